"""Ablations: a recipe against the same without one of its tricks, in paired runs.

DIR/VARIANT/recipe.yaml   what the variant trains; `baseline` is the recipe itself
DIR/VARIANT/seed-K        an ordinary run directory
DIR/table.md              what came of it so far, written anew after each run
DIR/results.json          the same for programs

Runs of equal seed are a pair: the same order, crops and initial weights, as far as the variant
leaves them. Each run is a `pitstop train` of its own, so nothing is carried from one to the next.
"""

import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import DIVERGED, FINISHED, INTERNAL, INTERRUPTED, KILLED
from pitstop.core.recipe import Recipe, load_recipe
from pitstop.engine import outcome
from pitstop.engine.drops import plain
from pitstop.engine.paired import Difference, difference
from pitstop.io.records import read_events
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import write_json, write_text

BASELINE = "baseline"
RECIPE = "recipe.yaml"

COLUMNS = ("variant", "runs", "top-1 %", "delta", "95%", "seconds", "time")


def ablate(
    variants: Mapping[str, Recipe], out: Path, *, seeds: int, console: Console, stdout: IO[str]
) -> int:
    """Trains each variant with each of the seeds 0, 1, ..., as far as that is not done yet.

    Seed by seed, the baseline first: there are pairs to compare early on. At SIGTERM, SIGINT or
    SIGHUP the run in progress saves and ends; called again, this goes on there.

    Args:
        variants: by name; one is `baseline`.
        out: the ablation's directory.
        seeds: how many.
        console: the table is shown there after each run.
        stdout: of the runs.

    Returns:
        an exit code: FINISHED, INTERRUPTED, or that of a run which failed.

    Raises:
        InputError: `out` holds something else, or an ablation of another recipe.
    """
    _prepare(out, variants)
    runs = {(name, seed): run_of(out, name, seed) for seed in range(seeds) for name in variants}
    left = {key: run for key, run in runs.items() if read_result(run) is None}
    if len(left) < len(runs):
        _report(variants, out, seeds, console)
    with Relay() as relay:
        for (name, seed), run in left.items():
            console.print(f"ablation of {variants[BASELINE].name}: {name}, seed {seed}")
            code = relay.run(_command(out / name / RECIPE, seed, run), stdout)
            if read_result(run) is not None:
                _report(variants, out, seeds, console)
            if (stop := _stop(code, relay, run, console)) is not None:
                return stop
    return FINISHED


def run_of(out: Path, variant: str, seed: int) -> RunDirectory:
    """Returns the run directory of a variant and a seed."""
    return RunDirectory(out / variant / f"seed-{seed}")


def _stop(code: int, relay: "Relay", run: RunDirectory, console: Console) -> int | None:
    """Returns the exit code if a run's end is that of the ablation, None if the next one comes."""
    if relay.insisted:
        return KILLED
    if relay.requested and (code in (FINISHED, INTERRUPTED) or code < 0):
        console.print("interrupted: the same command goes on")
        return INTERRUPTED
    if code < 0:
        console.print(f"{run.path}: was killed by {signal.Signals(-code).name}")
        return INTERNAL
    return None if code in (FINISHED, DIVERGED) else code


def _command(recipe: Path, seed: int, run: RunDirectory) -> list[str]:
    train = [sys.executable, "-P", "-m", "pitstop", "train", str(recipe)]
    return [*train, "--seed", str(seed), "--out", str(run.path)]


def _prepare(out: Path, variants: Mapping[str, Recipe]) -> None:
    """Writes each variant's recipe, if what is there is not of another one."""
    if out.is_file() or (out.is_dir() and [*out.iterdir()] and not (out / BASELINE).is_dir()):
        raise InputError(f"{out}: holds something other than an ablation: give another --out")
    for name, recipe in variants.items():
        path = out / name / RECIPE
        if path.exists() and _decisive(load_recipe(str(path))) != _decisive(recipe):
            raise InputError(f"{path}: is of another recipe, or other data: give another --out")
    for name, recipe in variants.items():
        head = f"# {name} of the ablation of {recipe.name}, complete\n"
        write_text(out / name / RECIPE, head + yaml.safe_dump(plain(recipe), sort_keys=False))


def _decisive(recipe: Recipe) -> dict[str, Any]:
    return recipe.identity() | {"data": recipe.data, "target_accuracy": recipe.target_accuracy}


class Relay:
    """Runs processes one after the other, and has signals end the one that is running.

    They are in sessions of their own, so that a Ctrl-C in a terminal does not reach them too: a
    second signal would end a run at once.
    """

    def __init__(self) -> None:
        self._signals: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def requested(self) -> bool:
        """Whether a stop has been asked for."""
        return bool(self._signals)

    @property
    def insisted(self) -> bool:
        """Whether Ctrl-C came twice."""
        return self._signals.count(signal.SIGINT) > 1

    def __enter__(self) -> "Relay":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        heeded = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._pass_on) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: list[str], stdout: IO[str]) -> int:
        """Runs a command and returns its exit code, negative if a signal ended it."""
        with subprocess.Popen(command, stdout=stdout, start_new_session=True) as self._process:
            if self.requested:  # while it was started
                self._process.terminate()
            return self._process.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL if self.insisted else signal.SIGTERM)


# Results


