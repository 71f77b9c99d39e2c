"""What the doctor found, as text, Markdown and JSON."""

import io
import json

import pytest
from rich.console import Console

from pitstop.report.diagnosis import Finding, as_json, is_fit, markdown, show, summary

OK = Finding("memory", "ok", "60 of 64 GiB are free", numbers={"free_bytes": 60})
WARN = Finding("mount", "warn", "/data is on nfs4 [network]", "copy it")
FAIL = Finding("learning", "fail", "top-1 1.2% | loss 4.7", "it does not learn")
SKIPPED = Finding("links", "skipped", "fewer than two GPUs")


@pytest.mark.parametrize(
    ("findings", "fit", "line"),
    [
        ((OK, WARN, SKIPPED), True, "fit (1 ok, 1 warn, 1 skipped)"),
        ((OK, OK, FAIL), False, "NOT FIT: learning (2 ok, 1 fail)"),
    ],
)
def test_one_failed_check_makes_a_machine_unfit_and_a_warning_does_not(findings, fit, line) -> None:
    assert is_fit(findings) is fit
    assert summary(findings) == line
    assert as_json(findings)["fit"] is fit


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=terminal, highlight=False)
    show((OK, WARN, FAIL, SKIPPED), console)
    return out.getvalue()


def test_text_has_a_line_a_finding_with_its_advice_below_and_the_verdict_last() -> None:
    assert shown(terminal=False).splitlines() == [
        "ok       memory    60 of 64 GiB are free",
        "warn     mount     /data is on nfs4 [network]",
        "                   -> copy it",
        "fail     learning  top-1 1.2% | loss 4.7",
        "                   -> it does not learn",
        "skipped  links     fewer than two GPUs",
        "NOT FIT: learning (1 ok, 1 warn, 1 fail, 1 skipped)",
    ]


def test_colours_are_for_terminals_and_can_be_turned_off(monkeypatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;31mfail" in shown(terminal=True)
    assert "\x1b" not in shown(terminal=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31mfail" not in shown(terminal=True)


def test_markdown_is_a_table_in_which_no_text_breaks_a_cell() -> None:
    broken = Finding("data", "fail", "two\nlines")
    lines = markdown((WARN, FAIL, broken)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0] == "| verdict | check | found | advice |"
    assert rows[3] == r"| fail | learning | top-1 1.2% \| loss 4.7 | it does not learn |"
    assert rows[4] == "| fail | data | two lines |  |"
    assert summary((WARN, FAIL, broken)) in lines


def test_json_has_the_figures_as_numbers() -> None:
    said = json.loads(json.dumps(as_json((OK, FAIL))))
    first, second = said["findings"]
    assert first == {
        "name": "memory",
        "verdict": "ok",
        "figure": "60 of 64 GiB are free",
        "advice": None,
        "numbers": {"free_bytes": 60},
    }
    assert second["advice"] == "it does not learn"
