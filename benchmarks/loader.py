"""Input pipelines side by side: images a second of pitstop and of its peers on the same JPEGs.

The work: RandomResizedCrop (area 0.08 to 1, ratio 3/4 to 4/3) and random flip to uint8 batches of
256, on 1,000 photos of ImageNet, with the page cache warm and a consumer that does nothing. Each
contender has its best sane setting: as many threads, or worker processes, as it has cores, to which
it is pinned. `benchmarks/peers` has them, a module each, with what is special about them.

Method. Each contender is a process of its own, which makes its files in the cache folder once. The
contenders take turns, one pass each a round, in the other direction every second round; only one
runs at a time. A pass is at least 2,048 images and 3 seconds, after a warm-up in which queues drain
that were filled while nobody asked. Images a second are medians of the rounds. A ratio is the
median of the rounds' ratios, so that the machine's drift cancels.

    python benchmarks/loader.py                                        # 224 px, 1 and 2 cores
    python benchmarks/loader.py --resolution 160,128 --short-side 256 --levels 192,160 --cores 2

A contender that cannot be imported is named and left out. torchvision and timm come with pitstop.
The others have environments of their own, as FFCV must be compiled (on Debian):

    python -m venv /tmp/peers/others
    /tmp/peers/others/bin/pip install 'torch>=2.6' torchvision timm webdataset
    /tmp/peers/others/bin/pip install nvidia-dali-cuda120 litdata mosaicml-streaming
    apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++
    python -m venv /tmp/peers/ffcv
    /tmp/peers/ffcv/bin/pip install 'torch>=2.6' torchvision numpy numba setuptools wheel
    /tmp/peers/ffcv/bin/pip install ffcv
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

BATCH_SIZE = 256
IMAGES, SECONDS = 2_048, 3.0
"""A pass is at least as many images and as long."""

PATIENCE = 60
"""Seconds that a worker may take to end."""

IN_VAL = 10
"""Images that are validation images too: a packed dataset must have some."""

HERE = Path(__file__).parent
SAMPLE = HERE.parent.parent / "shared" / "data" / "imagenet-sample.tar"


@dataclass(frozen=True)
class Contender:
    """A pipeline: `module` and `variant` are those of `benchmarks/peers`."""

    label: str
    module: str
    variant: str
    home: str
    """Whose interpreter runs it: `here`, `others` or `ffcv`."""
    needs: str
    """What to install."""


PEERS = {
    "torchvision": Contender(
        "torchvision ImageFolder, PIL (v1)", "with_torchvision", "pil", "here", "torchvision"
    ),
    "torchvision-v2": Contender(
        "torchvision decode_jpeg, v2 antialiased",
        "with_torchvision",
        "tensor",
        "here",
        "torchvision",
    ),
    "timm": Contender("timm create_loader", "with_timm", "", "here", "timm"),
    "webdataset": Contender(
        "WebDataset, decode_jpeg and v2", "with_webdataset", "", "others", "webdataset"
    ),
    "streaming": Contender(
        "MosaicML streaming, decode_jpeg and v2",
        "with_streaming",
        "",
        "others",
        "mosaicml-streaming",
    ),
    "litdata": Contender("LitData, decode_jpeg and v2", "with_litdata", "", "others", "litdata"),
    "dali": Contender(
        "DALI CPU, originals, not antialiased",
        "with_dali",
        "originals",
        "others",
        "nvidia-dali-cuda120",
    ),
    "dali-256": Contender(
        "DALI CPU, on short side 256", "with_dali", "256", "others", "nvidia-dali-cuda120"
    ),
    "dali-400": Contender(
        "DALI CPU, on short side 400", "with_dali", "400", "others", "nvidia-dali-cuda120"
    ),
    "ffcv-500": Contender("FFCV, 500 px, half raw", "with_ffcv", "500", "ffcv", "ffcv"),
    "ffcv-341": Contender("FFCV, longest side 341, JPEG", "with_ffcv", "341", "ffcv", "ffcv"),
}


def pitstop(*short_sides: int) -> Contender:
    """Returns pitstop on images of the first short side; the others are of levels."""
    variant = "+".join(map(str, short_sides))
    return Contender(f"pitstop, short side {variant}", "with_pitstop", variant, "here", "pitstop")


@dataclass(frozen=True)
class Scene:
    """Under which conditions the contenders meet."""

    resolution: int
    cores: int


@dataclass(frozen=True)
class Stage:
    """Where and how contenders are run."""

    cache: Path
    interpreters: dict[str, str]

    def command(self, contender: Contender, scene: Scene, *more: str) -> list[str]:
        """Returns the command of a worker."""
        stated = {
            "variant": contender.variant,
            "cache": self.cache,
            "cores": scene.cores,
            "resolution": scene.resolution,
            "batch-size": BATCH_SIZE,
            "images": IMAGES,
            "seconds": SECONDS,
        }
        start = [self.interpreters[contender.home], "-m", "peers.worker", contender.module]
        return [*start, *(f"--{key}={value}" for key, value in stated.items()), *more]

    @contextmanager
    def worker(
        self, name: str, contender: Contender, scene: Scene, *more: str
    ) -> Iterator["Worker"]:
        """Starts a worker; its standard error goes to a file in the cache."""
        log = self.cache / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as errors:
            process = subprocess.Popen(
                self.command(contender, scene, *more),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=HERE,
            )
        with process:
            try:
                yield Worker(name, process, log)
                process.communicate(timeout=PATIENCE)  # the end of its input ends it
            finally:
                process.kill()


@dataclass(frozen=True)
class Worker:
    """A contender's process."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def answer(self) -> Any:
        """Waits for its next line; raises if it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = "\n".join(self.log.read_text().splitlines()[-15:])
            raise SystemExit(f"{self.name} failed; the end of {self.log}:\n{last}")
        return json.loads(line)

    def timed(self) -> float:
        """Has it run one pass and returns its images a second."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()["images_per_second"]


