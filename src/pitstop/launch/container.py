"""Runs `pitstop train` in a training container of SageMaker.

What the job is comes from JSON files in input/config below a base directory, /opt/ml; where one is
missing, from the variables SM_* that SageMaker's training toolkit sets. What is what, below it:

input/config/hyperparameters.json   the options of `pitstop train`, and `recipe`; all are strings
input/config/inputdataconfig.json   the channels by name; their files are in input/data/NAME
input/config/resourceconfig.json    the machines that train together
input/config/checkpointconfig.json  what SageMaker keeps a copy of in S3: checkpoints/
input/data/pitstop/recipe.yaml      the recipe, of the launcher's own channel
model/                              the run directory; at the end SageMaker makes model.tar.gz of it
checkpoints/                        the run's copy (`train --remote`)
output/failure                      one line that says why the exit code is not 0

The copy consists of files that are written once, and counts by a manifest that comes last: so
SageMaker may bring them to S3, and back to the next machine, in any order and at any moment.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self, cast

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import BAD_INPUT, FINISHED, INTERNAL, INTERRUPTED
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import read_json, write_text
from pitstop.launch.init import leave_process_1
from pitstop.launch.local import DEFAULT_PORT, say
from pitstop.launch.request import train_command

BASE = Path("/opt/ml")

CODE = "pitstop"
"""The channel with the recipe and the wheel."""

RECIPE = "recipe.yaml"

TRAIN_CHANNELS = ("train", "training")
VAL_CHANNELS = ("validation", "val", "valid", "test")

TWO_WAY = ("compile",)
"""The switches of `pitstop train` that can be turned off: --no-compile."""

STOPS = (signal.SIGTERM, signal.SIGINT)

FAILURE_CHARACTERS = 1024
"""Of output/failure, SageMaker shows so many."""

NAME_SECONDS = 600.0
"""How long the other machines' names may be unknown at the start."""


def main() -> None:
    """`python -m pitstop.launch.container [BASE]`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until somebody listens, they wait
    leave_process_1()
    sys.exit(run(Path(sys.argv[1]) if len(sys.argv) > 1 else BASE))


def run(base: Path) -> int:
    """Trains what the files below `base` say; returns pitstop's exit code."""
    job = Job(base, os.environ)
    job.failure.unlink(missing_ok=True)
    with Relay() as relay:
        try:
            arguments = train_arguments(job, lambda: relay.stopped)
            code = relay.run([sys.executable, "-P", "-m", "pitstop", *arguments], environment(job))
        except InputError as error:
            say(relay.note(str(error)))
            code = BAD_INPUT
        except Exception as error:
            traceback.print_exc()
            relay.note(repr(error))
            code = INTERNAL
    if code != FINISHED:
        write_text(job.failure, failure_line(code, relay.said, RunDirectory(job.model)))
    return code


class Job:
    """What the files below `base` say, and in their place the environment.

    Raises:
        InputError: where a file is asked for that is damaged, or a variable.
    """

    def __init__(self, base: Path, environment: Mapping[str, str]) -> None:
        self.base = base
        self._environment = environment

    @property
    def model(self) -> Path:
        return self._place(self.base / "model", "SM_MODEL_DIR")

    @property
    def failure(self) -> Path:
        return self._place(self.base / "output", "SM_OUTPUT_DIR") / "failure"

    @property
    def code(self) -> Path:
        return self.channel(CODE)

    def channel(self, name: str) -> Path:
        """Returns the directory of a channel's files."""
        return self._place(self.base / "input" / "data" / name, f"SM_CHANNEL_{name.upper()}")

    def hyperparameters(self) -> dict[str, Any]:
        """Returns them by name; from a file they are strings, from SM_HPS any JSON."""
        return self._config("hyperparameters") or self._variable("SM_HPS") or {}

    def channels(self) -> list[str]:
        """Returns the names of the channels, without the launcher's own, sorted."""
        names = self._config("inputdataconfig") or self._variable("SM_CHANNELS") or ()
        return sorted(name for name in names if name != CODE)

    def machines(self) -> "Machines":
        """Returns which machines train together; this one alone where nobody says so."""
        stated = self._config("resourceconfig")
        if stated is None:
            hosts = self._variable("SM_HOSTS") or ["localhost"]
            here = self._environment.get("SM_CURRENT_HOST", hosts[0])
            interface = self._environment.get("SM_NETWORK_INTERFACE_NAME")
        else:
            hosts, here = stated["hosts"], stated["current_host"]
            interface = stated.get("network_interface_name")
        return Machines(tuple(sorted(hosts)), here, interface)

    def checkpoints(self) -> Path | None:
        """Returns the directory that SageMaker keeps in S3, None where there is none."""
        usual = self.base / "checkpoints"
        stated = self._config("checkpointconfig")
        if stated is None:
            return usual if usual.is_dir() else None
        path = Path(stated.get("LocalPath") or usual)
        return self.base / path.relative_to(BASE) if path.is_relative_to(BASE) else path

    def _config(self, name: str) -> dict[str, Any] | None:
        file = self.base / "input" / "config" / f"{name}.json"
        return read_json(file) if file.exists() else None

    def _variable(self, name: str) -> Any:
        text = self._environment.get(name)
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            raise InputError(f"{name}={text}: is not JSON") from None

    def _place(self, usual: Path, variable: str) -> Path:
        named = self._environment.get(variable)
        return Path(named) if named and not usual.exists() else usual


