"""Images are read and converted by several processes, in order: Pillow's encoder holds the GIL.

The processes import neither torch nor pyarrow, so they are there in 0.3 s. They are started as
programs rather than by ProcessPoolExecutor: a user's script needs no `if __name__ == "__main__"`,
and they end when the packing process does, however that ends.
"""

import errno
import os
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from pitstop.core.errors import InputError
from pitstop.data.convert import Settings, Split, Stored, convert, why_bad
from pitstop.data.sources.base import Item, Reader

FEW = 2000
"""Up to so many images are converted by threads, which are there at once."""

_TASK = 32
"""Images that a process is handed at once."""

_AHEAD = 2
"""Tasks that a process is handed before it has answered: it reads the images of the next."""

_OF_THE_FILE = (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENOENT, errno.ENOTDIR)
"""Reading errors that will come again. Others, of a disk or a network, do not make a bad image."""

_WINDOW = 8
"""Tasks a process that may be under way, or done and waiting for an earlier one."""

_READS = 8
"""Images that are read at once: one from a bucket takes as long as it takes to convert several."""

_SERVE = "import sys; from pitstop.data.converters import serve; serve(int(sys.argv[1]))"

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Converted(NamedTuple):
    """A good image."""

    stored: Stored
    digests: tuple[bytes, ...]
    """Of each picture along with the label, sha256."""


Result = Converted | str
"""Of an image; in words why it is bad."""


class Why(NamedTuple):
    """Why an image was not taken as it is, in words; None where it was."""

    bad: str | None
    converted: str | None


def why_odd(result: Result) -> Why:
    """Returns what is to be said of a result."""
    return Why(result, None) if isinstance(result, str) else Why(None, result.stored.converted)


Convert = Callable[[Split, Sequence[Item]], Generator[Result]]
"""Yields the results of items of a split, in their order."""


@contextmanager
def converters(
    read: Reader, settings: Settings, *, images: int, workers: int, check: Callable[[], None]
) -> Generator[Convert]:
    """Makes images convertible as long as the block lasts, by processes if they are many.

    Args:
        read: can be pickled.
        images: how many it will be.
        workers: processes.
        check: called often by whoever takes the results; what it raises ends the block.

    Raises:
        InputError: of the reader (a bucket cannot be reached), or a process was killed.
    """
    if images <= FEW:
        with warnings.catch_warnings():
            _ignore_oddities()
            yield partial(_by_threads, read, settings, workers, check)
        return
    processes = [_Process(check) for _ in range(workers)]
    try:
        for process in processes:
            process.send((read, settings))
        yield partial(_by_processes, processes, check)
    finally:
        for process in processes:
            process.kill()


def _ignore_oddities() -> None:
    """Mutes warnings about odd metadata and large images; what matters is raised."""
    warnings.filterwarnings("ignore", module="PIL")


def _fetched(read: Reader, name: str) -> bytes | Exception:
    try:
        return read(name)
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            return error
        return InputError(f"{name} cannot be read ({error}): the same command goes on")
    except Exception as error:
        return error


def _result(fetched: bytes | Exception, split: Split, item: Item, settings: Settings) -> Result:
    try:
        if isinstance(fetched, Exception):
            raise fetched
        stored = convert(fetched, split, settings)
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"there is too little memory for {item.name}: fewer --workers") from None
    except Exception as error:  # decoders raise nearly anything
        return why_bad(error)
    label = item.label.to_bytes(4, "little")
    return Converted(stored, tuple(sha256(label + p.data).digest() for p in stored.pictures))


def _read_and_convert(read: Reader, split: Split, item: Item, settings: Settings) -> Result:
    return _result(_fetched(read, item.name), split, item, settings)


