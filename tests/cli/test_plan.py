"""`pitstop plan` with two recipes, and with a learning rate that is still to be found."""

import json

from PIL import Image


def test_two_recipes_are_compared(command):
    said = command("plan", "fast", "mild")
    assert (said.code, said.err) == (0, "")
    rows = [line.split() for line in said.out.splitlines() if line.strip()]
    assert rows[0] == ["fast", "mild"]
    assert ["epochs", "16", "36"] in rows


def test_both_plans_are_in_the_json_and_in_the_picture(command):
    said = command("plan", "demo", "standard", "--json", "--plot", "plan.png")
    data = json.loads(said.out)
    assert [plan["recipe"] for plan in data["plans"]] == ["demo", "standard"]
    assert [plan["samples"] for plan in data["plans"]] == [1438, 1_281_167]
    assert data["differences"]["epochs"] == ["16", "60"]
    with Image.open("plan.png") as image:
        assert image.width > 1.5 * image.height


def test_options_are_for_both(command):
    said = command("plan", "fast", "mild", "--samples", 10_000, "--epochs", 10, "--json")
    plans = json.loads(said.out)["plans"]
    assert [(plan["samples"], int(plan["epochs"])) for plan in plans] == [(10_000, 10)] * 2


def test_a_csv_of_two_is_refused(refused):
    assert "--csv: is for one recipe" in refused("plan", "fast", "mild", "--csv")


def test_a_fallback_is_called_one(command):
    assert "0.24 is the fallback; the finder decides" in command("plan", "standard").out
    plan = json.loads(command("plan", "standard", "--json").out)
    assert plan["lr_fallback"] is True
    stated = json.loads(command("plan", "standard", "--set", "lr=0.1", "--json").out)
    assert stated["lr_fallback"] is False
