"""torch's elastic agent, in a thread: the main thread stays free for signals.

torch's own handlers would have it miss a signal while it waits in a store, and forget a perfect
save. The machines meet in torch's c10d rendezvous, whose store is with the one at the endpoint.
"""

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import RESTARTED
from pitstop.launch.local import Nodes, say

RUN_ID = "pitstop"

JOIN_SECONDS = 600
"""How long a machine waits for the others, at the start and when one is lost."""

AT_ONCE_SECONDS = 1
"""The agent ends the ranks that are left when one failed: they fail later than that."""

ANYWHERE = ("192.0.2.1", 9)
"""An address of nobody (RFC 5737): asking for the way to it sends nothing."""


class Stopped(Exception):  # noqa: N818
    """Ranks were to be started after the launcher was told to stop."""


class LocalRanks(threading.Thread):
    """The ranks of this machine, and the agent that starts and watches them."""

    def __init__(
        self,
        command: Sequence[str],
        nproc: int,
        nodes: Nodes,
        max_restarts: int,
        outcome: Path,
    ) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self.failed = False
        self.killed = False
        self._command, self._nproc, self._nodes = command, nproc, nodes
        self._max_restarts, self._outcome = max_restarts, outcome
        self._agent: Agent | None = None
        self._stopped_by: int | None = None
        self._gate = threading.Lock()
        self._pids: list[int] = []

    # In the thread

    def run(self) -> None:
        """Meets the other machines and runs the ranks to their end."""
        logger = logging.getLogger("torch.distributed.elastic")  # we say ourselves what failed
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
        try:
            meeting = meet(self._nodes)
            self._run_agent(meeting)
        except Stopped:
            pass
        except (RendezvousError, dist.DistError) as error:
            self._fail(_reason(error, self._nodes))
        except Exception as error:
            self.error = error

    def _run_agent(self, meeting: "Meeting") -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=self._nproc,
            entrypoint=self._command[0],
            args=tuple(self._command[1:]),
            rdzv_handler=meeting,
            max_restarts=self._max_restarts,
        )
        self._agent = Agent(self, spec, self._outcome.parent)
        try:
            if self._agent.run() is None:
                raise RendezvousClosedError
        finally:
            meeting.end(close=self._stopped_by is None)

    def start_processes(self, start: Callable[[], dict[int, Any]]) -> dict[int, Any]:
        """Starts an attempt's processes, unless the launcher was told to stop."""
        with self._gate:
            if self._stopped_by is not None:
                raise Stopped
            self._outcome.unlink(missing_ok=True)
            self.failed = False
            started = start()
            os.environ[RESTARTED] = "1"  # for those that may come after these
            self._pids = [*started.values()]
            return started

    def report(self, failures: dict[int, ProcessFailure], *, again: bool) -> None:
        """Says which ranks failed, save what a signal ended before it had begun to work."""
        first = min(failures.values(), key=lambda failure: failure.timestamp)
        if self._stopped_by is not None and first.exitcode == -self._stopped_by:
            return
        more = "; all ranks start again" if again else ""
        for line in causes(failures):
            self._fail(line + more)

    def _fail(self, line: str) -> None:
        self.failed = True
        say(line)

    # In the main thread

    def stop(self, number: int) -> None:
        """Passes a signal on to the ranks; none are started from now on."""
        with self._gate:
            self._stopped_by = signal.SIGTERM if number == signal.SIGHUP else number
            for pid in self._alive():
                with suppress(ProcessLookupError):
                    os.kill(pid, self._stopped_by)

    def kill(self) -> None:
        """Ends the ranks, and what they started, at once."""
        with self._gate:
            for pid in self._alive():
                self.killed = True
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    @property
    def waits_in_vain(self) -> bool:
        """Whether it waits for other machines though it was told to stop."""
        meeting = (WorkerState.INIT, WorkerState.STOPPED)
        at_it = self._agent is None or self._agent.get_worker_group().state in meeting
        return self._stopped_by is not None and at_it and not self._alive()

    def _alive(self) -> list[int]:
        return [pid for pid in self._pids if _runs(pid)]


class Agent(LocalElasticAgent):
    """Starts ranks, and all of them again when one fails or a lost machine comes back."""

    def __init__(self, ranks: LocalRanks, spec: WorkerSpec, scratch: Path) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(scratch)))
        self._ranks = ranks

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        start = super()._start_workers
        return self._ranks.start_processes(lambda: start(worker_group))  # pyright: ignore[reportCallIssue]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if result.is_failed():
            self._ranks.report(result.failures, again=self._remaining_restarts > 0)
        return result


