"""The report of runs: one HTML page that needs nothing but itself.

Tables and figures are markup that is there without a script; `page.js` draws the curves out of the
JSON in the page. The page's policy lets no other script run and nothing be loaded. Classes,
recipes and paths come from outside: what is text goes through `markup.tag`, which escapes it.
"""

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any

from pitstop import __version__
from pitstop.report.facts import Facts, Process, Stretch, curves, stretches
from pitstop.report.markup import Markup, embedded_json, joined, tag
from pitstop.report.predictions import (
    PAIRS,
    WORST,
    ClassScore,
    Predictions,
    class_scores,
    most_confused,
)

WAITS = 0.1
"""Share of the training time from which on waiting for data is what holds a run up."""

MOST_CLASSES = 20
"""So many are shown at once; the other classes can be unfolded."""
MATRIX = 30
"""Classes up to which the whole confusion matrix is shown."""
MOST_SETTINGS = 60
THUMBNAILS = 6
"""Of a pair of classes."""

UNKNOWN = "not known"


@dataclass(frozen=True)
class Story:
    """A run, and what is said of it beside its records.

    Args:
        facts: what the records say.
        command: that repeats it, lines of a shell; None where it is not known.
        recipe: the whole of it, as YAML; None where it is not known.
        plan: the picture of its plan, a PNG; None where there is none.
        remark: what is to be said of plan and command.
    """

    facts: Facts
    command: str | None
    recipe: str | None
    plan: bytes | None
    remark: str | None


def page(stories: Sequence[Story]) -> str:
    """Returns the page of one run or several, as HTML."""
    names = ", ".join(story.facts.name for story in stories)
    if len(stories) == 1:
        parts = [*_headline(stories[0].facts), _curves(), tag("article", *_run(stories[0]))]
    else:
        parts = [*_comparison(stories), _curves(), *map(_article, stories)]
    script = _beside("page.js")
    fingerprint = base64.b64encode(sha256(script.encode()).digest()).decode()
    html = Template(_beside("page.html")).substitute(
        policy=(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{fingerprint}'"
        ),
        title=joined(f"{names}: report"),
        heading=joined(names),
        style=_beside("page.css"),
        body=joined(*parts),
        data=embedded_json({"runs": [curves(story.facts) for story in stories]}),
        script=script,
        version=joined(__version__),
    )
    return html.encode(errors="replace").decode()  # names of files need not be Unicode


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# Parts of any kind


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], **attributes: str) -> Markup:
    """Returns a table that scrolls by itself where it is too wide; the first cell names a row.

    Args:
        attributes: of the table: `class_="numbers"` for figures on the right, `"texts"` for cells
            that may be broken anywhere.
    """
    cells = [[tag("th", row[0], scope="row"), *(tag("td", c) for c in row[1:])] for row in rows]
    head_row = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = tag("tbody", *(tag("tr", *row) for row in cells))
    return tag("div", tag("table", tag("thead", head_row), body, **attributes), class_="wide")


def _folded(summary: str, *content: str) -> Markup:
    return tag("details", tag("summary", summary), *content)


def _figures(figures: Sequence[tuple[str, str, str]]) -> Markup:
    """Returns figures large: what it is, the figure, and a line below it."""
    cards = [
        tag("div", tag("dt", name), tag("dd", tag("strong", figure), tag("small", below)))
        for name, figure, below in figures
    ]
    return tag("dl", *cards, class_="figures")


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _percent(value: Any) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.2f}%" if known else UNKNOWN


def _protocol(figures: dict[str, Any]) -> str:
    return _in_words(figures.get("protocol") or {})


def _in_words(protocol: dict[str, Any]) -> str:
    """Returns how was evaluated: `resolution 32, no flip average, images 10,000`."""
    return ", ".join(_stated(key.replace("_", " "), value) for key, value in protocol.items())


def _stated(key: str, value: Any) -> str:
    if isinstance(value, bool) or value == 0:
        return key if value else f"no {key}"
    return f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"


def _image(data: bytes, kind: str, alt: str) -> Markup:
    encoded = base64.b64encode(data).decode()
    return tag("img", src=f"data:image/{kind};base64,{encoded}", alt=alt)


# Several runs


def _cost(facts: Facts) -> str:
    if not any(process.price is not None for process in facts.processes):
        return UNKNOWN
    return _dollars(facts.dollars) + ("" if facts.priced else ", of the starts with a price")


def _dollars(amount: float) -> str:
    """Returns cents, and of less than ten cents two digits."""
    return f"${amount:,.2f}" if amount >= 0.1 or amount == 0 else f"${amount:.2g}"


