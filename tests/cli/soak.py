"""Kills runs at random moments, damages their checkpoints, and compares how they end.

Usage: python tests/cli/soak.py [--kills 200] [--damages 50] [--seed 0] [--json]

A tiny hybrid recipe is trained once in peace. Then processes train it again and again, half of the
runs with a copy in a directory, half in an S3 server on loopback, and are killed by SIGKILL (see
kill.py) until so many kills have struck. After one kill in four the machine is emptied: its run
directory is removed. After others a checkpoint, here or in the bucket, is damaged. Each start has
to go on from the newest state that is whole, here or in the bucket, as this script finds it with
nothing but SHA-256 and JSON. Each run has to end with the tensors, ids, accuracies, logs and
weights of the one in peace, bit by bit. The exit code is 1 where anything differs.

The work that a kill costs is the steps that the killed process had in its state, but for those from
which the next one goes on.
"""

import argparse
import csv
import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from pitstop.engine.verify import differences
from pitstop.io.objects import MissingObjectError, ObjectStore, open_store
from pitstop.io.run_directory import RunDirectory

RECIPE = {
    "name": "soak",
    "data": "digits",
    "epochs": 6,
    "batch_size": 24,
    "lr": "auto",
    "lr_finder": {"fallback": 0.05, "iterations": 30, "start_lr": 0.01, "end_lr": 10.0},
    "lr_schedule": "onecycle",
    "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    "label_smoothing": 0.1,
    "flip": "alternating",
    "threads": 1,
    "workers": 1,
    "ema": {"half_life": 5},
    "model": {
        "name": "resnet18",
        "kwargs": {"layers": [1, 1, 0, 0], "channels": [8, 16, 16, 16], "drop_rate": 0.2},
    },
    "eval": {"crop_ratio": 1.0, "batch_size": 128},
    "checkpoint": {"every": "2 steps"},
    "phases": [
        {
            "name": "small",
            "duration": "2ep",
            "resolution": 12,
            "data_fraction": 0.08,
            "mix": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
        },
        {
            "name": "frozen",
            "duration": "2ep",
            "resolution": 16,
            "data_fraction": 0.1,
            "batch_size": 36,
            "grad_accum_steps": 2,
            "freeze": ["layer1"],
        },
        {"name": "large", "duration": "rest", "resolution": 24, "data_fraction": 0.12},
    ],
}
"""33 steps, each second one saved, six evaluations."""

MOMENTS = {
    "images": 400,
    "step": 20,
    "evaluation": 30,
    "save": 12,
    "manifest": 12,
    "weights": 30,
    "records": 40,
    "upload": 60,
    "snapshot": 6,
    "verify": 60,
    "retention": 8,
    "claim": 2,
}
"""What a process does, and the most times it is waited for before the signal; see kill.py."""

FINDER, RESTORE = ("finder", 30), ("restore", 30)
"""Where there is no checkpoint yet; where the machine was emptied and there is a copy."""

DAMAGES = ("truncated", "bit flipped", "empty", "no manifest", "manifest cut", "left behind")

KILLS_A_RUN = 5
EMPTIED = 1 / 4
IN_BUCKET = 1 / 3
"""The share of damages that are to the newest copy, on an emptied machine."""

MOST_LOST = 4
"""Steps, where the disk stays: an interval, and the one whose save is being written."""

AT_ONCE = 2
HANGS_SECONDS = 300
SHOWN = 3
"""Differences of a run."""

TIMED = {"images_per_second", "seconds", "wait_seconds", "memory_mb", "wall_seconds"}
SCRIPT = Path(__file__).with_name("kill.py")


@dataclass
class Tally:
    """What came of some runs."""

    kills: Counter[str] = field(default_factory=Counter[str])
    damages: Counter[str] = field(default_factory=Counter[str])
    starts: int = 0
    emptied: int = 0
    runs: int = 0
    equal: int = 0
    kills_equal: int = 0
    """Those of the runs that ended equal."""
    recovered: int = 0
    lost_here: list[int] = field(default_factory=list[int])
    """Steps lost by each kill after which the disk stayed."""
    lost_damaged: list[int] = field(default_factory=list[int])
    """The same, with the newest checkpoint damaged too."""
    lost_emptied: list[int] = field(default_factory=list[int])
    """Steps lost by each kill after which there was only the bucket."""
    lost_by_ledger: int = 0
    wrong: list[str] = field(default_factory=list[str])

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


@dataclass(frozen=True, order=True)
class State:
    """A state that a run can go on from."""

    attempt: int
    sequence: int
    again: int
    step: int = field(compare=False)
    files: tuple[str, ...] = field(compare=False)
    """Paths here, keys in the bucket, the manifest last: of what only this state has."""


def content_of(store: ObjectStore, key: str) -> bytes:
    try:
        return store.get(key)
    except MissingObjectError:
        return b""


