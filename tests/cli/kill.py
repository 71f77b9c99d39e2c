"""Runs pitstop and sends a process a signal at an exact moment of its work.

Usage: python kill.py MOMENT NTH SIGNAL RANK ARGUMENTS...

The signal comes at the NTH time that this RANK is at the MOMENT, and goes to itself; with a RANK
such as `2-all`, to all ranks and the launcher; with `2-launcher`, to that alone. In place of a
signal, RAISE raises an exception there, and HANG waits for ever. A process without ranks beside it
ends its ARGUMENTS in `--nproc 1`; else it is their launcher, at which nothing strikes.

Before a signal, standard output says `struck after N steps`: those that the state then has; `no`,
where this process has not trained yet. soak.py runs this file in forks of a process that has
imported pitstop, with a `request` in place of a command line.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pitstop.cli import launching, main
from pitstop.runtime.place import Place

if "request" in globals():  # of runpy.run_path
    request: dict[str, Any] = globals()["request"]
    os.environ.clear()
    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv[1:] = request["arguments"]

moment, nth, number, who, *arguments = sys.argv[1:]
launching.RANK = (sys.executable, *sys.argv[:5])
rank, _, others = who.partition("-")
left = int(nth) if int(rank) == (Place.find() or Place()).rank else 0
alone = arguments[-2:] == ["--nproc", "1"]
counting = threading.Lock()
trained = "no"


def strike() -> bool:
    """Counts one more time at the moment; sends the signal at the nth."""
    global left
    with counting:
        left -= 1
        now = left == 0
    if now and number == "RAISE":
        raise RuntimeError("a planted failure")
    if now and number == "HANG":
        threading.Event().wait()
    if now:
        os.write(1, f"\nstruck after {trained} steps\n".encode())
        for pid in victims():
            os.kill(pid, signal.Signals[number])
    return now


def victims() -> list[int]:
    """Whom the signal is for, this process last."""
    launcher = os.getppid()
    if others != "all":
        return [launcher if others else os.getpid()]
    children = Path(f"/proc/{launcher}/task").glob("*/children")
    ranks = [int(pid) for path in children for pid in path.read_text().split()]
    return [launcher, *(pid for pid in ranks if pid != os.getpid()), os.getpid()]


def struck(function: Callable[..., Any]) -> Callable[..., Any]:
    def at_the_moment(*args: Any, **kwargs: Any) -> Any:
        strike()
        return function(*args, **kwargs)

    return at_the_moment


def counted(train_step: Callable[..., Any]) -> Callable[..., Any]:
    def count(stage: Any, state: Any, batch: Any, settings: Any) -> Any:
        global trained
        metrics = train_step(stage, state, batch, settings)
        trained = str(settings.step + 1)
        return metrics

    return count


def torn(content: bytes) -> Iterator[bytes]:
    """Yields what is uploaded in three pieces; strikes when the first is there."""
    third = len(content) // 3 + 1
    yield content[:third]
    yield content[third : 2 * third]
    strike()
    yield content[2 * third :]


class NoPlotter:
    """Spares the seconds of the child process that draws."""

    def __init__(self, run: object) -> None: ...

    def update(self) -> None: ...

    def finish(self) -> None: ...


def plant() -> None:
    """Has this process struck at the moment."""
    import obstore

    from pitstop.data import load
    from pitstop.engine import evaluate, journal, lr_finder, train
    from pitstop.io import objects, records, remote, upload
    from pitstop.runtime import checkpoint

    journal.Plotter = NoPlotter
    train.train_step = counted(train.train_step)
    whole_save, whole_create = checkpoint.torch.save, objects.ObjectStore.create
    whole_claim = remote.Remote.claim

    def torn_save(state: Any, file: IO[bytes]) -> None:
        """Strikes when half of the checkpoint is written."""
        whole_save(state, file)
        if left == 1:
            file.truncate(file.tell() // 2)
            file.flush()
        strike()

    def torn_create(store: Any, key: str, content: bytes) -> None:
        """Strikes when a part of an object is there."""
        what = {"claim.json": "claim", "manifest.json": "snapshot"}.get(Path(key).name, "upload")
        if what != moment or left != 1:
            if what == moment:
                strike()
            whole_create(store, key, content)
        else:
            parts: Any = {"chunk_size": len(content) // 3 + 1, "max_concurrency": 1}
            obstore.put(store._store, key, torn(content), use_multipart=True, **parts)

    def struck_claim(*args: Any, **kwargs: Any) -> int:
        attempt = whole_claim(*args, **kwargs)
        strike()
        return attempt

    match moment:
        case "images":
            load.resize = struck(load.resize)
        case "step":
            train.train_step = struck(train.train_step)
        case "evaluation":
            evaluate.predict = struck(evaluate.predict)
        case "save":
            checkpoint.torch.save = torn_save
        case "manifest":
            checkpoint.write_json = struck(checkpoint.write_json)
        case "weights":
            checkpoint.safetensors_bytes = struck(checkpoint.safetensors_bytes)
        case "records":
            records.Records.add = struck(records.Records.add)
        case "finder":
            lr_finder.train_step = struck(lr_finder.train_step)
        case "upload" | "snapshot":
            objects.ObjectStore.create = torn_create
        case "verify":
            upload.Uploader._verify = struck(upload.Uploader._verify)
        case "retention":
            objects.ObjectStore.delete = struck(objects.ObjectStore.delete)
        case "claim":
            objects.ObjectStore.create = torn_create
            remote.Remote.claim = struck_claim
        case "restore":  # of each file: when its download begins, and when it is put in place
            remote._partial = struck(remote._partial)
        case _:
            assert moment == "never"


if alone or Place.find() is not None:
    plant()
sys.argv[1:] = arguments
main()