class Meeting(DynamicRendezvousHandler):
    """torch's c10d rendezvous, in which a machine may have a number of its own choice.

    torch's static rendezvous has no way back: it cannot take a lost machine in again.
    """

    node_rank: int | None = None

    def _get_world(self) -> tuple[int, int]:
        rank, world = super()._get_world()
        return rank if self.node_rank is None else self.node_rank, world

    def end(self, *, close: bool) -> None:
        """Leaves; once closed, no machine can come back to it."""
        if close:
            self.shutdown()
        self._stop_heartbeats()


def meet(nodes: Nodes) -> Meeting:
    """Returns the rendezvous of the machines, connected to the store at its endpoint.

    Raises:
        InputError: the endpoint has no address, or this machine should be there and its port is
            taken.
        RendezvousConnectionError: nobody answers there.
    """
    host, port = nodes.meeting_point()
    address = _resolve(nodes, host, port)
    own = _own_address(host, address, port)
    if nodes.count > 1 and (interface := _interface(own)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if not (_can_listen(address, port) if nodes.rank is None else nodes.rank == 0):
        return _join(nodes, address, port, own)
    try:
        return _meeting(nodes, address, port, own, host=True)
    except RendezvousConnectionError:
        if nodes.rank is not None:
            raise InputError(f"--rdzv-endpoint {nodes.endpoint}: port {port} is taken") from None
    return _join(nodes, address, port, own)  # another launcher here was faster


def _join(nodes: Nodes, address: str, port: int, own: str) -> Meeting:
    until = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return _meeting(nodes, address, port, own, host=False)
        except OSError as error:
            if time.monotonic() > until:
                raise RendezvousConnectionError from error
            time.sleep(0.5)


def _meeting(nodes: Nodes, address: str, port: int, own: str, *, host: bool) -> Meeting:
    at = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    where = RendezvousParameters(
        "c10d", at, RUN_ID, nodes.count, nodes.count, is_host=host, read_timeout=60
    )
    backend, store = create_backend(where)
    timeout = RendezvousTimeout(join=timedelta(seconds=JOIN_SECONDS))
    meeting = Meeting.from_backend(RUN_ID, store, backend, nodes.count, nodes.count, own, timeout)
    meeting.node_rank = nodes.rank
    return meeting


def _resolve(nodes: Nodes, host: str, port: int) -> str:
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise InputError(f"--rdzv-endpoint {nodes.endpoint}: {host} has no address") from None


def _own_address(host: str, address: str, port: int) -> str:
    """Returns this machine's address for the others: the one by which it reaches the endpoint."""
    own = _source(address, port)
    if own is None or (_is_loopback(own) and host not in ("localhost", address)):
        # Debian's /etc/hosts gives a machine's own name 127.0.1.1
        return _source(*ANYWHERE) or address
    return own


def _source(address: str, port: int) -> str | None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port or 9))
        except OSError:  # no way there
            return None
        return probe.getsockname()[0]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _can_listen(address: str, port: int) -> bool:
    """Tells whether the address is this machine's, and the port free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


def _interface(address: str) -> str | None:
    """Returns the name of the network interface with an IPv4 address (Linux), None if unknown.

    Without it, gloo takes the address of the host's name, which is often a loopback one.
    """
    if sys.platform != "linux" or ":" in address:
        return None
    import fcntl

    siocgifaddr = 0x8915  # netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = name.encode().ljust(256, b"\0")
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, request)
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def causes(failures: dict[int, ProcessFailure]) -> list[str]:
    """Returns a line for each rank that died by a signal, else one for the first that failed."""
    first = min(failures, key=lambda rank: failures[rank].timestamp)
    since = failures[first].timestamp
    killed = [
        rank
        for rank, failure in failures.items()
        if failure.timestamp - since <= AT_ONCE_SECONDS and -failure.exitcode > 0
        if -failure.exitcode != signal.SIGTERM  # by which the agent ends the others
    ]
    if not killed and failures[first].exitcode >= 0:
        return [f"rank {first} failed with exit code {failures[first].exitcode}"]
    return [f"rank {r} was killed by {failures[r].signal_name()}" for r in killed or [first]]


def _reason(error: Exception, nodes: Nodes) -> str:
    again = "start the command again on every machine"
    if isinstance(error, RendezvousTimeoutError):
        return f"fewer than {nodes.count} machines came to {nodes.endpoint} in {JOIN_SECONDS} s"
    if isinstance(error, RendezvousClosedError):
        return f"the run of {nodes.endpoint} has ended on another machine: {again}"
    return f"no answer from {nodes.endpoint}, where the machines meet: {again}"


def _runs(pid: int) -> bool:
    """Tells whether a child of this process has not ended; its parent still has to collect it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