def states_here(run: Path) -> list[State]:
    """Returns the whole checkpoints of a run, the newest last."""
    found: list[State] = []
    for path in run.glob("checkpoints/*.json"):
        with suppress(ValueError):
            stated = json.loads(path.read_bytes())
            file = path.with_name(stated["file"])
            content = file.read_bytes() if file.exists() else b""
            if hashlib.sha256(content).hexdigest() == stated["sha256"]:
                files = str(file), str(path)
                place = stated["attempt"], stated["sequence"], 0
                found.append(State(*place, stated["step"], files))
    return sorted(found)


def states_there(store: ObjectStore) -> list[State]:
    """Returns the whole snapshots of a bucket, the newest last."""
    keys = [found.key for found in store.list()]
    digests = {key: hashlib.sha256(content_of(store, key)).hexdigest() for key in keys}
    found: list[State] = []
    for key in (key for key in keys if key.endswith("/manifest.json")):
        with suppress(ValueError):
            stated = json.loads(content_of(store, key))
            files = stated["files"].values()
            if all(digests.get(file["key"]) == file["sha256"] for file in files):
                folder = key.rpartition("/")[0]
                own = [file["key"] for file in files if file["key"].startswith(f"{folder}/")]
                again = re.search(r"step-\d+-(\d+)$", folder)
                place = stated["attempt"], stated["sequence"], int(again[1]) if again else 1
                found.append(State(*place, stated["step"], (*own, key)))
    return sorted(found)


def damaged(content: bytes, how: str, rng: random.Random) -> bytes:
    """Returns the content of a file that something has happened to."""
    if how == "empty":
        return b""
    if how == "bit flipped":
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content[: rng.randrange(1, len(content))]