def _speed(facts: Facts) -> str:
    speed = facts.history.images_per_second
    return f"{speed:,.0f}" if math.isfinite(speed) else UNKNOWN


def _evaluation(which: str, key: str) -> Callable[[Facts], str]:
    return lambda facts: _percent((facts.state.get(which) or {}).get(key))


def _epochs(facts: Facts) -> str:
    """Returns how many epochs were trained, and of how many, where that is not all."""
    state = facts.state
    if "epoch" not in state:
        return UNKNOWN
    done, all_ = _epoch(state["epoch"]), _epoch(state.get("epochs", state["epoch"]))
    return done if done == all_ else f"{done} of {all_}"


def _epoch(number: float) -> str:
    return f"{number:,.2f}".removesuffix("0").removesuffix(".0")


_COMPARED: dict[str, Callable[[Facts], str]] = {
    "status": lambda facts: str(facts.state.get("status", UNKNOWN)),
    "last top-1": _evaluation("metrics", "top1"),
    "last top-5": _evaluation("metrics", "top5"),
    "best top-1": _evaluation("best", "top1"),
    "epochs": _epochs,
    "time": lambda facts: _time(facts.seconds),
    "cost": _cost,
    "images a second": _speed,
    "starts": lambda facts: str(len(facts.processes)),
}


def _comparison(stories: Sequence[Story]) -> Iterator[Markup]:
    runs = [story.facts for story in stories]
    head = ["", *(facts.name for facts in runs)]
    compared = [[name, *map(of, runs)] for name, of in _COMPARED.items()]
    yield tag("h2", "Side by side")
    protocols = [_protocol(facts.state.get("metrics") or {}) or UNKNOWN for facts in runs]
    if len(set(protocols)) > 1:
        yield tag("p", "The runs are not evaluated by one protocol.", class_="warning")
        compared.append(["protocol", *protocols])
    yield _table(head, compared, class_="compared")
    if len(set(protocols)) == 1:
        yield tag("p", f"Protocol: {protocols[0]}.", class_="protocol")
    yield tag("h3", "What differs")
    differing = _differing([facts.state.get("identity") or {} for facts in runs])
    if not differing:
        yield tag("p", "Recipe, seed and dataset are the same.")
        return
    yield _table(head, differing[:MOST_SETTINGS], class_="compared")
    if len(differing) > MOST_SETTINGS:
        yield tag("p", f"and {len(differing) - MOST_SETTINGS} more")


