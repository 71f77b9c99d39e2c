"""What the machine, its disk, its bucket and its price do to a run, and what the run does then.

Real processes of the command line, real signals, loopback servers. Most are forks of one process
that has imported pitstop (forked.py); where the system itself matters, they are started anew.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pitstop.io.objects import ObjectStore

from ..io.faults import FaultyS3, faulty_s3
from ..runtime.metadata import SPOT, TERMINATE, serving

pytestmark = pytest.mark.timeout(180)

RECIPE = {
    "name": "tiny",
    "data": "digits",
    "epochs": 2,
    "batch_size": 24,
    "data_fraction": 0.1,
    "resolution": 16,
    "lr": 0.05,
    "threads": 1,
    "workers": 1,
    "device": "cpu",
    "ema": {"half_life": 5},
    "model": {
        "name": "resnet18",
        "kwargs": {"layers": [1, 1, 0, 0], "channels": [8, 16, 16, 16], "drop_rate": 0.2},
    },
    "eval": {"crop_ratio": 1.0, "batch_size": 64},
    "checkpoint": {"every": "2 steps"},
}
"""Of 12 steps, with two evaluations and six checkpoints."""

ENDLESS = {"epochs": 5000, "eval": {"every": 5000}, "checkpoint": {"every": "5000ep"}}
"""Minutes of steps, without a save of its own."""

SECRETS = ("a-secret-that-nobody-prints", "a-session-that-nobody-prints")
"""The first is of the fixture `aws`."""

SECONDS = 60
"""Longer than anything takes here."""

OF_THE_CLOCK = ("images_per_second", "seconds", "wait_seconds", "memory_mb", "wall_seconds")
"""Columns of training_log.csv that are never the same twice."""


@dataclass(frozen=True)
class Said:
    """What became of a command."""

    code: int | None
    text: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("pitstop: ")]


class Running:
    """A command that runs."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self._log = process, log

    def wait(self) -> Said:
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, "it goes on and on"
        said = Said(self.process.exitcode, self._log.read_text())
        assert "Traceback" not in said.text, said.text
        return said


