"""Ranks: the processes that train one model together, and what they tell each other.

The gradients go through DistributedDataParallel. All else goes two ways. Small numbers that each
step needs go over a gloo group of their own, so that they never wait for the device. What happens
once, takes as long as it takes, or goes wrong is said in a key-value store that rank 0 keeps.

A rank that fails says so there and each rank, whatever it is at, watches for it: all end with the
first failure's exit code WATCH_SECONDS later. A rank that dies without a word is missed by the
others when its connections break; one that hangs, when `timeout` is over. Then the others call the
roll, wait ROLL_CALL_SECONDS for answers, and name the rank that gave none, or that missed nobody.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from pitstop.core.errors import InputError, RankFailedError
from pitstop.core.exit_codes import BAD_INPUT, INTERNAL, KILLED, OUTCOME
from pitstop.runtime.place import Place, end_process, meeting_point

DEFAULT_TIMEOUT = 300.0
"""Seconds after which a rank that does not answer is given up."""

WATCH_SECONDS = 1.0
ROLL_CALL_SECONDS = 5.0
POLL_SECONDS = 0.1

FAILURE, ROLL_CALL = "failure", "roll-call"


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step."""

    stop: bool = False
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
        self._beats, self._doing = 0, "starting"

    # Joining and leaving

    def __enter__(self) -> Self:
        if OUTCOME in os.environ:
            mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # pyright: ignore[reportAttributeAccessIssue]
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
        return PrefixStore("pitstop", next(stores)[0])

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
                until = ROLL_CALL_SECONDS if failed else self._timeout.total_seconds()
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
        return Decision(*(bool(value) for value in tensor.tolist()))

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
        """Returns the bytes, one or more, that rank 0 gives, on all ranks."""
        if self.world == 1:
            assert value is not None
            return value
        size = torch.tensor([len(value or b"")])
        dist.broadcast(size, 0, group=self._control)
        if value is None:
            data = torch.empty(int(size), dtype=torch.uint8)
        else:
            data = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._control)
        return data.numpy().tobytes()

    def say_to_all(self, name: str, value: int | None) -> int:
        """Returns the number that rank 0 gives, whenever it does; `name` is used once."""
        if self.world == 1:
            assert value is not None
            return value
        if value is not None:
            self._store.set(name, str(value))
        self._wait_for([name])
        return int(self._store.get(name))

    def any(self, name: str, value: bool) -> bool:
        """Tells whether the value is true on any rank, whenever all have one; used once."""
        if self.world == 1:
            return value
        self._store.set(f"{name}/{self.rank}", str(int(value)))
        keys = [f"{name}/{rank}" for rank in range(self.world)]
        self._wait_for(keys)
        return any(self._store.get(key) == b"1" for key in keys)

    @contextmanager
    def node_first(self, name: str) -> Generator[None]:
        """Lets the first rank of each machine through, and the others when it is done."""
        key = f"{name}/node/{self.place.node}"
        if self.world > 1 and not self.speaks_for_node:
            self._wait_for([key])
        yield
        if self.world > 1 and self.speaks_for_node:
            self._store.set(key, "")

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
            if not _is_of_a_lost_rank(error):
                mine = self._failure(*_cause_and_code(error))
                own = self._is_first(mine) or (self.main and isinstance(error, InputError))
                return error if own else self._first()
            self._store.set(ROLL_CALL, "")
            self._answer_roll_call(self._store)
            self._store.set(f"missed/{self.rank}", "")
            everyone = [f"missed/{rank}" for rank in range(self.world)]
            self._wait_for(everyone, ROLL_CALL_SECONDS)
            if not self._store.check([FAILURE]):
                self._is_first(self._failure(f"{self._missing()} ({error})", INTERNAL))
            return self._first()
        except RuntimeError:
            return self._store_is_lost()

    def _failure(self, cause: str, code: int) -> dict[str, Any]:
        cause = " ".join(cause.split())
        return {"rank": self.rank, "host": socket.gethostname(), "cause": cause, "code": code}

    def _is_first(self, failure: dict[str, Any]) -> bool:
        said = json.dumps(failure)
        return self._store.compare_set(FAILURE, "", said).decode() == said

    def _first(self, store: Store | None = None) -> RankFailedError:
        failure = json.loads((store or self._store).get(FAILURE))
        where = f"rank {failure['rank']} on {failure['host']}"
        return RankFailedError(f"{where}: {failure['cause']}", failure["code"], shown=self.main)

    def _missing(self) -> str:
        """Names the ranks that gave no answer to the roll call, or the one that missed nobody."""
        here = [rank for rank in range(self.world) if self._store.check([f"here/{rank}"])]
        lost = [str(rank) for rank in range(self.world) if rank not in here]
        if lost:
            return f"rank {', '.join(lost)} was lost: killed, or its machine is gone"
        content = [rank for rank in here if not self._store.check([f"missed/{rank}"])]
        if not content:
            return "the connection between the ranks broke"
        answers = [(*json.loads(self._store.get(f"here/{rank}")), rank) for rank in content]
        _, doing, rank = min(answers)
        seconds = self._timeout.total_seconds()
        return f"rank {rank} hangs: no answer for {seconds:g} s while it was {doing}"

    def _answer_roll_call(self, store: Store) -> None:
        store.set(f"here/{self.rank}", json.dumps([self._beats, self._doing]))

    def _watch(self, store: Store) -> None:
        """Ends this process when another rank has failed, whatever its main thread waits for."""
        answered = False
        while not self._ended.wait(WATCH_SECONDS):
            try:
                if not answered and store.check([ROLL_CALL]):
                    self._answer_roll_call(store)
                    answered = True
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
        cause = "rank 0 was lost: killed, or its machine is gone"
        return RankFailedError(cause, INTERNAL, shown=self.rank == 1)


def _cause_and_code(error: BaseException) -> tuple[str, int]:
    """Returns what to tell the others of an exception, and the exit code that it means."""
    if isinstance(error, InputError):
        return str(error), BAD_INPUT
    code = KILLED if isinstance(error, KeyboardInterrupt) else INTERNAL
    return f"{type(error).__name__}: {error}", code


def _is_of_a_lost_rank(error: BaseException) -> bool:
    """Tells whether an error only says that another rank did not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
