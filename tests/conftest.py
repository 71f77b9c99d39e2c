"""Property tests ask the same questions on every run, and are not timed. Two machines in one."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
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


@pytest.fixture(scope="session")
def s3_endpoint() -> Generator[str]:
    """An S3 server on loopback, for as long as the tests run."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


SECRET = "a-secret-that-nobody-prints"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment with the keys of AWS, and nothing of the user's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture
def bucket(s3_endpoint: str, aws: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket on the S3 server, to which the environment points."""
    import uuid

    import boto3

    aws.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    name = f"bucket-{uuid.uuid4().hex}"
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}"
