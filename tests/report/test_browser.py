"""The report in a real browser: it says nothing on the console, loads nothing, and fits a phone."""

import base64
import re
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from pitstop.report.facts import read_facts
from pitstop.report.page import page

from .test_page import SEEN, run_of, story_of

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
if not CHROMIUM:
    pytest.skip("no Chromium here", allow_module_level=True)

PATIENCE = 600_000
"""Milliseconds: a busy machine takes minutes to start a browser."""

DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def picture(kind: str, width: int, height: int) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, height), "teal").save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def browser() -> "Generator[Browser]":
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=options, timeout=PATIENCE
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, interrupted, with predictions; one of nine runs; one of none yet."""
    folder = tmp_path_factory.mktemp("pages")
    thumbnail = base64.b64encode(picture("JPEG", 48, 32)).decode()
    mistakes = [each | {"jpeg": thumbnail} for each in SEEN["mistakes"]]
    runs = {
        "one": [run_of(folder / "one", seen=SEEN | {"mistakes": mistakes})],
        "many": [run_of(folder / f"a-run-with-a-long-name-{n}") for n in range(9)],
        "empty": [run_of(folder / "empty", [], ledger=[])],
    }
    plan = picture("PNG", 900, 600)
    for name, shown in runs.items():
        stories = [replace(story_of(read_facts(run)), plan=plan) for run in shown]
        (folder / f"{name}.html").write_text(page(stories))
    return {name: folder / f"{name}.html" for name in runs}


@dataclass
class Opened:
    """A page in the browser, and what it complained of and asked for."""

    tab: "Page"
    said: list[str] = field(default_factory=list[str])
    asked: list[str] = field(default_factory=list[str])


Open = Callable[..., Opened]


@pytest.fixture
def show(browser: "Browser", pages: dict[str, Path]) -> Generator[Open]:
    """Opens pages by name; in the end nothing was said on the console, and nothing was loaded."""
    shown: list[Opened] = []

    def opened(name: str, **options: Any) -> Opened:
        context = browser.new_context(**(DESKTOP | options))
        context.set_default_timeout(PATIENCE)
        one = Opened(context.new_page())
        shown.append(one)
        one.tab.on("console", lambda message: one.said.append(message.text))
        one.tab.on("pageerror", lambda error: one.said.append(str(error)))
        one.tab.on("request", lambda request: one.asked.append(request.url))
        one.tab.goto(pages[name].as_uri())
        return one

    yield opened
    for one in shown:
        loaded = [url for url in one.asked if not url.startswith("data:")]
        assert one.said == []
        assert loaded == [one.tab.url]
        one.tab.context.close()


def curves(tab: "Page") -> list[str]:
    return tab.locator("#charts polyline").evaluate_all("all => all.map(a => a.outerHTML)")


def press(tab: "Page", name: str) -> None:
    tab.get_by_role("button", name=name, exact=True).click()


def test_each_axis_draws_other_curves(show: Open) -> None:
    tab = show("one").tab
    drawn: list[list[str]] = []
    for axis in ("epochs", "minutes", "dollars"):
        press(tab, axis)
        pressed = tab.locator(".axes [aria-pressed=true]")
        assert pressed.all_text_contents() == [axis]
        assert (
            tab.locator(".chart", has_text="Accuracy").locator("svg text", has_text=axis).count()
            == 1
        )
        drawn.append(curves(tab))
    assert all(len(lines) == 7 for lines in drawn)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert all(x != y for x, y in zip(drawn[a][:3], drawn[b][:3], strict=True))
    assert tab.locator(".mark").count() == 4


def test_pointing_reads_the_values(show: Open) -> None:
    tab = show("one").tab
    picture = tab.locator(".chart svg").first
    box = picture.bounding_box()
    assert box is not None
    middle = 52 + (box["width"] - 62) / 2
    picture.hover(position={"x": middle, "y": 100})
    tip = tab.locator(".tip").first
    said = tip.inner_text()
    assert said.startswith("2")
    assert "val top-1 20%" in said
    assert "started again at step 20" in said
    tab.mouse.move(5, 5)
    assert tip.is_hidden()


def test_a_click_hides_a_curve_and_a_run(show: Open) -> None:
    tab = show("one").tab
    press(tab, "val top-1")
    assert len(curves(tab)) == 6
    press(tab, "val top-1")
    assert len(curves(tab)) == 7
    tab = show("many").tab
    assert len(curves(tab)) == 9 * 6
    press(tab, "a-run-with-a-long-name-3")
    assert len(curves(tab)) == 8 * 6


@pytest.mark.parametrize("name", ["one", "many", "empty"])
def test_a_phone_shows_it_without_scrolling_sideways(show: Open, name: str) -> None:
    tab = show(name, **PHONE).tab
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = tab.evaluate(
        """() => [...document.querySelectorAll('body *')]
            .filter(e => !e.closest('.wide, pre, .plan, svg'))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.evaluate("innerWidth") == 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "many"])
def test_it_can_be_read_in_the_light_and_in_the_dark(show: Open, name: str, scheme: str) -> None:
    tab = show(name, color_scheme=scheme).tab
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert (luminance(pixel(tab.evaluate(COLOUR_OF_PAPER))) < 0.05) == (scheme == "dark")
    texts = tab.evaluate(TEXTS)
    assert len(texts) > 100
    poor = [text for text, ink, paper in texts if contrast(pixel(ink), pixel(paper)) < 4.5]
    assert poor == []


COLOUR_OF_PAPER = "getComputedStyle(document.body).backgroundColor"

TEXTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const seen = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(',')})`;
  };
  const papers = (node) =>
    node ? [...papers(node.parentElement), getComputedStyle(node).backgroundColor] : [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement;
    if (!text || !node.checkVisibility() || node.closest('script')) continue;
    const style = getComputedStyle(node), paper = papers(node);
    const ink = node.closest('svg') ? style.fill : style.color;
    found.push([text, seen([...paper, ink]), seen(paper)]);
  }
  return found;
}"""
"""Each text that is seen, with the colours of its letters and of what is behind them."""


def pixel(colour: str) -> tuple[float, ...]:
    return tuple(float(number) / 255 for number in re.findall(r"\d+", colour)[:3])


def luminance(colour: tuple[float, ...]) -> float:
    """Of WCAG 2, 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(ink: tuple[float, ...], paper: tuple[float, ...]) -> float:
    """Of WCAG 2, 1 to 21."""
    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)
