"""`pitstop report`."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pitstop.core.recipe import load_recipe


class Pictures(HTMLParser):
    """The sources of a page's images, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.text += data


EVENT = {
    **{"kind": "train", "step": 45, "first": 0, "wall_seconds": 1.0, "images": 1440},
    **{"time": "2026-01-01T00:00:00Z", "epoch": 1440 / 1438, "phase": "small", "resolution": 24},
    **{"batch_size": 32, "lr": 0.1, "momentum": 0.9, "loss": 3166.0, "top1": 348, "top5": 993},
    **{"seconds": 1.0, "wait_seconds": 0.1},
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a run of a recipe that has trained one epoch; in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))

    def write(name: str, recipe: str = "demo", steps: int = 719, **overrides: object) -> str:
        Path(name).mkdir()
        loaded = load_recipe(recipe, overrides)
        state = {"recipe": loaded.model_dump(mode="json"), "status": "running", "steps": steps}
        Path(name, "run.json").write_text(json.dumps(state))
        Path(name, "events.jsonl").write_text(json.dumps(EVENT) + "\n")
        return name

    return write


def test_a_run_is_on_a_page_with_its_plan_and_its_command(command, write):
    said = command("report", write("a"), "-o", "page.html")
    assert (said.code, said.err) == (0, "written: page.html\n")
    page = Pictures(Path("page.html").read_text())
    assert [source[:22] for source in page.found] == ["data:image/png;base64,"]
    assert "\npitstop train demo\n" in page.text.replace("Again", "\n").replace(
        "The whole", "\nThe"
    )
    assert "comes to" not in page.text


def test_the_command_states_what_differs_from_the_bundled_recipe(command, write):
    write("a", seed=3, **{"eval.crop_ratio": 0.5, "data": "my data"})
    assert command("report", "a").code == 0
    text = Pictures(Path("report.html").read_text()).text
    line = next(line for line in text.splitlines() if "pitstop train demo" in line)
    assert "--set 'data=my data'" in line
    assert "--set seed=3" in line
    assert "crop_ratio" in line


def test_what_no_bundled_recipe_comes_to_is_a_file(command, write):
    write("a", **{"phases.1.resolution": 48})
    assert command("report", "a").code == 0
    text = Pictures(Path("report.html").read_text()).text
    assert "pitstop train recipe.yaml" in text
    recipe = text[text.index("The whole recipe") + len("The whole recipe") :].partition("Made by")[
        0
    ]
    Path("recipe.yaml").write_text(recipe)
    assert load_recipe("recipe.yaml") == load_recipe("demo", {"phases.1.resolution": 48})


def test_a_run_that_was_changed_on_its_way_says_so(command, write):
    assert command("report", write("a", steps=1000)).code == 0
    assert "comes to 719 steps, the run to 1,000" in Path("report.html").read_text()


def test_a_run_in_a_bucket_is_fetched(command, write, tmp_path):
    shutil.copytree(write("a"), tmp_path / "bucket/b")
    assert command("report", "a", f"file://{tmp_path}/bucket/b").code == 0
    assert "Side by side" in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nothing",), "nothing: holds no run"),
        (("a", "-o", "."), "--out .: is a directory"),
        (("a", "--price", "-1"), "--price"),
    ],
)
def test_what_makes_no_sense_is_refused(refused, write, arguments, expected):
    write("a")
    assert expected in refused("report", *arguments)
    assert not Path("report.html").exists()
