"""Ablations of the tiny demo. Runs are made in this process, but for those that get a signal."""

import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import IO

import pytest

from pitstop import cli
from pitstop.core.recipe import load_recipe
from pitstop.engine import ablate
from pitstop.engine.paired import t_quantile

MIXUP = "no-mixup"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has runs made in this process; names each one, in their order."""
    made: list[str] = []

    def run(self: ablate.Relay, command: list[str], stdout: IO[str]) -> int:
        made.append("/".join(Path(command[-1]).parts[-2:]))
        return cli.run(command[command.index("train") :])

    monkeypatch.setattr(ablate.Relay, "run", run)
    return made


@pytest.fixture
def tiny(settings: tuple[str, ...]) -> tuple[str, ...]:
    """The ablation of the tiny demo, whose first phase has mixup."""
    mixed = ("--set", "phases.0.mix={mixup_alpha: 0.4}", "--set", "threads=1", "--set", "workers=1")
    return ("ablate", "demo", *settings, *mixed, "--out", "out")


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_pairs_are_made_seed_by_seed_and_compared(place, command, runs, tiny):
    half = ("--variant", "half:lr=0.05,optimizer={name: sgd, momentum: 0.5}")
    said = command(*tiny, "--drop", "mixup", *half, "--seeds", "2")
    assert said.code == 0, said.err
    assert runs == [f"{v}/seed-{s}" for s in (0, 1) for v in ("baseline", MIXUP, "half")]

    top1 = {name: read(f"out/{name}/run.json")["metrics"]["top1"] for name in runs}
    deltas = [top1[f"{MIXUP}/seed-{s}"] - top1[f"baseline/seed-{s}"] for s in (0, 1)]
    margin = t_quantile(1, 0.95) * statistics.stdev(deltas) / 2**0.5
    found = read("out/results.json")
    row = next(row for row in found["rows"] if row["variant"] == MIXUP)
    assert row["runs"] == 2
    assert row["delta"]["mean"] == pytest.approx(statistics.mean(deltas))
    assert row["delta"]["interval"] == pytest.approx(
        [statistics.mean(deltas) - margin, statistics.mean(deltas) + margin]
    )
    assert {f"{r['variant']}/seed-{r['seed']}": r["top1"] for r in found["runs"]} == top1
    shown = f"| {MIXUP} | 2 | {statistics.mean(top1[f'{MIXUP}/seed-{s}'] for s in (0, 1)):.2f} | "
    shown += f"{statistics.mean(deltas):+.2f} | ±{margin:.2f} | "
    table = Path("out/table.md").read_text()
    assert shown in table
    assert "last evaluation (resolution 16, crop_ratio 1.0" in table
    assert [line.split()[0] for line in said.out.splitlines() if "±" in line][-2:] == [
        MIXUP,
        "half",
    ]


def test_a_run_is_an_ordinary_run_of_its_seed(place, command, runs, settings, tiny):
    """Seed 1 of the baseline and of the variant, against `pitstop train` with the same changes."""
    assert command(*tiny, "--drop", "mixup", "--seeds", "2").code == 0
    train = ("train", *tiny[1:-2], "--seed", "1")
    assert command(*train, "--out", "with").code == 0
    assert command(*train, "--set", "phases.0.mix=null", "--out", "without").code == 0
    for plain, ablated in (("with", "baseline"), ("without", MIXUP)):
        weights = (Path(p) / "last.safetensors" for p in (plain, f"out/{ablated}/seed-1"))
        one, other = (path.read_bytes() for path in weights)
        assert one == other
    assert load_recipe("out/no-mixup/recipe.yaml").phases[0].mix is None


def test_an_ablation_grows_and_nothing_is_trained_twice(place, command, runs, tiny):
    assert command(*tiny, "--drop", "mixup", "--seeds", "1").code == 0
    one_pair = next(line for line in Path("out/table.md").read_text().splitlines() if MIXUP in line)
    assert one_pair.split(" | ")[4] == "-"
    before = list(runs)
    again = command(*tiny, "--drop", "mixup", "--seeds", "1", "--json")
    assert (again.code, runs) == (0, before)
    assert json.loads(again.out) == read("out/results.json")
    more = ("--drop", "mixup", "--drop", "label_smoothing", "--seeds", "2")
    assert command(*tiny, *more).code == 0
    assert runs[2:] == [
        "no-label_smoothing/seed-0",
        *(f"{v}/seed-1" for v in ("baseline", MIXUP, "no-label_smoothing")),
    ]


def test_a_run_that_diverges_is_counted_apart_and_not_tried_again(place, command, runs, tiny):
    mad = ("--variant", "mad:lr=1e30")
    assert command(*tiny, *mad, "--seeds", "1").code == 0
    row = read("out/results.json")["rows"][1]
    assert (row["runs"], row["diverged"], row["top1"], row["delta"]) == (0, 1, None, None)
    assert "| mad | 0, 1 diverged | - | - | - | - | - |" in Path("out/table.md").read_text()
    assert command(*tiny, *mad, "--seeds", "1").code == 0
    assert runs == ["baseline/seed-0", "mad/seed-0"]


def test_a_signal_interrupts_the_run_and_the_same_command_goes_on(
    place, command, tiny, monkeypatch, request
):
    """SIGTERM reaches the ablation while its first run, a process, is at its third step."""
    kill = (sys.executable, str(Path(__file__).with_name("kill.py")))
    plain = ablate._command

    def planted(*arguments) -> list[str]:
        train = plain(*arguments)
        train = train[train.index("train") :]
        return [*kill, "step", "3", "SIGTERM", "0-launcher", *train, "--nproc", "1"]

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "_command", planted)
        patch.setenv("OMP_NUM_THREADS", "1")
        said = command(*tiny, "--drop", "mixup", "--seeds", "1")
    assert said.code == 75, said
    assert "the same command goes on" in said.out
    stopped = read("out/baseline/seed-0/run.json")
    assert (stopped["status"], stopped["exit_code"]) == ("interrupted", 75)
    assert 0 < stopped["step"] < stopped["steps"]
    assert not Path("out/results.json").exists()
    runs = request.getfixturevalue("runs")
    said = command(*tiny, "--drop", "mixup", "--seeds", "1")
    assert said.code == 0, said
    assert f"resuming at step {stopped['step']}" in said.out
    assert runs == ["baseline/seed-0", f"{MIXUP}/seed-0"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_ends_the_run_at_once(tmp_path):
    """The run is a process that has Ctrl-C pressed, and pressed again when SIGTERM reaches it."""
    deaf = (
        "import os, signal\n"
        "press = lambda *_: os.kill(os.getppid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGTERM, press)\n"
        "press()\n"
        "while True: signal.pause()"
    )
    with ablate.Relay() as relay, (tmp_path / "out").open("w") as out:
        assert relay.run([sys.executable, "-c", deaf], out) == -signal.SIGKILL
        assert relay.insisted


def test_a_run_that_fails_ends_the_ablation_with_its_code(place, command, monkeypatch, tiny):
    failing = [sys.executable, "-c", "import sys; sys.exit(70)"]
    killed = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"]
    monkeypatch.setattr(ablate, "_command", lambda *_: failing)
    assert command(*tiny, "--drop", "mixup").code == 70
    monkeypatch.setattr(ablate, "_command", lambda *_: killed)
    said = command(*tiny, "--drop", "mixup")
    assert said.code == 70
    assert f"out{os.sep}baseline{os.sep}seed-0: was killed by SIGKILL" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare with: give --drop TRICK or --variant NAME:KEY=VALUE"),
        (["--drop", "ema"], "--drop ema: does not use it: recipe demo uses "),
        (["--drop", "lables"], "--drop lables: is no trick"),
        (["--variant", "x"], "--variant x: write it as NAME:KEY=VALUE[,KEY=VALUE]"),
        (["--variant", "../x:lr=1"], "--variant ../x:lr=1: write it as NAME:KEY=VALUE"),
        (["--variant", "baseline:lr=1"], "--variant baseline: there is one of this name"),
        (["--variant", "x:lr=0.1"], "--variant x: changes nothing"),
        (["--variant", "x:seed=1"], "seed: the runs have the seeds 0, 1, ...: say with --seeds"),
        (["--variant", "x:lr=-1"], "demo: lr: input should be greater than 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(place, refused, arguments, message):
    assert refused("ablate", "demo", *arguments, "--out", "out").startswith(message)
    assert not Path("out").exists()


def test_what_is_in_the_way_is_refused(place, refused, command, runs, tiny):
    Path("out").mkdir()
    Path("out/thesis.txt").touch()
    line = "out: holds something other than an ablation: give another --out"
    assert refused(*tiny, "--drop", "mixup") == line
    Path("out/thesis.txt").unlink()
    assert command(*tiny, "--drop", "mixup", "--seeds", "1").code == 0
    changed = refused(*tiny, "--drop", "mixup", "--set", "lr=0.2")
    assert changed == "out/baseline/recipe.yaml: is of another recipe, or other data: " + (
        "give another --out"
    )