def unpack(archive: Path, cache: Path) -> None:
    """Lays the archive out as a class folder, train/<class>/..., with a few images in val/ too."""
    originals = cache / "originals"
    if originals.exists():
        return
    unfinished = cache / ".originals"
    shutil.rmtree(unfinished, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(unfinished, filter="data")
    (folder,) = unfinished.iterdir()
    folder.rename(unfinished / "train")
    for place in sorted((unfinished / "train").iterdir())[:IN_VAL]:
        shutil.copytree(place, unfinished / "val" / place.name)
    unfinished.rename(originals)


def prepare(
    stage: Stage, contenders: dict[str, Contender]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Has all files made; returns the contenders that are here, and the versions of theirs."""
    present: dict[str, Contender] = {}
    versions: dict[str, str] = {}
    scene = Scene(224, len(os.sched_getaffinity(0)))
    for name, contender in contenders.items():
        if shutil.which(stage.interpreters[contender.home]) is None:
            missing = f"there is no {stage.interpreters[contender.home]}"
        else:
            print(f"preparing {name}", file=sys.stderr)
            with stage.worker(name, contender, scene, "--prepare") as worker:
                answer = worker.answer()
            missing = answer.get("missing")
        if missing is None:
            present[name] = contender
            versions |= answer
        else:
            print(f"left out: {contender.label} ({missing}); pip install {contender.needs}")
    return present, versions


def warm(cache: Path) -> None:
    """Reads all files of the cache once, so that they are in the page cache."""
    for file in cache.rglob("*"):
        if file.is_file():
            file.read_bytes()


def measure(
    stage: Stage, contenders: dict[str, Contender], scene: Scene, rounds: int
) -> dict[str, list[float]]:
    """Returns the images a second of each contender in each round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        workers: list[Worker] = []
        for name, contender in contenders.items():
            worker = stack.enter_context(stage.worker(name, contender, scene))
            assert worker.answer() == "ready"
            workers.append(worker)
        for turn in range(rounds):
            for worker in workers[:: -1 if turn % 2 else 1]:
                rates[worker.name].append(worker.timed())
            done = f"{scene}: round {turn + 1} of {rounds}"
            print(done, file=sys.stderr)
    return rates


def report(contenders: dict[str, Contender], scene: Scene, rates: dict[str, list[float]]) -> None:
    """Prints a table: images a second, and how many times as fast pitstop is."""
    ours = [name for name in rates if is_ours(name)]
    rounds = len(next(iter(rates.values())))
    print(
        f"\n{scene.resolution} px, {scene.cores} core{'s' * (scene.cores > 1)}: images/s, medians "
        f"of {rounds} (lowest to highest); ratios of pitstop to each"
    )
    print(" " * 69 + "".join(f"{name:>13}" for name in ours))
    for name, contender in contenders.items():
        mine = rates[name]
        spread = f"({min(mine):,.0f} to {max(mine):,.0f})"
        ratios = "".join(f"{ratio(rates[our], mine):>12.2f}x" for our in ours)
        print(f"  {contender.label:<41} {median(mine):>7,.0f} {spread:<17}{ratios}")


def is_ours(name: str) -> bool:
    return name.startswith("pitstop")


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median of the rounds' ratios."""
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def as_json(
    environment: dict[str, Any], results: dict[Scene, dict[str, list[float]]]
) -> dict[str, Any]:
    scenes = [
        {
            **vars(scene),
            "images_per_second": {name: round(median(mine), 1) for name, mine in rates.items()},
            "rounds": {name: [round(rate, 1) for rate in mine] for name, mine in rates.items()},
            "ratios": {
                ours: {name: round(ratio(rates[ours], mine), 3) for name, mine in rates.items()}
                for ours in filter(is_ours, rates)
            },
        }
        for scene, rates in results.items()
    ]
    return {"benchmark": "loader", "environment": environment, "scenes": scenes}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    others = os.environ.get("PITSTOP_OTHERS_PYTHON", "/tmp/peers/others/bin/python")
    ffcv = os.environ.get("PITSTOP_FFCV_PYTHON", "/tmp/peers/ffcv/bin/python")
    some = "comma-separated"
    parser.add_argument("--resolution", type=numbers, default=[224], help=f"{some} (224)")
    parser.add_argument("--cores", type=numbers, default=[1, 2], help=f"{some} (1,2)")
    parser.add_argument("--short-side", type=numbers, default=[256, 400], help=f"{some} (256,400)")
    parser.add_argument(
        "--levels", type=numbers, help=f"{some}; then pitstop runs with and without them"
    )
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), help=f"{some}, of {', '.join(PEERS)} (all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="a tar of class folders")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/pitstop-bench"))
    parser.add_argument("--others-python", default=others, help="or PITSTOP_OTHERS_PYTHON")
    parser.add_argument("--ffcv-python", default=ffcv, help="or PITSTOP_FFCV_PYTHON")
    options = parser.parse_args()
    unknown = set(options.peers or ()) - set(PEERS)
    if unknown:
        parser.error(f"no peer {', '.join(sorted(unknown))}: there are {', '.join(PEERS)}")
    return options


