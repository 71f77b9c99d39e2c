"""Property tests ask the same questions on every run, and are not timed. Two machines in one."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "pitstop",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pitstop")


@dataclass(frozen=True)
class Machine:
    """A network namespace: to what runs in it, a machine of its own."""

    namespace: str
    address: str

    def popen(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        """Starts a process there."""
        inside = ["ip", "netns", "exec", self.namespace, *map(str, command)]
        return subprocess.Popen(inside, text=True, **options)

    def kill(self) -> None:
        """Kills all processes there, as if the power was cut."""
        for pid in ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def ip(*arguments: str) -> str:
    """Runs iproute2's `ip`."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def machines() -> Generator[tuple[Machine, Machine]]:
    """Two machines on one wire, with the same host name."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    both = [Machine(f"pitstop{os.getpid()}-{n}", f"10.123.45.{n}") for n in (1, 2)]
    first, second = both
    try:
        for machine in both:
            ip("netns", "add", machine.namespace)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    wire = ("link", "add", "wire", "type", "veth", "peer", "name", "wire")
    ip("-n", first.namespace, *wire, "netns", second.namespace)
    for machine in both:
        inside = ("-n", machine.namespace)
        ip(*inside, "address", "add", f"{machine.address}/24", "dev", "wire")
        ip(*inside, "link", "set", "wire", "up")
        ip(*inside, "link", "set", "lo", "up")
    yield first, second
    for machine in both:
        machine.kill()
        ip("netns", "delete", machine.namespace)
