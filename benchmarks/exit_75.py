"""From SIGTERM to exit 75: a ResNet-50 with momentum and EMA, saved and uploaded to S3.

Method. `pitstop train` trains ResNet-50 with SGD and EMA on 1,000 classes of synthetic images, two
of 64 pixels a step, and saves nothing by itself. In the midst of it the process gets SIGTERM. It
finishes its step, saves (the state, and the weights twice more as safetensors: raw and averaged),
uploads all that to an S3 server on loopback (moto, in the process of the benchmark), reads each
object back and compares it, and exits with 75. The time is from the signal to the end of the
process; its parts are measured in the training process: `stop` until it begins to save, `save`
until the checkpoint is on disk (fsync and checksums included), `send` and `verify` the requests
that write and those that read back, `rest` what remains: checksums of what is sent, listings, the
records, the end of the process. How fast moto is decides over `send` and `verify`.

    python benchmarks/exit_75.py --runs 5      # about 2 minutes on 2 cores
"""

import argparse
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

CLASSES = 1000
BUCKET = "exit-75"
RECIPE = {
    "name": "exit-75",
    "epochs": 1000,
    "batch_size": 2,
    "resolution": 64,
    "lr": 0.001,
    "model": "resnet50",
    "optimizer": "sgd",
    "ema": {},
    "device": "cpu",
    "eval": {"every": 1000},
    "checkpoint": {"every": "1000ep"},
}
PARTS = ("stop", "save", "send", "verify", "rest")

Times = dict[str, float]


def make_images(folder: Path) -> None:
    """Writes an image to train on and one to validate on for each class."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            path = folder / split / f"{label:04d}" / "one.jpg"
            path.parent.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)


@contextmanager
def s3_server() -> Generator[str]:
    """Runs an S3 server on loopback, to which the environment points; gives its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def empty_bucket(server: str) -> None:
    """Makes the bucket anew, and forgets what was in it."""
    for method, path in (("POST", "moto-api/reset"), ("PUT", BUCKET)):
        urllib.request.urlopen(urllib.request.Request(f"{server}/{path}", method=method)).close()


# In the training process


def train(arguments: list[str], times: Path) -> int:
    """Runs `pitstop train` and writes when it did what, by the clock that all processes have."""
    from pitstop import cli
    from pitstop.engine.guard import Guard
    from pitstop.engine.journal import Journal
    from pitstop.io.objects import ObjectStore

    moments: Times = {"send": 0.0, "verify": 0.0}
    Journal.save = at_start(moments, "save", Journal.save)
    Guard.saved = at_start(moments, "saved", Guard.saved)
    ObjectStore.put = timed(moments, "send", ObjectStore.put)
    ObjectStore.create = timed(moments, "send", ObjectStore.create)
    ObjectStore.stream = timed_stream(moments, ObjectStore.stream)
    code = cli.run(arguments)
    times.write_text(json.dumps(moments))
    return code


def at_start(moments: Times, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Notes when a function is called for the first time."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        moments.setdefault(name, time.monotonic())
        return function(*args, **kwargs)

    return call


def timed(moments: Times, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds up the time of a function's calls."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            moments[name] += time.monotonic() - began

    return call


def timed_stream(moments: Times, stream: Callable[..., Iterator[bytes]]) -> Callable[..., Any]:
    """Adds up the time in which streams are read, with what their reader does meanwhile."""

    def call(*args: Any, **kwargs: Any) -> Iterator[bytes]:
        began = time.monotonic()
        yield from stream(*args, **kwargs)
        moments["verify"] += time.monotonic() - began

    return call


# The measurement


def measure(place: Path, recipe: Path) -> Times:
    """Trains, sends SIGTERM, and returns the seconds to the exit and those of its parts."""
    out, times = place / "run", place / "times.json"
    asked = ["train", str(recipe), "--out", str(out), "--remote", f"s3://{BUCKET}/run"]
    command = [sys.executable, __file__, "--train", str(times), *asked]
    with (place / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not (out / "events.jsonl").exists() or '"train"' not in (
            (out / "events.jsonl").read_text()
        ):
            assert process.poll() is None, (place / "log.txt").read_text()
            time.sleep(0.1)
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        ended = time.monotonic()
    finally:
        process.kill()
    assert code == 75, (place / "log.txt").read_text()
    moments = json.loads(times.read_text())
    total = ended - signalled
    parts = {
        "stop": moments["save"] - signalled,
        "save": moments["saved"] - moments["save"],
        "send": moments["send"],
        "verify": moments["verify"],
    }
    return {"total": total, **parts, "rest": total - sum(parts.values())}


def uploaded_megabytes(out: Path) -> float:
    """Returns the size of what was sent: the files of a run that hold weights."""
    files = [*out.glob("checkpoints/*.pt"), *out.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files) / 1e6


def report(runs: list[Times], state: float, uploaded: float) -> None:
    """Prints the result as Markdown, and again as JSON."""
    medians = {name: median(run[name] for run in runs) for name in ("total", *PARTS)}
    totals = [run["total"] for run in runs]
    print(
        f"ResNet-50 with momentum and EMA: a state of {state:.0f} MB, {uploaded:.0f} MB uploaded; "
        f"medians of {len(runs)} runs\n\n"
        f"| SIGTERM to exit 75 | {' | '.join(PARTS)} |\n|{'---|' * (1 + len(PARTS))}\n"
        f"| {medians['total']:.1f} s ({min(totals):.1f} to {max(totals):.1f}) | "
        + " | ".join(f"{medians[part]:.1f} s" for part in PARTS)
        + " |\n"
    )
    result = {
        "benchmark": "exit_75",
        "cores": os.cpu_count(),
        "state_megabytes": round(state, 1),
        "uploaded_megabytes": round(uploaded, 1),
        "median_seconds": {name: round(seconds, 3) for name, seconds in medians.items()},
        "seconds": [round(total, 3) for total in totals],
    }
    print(json.dumps(result))


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(sys.argv[3:], Path(sys.argv[2])))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="(default 5)")
    parser.add_argument("--directory", type=Path, help="where to save: on the disk to measure")
    options = parser.parse_args()
    runs: list[Times] = []
    state = uploaded = 0.0
    with TemporaryDirectory(dir=options.directory) as scratch, s3_server() as server:
        images, recipe = Path(scratch) / "images", Path(scratch) / "recipe.yaml"
        make_images(images)
        recipe.write_text(json.dumps({**RECIPE, "data": str(images)}))  # JSON is YAML
        os.environ["PITSTOP_CACHE"] = str(Path(scratch) / "cache")
        for _ in range(options.runs):
            empty_bucket(server)
            with TemporaryDirectory(dir=scratch) as place:
                runs.append(measure(Path(place), recipe))
                out = Path(place) / "run"
                uploaded = uploaded_megabytes(out)
                (checkpoint,) = out.glob("checkpoints/*.pt")
                state = checkpoint.stat().st_size / 1e6
    report(runs, state, uploaded)


if __name__ == "__main__":
    main()