def _differing(identities: Sequence[dict[str, Any]]) -> list[list[str]]:
    keys = {key: None for identity in identities for key in identity}
    rows = [[key, *(str(i.get(key, "-")) for i in identities)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _curves() -> Markup:
    """Returns the place of the curves, which the script fills."""
    return tag(
        "section",
        tag("h2", "Curves"),
        tag("noscript", "The curves are drawn by a script, which is switched off here."),
        tag("div", id="controls"),
        tag("div", id="charts"),
    )


# One run


def _article(story: Story) -> Markup:
    """Returns a run among several: folded, for the comparison is what the page is for."""
    name = tag("summary", tag("h2", story.facts.name))
    return tag("details", name, *_headline(story.facts), *_run(story), class_="run")


def _run(story: Story) -> Iterator[Markup]:
    """Yields what is said of a run below its headline."""
    facts = story.facts
    if facts.predictions is not None:
        yield from _classes(facts.predictions)
    yield from _plan(story)
    yield from _throughput(facts)
    yield from _starts(facts)
    yield from _environment(facts)
    yield from _again(story)
    yield from _notes(facts)


def _subject(facts: Facts) -> Iterator[Markup]:
    """Yields what was trained, on what, and when it was last heard of."""
    recipe = facts.state.get("recipe") or {}
    said = [f"recipe {recipe['name']}"] if "name" in recipe else []
    said += [str(recipe["model"]["name"])] if "model" in recipe else []
    said += [f"data {recipe['data']}"] if recipe.get("data") else []
    times = [event["time"] for event in facts.events if "time" in event]
    if times:
        said.append(tag("time", f"{times[-1][:16].replace('T', ' ')} UTC", datetime=times[-1]))
    if said:
        first, *others = said
        yield tag(
            "p", first, *(part for each in others for part in (" · ", each)), class_="subject"
        )


def _headline(facts: Facts) -> Iterator[Markup]:
    yield from _subject(facts)
    state = facts.state
    last, best = state.get("metrics"), state.get("best")
    status = str(state.get("status", UNKNOWN))
    if status not in ("finished", "target met"):
        text = f"{status} at step {state.get('step', '?')} of {state.get('steps', '?')}"
        yield tag(
            "p", f"This run is not complete: {text}. The figures are of so far.", class_="warning"
        )
    accuracies: list[tuple[str, str, str]] = []
    if last:
        accuracies = [
            ("top-1", _percent(last["top1"]), f"last evaluation, epoch {_epoch(last['epoch'])}"),
            ("top-5", _percent(last["top5"]), f"loss {last['loss']:.4f}"),
        ]
    if best:
        seen = f"epoch {_epoch(best['epoch'])}, chosen on these images"
        accuracies.append(("best top-1", _percent(best["top1"]), seen))
    yield _figures(
        [
            *accuracies,
            ("time", _time(facts.seconds), f"{_epochs(facts)} epochs"),
            ("cost", _cost(facts), _count(len(facts.processes), "start")),
            ("images a second", _speed(facts), "in training"),
        ]
    )
    if last:
        yield tag("p", f"Protocol: {_protocol(last)}.", class_="protocol")
        for also in last.get("also", []):
            text = f"Also top-1 {_percent(also['top1'])}, top-5 {_percent(also['top5'])}: "
            yield tag("p", text + _protocol(also) + ".", class_="protocol")


def _plan(story: Story) -> Iterator[Markup]:
    yield tag("h3", "Plan")
    if story.plan is not None:
        picture = _image(story.plan, "png", f"the plan of {story.facts.name}, over the epochs")
        yield tag("figure", picture, class_="plan")
    if story.remark is not None:
        yield tag("p", story.remark)


def _throughput(facts: Facts) -> Iterator[Markup]:
    yield tag("h3", "Throughput")
    trained = stretches(facts)
    seconds = sum(stretch.seconds for stretch in trained)
    if not seconds:
        yield tag("p", "Nothing was trained yet.")
        return
    yield tag("p", _bottleneck(facts, trained, seconds))
    head = ["phase", "resolution", "batch", "steps", "images/s", "waiting for data"]
    yield _table(head, [_speeds(stretch) for stretch in trained], class_="numbers")


def _bottleneck(facts: Facts, trained: Sequence[Stretch], seconds: float) -> str:
    waiting = sum(stretch.wait_seconds for stretch in trained) / seconds
    evaluating = sum(event["seconds"] for event in facts.events if event["kind"] == "val")
    rest = max(0.0, facts.seconds - seconds - evaluating)
    times = (
        f"{_time(seconds)} of training, {_time(evaluating)} of evaluation, {_time(rest)} of "
        "start-up, saving and work that was lost."
    )
    if waiting >= WAITS:
        held = f"Loading holds it up: {waiting:.0%} of the training time it waited for images."
    else:
        held = f"The device holds it up: images were waited for in {waiting:.1%} of the time."
    used = [event["utilization"] for event in facts.events if "utilization" in event]
    mean = f" Mean utilization of the device: {sum(used) / len(used):.0f}%." if used else ""
    return f"{times} {held}{mean}"


def _speeds(stretch: Stretch) -> list[str]:
    seconds = stretch.seconds
    return [
        stretch.phase,
        f"{stretch.resolution} px",
        f"{stretch.batch_size:,}",
        f"{stretch.steps:,}",
        f"{stretch.images / seconds:,.0f}" if seconds else UNKNOWN,
        f"{stretch.wait_seconds / seconds:.1%}" if seconds else UNKNOWN,
    ]


def _starts(facts: Facts) -> Iterator[Markup]:
    if not facts.processes:
        return
    lost = sum(process.start.lost_steps for process in facts.processes)
    again = sum(process.start.lost_seconds for process in facts.processes)
    yield tag("h3", "Starts")
    if lost:
        yield tag("p", f"{_count(lost, 'step')} done again after interruptions: {_time(again)}.")
    head = ["began", "on", "ranks", "steps", "time", "$ an hour", "cost", "ended"]
    yield _table(head, [_start(process) for process in facts.processes], class_="lines")


def _start(process: Process) -> list[str]:
    start, price = process.start, process.price
    return [
        start.time[:19].replace("T", " ") + " UTC",
        start.machine or UNKNOWN,
        str(start.world),
        f"{start.step:,} to {process.step:,}",
        _time(process.seconds),
        UNKNOWN if price is None else f"{price:g}",
        UNKNOWN if price is None else _dollars(process.dollars),
        process.ended,
    ]


def _environment(facts: Facts) -> Iterator[Markup]:
    state = facts.state
    told: dict[str, Any] = {"pitstop": state.get("version", UNKNOWN)}
    told |= state.get("circumstance") or {}
    told |= {f"data: {key}": value for key, value in (state.get("data") or {}).items()}
    told["data: digest"] = (state.get("identity") or {}).get("dataset", UNKNOWN)
    yield tag("h3", "Environment")
    yield _table(["", "at the last start"], [[key, str(told[key])] for key in told], class_="texts")


def _again(story: Story) -> Iterator[Markup]:
    if story.command is None:
        return
    yield tag("h3", "Again")
    yield tag("pre", tag("code", story.command), tabindex="0")
    if story.recipe is not None:
        yield _folded("The whole recipe", tag("pre", tag("code", story.recipe), tabindex="0"))


def _notes(facts: Facts) -> Iterator[Markup]:
    notes = [event["text"] for event in facts.events if event["kind"] == "note"]
    if notes:
        yield _folded("What the run said", tag("pre", "\n".join(notes), tabindex="0"))


# Classes


def _classes(predictions: Predictions) -> Iterator[Markup]:
    protocol = _in_words(predictions.protocol)
    yield tag("h3", "Classes")
    yield tag("p", f"top-1 {_percent(predictions.top1)}: {protocol}.", class_="protocol")
    chance = 100 / len(predictions.classes)
    if predictions.top1 < 2 * chance:
        text = f"This is hardly better than chance, which is {_percent(chance)}."
        yield tag("p", text, class_="warning")
    scores = class_scores(predictions)
    yield _accuracies(scores[:MOST_CLASSES])
    if len(scores) > MOST_CLASSES:
        rest = scores[MOST_CLASSES:]
        yield _folded(f"{len(rest):,} better classes", _accuracies(rest))
    if len(predictions.classes) <= MATRIX:
        yield _folded(
            "Confusion matrix: true classes down, predicted ones across", _matrix(predictions)
        )
    yield from _pairs(predictions)
    yield from _mistakes(predictions)


def _accuracies(scores: Sequence[ClassScore]) -> Markup:
    rows = [
        [
            score.name,
            f"{score.images:,}",
            joined(
                tag("meter", min="0", max="100", value=f"{score.top1:.2f}"),
                " ",
                _percent(score.top1),
            ),
        ]
        for score in scores
    ]
    return _table(["class", "images", "top-1"], rows)


def _matrix(predictions: Predictions) -> Markup:
    """Returns the table, each cell as dark as its share of the row."""
    rows: list[Markup] = []
    for name, counts in zip(predictions.classes, predictions.confusion, strict=True):
        shares = [count / max(1, sum(counts)) for count in counts]
        cells = [
            tag("td", f"{count:,}" if count else "", style=f"--share: {100 * share:.0f}%")
            for count, share in zip(counts, shares, strict=True)
        ]
        rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    head = tag("tr", tag("th", ""), *(tag("th", c, scope="col") for c in predictions.classes))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="matrix")
    return tag("div", table, class_="wide")


def _pairs(predictions: Predictions) -> Iterator[Markup]:
    pairs = most_confused(predictions, PAIRS)
    if not pairs:
        return
    thumbnails: dict[tuple[int, int], list[bytes]] = {}
    for mistake in predictions.mistakes:
        thumbnails.setdefault((mistake.label, mistake.predicted), []).append(mistake.jpeg)
    names = predictions.classes
    yield tag("h3", "Most confused")
    yield _table(
        ["class", "taken for", "images", "of the class", "some of them"],
        [
            [
                names[pair.label],
                names[pair.predicted],
                f"{pair.images:,}",
                f"{pair.share:.1f}%",
                joined(
                    *(
                        _image(jpeg, "jpeg", names[pair.label])
                        for jpeg in thumbnails.get((pair.label, pair.predicted), [])[:THUMBNAILS]
                    )
                ),
            ]
            for pair in pairs
        ],
    )


def _mistakes(predictions: Predictions) -> Iterator[Markup]:
    if not predictions.mistakes:
        return
    names = predictions.classes
    yield tag("h3", "Worst mistakes")
    shown: list[Markup] = []
    for mistake in predictions.mistakes[:WORST]:
        label, predicted = names[mistake.label], names[mistake.predicted]
        caption = tag(
            "figcaption", tag("b", label), f" taken for {predicted}, {mistake.probability:.1%}"
        )
        shown.append(tag("figure", _image(mistake.jpeg, "jpeg", label), caption))
    yield tag("div", *shown, class_="gallery")