class Run:
    """A run under attack, on one machine, with a copy elsewhere.

    Args:
        out: its run directory.
        url: of its copy.
    """

    def __init__(self, recipe: Path, out: Path, url: str, rng: random.Random) -> None:
        self.recipe, self.out, self.url, self.rng = recipe, out, url, rng
        self.store = open_store(url, make_directory=True)
        self.tally = Tally(runs=1)
        self.number = 0
        """Of kills that have struck."""
        self.unrecovered = 0
        """Damages, after which no start has come to training yet."""
        self.ended = False
        self.emptied = False
        """Whether the machine has been emptied since the last training."""
        self.damaged = False
        """Whether a checkpoint here has been damaged since."""
        self._trained: int | None = None
        """Steps that the last start which trained had done when it was killed."""
        self._starts: set[str] = set()

    def go_on(self, moment: str = "never", nth: int = 1) -> bool:
        """Starts the command; says whether it was killed, and checks from where it went on."""
        here, there = states_here(self.out), states_there(self.store)
        newest = max([*here, *there], default=None)
        expected = newest.step if newest else 0
        said, code = self._start(moment, nth)
        self.tally.starts += 1
        self.ended = code == 0
        starts = [*self._new_starts()]
        for start in starts:
            if start["step"] != expected:
                self._wrong(f"went on from step {start['step']}, not {expected}")
            self._note_lost(start)
        if starts or code == 0:  # there may be nothing left to train
            from_there = all(start["step"] == expected for start in starts)
            self.tally.recovered += self.unrecovered if from_there else 0
            self.unrecovered = 0
        if code not in (0, -signal.SIGKILL):
            self._wrong(f"exit code {code} ({moment} {nth}): {said[-300:]}")
        if code == -signal.SIGKILL:
            self.tally.kills[moment] += 1
            self.number += 1
            if trained := re.findall(r"struck after (\d+) steps", said):
                self._trained, self.emptied, self.damaged = int(trained[-1]), False, False
        return code == -signal.SIGKILL

    def _start(self, moment: str, nth: int) -> tuple[str, int]:
        """Runs the command in a fork of a process that has imported pitstop: that takes longest.

        Returns:
            What it said, and its exit code.
        """
        log = self.out.with_suffix(".log")
        train = ["train", str(self.recipe), "--out", str(self.out), "--remote", self.url]
        others = ["--max-fruitless-starts", "0", "--device", "cpu", "--nproc", "1"]
        request = {
            "arguments": [moment, str(nth), "SIGKILL", "0", *train, *others],
            "environment": dict(os.environ),
            "log": str(log),
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pitstop.engine.run", "pitstop.cli"])
        process = context.Process(
            target=runpy.run_path, args=(str(SCRIPT), {"request": request}, "kill")
        )
        process.start()
        process.join(HANGS_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            self._wrong(f"hung ({moment} {nth})")
        assert process.exitcode is not None
        return log.read_text(), process.exitcode

    def _new_starts(self) -> Iterator[dict[str, Any]]:
        """Yields what the ledger says of the start that has just ended, if it came so far."""
        ledger = RunDirectory(self.out).ledger
        for line in ledger.read_text().splitlines() if ledger.exists() else ():
            with suppress(ValueError):
                entry = json.loads(line)
                if entry["kind"] == "start" and entry["id"] not in self._starts:
                    self._starts.add(entry["id"])
                    yield entry

    def _note_lost(self, start: dict[str, Any]) -> None:
        self.tally.lost_by_ledger += start["lost_steps"]
        if self._trained is not None:
            kept = self.tally.lost_damaged if self.damaged else self.tally.lost_here
            lost = self.tally.lost_emptied if self.emptied else kept
            lost.append(self._trained - start["step"])
        self._trained, self.damaged = None, False

    def _wrong(self, what: str) -> None:
        self.tally.wrong.append(f"{self.out.name}, after {self.number} kills: {what}")

    def moment(self) -> tuple[str, int]:
        """Draws a moment that may come in the next start, and at which of its times to strike."""
        here, there = states_here(self.out), states_there(self.store)
        if not here and not there and self.rng.random() < 1 / 3:
            name, most = FINDER
        elif not here and there and self.rng.random() < 1 / 2:
            name, most = RESTORE
        else:
            name = self.rng.choice([*MOMENTS])
            most = MOMENTS[name]
        return name, self.rng.randint(1, most)

    def empty(self) -> None:
        """Takes the machine's disk away."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.emptied = True
        self.tally.emptied += 1

    def damage(self) -> bool:
        """Damages the newest state, here or in the bucket; says whether there is one left then."""
        here, there = states_here(self.out), states_there(self.store)
        how = self.rng.choice(DAMAGES)
        if self.rng.random() < IN_BUCKET and len(there) > 1:
            *files, _ = there[-1].files
            how = how if files else "no manifest"
            self.empty()
            self._damage_there(there[-1], how)
            where = "bucket"
        elif here and len(here) + len(there) > 1:
            self.damage_here(here[-1], how)
            where = "disk"
        else:
            return False
        assert states_here(self.out) or states_there(self.store)
        self.tally.damages[f"{how}, {where}"] += 1
        self.unrecovered += 1
        return True

    def damage_here(self, state: State, how: str) -> None:
        self.damaged = True
        checkpoint, manifest = map(Path, state.files)
        match how:
            case "no manifest":
                manifest.unlink()
            case "left behind":
                half = damaged(checkpoint.read_bytes(), "truncated", self.rng)
                checkpoint.with_name("epoch-0099.00-step-00000099.pt").write_bytes(half)
                checkpoint.with_name(f"{checkpoint.name}.partial").write_bytes(half)
            case _:
                file = manifest if how == "manifest cut" else checkpoint
                file.write_bytes(damaged(file.read_bytes(), how, self.rng))

    def _damage_there(self, state: State, how: str) -> None:
        *files, manifest = state.files
        match how:
            case "no manifest":
                self.store.delete([manifest])
            case "left behind":
                newer = f"{state.attempt:04d}/{state.sequence + 1:04d}-step-{state.step + 2:08d}"
                key = f"attempts/{newer}/last.safetensors"
                self.store.put(key, damaged(self.store.get(files[0]), "truncated", self.rng))
            case _:
                key = manifest if how == "manifest cut" else self.rng.choice(files)
                self.store.put(key, damaged(self.store.get(key), how, self.rng))

    def compare(self, whole: RunDirectory) -> None:
        """Notes whether the run has ended as the one in peace."""
        if not self.ended:
            return
        run = RunDirectory(self.out)
        lines = differences(run, whole)
        lines += [] if logs(run) == logs(whole) else ["training_log.csv differs"]
        lines += [f"{name} differs" for name in unequal_weights(run, whole)]
        if lines:
            self._wrong("; ".join([*lines[:SHOWN], f"{len(lines)} differences in all"]))
        else:
            self.tally.equal += 1
            self.tally.kills_equal += self.number


def logs(run: RunDirectory) -> list[dict[str, str]]:
    """Returns the rows of the log, but for how long things took."""
    with run.csv.open() as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def unequal_weights(run: RunDirectory, whole: RunDirectory) -> list[str]:
    pairs = {path.name: (run.path / path.name, path) for path in whole.path.glob("*.safetensors")}
    assert len(pairs) == 4
    return [name for name, (a, b) in pairs.items() if a.read_bytes() != b.read_bytes()]


@dataclass(frozen=True)
class Soak:
    """A place for runs.

    Args:
        folder: where they lie.
    """

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "soak.yaml"

    @property
    def whole(self) -> RunDirectory:
        return RunDirectory(self.folder / "whole")

    def prepare(self) -> None:
        """Trains in peace."""
        self.recipe.write_text(yaml.safe_dump(RECIPE))
        run = Run(self.recipe, self.whole.path, str(self.folder / "copy"), random.Random(0))
        run.go_on()
        assert not run.tally.wrong, run.tally.wrong
        shutil.rmtree(self.folder / "copy")

    def attack(self, job: int, kills: int, damages: int, seed: int) -> Tally:
        """Has runs under attack until there were so many kills and damages."""
        rng = random.Random(f"{seed}/{job}")
        tallies: list[Tally] = []
        while kills > 0 or damages > 0:
            name = f"run-{job}-{len(tallies)}"
            url = f"s3://soak/{name}" if job % 2 else str(self.folder / f"copy-of-{name}")
            run = Run(self.recipe, self.folder / name, url, rng)
            self._attack(run, kills, damages)
            tallies.append(run.tally)
            kills -= run.tally.kills.total()
            damages -= run.tally.damages.total()
            shutil.rmtree(run.out, ignore_errors=True)
            assert len(tallies) < 10 * KILLS_A_RUN, run.tally.wrong
        return reduce(add, tallies)

    def _attack(self, run: Run, kills: int, damages: int) -> None:
        for _ in range(kills):
            if not run.go_on(*run.moment()):
                break
            wanted = damages - run.tally.damages.total()
            is_damaged = run.rng.random() * kills < 2 * wanted and run.damage()
            if not is_damaged and run.rng.random() < EMPTIED:
                run.empty()
        else:
            run.go_on()
        while run.tally.damages.total() < damages and run.damage():
            run.go_on()
        run.compare(self.whole)


@contextmanager
def s3_on_loopback() -> Generator[None]:
    """Has an S3 server with the bucket `soak`, to which the environment points."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
        }
        client = boto3.client("s3")
        client.create_bucket(Bucket="soak")
        client.close()
        yield
    finally:
        server.stop()


def shares(total: int, parts: int) -> list[int]:
    """Returns `total` in so many parts that differ by at most one."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def soak(folder: Path, kills: int, damages: int, seed: int) -> Tally:
    """Returns what came of so many kills and damages."""
    (folder / "tmp").mkdir()
    places = {"PITSTOP_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    os.environ |= places | {"OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    place = Soak(folder)
    jobs = max(2, -(-kills // KILLS_A_RUN))
    with s3_on_loopback(), ThreadPoolExecutor(AT_ONCE) as pool:
        place.prepare()
        parts = enumerate(zip(shares(kills, jobs), shares(damages, jobs), strict=True))
        begun = [pool.submit(place.attack, job, k, d, seed) for job, (k, d) in parts]
        tallies: list[Tally] = []
        for future in begun:
            tallies.append(future.result())
            done = reduce(add, tallies)
            print(
                f"{done.kills.total()} of {kills} kills, {done.damages.total()} of {damages} "
                f"damages, {done.equal} of {done.runs} runs equal",
                file=sys.stderr,
                flush=True,
            )
    return reduce(add, tallies)


def of_losses(lost: list[int]) -> str:
    if not lost:
        return "none"
    return f"median {median(lost):g}, max {max(lost)} ({len(lost)} kills)"


def table(tally: Tally, seed: int, seconds: float) -> str:
    """Returns what came of it, to read."""
    kills, damages = tally.kills.total(), tally.damages.total()
    return "\n".join(
        [
            "moment        kills",
            *(f"{name:12} {number:6}" for name, number in sorted(tally.kills.items())),
            f"{'all':12} {kills:6}",
            "",
            "damage                 restarts",
            *(f"{name:24} {number:6}" for name, number in sorted(tally.damages.items())),
            "",
            f"seed {seed}, {tally.runs} runs, {tally.starts} starts, {seconds:.0f} s; "
            f"the machine was emptied {tally.emptied} times",
            f"equal      {tally.equal} of {tally.runs} runs, {tally.kills_equal} of {kills} kills",
            f"recovered  {tally.recovered} of {damages} damaged restarts",
            f"steps lost by a kill, the disk stays:   {of_losses(tally.lost_here)}",
            f"  and the newest checkpoint is damaged: {of_losses(tally.lost_damaged)}",
            f"  and the disk is lost:                 {of_losses(tally.lost_emptied)}",
            f"steps lost as the ledgers count them:   {tally.lost_by_ledger} in all",
            *tally.wrong,
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills runs, damages checkpoints, compares.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pitstop-soak-") as folder:
        tally = soak(Path(folder), asked.kills, asked.damages, asked.seed)
    seconds = time.monotonic() - began
    if asked.json:
        print(json.dumps(vars(tally) | {"seed": asked.seed, "seconds": round(seconds, 1)}))
    else:
        print(table(tally, asked.seed, seconds))
    complete = tally.equal == tally.runs and tally.recovered == tally.damages.total()
    cheap = max(tally.lost_here, default=0) <= MOST_LOST
    return 0 if complete and cheap and not tally.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
