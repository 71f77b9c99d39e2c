"""What `pitstop doctor` found: as terminal text, Markdown and JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

Verdict = Literal["ok", "warn", "fail", "skipped"]

STYLES: dict[Verdict, str] = {
    "ok": "green",
    "warn": "yellow",
    "fail": "bold red",
    "skipped": "dim",
}


@dataclass(frozen=True)
class Finding:
    """What a check came to."""

    name: str
    """Of the check."""
    verdict: Verdict
    figure: str
    """What was measured, in words and numbers; of a check that was skipped, why."""
    advice: str | None = None
    """What to do; None where there is nothing to do."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, for programs: plain data, by names that end in their units."""


def is_fit(findings: Sequence[Finding]) -> bool:
    """Says whether no check has failed."""
    return all(finding.verdict != "fail" for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    """Returns the verdict in a line."""
    counts = Counter(finding.verdict for finding in findings)
    said = [f"{counts[verdict]} {verdict}" for verdict in STYLES if counts[verdict]]
    failed = ", ".join(finding.name for finding in findings if finding.verdict == "fail")
    return f"{f'NOT FIT: {failed}' if failed else 'fit'} ({', '.join(said)})"


def show(findings: Sequence[Finding], console: Console) -> None:
    """Prints the findings, a line each and their advice below it, and the verdict."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        verdict = (f"{finding.verdict:7}", STYLES[finding.verdict])
        line = Text.assemble(verdict, f"  {finding.name:{width}}  {finding.figure}")
        console.print(line, soft_wrap=True)
        if finding.advice is not None:
            console.print(Text(f"{'':{width + 11}}-> {finding.advice}"), soft_wrap=True)
    console.print(Text(summary(findings)), soft_wrap=True)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the findings as plain data."""
    return {
        "fit": is_fit(findings),
        "summary": summary(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def markdown(findings: Sequence[Finding]) -> str:
    """Returns the findings as a page with a table."""
    rows = [
        (finding.verdict, finding.name, finding.figure, finding.advice or "")
        for finding in findings
    ]
    head = ("verdict", "check", "found", "advice")
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(["# pitstop doctor", "", summary(findings), "", *lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