@dataclass(frozen=True)
class Machines:
    """The names of the machines in the order of their ranks, and which of them this one is."""

    hosts: tuple[str, ...]
    here: str
    interface: str | None
    """The network interface by which they reach each other."""

    @property
    def rank(self) -> int:
        return self.hosts.index(self.here)


def train_arguments(job: Job, stopped: Callable[[], bool] = lambda: False) -> list[str]:
    """Returns the command line behind `pitstop`: what the job asks for, and its places.

    Fetches the run that it is to begin from, and waits for the first of several machines.

    Args:
        job: the job.
        stopped: whether to wait no longer.

    Raises:
        InputError: naming the hyperparameter or the channel.
    """
    stated = job.hyperparameters()
    machines, checkpoints = job.machines(), job.checkpoints()
    previous = previous_run(job, stated, checkpoints) if machines.rank == 0 else None
    data = None if "data" in stated else data_of(job)
    several = len(machines.hosts) > 1
    if several:
        await_name(machines.hosts[0], stopped)
    return train_command(
        options(stated),
        recipe=recipe_of(job, stated),
        data=None if data is None else str(data),
        out=str(job.model),
        remote=None if checkpoints is None else str(checkpoints),
        resume=None if previous is None else str(previous),
        nodes=len(machines.hosts),
        node_rank=machines.rank if several else None,
        endpoint=f"{machines.hosts[0]}:{DEFAULT_PORT}" if several else None,
    )


def options(hyperparameters: Mapping[str, Any]) -> list[str]:
    """Returns hyperparameters as options of `pitstop train`.

    `batch_size: "256"` is --batch-size=256; `compile: "False"` is --no-compile, as a string or
    not; a list repeats an option; a key with a dot is one of the recipe: --set=phases.1.lr=0.5.
    """
    found: list[str] = []
    for key, stated in hyperparameters.items():
        if key in ("recipe", "resume") or key.startswith("sagemaker_"):  # of the SageMaker SDK
            continue
        name = key.replace("_", "-")
        for value in values(stated):
            if "." in key:
                text = value if isinstance(value, str) else json.dumps(value)
                found.append(f"--set={key}={text}")
            elif value is True:
                found.append(f"--{name}")
            elif value is not False:
                found.append(f"--{name}={value}")
            elif name in TWO_WAY:
                found.append(f"--no-{name}")
    return found


def values(stated: Any) -> Iterator[str | bool]:
    """Yields the values of a hyperparameter: text, switches, or a JSON list of such.

    The SageMaker SDK writes strings as JSON and truths as Python does.
    """
    parsed = stated
    if isinstance(stated, str):
        try:
            parsed = json.loads(stated.lower() if stated in ("True", "False") else stated)
        except ValueError:
            parsed = stated
    if isinstance(parsed, list):
        for one in cast("list[Any]", parsed):
            yield one if isinstance(one, str | bool) else json.dumps(one)
    elif isinstance(parsed, str | bool):
        yield parsed
    else:  # a number stays as it was written
        yield stated if isinstance(stated, str) else json.dumps(stated)


def recipe_of(job: Job, stated: Mapping[str, Any]) -> str:
    """Returns the file of the recipe, or a bundled one's name."""
    file = job.code / RECIPE
    if file.exists():
        return str(file)
    if "recipe" not in stated:
        raise InputError("hyperparameter recipe: is missing: name a recipe")
    return str(next(values(stated["recipe"])))