def chosen(options: argparse.Namespace) -> dict[str, Contender]:
    """Returns the contenders; DALI reads smaller files only of the short sides asked for."""
    idle = {f"dali-{side}" for side in (256, 400) if side not in options.short_side}
    names = options.peers if options.peers is not None else [n for n in PEERS if n not in idle]
    contenders = {name: PEERS[name] for name in names}
    ours = [pitstop(side) for side in options.short_side]
    if options.levels:
        ours += [pitstop(side, *options.levels) for side in options.short_side]
    return contenders | {f"pitstop-{contender.variant}": contender for contender in ours}


def main() -> None:
    options = parse_options()
    options.cache.mkdir(parents=True, exist_ok=True)
    unpack(options.data, options.cache)
    interpreters = {
        "here": sys.executable,
        "others": options.others_python,
        "ffcv": options.ffcv_python,
    }
    stage = Stage(options.cache.resolve(), interpreters)
    contenders, versions = prepare(stage, chosen(options))
    environment = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **dict(sorted(versions.items())),
    }
    print(", ".join(f"{name} {what}" for name, what in environment.items()))
    warm(options.cache)
    results: dict[Scene, dict[str, list[float]]] = {}
    for resolution in options.resolution:
        for cores in options.cores:
            scene = Scene(resolution, cores)
            results[scene] = measure(stage, contenders, scene, options.rounds)
            report(contenders, scene, results[scene])
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(environment, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