@dataclass(frozen=True)
class Result:
    """What came of a run that has ended."""

    status: str
    top1: float | None
    """Percent, of the last evaluation; None if the run diverged."""
    seconds: float
    """Of training: neither evaluations nor start-up."""
    protocol: dict[str, Any]
    """How it was evaluated."""


def read_result(run: RunDirectory) -> Result | None:
    """Returns what came of a run, None if it has not ended."""
    stated = run.read() or {}
    ends = (outcome.FINISHED, outcome.TARGET_MET, outcome.DIVERGED)
    status = stated.get("status")
    if status not in [end.status for end in ends]:
        return None
    seconds = sum(event["seconds"] for event in read_events(run.events) if event["kind"] == "train")
    if status == outcome.DIVERGED.status:
        return Result(status, None, seconds, {})
    metrics = stated["metrics"]
    return Result(status, metrics["top1"], seconds, metrics["protocol"])


@dataclass(frozen=True)
class Row:
    """A variant in the table; what there are no runs for yet is None."""

    variant: str
    runs: int
    """Those that reached their end."""
    diverged: int
    top1: float | None
    seconds: float | None
    """The means of the runs."""
    delta: Difference | None
    """Percentage points of top-1 above the baseline, over the pairs."""
    time: float | None
    """Seconds over those of the baseline, of the pairs."""


def rows(results: Mapping[str, Mapping[int, Result]]) -> list[Row]:
    """Returns the table of results by variant and seed; the first variant is the baseline."""
    baseline = next(iter(results.values()))
    return [_row(name, own, None if own is baseline else baseline) for name, own in results.items()]


def _row(variant: str, results: Mapping[int, Result], baseline: Mapping[int, Result] | None) -> Row:
    ended = [result for result in results.values() if result.top1 is not None]
    other = baseline or {}
    pairs = [(result, other[seed]) for seed, result in results.items() if seed in other]
    tops = [(a.top1, b.top1) for a, b in pairs if a.top1 is not None and b.top1 is not None]
    times = [(a.seconds, b.seconds) for a, b in pairs if None not in (a.top1, b.top1)]
    return Row(
        variant=variant,
        runs=len(ended),
        diverged=len(results) - len(ended),
        top1=statistics.fmean(r.top1 for r in ended if r.top1 is not None) if ended else None,
        seconds=statistics.fmean(r.seconds for r in ended) if ended else None,
        delta=difference(tops) if tops else None,
        time=sum(a for a, _ in times) / sum(b for _, b in times) if times else None,
    )


def _report(variants: Mapping[str, Recipe], out: Path, seeds: int, console: Console) -> None:
    """Writes and shows what came of the runs so far."""
    found = {
        name: {seed: read_result(run_of(out, name, seed)) for seed in range(seeds)}
        for name in variants
    }
    results = {
        name: {seed: result for seed, result in own.items() if result is not None}
        for name, own in found.items()
    }
    table = rows(results)
    caption = _caption(variants[BASELINE], results)
    write_json(out / "results.json", _as_json(variants[BASELINE], seeds, results, table))
    write_text(out / "table.md", _markdown(table, caption))
    console.print(_terminal(table))
    console.print(caption)


def _as_json(
    recipe: Recipe, seeds: int, results: Mapping[str, Mapping[int, Result]], table: list[Row]
) -> dict[str, Any]:
    runs = [
        {"variant": name, "seed": seed, **asdict(result)}
        for name, own in results.items()
        for seed, result in own.items()
    ]
    rows = [asdict(row) for row in table]
    return {"recipe": recipe.name, "data": recipe.data, "seeds": seeds, "rows": rows, "runs": runs}


def _caption(recipe: Recipe, results: Mapping[str, Mapping[int, Result]]) -> str:
    """Returns what the figures are, and by which protocol."""
    protocol = next((r.protocol for r in results[BASELINE].values() if r.protocol), {})
    shown = ", ".join(f"{key} {value}" for key, value in protocol.items())
    lines = [
        f"{recipe.name} on {recipe.data}, {recipe.epochs:g} epochs.",
        f"top-1: mean of each run's last evaluation ({shown}).",
        "delta: percentage points above the baseline, mean over the pairs of equal seed; 95%: how "
        "far Student's t interval of it reaches to both sides.",
        "seconds: mean of training, without start-up and evaluations; time: over the baseline's.",
    ]
    for name, own in results.items():
        other = next((r.protocol for r in own.values() if r.protocol), protocol)
        changed = [f"{key} {value}" for key, value in other.items() if protocol.get(key) != value]
        lines += [f"{name} is evaluated with {', '.join(changed)}."] if changed else []
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    interval = row.delta.interval if row.delta else None
    diverged = f", {row.diverged} diverged" if row.diverged else ""
    return [
        row.variant,
        f"{row.runs}{diverged}",
        "-" if row.top1 is None else f"{row.top1:.2f}",
        "-" if row.delta is None else f"{row.delta.mean:+.2f}",
        "-" if interval is None else f"±{(interval[1] - interval[0]) / 2:.2f}",
        "-" if row.seconds is None else f"{row.seconds:.1f}",
        "-" if row.time is None else f"x{row.time:.3f}",
    ]


def _markdown(table: list[Row], caption: str) -> str:
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *map(_cells, table)]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{text}\n{caption}\n"


def _terminal(table: list[Row]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for row in table:
        shown.add_row(*_cells(row))
    return shown
