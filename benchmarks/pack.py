"""Packing against what it cannot do without: decoding, shrinking and encoding alone.

The images are the photos of the ImageNet sample under several names each, as a class folder; the
page cache is warm. Packing is `pitstop.data.pack.pack` from its call to its return: it starts its
processes, reads, converts, hashes, writes shards, index and manifest, and fsyncs. Alone is the same
`convert` on the same files with the same settings by as many processes, which are there already and
drop what comes of it. Both take turns, in the other order every second round, and all is pinned to
as many cores as there are processes. Images a second are medians of the rounds; the ratio is the
median of the rounds' ratios.

    python benchmarks/pack.py
    python benchmarks/pack.py --short-side 256 --levels 160 --rounds 5
"""

import argparse
import json
import os
import platform
import shutil
import tarfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import PIL
import simplejpeg

from pitstop.data.convert import Settings, convert
from pitstop.data.pack import pack
from pitstop.data.sources.base import Source
from pitstop.data.sources.folder import folder_source

SAMPLE = Path(__file__).parent.parent.parent / "shared" / "data" / "imagenet-sample.tar"

IN_VAL = 10
"""Images a class that are validation images: a packed dataset must have some."""

CLASSES = 10


@dataclass(frozen=True)
class Round:
    """Images a second."""

    pack: float
    alone: float


def make_folder(cache: Path, copies: int) -> Path:
    """Returns a class folder of the sample, each photo under several names."""
    root = cache / f"pack-{copies}"
    if root.exists():
        return root
    with tarfile.open(SAMPLE) as archive:
        archive.extractall(cache, filter="data")
    building = cache / f"pack-{copies}.partial"
    shutil.rmtree(building, ignore_errors=True)
    photos = sorted((cache / "imagenet-sample").rglob("*.JPEG"))
    for index, photo in enumerate(photos):
        for copy in range(copies):
            split = "val" if copy == 0 and index < IN_VAL * CLASSES else "train"
            place = building / split / f"class{index % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{copy}-{photo.name}").symlink_to(photo.resolve())
    building.rename(root)
    return root


def converter(connection: Connection, files: list[Path], copies: int, settings: Settings) -> None:
    """Is a process of `Alone`: converts its images as often as it is told to."""
    connection.send("ready")
    while connection.recv():
        for file in files * copies:
            convert(file.read_bytes(), "train", settings)
        connection.send("done")


class Alone:
    """Processes that convert the photos; they do nothing until `run`."""

    def __init__(self, cache: Path, copies: int, settings: Settings, processes: int) -> None:
        photos = sorted((cache / "imagenet-sample").rglob("*.JPEG"))
        self._images = len(photos) * copies
        context = get_context("spawn")
        self._connections: list[Connection] = []
        for number in range(processes):
            ours, theirs = context.Pipe()
            work = (theirs, photos[number::processes], copies, settings)
            context.Process(target=converter, args=work, daemon=True).start()
            self._connections.append(ours)
        self._wait()

    def run(self) -> float:
        """Returns images a second."""
        started = time.perf_counter()
        for connection in self._connections:
            connection.send(True)
        self._wait()
        return self._images / (time.perf_counter() - started)

    def close(self) -> None:
        for connection in self._connections:
            connection.send(False)

    def _wait(self) -> None:
        for connection in self._connections:
            connection.recv()


def run_pack(source: Source, out: Path, settings: Settings, processes: int) -> float:
    """Returns images a second."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    report = pack(
        source,
        out,
        short_side=settings.short_side,
        quality=settings.quality,
        levels=settings.levels,
        workers=processes,
    )
    return (report.train + report.val) / (time.perf_counter() - started)


def measure(
    cache: Path, copies: int, settings: Settings, processes: int, rounds: int
) -> list[Round]:
    """Runs both in turn, after a pass of packing that warms the page cache."""
    source, out = folder_source(make_folder(cache, copies)), cache / "packed"
    alone = Alone(cache, copies, settings, processes)
    run_pack(source, out, settings, processes)
    measured: list[Round] = []
    for number in range(rounds):
        first = alone.run() if number % 2 else None
        packed = run_pack(source, out, settings, processes)
        measured.append(Round(packed, alone.run() if first is None else first))
    alone.close()
    shutil.rmtree(out)
    return measured


def report(settings: Settings, images: int, processes: int, rounds: list[Round]) -> None:
    """Prints the result, and again as JSON."""
    packed, alone = (median(getattr(each, what) for each in rounds) for what in ("pack", "alone"))
    ratio = median(each.pack / each.alone for each in rounds)
    levels = "".join(f", level {level}" for level in settings.levels)
    print(
        f"packing {images:,} photos, short side {settings.short_side}{levels}, "
        f"{processes} processes, medians of {len(rounds)}\n"
        f"  pack    {packed:,.0f} images/s\n"
        f"  alone   {alone:,.0f} images/s: decode, shrink, encode\n"
        f"  ratio   {ratio:.3f}"
    )
    result = {
        "benchmark": "pack",
        "short_side": settings.short_side,
        "levels": settings.levels,
        "images": images,
        "processes": processes,
        "pack_images_per_second": round(packed, 1),
        "alone_images_per_second": round(alone, 1),
        "ratio": round(ratio, 4),
        "ratios": [round(each.pack / each.alone, 4) for each in rounds],
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short-side", type=int, default=400, help="pixels (default 400)")
    parser.add_argument("--levels", default="", help="short sides of small copies: 160,256")
    parser.add_argument("--processes", type=int, default=2, help="and cores (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--copies", type=int, default=6, help="names a photo has (default 6)")
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/pitstop-pack"), help="on the disk to measure"
    )
    options = parser.parse_args()
    if not SAMPLE.exists():
        raise SystemExit(f"{SAMPLE} is not there: the photos are needed")
    options.cache.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.processes])
    levels = tuple(int(side) for side in options.levels.split(",") if side)
    settings = Settings(options.short_side, 90, levels)
    rounds = measure(options.cache, options.copies, settings, options.processes, options.rounds)
    report(settings, 1000 * options.copies, options.processes, rounds)


if __name__ == "__main__":
    main()