class Pitstop:
    """Starts pitstop's commands, each as a process of its own."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pitstop.engine.run", "pitstop.cli"])
        self.running: list[Running] = []

    def start(self, *arguments: object, strike: tuple[int, str] = (0, "")) -> Running:
        """Starts a command; a strike is a signal to itself before the n-th step that it trains."""
        log = self._place / f"{len(self.running)}.log"
        request = {
            "arguments": [*map(str, arguments)],
            "environment": dict(os.environ),
            "log": str(log),
            "strike_at": strike[0],
            "strike_by": strike[1],
        }
        script = str(Path(__file__).with_name("forked.py"))
        arguments = (script, {"request": request}, "forked")
        process = self._context.Process(target=runpy.run_path, args=arguments)
        process.start()
        self.running.append(Running(process, log))
        return self.running[-1]

    def __call__(self, *arguments: object, strike: tuple[int, str] = (0, "")) -> Said:
        return self.start(*arguments, strike=strike).wait()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, on a machine that is not of EC2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PITSTOP_CACHE", str(cache))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def pitstop(place: Path) -> Generator[Pitstop]:
    pitstop = Pitstop(place)
    yield pitstop
    for running in pitstop.running:
        running.process.kill()
        running.process.join()
        running.process.close()


Train = tuple[str, ...]


def training(place: Path, **changes: object) -> Train:
    """The command that trains the tiny recipe, with these keys of it changed."""
    recipe = place / f"{'endless' if changes else 'tiny'}.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return ("train", str(recipe), "--out", str(place / "run"))


@pytest.fixture
def train(place: Path) -> Train:
    return training(place)


@pytest.fixture
def endless(place: Path) -> Train:
    return training(place, **ENDLESS)


@dataclass(frozen=True)
class Result:
    """What a run has come to, but for what the clock says."""

    weights: tuple[str, ...]
    rows: list[dict[str, str]]

    @classmethod
    def of(cls, out: Path) -> "Result":
        files = sorted(out.glob("*.safetensors"))
        assert len(files) == 4
        with (out / "training_log.csv").open() as file:
            rows = [*csv.DictReader(file)]
        for row in rows:
            for column in OF_THE_CLOCK:
                del row[column]
        return cls(tuple(hashlib.sha256(f.read_bytes()).hexdigest() for f in files), rows)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of a run that nobody touched."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PITSTOP_CACHE", str(cache))
        assert Pitstop(place)(*training(place)).code == 0
    return Result.of(place / "run")


def await_(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    """The whole lines of a kind in events.jsonl or ledger.jsonl."""
    text = path.read_text() if path.exists() else ""
    read = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in read if line["kind"] == kind]


def await_training(out: Path) -> None:
    await_(lambda: lines(out / "events.jsonl", "train") != [])


def stated(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def assert_saved(out: Path) -> int:
    """Returns the step that a run has come to; its newest checkpoint is of this step."""
    manifests = [json.loads(path.read_text()) for path in out.glob("checkpoints/*.json")]
    assert max(manifest["step"] for manifest in manifests) == stated(out)["step"]
    return stated(out)["step"]


def assert_interrupted(said: Said, out: Path, reason: str) -> None:
    """It is saved where it was, with what has interrupted it in the ledger."""
    assert said.code == 75, said.text
    assert stated(out)["status"] == "interrupted"
    assert assert_saved(out) > 0
    end = lines(out / "ledger.jsonl", "end")[-1]
    assert (end["status"], end["exit_code"]) == (reason, 75)
    assert end["saved_step"] == end["step"] == stated(out)["step"]


# Notices


def test_a_spot_notice_ends_a_run_saved(pitstop, endless, place, monkeypatch):
    with serving() as metadata:
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
        running = pitstop.start(*endless)
        await_training(place / "run")
        metadata.items[SPOT] = TERMINATE
        reason = f"EC2 spot notice: terminate at {TERMINATE['time']}"
        assert_interrupted(running.wait(), place / "run", reason)


def test_a_file_that_appears_ends_a_run_saved(pitstop, endless, place):
    gone_soon = place / "gone soon"
    running = pitstop.start(*endless, "--preemption-file", gone_soon)
    await_training(place / "run")
    gone_soon.touch()
    assert_interrupted(running.wait(), place / "run", f"{gone_soon} exists")


ALL_OUTPUT: dict[str, Any] = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
}
NAMESPACE = ("unshare", "--user", "--map-root-user")


def namespace(*options: str) -> list[str]:
    """The command that begins a namespace, where one may."""
    try:
        tried = subprocess.run([*NAMESPACE, *options, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if tried.returncode != 0:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")
    return [*NAMESPACE, *options]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_process_1_of_a_container_is_as_any_other(endless, place, number):
    """The kernel would withhold SIGHUP from it."""
    unshare = namespace("--pid", "--fork", "--mount-proc", "--kill-child")
    command = [*unshare, sys.executable, "-m", "pitstop", *endless]
    with subprocess.Popen(command, **ALL_OUTPUT) as process:
        try:
            await_training(place / "run")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(children), number)
            text, _ = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    if number == signal.SIGTERM:
        assert_interrupted(Said(process.returncode, text), place / "run", "SIGTERM")
    else:
        assert process.returncode == 128 + number


# The bucket


@pytest.fixture
def server(
    s3_endpoint: str, bucket: str, aws: pytest.MonkeyPatch, place: Path
) -> Iterator[FaultyS3]:
    """What stands before the bucket. The credentials are those of a role for a while."""
    aws.setenv("AWS_SESSION_TOKEN", SECRETS[1])
    aws.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with faulty_s3(s3_endpoint) as server:
        aws.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture
def remote(server: FaultyS3, bucket: str) -> str:
    return f"{bucket}/runs/mine"


def assert_in_bucket(pitstop: Pitstop, command: Train, out: Path, result: Result) -> None:
    """What the bucket gives an emptied machine is the result."""
    shutil.rmtree(out)
    said = pitstop(*command)
    assert said.code == 0, said.text
    assert f"restored step {result.rows[-1]['step']} from s3://" in said.text
    assert Result.of(out) == result


def assert_no_secrets(said: Said, place: Path, remote: str) -> None:
    """Neither in what was said, nor in a file, nor in the bucket."""
    store = ObjectStore(remote)
    everything = [said.text.encode(), *(store.get(found.key) for found in store.list())]
    everything += [path.read_bytes() for path in place.rglob("*") if path.is_file()]
    assert len(everything) > 10
    for secret in (*SECRETS, "AKIAEXAMPLE"):
        assert not any(secret.encode() in content for content in everything), secret


def test_an_emptied_machine_goes_on_from_the_bucket_alone(pitstop, train, whole, remote, place):
    out, command = place / "run", (*train, "--remote", remote)
    assert_interrupted(pitstop(*command, strike=(5, "SIGTERM")), out, "SIGTERM")
    shutil.rmtree(out)
    said = pitstop(*command)
    assert said.code == 0, said.text
    assert "restored step 5 from s3://" in said.text
    assert Result.of(out) == whole
    assert [line["step"] for line in lines(out / "ledger.jsonl", "start")] == [0, 5]
    assert_no_secrets(said, place, remote)
    assert_in_bucket(pitstop, command, out, whole)  # the end of it, too


LAST = "PUT .*step-00000012"
PASSING = [
    pytest.param("flip", rf"{LAST}/.*\.pt$", 1, id="one bit of the last checkpoint"),
    pytest.param(
        *("deny", rf"{LAST}.*/manifest\.json$", 2),
        id="no to the last manifest",
        marks=pytest.mark.slow,
    ),
    pytest.param("truncate", "PUT .*step", 3, id="truncated", marks=pytest.mark.slow),
    pytest.param("error", "PUT .*step", 2, id="errors", marks=pytest.mark.slow),
    pytest.param("lose", "PUT .*step", 1, id="an answer is lost", marks=pytest.mark.slow),
    pytest.param("reset", "GET .*step", 1, id="reset", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "pattern", "times"), PASSING)
def test_what_goes_by_in_a_bucket_costs_nothing(
    pitstop, train, whole, server, remote, place, kind, pattern, times
):
    server.inject(kind, pattern, times)
    command = (*train, "--remote", remote)
    said = pitstop(*command)
    assert said.code == 0, said.text
    assert Result.of(place / "run") == whole
    assert_no_secrets(said, place, remote)
    assert_in_bucket(pitstop, command, place / "run", whole)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("deny", "PUT .*step"),
        pytest.param("truncate", "PUT .*step", marks=pytest.mark.slow),
        pytest.param("error", "PUT .*step", marks=pytest.mark.slow),
        pytest.param("deny", "GET .*step", marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_as_it_would_but_says_that_its_bucket_has_not_got_it(
    pitstop, train, whole, server, remote, place, kind, pattern
):
    server.inject(kind, pattern)
    command = (*train, "--remote", remote)
    said = pitstop(*command)
    assert said.code == 70, said.text
    (line,) = [s for s in said.text.splitlines() if s.endswith("here stand; start it again")]
    assert line.startswith(remote)
    assert stated(place / "run")["status"] == "not durable"
    assert Result.of(place / "run") == whole
    server.heal()
    assert pitstop(*command).code == 0
    assert_no_secrets(said, place, remote)
    assert_in_bucket(pitstop, command, place / "run", whole)


def test_a_bucket_that_says_no_at_the_start_is_one_line(pitstop, train, server, remote, place):
    server.inject("deny", ".")
    said = pitstop(*train, "--remote", remote)
    server.heal()
    assert said.code == 2, said.text
    (line,) = said.errors
    assert line.startswith(f"pitstop: {remote}")
    assert "access was denied: ask for the right to list and read" in line
    assert not (place / "run" / "events.jsonl").exists()


def test_a_bucket_that_stalls_ends_a_run_that_is_asked_to_be_durable(
    pitstop, place, server, remote
):
    changes, out = {**ENDLESS, "checkpoint": {"every": "20 steps"}}, place / "run"
    server.inject("stall", "PUT .*step")
    said = pitstop(*training(place, **changes), "--remote", remote, "--max-durable-age", 0.03)
    assert server.stalled.is_set()
    server.heal()
    assert said.code == 70, said.text
    assert stated(out)["status"] == "not durable"
    assert assert_saved(out) > 0
    assert "durable" not in stated(out)
    line = f"{remote}: does not answer in time: the checkpoints here stand; start it again"
    assert said.text.count(line) == 1
    assert_no_secrets(said, place, remote)


# The disk


def in_a_small_place(place: Path, *script: str) -> Said:
    """Runs a script of the shell, in which `room` is a file system of its own."""
    unshare = namespace("--mount")
    (place / "room").mkdir()
    shell = ["sh", "-c", "\n".join(["mount -t tmpfs -o size=64k tmpfs room", *script])]
    done = subprocess.run([*unshare, *shell], check=False, **ALL_OUTPUT)
    return Said(done.returncode, done.stdout)


@pytest.fixture
def shell(train: Train) -> str:
    """The command that trains in `room`, as the shell has it."""
    return f"{sys.executable} -m pitstop {train[0]} {train[1]} --out room/run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "what"),
    [
        pytest.param(16, "the disk: No space left on device", id="for the records"),
        pytest.param(700, "the checkpoint was not saved: No space left", id="for checkpoints"),
    ],
)
def test_a_full_disk_is_one_line_and_with_room_it_goes_on(whole, place, shell, kilobytes, what):
    said = in_a_small_place(
        place,
        f"mount -o remount,size={kilobytes}k room",
        shell,
        'echo "exit code $?"',
        "mount -o remount,size=100m room",
        shell,
        'echo "exit code $?"',
        "cp -r room/run kept",
    )
    assert said.text.count("exit code") == 2, said.text
    assert "Traceback" not in said.text
    assert "exit code 2" in said.text
    assert said.text.rstrip().endswith("exit code 0")
    (line,) = said.errors
    assert what in line
    assert Result.of(place / "kept") == whole


@pytest.mark.slow
def test_a_disk_that_may_only_be_read_is_one_line(place, shell):
    """For root, too; as a disk is after its errors."""
    said = in_a_small_place(
        place, "mkdir room/run && touch room/run/.lock", "mount -o remount,ro room", shell
    )
    assert said.code == 2, said.text
    (line,) = said.text.splitlines()
    assert line == "pitstop: room/run: cannot be written: Read-only file system"


# Money


def test_when_the_money_is_spent_it_ends_saved_and_for_more_it_goes_on(pitstop, endless, place):
    price = ("--price", 3600)  # a dollar a second
    said = pitstop(*endless, *price, "--max-cost", 1.5)
    assert said.code == 77, said.text
    assert stated(place / "run")["status"] == "budget spent"
    step = assert_saved(place / "run")
    spent = lines(place / "run/ledger.jsonl", "end")[-1]["seconds"]
    (stated_spent,) = re.findall(r"^spent: \$(\d+\.\d\d) of all starts$", said.text, re.MULTILINE)
    assert 1.5 <= float(stated_spent) <= spent + 0.005  # it is said before the very end
    said = pitstop(*endless, *price, "--max-cost", spent)
    assert said.code == 77, said.text
    assert assert_saved(place / "run") == step  # not a step for no money
    said = pitstop(*endless, *price, "--max-cost", spent + 1.5)
    assert said.code == 77, said.text
    assert f"resuming at step {step} of" in said.text
    assert assert_saved(place / "run") > step


def test_starts_that_get_nowhere_are_refused_in_the_end(pitstop, train, place):
    few = ("--max-fruitless-starts", 2)
    for _ in range(2):
        assert pitstop(*train, *few, strike=(1, "SIGKILL")).code == -signal.SIGKILL
    said = pitstop(*train, *few)
    assert said.code == 2
    assert said.text == (
        f"pitstop: {place / 'run'}: 2 starts in a row have saved nothing: see what stops them, "
        "then go on with --max-fruitless-starts 3\n"
    )
    assert pitstop(*train, "--max-fruitless-starts", 3).code == 0
