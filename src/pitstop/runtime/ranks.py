"""Ranks: the processes that train one model together, and what they tell each other.

The gradients go through DistributedDataParallel. All else goes two ways. Small numbers that each
step needs go over a gloo group of their own, so that they never wait for the device. What happens
once, takes as long as it takes, or goes wrong is said in a key-value store that rank 0 keeps.

A thread of each rank says every second that it is alive and what it is at, and watches for
failures: whatever its main thread waits for, a rank ends with the first failure's exit code.

- A rank that fails says so.
- One that dies without a word is missed by the others when its connections break, or, should they
  wait for a GPU meanwhile, by rank 0's thread when it has heard nothing for LOST_SECONDS.
- One that hangs is missed when `timeout` is over.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from pitstop.core.errors import InputError, RankFailedError
from pitstop.core.exit_codes import BAD_INPUT, INTERNAL, KILLED, LAUNCHER
from pitstop.runtime.place import Place, end_process, meeting_point

DEFAULT_TIMEOUT = 300.0
"""Seconds after which a rank that does not answer is given up."""

WATCH_SECONDS = 1.0
POLL_SECONDS = 0.1

ROLL_CALL_SECONDS = 5.0
"""From a broken connection to a verdict on who is lost."""

LOST_SECONDS = 30.0
"""A process may hold Python's lock for a while, as when it loads or compiles something."""

FAILURE = "failure"

STARTING, ENDING = "starting", "ending"
"""What takes as long as it takes: packing, the last save."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step.

    `stop` is why to: the highest number that any of them gives, 0 for not at all. What the numbers
    mean is up to the caller.
    """

    stop: int = 0
    save: bool = False
    flush: bool = False