def data_of(job: Job) -> Path | None:
    """Returns what the channels hold; None without a channel.

    One channel is a dataset, or holds the one file that is. Of two, one is for validation: they
    become the folders train and val of one directory.
    """
    names = job.channels()
    if not names:
        return None
    if len(names) == 1:
        directory = job.channel(names[0])
        entries = [*directory.iterdir()] if directory.is_dir() else []
        return entries[0] if len(entries) == 1 and entries[0].is_file() else directory
    train = [name for name in names if name in TRAIN_CHANNELS]
    val = [name for name in names if name in VAL_CHANNELS]
    if len(train) != 1 or len(val) != 1 or len(names) != 2:
        raise InputError(
            f"channels {', '.join(names)}: give one with the dataset, or two: train and validation"
        )
    joined = cache() / "channels"
    joined.mkdir(parents=True, exist_ok=True)
    for folder, name in (("train", train[0]), ("val", val[0])):
        (joined / folder).unlink(missing_ok=True)
        (joined / folder).symlink_to(job.channel(name).absolute(), target_is_directory=True)
    return joined


def previous_run(job: Job, stated: Mapping[str, Any], checkpoints: Path | None) -> Path | None:
    """Fetches the run that this one is to begin from, and returns its directory.

    Returns None without one, and where this run has begun before.
    """
    if "resume" not in stated:
        return None
    copies = [] if checkpoints is None else [*checkpoints.glob("attempts/*/*/manifest.json")]
    if copies or RunDirectory(job.model).events.exists():
        return None
    from pitstop.io.fetch import fetch

    directory = cache() / "previous"
    fetch(str(next(values(stated["resume"]))), directory, say)
    return directory


def await_name(host: str, stopped: Callable[[], bool]) -> None:
    """Returns when the host has an address: on SageMaker names may come a little later.

    Gives up after NAME_SECONDS: `train` says what is wrong.
    """
    until = time.monotonic() + NAME_SECONDS
    while time.monotonic() < until and not stopped():
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError:
            time.sleep(1)


def environment(job: Job) -> dict[str, str]:
    """Returns the environment that training runs in; what the job sets stays."""
    chosen = {"PITSTOP_CACHE": str(cache())}
    machines = job.machines()
    if len(machines.hosts) > 1 and machines.interface is not None:
        chosen |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), machines.interface)
    return {**chosen, **os.environ}


def cache() -> Path:
    """Returns where datasets are packed: /tmp is on the job's volume, the home is not."""
    return Path(os.environ.get("PITSTOP_CACHE") or Path(tempfile.gettempdir()) / "pitstop")


class Relay:
    """Runs a command and passes a stop on to it, as a context manager.

    SIGTERM and SIGINT become the command's SIGTERM. They may be blocked before: from now on they
    are not, and those that wait arrive.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.said = ""
        """The last line that pitstop has said for the user."""
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._stop) for number in STOPS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def note(self, line: str) -> str:
        """Notes what is said for the user, and returns it."""
        self.said = line
        return line

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        """Runs the command to its end.

        Returns:
            its exit code, 128 + n if signal n ended it; 75 if it was stopped before it listened.
        """
        if not self.stopped:
            self._child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
            if self.stopped:  # while it was being started
                self._child.terminate()
            listener = threading.Thread(target=self._listen, args=[self._child.stderr], daemon=True)
            listener.start()
            code = self._child.wait()
            listener.join(1)  # what it has left running may hold the pipe
            if code != -signal.SIGTERM or not self.stopped:
                return code if code >= 0 else 128 - code
        self.note("stopped before there was anything to save")
        return INTERRUPTED

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._child is not None:
            self._child.terminate()

    def _listen(self, stream: IO[bytes]) -> None:
        """Passes on what comes, and notes what is for the user."""
        with stream:
            for line in stream:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
                if line.startswith(b"pitstop: "):
                    self.said = line.decode(errors="replace").removeprefix("pitstop: ").strip()


def failure_line(code: int, said: str, run: RunDirectory) -> str:
    """Returns what the job's FailureReason will be."""
    state = run.read() or {}
    if not said and state.get("exit_code") == code:
        said = f"{state['status']} at step {state['step']} of {state['steps']}"
    line = " ".join(f"pitstop train: exit code {code}: {said or 'see the log'}".split())
    return line[:FAILURE_CHARACTERS]


if __name__ == "__main__":
    main()