def _by_threads(
    read: Reader,
    settings: Settings,
    workers: int,
    check: Callable[[], None],
    split: Split,
    items: Sequence[Item],
) -> Generator[Result]:
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max(workers, _READS)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_read_and_convert, read, split, item, settings))
                if len(pending) > 4 * max(workers, _READS):
                    yield pending.popleft().result()
                    check()
            while pending:
                yield pending.popleft().result()
                check()
        finally:
            for future in pending:
                future.cancel()


def _by_processes(
    processes: Sequence["_Process"],
    check: Callable[[], None],
    split: Split,
    items: Sequence[Item],
) -> Generator[Result]:
    """Hands out tasks in turn; what is done early waits for what comes before."""
    done: dict[int, list[Result]] = {}
    handed = given = 0
    tasks = -(-len(items) // _TASK)
    while given < tasks:
        for process in chain(*[processes] * _AHEAD):
            if handed < min(tasks, given + _WINDOW * len(processes)) and process.owes < _AHEAD:
                task = items[handed * _TASK : (handed + 1) * _TASK]
                process.hand((handed, split, task))
                handed += 1
        for process in _ready(processes):
            number, results = process.answer()
            done[number] = results
        check()
        while given in done:
            for result in done.pop(given):
                yield result
                check()
            given += 1


def _ready(processes: Sequence["_Process"]) -> list["_Process"]:
    ready = wait([process.connection for process in processes], timeout=0.1)
    return [process for process in processes if process.connection in ready]


class _Process:
    """A process that converts."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self.connection, theirs = Pipe()
        self.owes = 0
        """Tasks that it has not answered yet."""
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-c", _SERVE, str(theirs.fileno())],
                env=os.environ | _ONE_THREAD,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for whoever packs
            )

    def hand(self, task: tuple[int, Split, Sequence[Item]]) -> None:
        """Gives it something to do."""
        self.send(task)
        self.owes += 1

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            raise self._died() from None

    def answer(self) -> tuple[int, list[Result]]:
        """Returns a task's number and its results, as soon as they are there."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, InputError):
            raise answer
        self.owes -= 1
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def _died(self) -> Exception:
        code = self._process.wait()
        self._check()  # a signal to stop may have met it too, before it had a group of its own
        if code == -signal.SIGKILL:
            reason = "a process that converts images was killed, for lack of memory as it seems"
            return InputError(f"{reason}: the same command goes on; give it fewer --workers")
        return RuntimeError(f"a process that converts images ended with {code}")


# In such a process.


class _Task(NamedTuple):
    number: int
    split: Split
    items: Sequence[Item]
    lanes: Sequence[Future[list[bytes | Exception]]]
    """The images of every 8th item, from the first one on, from the second one on, ..."""


def serve(descriptor: int) -> None:
    """Converts what comes through a connection until it is closed."""
    tasks: SimpleQueue[_Task] = SimpleQueue()
    with Connection(descriptor) as connection, ThreadPoolExecutor(_READS) as pool:
        try:
            read, settings = connection.recv()
            Thread(target=_receive, args=(connection, pool, read, tasks), daemon=True).start()
            while True:
                connection.send(_answer(tasks.get(), settings))
        except (EOFError, ConnectionError):
            os._exit(0)  # at once, as _receive does: nobody is left to read for


def _answer(task: _Task, settings: Settings) -> tuple[int, list[Result]] | InputError:
    try:
        return task.number, [
            _result(task.lanes[at % _READS].result()[at // _READS], task.split, item, settings)
            for at, item in enumerate(task.items)
        ]
    except InputError as error:
        return error


def _receive(
    connection: Connection, pool: ThreadPoolExecutor, read: Reader, tasks: SimpleQueue[_Task]
) -> None:
    """Has the images of tasks read as they come; ends the process with the connection."""
    while True:
        try:
            number, split, items = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        lanes = [pool.submit(_read_lane, read, items[lane::_READS]) for lane in range(_READS)]
        tasks.put(_Task(number, split, items, lanes))


def _read_lane(read: Reader, items: Sequence[Item]) -> list[bytes | Exception]:
    return [_fetched(read, item.name) for item in items]