class Ranks:
    """This process among the others, as a context manager; alone by default.

    Entering waits for the others. Whoever leaves with an exception takes the others along; if it
    is another rank's failure that raised it, RankFailedError is raised in its stead.

    Args:
        place: which of how many this process is.
        timeout: seconds after which a rank that does not answer is given up.
    """

    def __init__(self, place: Place | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.place = place or Place()
        self.rank, self.world = self.place.rank, self.place.world
        self.main = self.rank == 0
        self.speaks_for_node = self.place.local_rank == 0
        self._timeout = timedelta(seconds=timeout)
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._ended = threading.Event()
        self._beats, self._doing = 0, STARTING
        self._sent = 0

    # Joining and leaving

    def __enter__(self) -> Self:
        if LAUNCHER in os.environ:
            mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # pyright: ignore[reportAttributeAccessIssue]
            if os.getppid() != int(os.environ[LAUNCHER]):  # it was too late for that
                os.kill(os.getpid(), signal.SIGTERM)
        if self.world > 1:
            self._join()
        return self

    def _join(self) -> None:
        os.environ.update(meeting_point())
        try:
            self._store, watched = self._connect(), self._connect()
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            message = f"rank {self.rank} did not find the others at {where}: {error}"
            raise RankFailedError(" ".join(message.split()), INTERNAL, shown=True) from None
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        self._watcher = threading.Thread(target=self._watch, args=[watched], daemon=True)
        self._watcher.start()
        dist.init_process_group(
            backend,
            store=PrefixStore("groups", self._store),
            rank=self.rank,
            world_size=self.world,
            timeout=self._timeout,
        )
        self._control: Any = dist.new_group(backend="gloo", timeout=self._timeout)

    def _connect(self) -> Store:
        stores = rendezvous("env://", self.rank, self.world, timeout=self._timeout)
        # torchrun may give an attempt the store of the one before; our launcher does not
        attempt = "" if LAUNCHER in os.environ else os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        return PrefixStore(f"pitstop{attempt}", next(stores)[0])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.world == 1:
            return
        failed = None if error is None else self._account_for(error)
        self._ended.set()
        self._watcher.join()
        self._wait_for_the_others_to_leave(failed is not None)
        if failed is not None and failed is not error:
            raise failed from error
        if error is None:
            dist.destroy_process_group()

    def _wait_for_the_others_to_leave(self, failed: bool) -> None:
        """Rank 0 goes last, for the store goes with it."""
        with suppress(RuntimeError):  # the store is gone
            self._store.set(f"left/{self.rank}", "")
            if self.main:
                everyone = [f"left/{rank}" for rank in range(self.world)]
                until = 3 * WATCH_SECONDS if failed else self._timeout.total_seconds()
                self._wait_for(everyone, until)

    # What each step needs

    def begin(self, doing: str) -> None:
        """Notes what this rank begins to do, for those who ask should it not come to an end."""
        self._beats, self._doing = self._beats + 1, doing

    def agree(self, wish: Decision) -> Decision:
        """Says what this rank wishes, and returns what any rank wished at the call before.

        Nothing waits: the answer to the call before has long arrived. A rank that is alone gets
        its own wish at once.
        """
        if self.world == 1:
            return wish
        before = self._answer()
        # what is done now is not wished for again
        wish = replace(wish, save=wish.save > before.save, flush=wish.flush > before.flush)
        tensor = torch.tensor(astuple(wish), dtype=torch.int32)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        self._pending = work, tensor
        return before

    def _answer(self) -> Decision:
        if self._pending is None:
            return Decision()
        work, tensor = self._pending
        work.wait()
        stop, save, flush = tensor.tolist()
        return Decision(stop, bool(save), bool(flush))

    def gather(self, values: Iterable[float]) -> torch.Tensor:
        """Returns the values of all ranks, float64 [world, n]; waits for them."""
        own = torch.tensor([*values], dtype=torch.float64)
        if self.world == 1:
            return own[None]
        everyone = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(everyone, own, group=self._control)
        return torch.stack(everyone)

    # The model

    def parallel(self, model: nn.Module) -> nn.Module:
        """Returns the model with its gradients averaged over the ranks.

        It takes over rank 0's weights and buffers. From then on each rank has its own batch
        statistics, of which those of rank 0 count: see `take_main_buffers`.
        """
        if self.world == 1:
            return model
        self.take_main_buffers(model)  # frozen layers compute with them
        device = next(model.parameters()).device
        index = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():  # torch 2.14 has another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model, device_ids=index, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def without_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Returns the context of a backward pass whose gradients stay on this rank as yet."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def take_main_buffers(self, model: nn.Module) -> None:
        """Gives all ranks rank 0's buffers (batch statistics), where those are computed with."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    # What happens once

    def from_main(self, value: bytes | None) -> bytes:
        """Returns the bytes, one or more, that rank 0 gives, on all ranks, whenever it does."""
        if self.world == 1:
            assert value is not None
            return value
        self._sent += 1
        self.say_to_all(f"sent/{self._sent}", 1 if self.main else None)
        size = torch.tensor([len(value or b"")])
        dist.broadcast(size, 0, group=self._control)
        if value is None:
            data = torch.empty(int(size), dtype=torch.uint8)
        else:
            data = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._control)
        return data.numpy().tobytes() if value is None else value

    def say_to_all(self, name: str, value: int | None) -> int:
        """Returns the number that rank 0 gives, whenever it does; `name` is used once."""
        if self.world == 1:
            assert value is not None
            return value
        if value is not None:
            self._store.set(name, str(value))
        self._wait_for([name])
        return int(self._store.get(name))

    def any(self, name: str, value: Callable[[], bool]) -> bool:
        """Tells, when all ranks have come here, whether the value was true on any; used once.

        It counts, and `already` tells the others, also when it becomes true while this one waits.
        """
        if self.world == 1:
            return value()

        def look() -> None:
            if value():
                self._store.set(f"{name}/true", "")

        self._meet(f"{name}/come", look)
        look()
        self._meet(f"{name}/looked", lambda: None)
        return self.already(name)

    def already(self, name: str) -> bool:
        """Tells whether `any` of that name is true already."""
        return self.world > 1 and self._store.check([f"{name}/true"])

    @contextmanager
    def node_first(self, name: str) -> Generator[None]:
        """Lets the first rank of each machine through, and the others when it is done."""
        key = f"{name}/node/{self.place.node}"
        if self.world > 1 and not self.speaks_for_node:
            self._wait_for([key])
        yield
        if self.world > 1 and self.speaks_for_node:
            self._store.set(key, "")

    def _meet(self, name: str, meanwhile: Callable[[], None]) -> None:
        everyone = [f"{name}/{rank}" for rank in range(self.world)]
        self._store.set(everyone[self.rank], "")
        while not self._wait_for(everyone, WATCH_SECONDS):
            meanwhile()

    def _wait_for(self, keys: list[str], seconds: float = float("inf")) -> bool:
        """Waits for keys of the store; tells whether all are there."""
        until = time.monotonic() + seconds
        while not (there := self._store.check(keys)) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return there

    # Failure

    def _account_for(self, error: BaseException) -> BaseException:
        """Tells the others of this rank's failure; returns the first one of all of them."""
        try:
            if not is_of_a_lost_rank(error):
                mine = self._failure(*_cause_and_code(error))
                is_first = self._is_first(mine)
                if not isinstance(error, InputError):
                    return error if is_first else self._first()
                return error if self.main else self._first()  # rank 0 says all of these
            cause = f"{self._missing()} ({error})"
            if not self._store.check([FAILURE]):
                self._is_first(self._failure(cause, INTERNAL))
            return self._first()
        except RuntimeError:
            return self._store_is_lost()

    def _failure(self, cause: str, code: int) -> dict[str, Any]:
        cause = " ".join(cause.split())
        return {"rank": self.rank, "host": socket.gethostname(), "cause": cause, "code": code}

    def _is_first(self, failure: dict[str, Any], store: Store | None = None) -> bool:
        said = json.dumps(failure)
        return (store or self._store).compare_set(FAILURE, "", said).decode() == said

    def _first(self, store: Store | None = None) -> RankFailedError:
        failure = json.loads((store or self._store).get(FAILURE))
        where = f"rank {failure['rank']} on {failure['host']}"
        return RankFailedError(f"{where}: {failure['cause']}", failure["code"], shown=self.main)

    def _missing(self) -> str:
        """Says which rank did not answer, as one whose connection broke or timed out."""
        before = self._signs_of_life(self._store)
        self._store.set(f"missed/{self.rank}", "")
        self._wait_for([f"missed/{rank}" for rank in range(self.world)], ROLL_CALL_SECONDS)
        after = self._signs_of_life(self._store)
        content = {r: s for r, s in after.items() if not self._store.check([f"missed/{r}"])}
        lost = [rank for rank, signs in content.items() if signs.ticks == before[rank].ticks]
        if lost:
            return _lost(lost)
        return _hangs(content, self._timeout) if content else "the connection between ranks broke"

    def _signs_of_life(self, store: Store) -> "dict[int, Signs]":
        said = store.multi_get([f"alive/{rank}" for rank in range(self.world)])
        return {rank: Signs(*json.loads(line)) for rank, line in enumerate(said)}

    def _watch(self, store: Store) -> None:
        """Ends this process when a rank has failed, whatever its main thread waits for."""
        everyone, judge = [f"alive/{rank}" for rank in range(self.world)], Judge(self._timeout)
        ticks = 0
        while not self._ended.wait(WATCH_SECONDS if ticks else 0):
            ticks += 1
            try:
                store.set(everyone[self.rank], json.dumps([ticks, self._beats, self._doing]))
                if self.main and store.check(everyone):
                    verdict = judge.verdict(self._signs_of_life(store), time.monotonic())
                    if verdict is not None and not store.check([FAILURE]):
                        self._is_first(self._failure(verdict, INTERNAL), store)
                failed = self._first(store) if store.check([FAILURE]) else None
            except RuntimeError:
                failed = self._store_is_lost()
            # rank 0 ends last, as the store goes with it
            if failed is not None and not self._ended.wait(WATCH_SECONDS * (1 + 2 * self.main)):
                if failed.shown:
                    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
                    print(f"{show_cursor}pitstop: {failed}", file=sys.stderr)
                with suppress(RuntimeError):
                    store.set(f"left/{self.rank}", "")
                end_process(failed.exit_code)

    def _store_is_lost(self) -> RankFailedError:
        shown = self.rank == 1 or self.speaks_for_node
        return RankFailedError(_lost([0]), INTERNAL, shown=shown)


class Signs(NamedTuple):
    """Of life: what a rank's thread says each second."""

    ticks: int
    """Of the thread itself."""
    beats: int
    """How often the main thread has begun something."""
    doing: str


class Judge:
    """Tells from signs of life which rank is lost, or hangs."""

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._ticks: dict[int, tuple[int, float]] = {}
        self._beats: tuple[list[int], float] = ([], 0.0)

    def verdict(self, signs: dict[int, Signs], now: float) -> str | None:
        """Returns what is wrong, None as long as nothing is.

        Args:
            signs: of all ranks, as they are now.
            now: seconds on a clock.
        """
        for rank, sign in signs.items():
            ticks, _ = self._ticks.get(rank, (None, now))
            if ticks != sign.ticks:
                self._ticks[rank] = sign.ticks, now
        lost = [rank for rank, (_, since) in self._ticks.items() if now - since > LOST_SECONDS]
        if lost:
            return _lost(lost)
        beats = [sign.beats for sign in signs.values()]
        patient = any(sign.doing in (STARTING, ENDING) for sign in signs.values())
        if patient or beats != self._beats[0]:
            self._beats = beats, now
        if now - self._beats[1] > self._timeout.total_seconds() + LOST_SECONDS:
            return _hangs(signs, self._timeout)
        return None


def _lost(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))} was lost: killed, or its machine is gone"


def _hangs(signs: dict[int, Signs], timeout: timedelta) -> str:
    """Names the rank that has come least far."""
    rank = min(signs, key=lambda rank: signs[rank].beats)
    seconds = timeout.total_seconds()
    return f"rank {rank} hangs: no answer for {seconds:g} s while it was {signs[rank].doing}"


def _cause_and_code(error: BaseException) -> tuple[str, int]:
    """Returns what to tell the others of an exception, and the exit code that it means."""
    if isinstance(error, InputError):
        return str(error), BAD_INPUT
    code = KILLED if isinstance(error, KeyboardInterrupt) else INTERNAL
    return f"{type(error).__name__}: {error}", code


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Tells whether an error only says that another rank did not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
