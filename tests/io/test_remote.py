"""Snapshots of a run in a bucket that fails in every way, and in a directory."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.io import upload
from pitstop.io.objects import Patience
from pitstop.io.remote import Remote, Snapshot
from pitstop.io.upload import Uploader

from .faults import FaultyS3, Kind, faulty_s3

PATIENCE = Patience(retries=2, retry_seconds=60.0, read_seconds=60.0)

SECONDS = 60.0
"""Longer than anything takes here."""

MANIFEST = r"PUT .*/manifest\.json$"

Lines = list[str]


@pytest.fixture(autouse=True)
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried again soon, but not often."""
    monkeypatch.setattr(upload, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(upload, "TRIES", 2)


@pytest.fixture
def server(s3_endpoint: str, bucket: str, aws: pytest.MonkeyPatch) -> Generator[FaultyS3]:
    """What stands before the bucket."""
    with faulty_s3(s3_endpoint) as server:
        aws.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture
def remote(server: FaultyS3, bucket: str) -> Remote:
    """An empty remote in a bucket that may fail."""
    return Remote(f"{bucket}/runs/mine", PATIENCE)


@pytest.fixture(params=["bucket", "directory"])
def any_remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    """An empty remote of each kind."""
    if request.param == "bucket":
        return request.getfixturevalue("remote")
    return Remote(str(tmp_path / "remote"))


@pytest.fixture
def lines() -> Lines:
    """What was said."""
    return []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory."""
    path = tmp_path / "run"
    write(path, {"checkpoints/one.pt": b"one" * 1000, "checkpoints/one.json": b"{}"})
    write(path, {"events.jsonl": b"1\n", "training_log.txt": b"", "best.safetensors": b"best"})
    return path


@pytest.fixture
def uploading() -> Generator[Callable[[Remote, int], Uploader]]:
    """Makes uploaders, and closes them."""
    uploaders: list[Uploader] = []

    def uploading(remote: Remote, attempt: int) -> Uploader:
        uploaders.append(Uploader(remote, attempt))
        return uploaders[-1]

    yield uploading
    for uploader in uploaders:
        uploader.close()


Uploading = Callable[[Remote, int], Uploader]


def write(run: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)


def contents(run: Path) -> dict[str, bytes]:
    """The files of a directory, by name."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def offer(uploader: Uploader, run: Path, sequence: int) -> None:
    """Offers all that there is in a run directory."""
    files = {name: run / name for name in sorted(contents(run))}
    uploader.offer(files, sequence=sequence, step=10 * sequence, epoch=0.5, top1=None)


def save(uploader: Uploader, run: Path, sequence: int) -> dict[str, bytes]:
    """Changes a run, has it uploaded, and returns what it was."""
    write(run, {"events.jsonl": b"1\n" * sequence, f"checkpoints/{sequence}.pt": b"%d" % sequence})
    offer(uploader, run, sequence)
    assert uploader.wait(SECONDS), uploader.problem
    return contents(run)


def newest(remote: Remote, lines: Lines) -> Snapshot:
    found = remote.newest(lines.append)
    assert found is not None
    return found


def restored(remote: Remote, lines: Lines, path: Path) -> dict[str, bytes]:
    """The files of the newest snapshot, restored into an empty directory."""
    remote.restore(newest(remote, lines), path, lines.append)
    return contents(path)


def keys(remote: Remote) -> set[str]:
    return {found.key for found in remote.store.list()}


# Attempts


def test_attempts_are_numbered(any_remote: Remote) -> None:
    assert [any_remote.claim() for _ in range(3)] == [1, 2, 3]


def test_two_never_claim_one_number(any_remote: Remote) -> None:
    together = threading.Barrier(8)

    def claim(_: int) -> int:
        together.wait()
        return any_remote.claim()

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(claim, range(8))) == list(range(1, 9))


def test_a_claim_that_was_written_over_is_not_held(server: FaultyS3, remote: Remote) -> None:
    server.inject("flip", r"GET .*0001/claim\.json", times=1)
    assert remote.claim() == 2


def test_a_number_is_not_taken_while_its_snapshots_are_there(
    any_remote: Remote, run: Path, uploading: Uploading
) -> None:
    any_remote.claim()
    save(uploading(any_remote, 2), run, 1)
    assert any_remote.claim() == 3


# What is uploaded is restored


def test_an_empty_directory_is_filled_with_what_was_offered(
    any_remote: Remote, run: Path, uploading: Uploading, lines: Lines, tmp_path: Path
) -> None:
    write(run, {"checkpoints/epoch-1++.pt": os.urandom(9 * 2**20), "plots/a/b.png": b"png"})
    attempt = any_remote.claim()
    uploader = uploading(any_remote, attempt)
    assert uploader.wait(0)
    files = {name: run / name for name in contents(run)}
    uploader.offer(files, sequence=7, step=12345, epoch=1.25, top1=76.5)
    assert uploader.wait(SECONDS)
    assert uploader.problem is None
    found = newest(any_remote, lines)
    assert (found.attempt, found.sequence, found.step) == (1, 7, 12345)
    assert (found.epoch, found.top1) == (1.25, 76.5)
    assert found.key == "attempts/0001/0007-step-00012345/manifest.json"
    assert list(found.files) == list(files)
    assert restored(any_remote, lines, tmp_path / "empty") == contents(run)
    assert lines == []


def test_nothing_in_the_remote_tells_a_secret(
    remote: Remote, run: Path, uploading: Uploading
) -> None:
    save(uploading(remote, remote.claim()), run, 1)
    everything = b"".join(remote.store.get(key) for key in keys(remote))
    assert b"a-secret" not in everything
    assert b"AKIA" not in everything


def test_what_is_durable_is_known(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading
) -> None:
    uploader = uploading(remote, remote.claim())
    assert uploader.durable is None
    save(uploader, run, 1)
    first = uploader.durable
    assert first is not None
    assert (first.step, first.sequence) == (10, 1)
    server.inject("error", "PUT")
    offer(uploader, run, 2)
    assert not uploader.wait(SECONDS)
    assert uploader.durable == first


def test_a_file_is_uploaded_as_it_was_when_it_was_offered(
    server: FaultyS3,
    remote: Remote,
    run: Path,
    uploading: Uploading,
    lines: Lines,
    tmp_path: Path,
) -> None:
    before = contents(run)
    server.inject("stall", "GET")
    uploader = uploading(remote, 1)
    offer(uploader, run, 1)
    assert server.stalled.wait(SECONDS)
    (run / "checkpoints/one.pt").unlink()
    (run / "new").write_bytes(b"other")
    (run / "new").replace(run / "best.safetensors")
    with (run / "events.jsonl").open("ab") as events:
        events.write(b"2\n")
    server.heal()
    assert uploader.wait(SECONDS)
    assert restored(remote, lines, tmp_path / "empty") == before


def test_what_has_not_changed_is_uploaded_once(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading, tmp_path: Path, lines: Lines
) -> None:
    write(run, {"last.safetensors": b"best"})
    save(uploading(remote, remote.claim()), run, 1)
    put = [asked for asked in server.asked if asked.endswith(".safetensors")]
    assert len([asked for asked in put if asked.startswith("PUT")]) == 1
    server.asked.clear()
    there = save(uploading(remote, remote.claim()), run, 2)
    put = [asked.rpartition("step-00000020/")[2] for asked in server.asked if "PUT" in asked]
    assert {*put} == {"PUT runs/mine/attempts/0002/claim.json", *put[1:]}
    assert sorted(put[1:]) == ["checkpoints/2.pt", "events.jsonl", "manifest.json"]
    assert restored(remote, lines, tmp_path / "empty") == there


def test_what_somebody_removed_is_uploaded_again(
    any_remote: Remote, run: Path, uploading: Uploading, lines: Lines, tmp_path: Path
) -> None:
    uploader = uploading(any_remote, any_remote.claim())
    save(uploader, run, 1)
    any_remote.store.delete(["attempts/0001/0001-step-00000010/best.safetensors"])
    there = save(uploader, run, 2)
    assert restored(any_remote, lines, tmp_path / "empty") == there


def test_what_somebody_removed_before_it_was_named_is_uploaded_again(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading, tmp_path: Path, lines: Lines
) -> None:
    uploader = uploading(remote, remote.claim())
    server.inject("error", MANIFEST)
    offer(uploader, run, 1)
    assert not uploader.wait(SECONDS)
    remote.store.delete(["attempts/0001/0001-step-00000010/best.safetensors"])
    server.heal()
    there = save(uploader, run, 2)
    assert restored(remote, lines, tmp_path / "empty") == there


def test_an_offer_that_has_not_begun_gives_way_to_a_newer_one(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading
) -> None:
    uploader = uploading(remote, 1)
    server.inject("stall", "GET")
    offer(uploader, run, 1)
    assert server.stalled.wait(SECONDS)
    offer(uploader, run, 2)
    offer(uploader, run, 3)
    server.heal()
    assert uploader.wait(SECONDS)
    manifests = {key for key in keys(remote) if key.endswith("manifest.json")}
    assert {key.split("/")[2] for key in manifests} == {"0001-step-00000010", "0003-step-00000030"}


def test_a_file_that_cannot_be_opened_is_a_problem_and_raises_nothing(
    any_remote: Remote, run: Path, uploading: Uploading, lines: Lines
) -> None:
    uploader = uploading(any_remote, 1)
    files = {"events.jsonl": run / "events.jsonl", "nix": run / "nix"}
    uploader.offer(files, sequence=1, step=1, epoch=0.0, top1=None)
    assert not uploader.wait(SECONDS)
    assert uploader.problem == f"{run}/nix: cannot be read: No such file or directory"
    assert any_remote.newest(lines.append) is None
    save(uploader, run, 2)
    assert uploader.problem is None


# Which one is the newest


def test_the_highest_attempt_with_a_snapshot_is_the_newest(
    any_remote: Remote, run: Path, uploading: Uploading, lines: Lines
) -> None:
    assert any_remote.newest(lines.append) is None
    any_remote.claim()
    save(uploading(any_remote, 1), run, 5)
    any_remote.claim()
    assert newest(any_remote, lines).attempt == 1
    save(uploading(any_remote, 2), run, 4)
    any_remote.claim()
    assert (newest(any_remote, lines).attempt, newest(any_remote, lines).sequence) == (2, 4)
    assert lines == []


def test_an_attempt_that_starts_over_hides_those_before_and_keeps_them(
    any_remote: Remote, run: Path, uploading: Uploading, lines: Lines
) -> None:
    any_remote.claim()
    save(uploading(any_remote, 1), run, 1)
    before = keys(any_remote)
    any_remote.claim(starts_over=True)
    assert any_remote.newest(lines.append) is None
    any_remote.claim()
    assert any_remote.newest(lines.append) is None
    uploader = uploading(any_remote, 3)
    for sequence in (1, 2, 3):
        save(uploader, run, sequence)
    assert newest(any_remote, lines).attempt == 3
    assert before <= keys(any_remote)


# Retention


def test_the_newest_two_are_kept_whole_and_what_is_not_ours_stays(
    any_remote: Remote, run: Path, uploading: Uploading, lines: Lines, tmp_path: Path
) -> None:
    foreign = ["notes.txt", "attempts/README", "attempts/0001/0001-step-00000010/mine.txt"]
    uploader = uploading(any_remote, any_remote.claim())
    for sequence in (1, 2):
        save(uploader, run, sequence)
        (run / f"checkpoints/{sequence}.pt").unlink()
    for key in foreign:
        any_remote.store.put(key, b"mine")
    uploader = uploading(any_remote, any_remote.claim())
    save(uploader, run, 3)
    third = contents(run)
    fourth = save(uploader, run, 4)
    assert {key.split("/", 1)[1] for key in keys(any_remote) if key.endswith(".json")} == {
        "0001/claim.json",
        "0002/claim.json",
        "0001/0001-step-00000010/checkpoints/one.json",
        "0002/0003-step-00000030/manifest.json",
        "0002/0004-step-00000040/manifest.json",
    }
    unneeded = {"attempts/0001/0001-step-00000010/checkpoints/1.pt"}
    assert not unneeded & keys(any_remote)
    assert {*foreign} <= keys(any_remote)
    assert restored(any_remote, lines, tmp_path / "fourth") == fourth
    any_remote.store.delete(["attempts/0002/0004-step-00000040/manifest.json"])
    assert restored(any_remote, lines, tmp_path / "third") == third


def test_a_manifest_does_not_make_us_remove_what_is_not_ours(
    any_remote: Remote, run: Path, uploading: Uploading
) -> None:
    any_remote.store.put("precious", b"mine")
    uploader = uploading(any_remote, any_remote.claim())
    save(uploader, run, 1)
    falsify(any_remote, 1, lambda m: m["files"]["events.jsonl"].update(key="precious", bytes=4))
    for sequence in (2, 3, 4, 5):
        save(uploader, run, sequence)
    assert "precious" in keys(any_remote)


def test_what_a_failed_upload_left_is_removed(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading, lines: Lines
) -> None:
    uploader = uploading(remote, remote.claim())
    server.inject("truncate", r"PUT .*best\.safetensors")
    offer(uploader, run, 1)
    assert not uploader.wait(SECONDS)
    assert any(key.endswith("best.safetensors") for key in keys(remote))
    server.heal()
    save(uploader, run, 2)
    save(uploader, run, 3)
    named = {file.key for file in newest(remote, lines).files.values()}
    assert len([key for key in keys(remote) if key.endswith("best.safetensors")]) == 1
    assert any(key.endswith("best.safetensors") for key in named)


def test_a_snapshot_is_durable_even_if_the_old_ones_cannot_be_removed(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading
) -> None:
    uploader = uploading(remote, remote.claim())
    server.inject("deny", "^(POST|DELETE)")
    for sequence in (1, 2, 3):
        save(uploader, run, sequence)
    assert uploader.durable is not None
    assert uploader.durable.sequence == 3
    assert uploader.problem is not None
    assert re.search(r"access was denied: ask for the right to delete, or", uploader.problem)
    manifests = [key for key in keys(remote) if key.endswith("manifest.json")]
    assert [key.split("/")[2][:4] for key in sorted(manifests)] == ["0001", "0002", "0003"]


# A bucket that fails


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("error", r"the server failed: try again later$"),
        ("reset", r"the server was not reached: check the network"),
        ("lose", r"the server was not reached: check the network"),
        ("truncate", r"one\.pt: 1,500 of 3,000 bytes arrived$"),
        ("flip", r"one\.pt: did not arrive as it was sent$"),
        ("deny", r"access was denied: ask for the right to write, or set AWS_ACCESS_KEY_ID"),
    ],
)
def test_an_upload_that_fails_does_not_count_and_the_next_one_does(
    kind: Kind,
    message: str,
    server: FaultyS3,
    remote: Remote,
    run: Path,
    uploading: Uploading,
    lines: Lines,
    tmp_path: Path,
) -> None:
    uploader = uploading(remote, remote.claim())
    there = save(uploader, run, 1)
    server.inject(kind, r"PUT .*\.pt$")
    write(run, {"checkpoints/one.pt": b"new" * 1000})
    offer(uploader, run, 2)
    assert not uploader.wait(SECONDS)
    assert uploader.problem is not None
    assert re.search(message, uploader.problem)
    assert "\n" not in uploader.problem
    assert "AKIA" not in uploader.problem
    assert "a-secret" not in uploader.problem
    assert restored(remote, lines, tmp_path / "first") == there
    server.heal()
    there = save(uploader, run, 3)
    assert uploader.problem is None
    assert restored(remote, lines, tmp_path / "third") == there


@pytest.mark.parametrize("kind", ["truncate", "flip", "error"])
def test_a_manifest_that_does_not_arrive_does_not_count(
    kind: Kind, server: FaultyS3, remote: Remote, run: Path, uploading: Uploading, lines: Lines
) -> None:
    uploader = uploading(remote, remote.claim())
    save(uploader, run, 1)
    server.inject(kind, MANIFEST)
    offer(uploader, run, 2)
    assert not uploader.wait(SECONDS)
    assert uploader.durable is not None
    assert uploader.durable.sequence == 1
    if kind != "flip":  # a flipped bit may be in the time of day
        assert newest(remote, lines).sequence == 1


@pytest.mark.parametrize("kind", ["error", "reset", "lose", "truncate", "flip"])
@pytest.mark.parametrize("what", ["PUT", "GET", MANIFEST])
def test_what_fails_once_does_no_harm(
    kind: Kind,
    what: str,
    server: FaultyS3,
    remote: Remote,
    run: Path,
    uploading: Uploading,
    lines: Lines,
    tmp_path: Path,
) -> None:
    uploader = uploading(remote, remote.claim())
    server.inject(kind, what, times=1)
    there = save(uploader, run, 1)
    assert restored(remote, lines, tmp_path / "empty") == there


def test_what_was_given_up_is_uploaded_as_soon_as_it_is_possible(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading
) -> None:
    uploader = uploading(remote, remote.claim())
    server.inject("error", "PUT")
    offer(uploader, run, 1)
    assert not uploader.wait(SECONDS)
    with uploader._changed:
        server.heal()
        assert uploader._changed.wait_for(lambda: uploader._durable is not None, SECONDS)


def test_a_bucket_that_stalls_keeps_nobody_waiting(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading
) -> None:
    uploader = uploading(remote, remote.claim())
    server.inject("stall", "")
    offer(uploader, run, 1)
    assert server.stalled.wait(SECONDS)
    offer(uploader, run, 2)
    offer(uploader, run, 3)
    assert not uploader.wait(0.01)
    assert uploader.durable is None
    server.heal()
    assert uploader.wait(SECONDS)
    assert uploader.durable is not None
    assert uploader.durable.sequence == 3


def test_a_request_that_stalls_is_given_up(
    server: FaultyS3, bucket: str, run: Path, uploading: Uploading
) -> None:
    attempt = Remote(bucket, PATIENCE).claim()
    hasty = Remote(bucket, Patience(retries=1, retry_seconds=60.0, read_seconds=1.0))
    uploader = uploading(hasty, attempt)
    server.inject("stall", r"PUT .*\.pt$")
    offer(uploader, run, 1)
    assert not uploader.wait(SECONDS)
    assert uploader.problem is not None
    assert "the server was not reached" in uploader.problem


def test_a_higher_attempt_stops_an_upload_before_its_manifest(
    any_remote: Remote,
    run: Path,
    uploading: Uploading,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uploader = uploading(any_remote, any_remote.claim())
    save(uploader, run, 1)
    verify = Uploader._verify

    def claim_then_verify(*arguments: object) -> None:
        monkeypatch.setattr(Uploader, "_verify", verify)
        any_remote.claim()
        verify(*arguments)

    monkeypatch.setattr(Uploader, "_verify", claim_then_verify)
    write(run, {"events.jsonl": b"other"})
    offer(uploader, run, 2)
    assert not uploader.wait(SECONDS)
    assert uploader.superseded == 2
    what = "attempt 2 has taken this run over: attempt 1 stops"
    assert uploader.problem == f"{any_remote.store.url}: {what}"
    assert newest(any_remote, lines).sequence == 1
    offer(uploader, run, 3)
    assert not uploader.wait(SECONDS)
    assert newest(any_remote, lines).sequence == 1


# Processes that end

SCRIPT = """
import sys
from pathlib import Path
from pitstop.io import upload
from pitstop.io.remote import Remote

url, run = sys.argv[1], Path(sys.argv[2])
upload._CLOSE_SECONDS = 0.2
uploader = upload.Uploader(Remote(url), 1)
files = {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file()}
uploader.offer(files, sequence=2, step=20, epoch=0.5, top1=None)
sys.stdin.read(1)
uploader.close()
sys.exit(75)
"""


def process(url: str, run: Path) -> "subprocess.Popen[bytes]":
    """A process that uploads until it is told to end."""
    command = [sys.executable, "-c", SCRIPT, url, str(run)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_kill_before_the_manifest_leaves_the_snapshot_before(
    server: FaultyS3,
    remote: Remote,
    run: Path,
    uploading: Uploading,
    lines: Lines,
    tmp_path: Path,
) -> None:
    remote.claim()
    there = save(uploading(remote, 1), run, 1)
    write(run, {"checkpoints/two.pt": b"two", "events.jsonl": b"other"})
    server.inject("stall", MANIFEST)
    with process(remote.store.url, run) as killed:
        assert server.stalled.wait(SECONDS)
        killed.send_signal(signal.SIGKILL)
    assert "attempts/0001/0002-step-00000020/checkpoints/two.pt" in keys(remote)
    assert restored(remote, lines, tmp_path / "empty") == there
    assert lines == []


@pytest.mark.parametrize("where", [r"PUT .*\.pt$", r"GET .*big\.pt$"])
def test_a_process_ends_as_it_should_in_the_middle_of_an_upload(
    where: str, server: FaultyS3, remote: Remote, run: Path
) -> None:
    write(run, {"checkpoints/big.pt": os.urandom(20 * 2**20)})
    server.inject("stall", where)
    with process(remote.store.url, run) as ending:
        assert server.stalled.wait(SECONDS)
        _, errors = ending.communicate(b"\n", timeout=SECONDS)
        assert (ending.returncode, errors) == (75, b"")


# Damage in the remote


def falsify(remote: Remote, sequence: int, change: Callable[[dict[str, dict]], object]) -> None:
    """Changes the manifest of a snapshot of attempt 1."""
    key = f"attempts/0001/{sequence:04d}-step-{10 * sequence:08d}/manifest.json"
    manifest = json.loads(remote.store.get(key))
    change(manifest)
    remote.store.put(key, json.dumps(manifest).encode())


@pytest.fixture
def saved_twice(
    any_remote: Remote, run: Path, uploading: Uploading
) -> tuple[Remote, dict[str, bytes]]:
    """A remote with two snapshots, and the files of the first."""
    uploader = uploading(any_remote, any_remote.claim())
    first = save(uploader, run, 1)
    save(uploader, run, 2)
    return any_remote, first


def rename(manifest: dict[str, dict], name: str) -> None:
    manifest["files"][name] = manifest["files"].pop("events.jsonl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: rename(m, "../events.jsonl"), "names '../events.jsonl', which is not inside"),
        (lambda m: rename(m, "/tmp/events.jsonl"), "names '/tmp/events.jsonl', which is not"),
        (lambda m: rename(m, "a/../../b"), "not inside the run directory"),
        (lambda m: rename(m, ""), "not inside the run directory"),
        (lambda m: m["files"]["events.jsonl"].update(key="../x"), "'../x', which is no key"),
        (
            lambda m: m["files"]["events.jsonl"].update(key="attempts/0001/claim.json"),
            "which is no key of a snapshot",
        ),
        (
            lambda m: m["files"]["events.jsonl"].update(
                key="attempts/0001/0001-step-00000010/../../claim.json"
            ),
            "which is no key of a snapshot",
        ),
        (lambda m: m.update(sequence=9), "is of another snapshot"),
        (lambda m: m.pop("files"), "1 validation error"),
    ],
)
def test_a_manifest_that_is_not_right_does_not_count(
    change: Callable[[dict[str, dict]], object],
    reason: str,
    saved_twice: tuple[Remote, dict[str, bytes]],
    lines: Lines,
    tmp_path: Path,
) -> None:
    remote, first = saved_twice
    falsify(remote, 2, change)
    assert restored(remote, lines, tmp_path / "empty" / "run") == first
    (line,) = lines
    assert re.search(r"0002-step-00000020/manifest\.json: is damaged \(", line)
    assert reason in line
    assert line.endswith("; going back to the snapshot before")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["run"]


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"\x00\xff", b"null"])
def test_a_manifest_that_cannot_be_read_does_not_count(
    damaged: bytes,
    saved_twice: tuple[Remote, dict[str, bytes]],
    lines: Lines,
    tmp_path: Path,
) -> None:
    remote, first = saved_twice
    remote.store.put("attempts/0001/0002-step-00000020/manifest.json", damaged)
    assert restored(remote, lines, tmp_path / "empty") == first
    assert len(lines) == 1


@pytest.mark.parametrize("damage", ["missing", "shorter", "flipped"])
def test_a_file_that_is_damaged_takes_the_snapshot_before(
    damage: str, saved_twice: tuple[Remote, dict[str, bytes]], lines: Lines, tmp_path: Path
) -> None:
    remote, first = saved_twice
    key = newest(remote, lines).files["events.jsonl"].key
    content = remote.store.get(key)
    if damage == "missing":
        remote.store.delete([key])
    else:
        remote.store.put(key, content[:-1] if damage == "shorter" else b"2" + content[1:])
    assert newest(remote, []).sequence == (2 if damage == "flipped" else 1)
    assert restored(remote, lines, tmp_path / "empty") == first
    (line,) = lines
    assert line.startswith(f"{remote.store.url}/{key}: is ")
    assert line.endswith("damaged; going back to the snapshot before")


def test_what_goes_missing_before_it_is_restored_takes_the_snapshot_before(
    saved_twice: tuple[Remote, dict[str, bytes]], lines: Lines, tmp_path: Path
) -> None:
    remote, first = saved_twice
    snapshot = newest(remote, lines)
    remote.store.delete([snapshot.files["events.jsonl"].key])
    taken = remote.restore(snapshot, tmp_path / "empty", lines.append)
    assert taken is not None
    assert taken.sequence == 1
    assert contents(tmp_path / "empty") == first


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_file_that_is_not_needed_is_left_out_where_no_snapshot_is_whole(
    damage: str, any_remote: Remote, run: Path, uploading: Uploading, lines: Lines, tmp_path: Path
) -> None:
    """All snapshots share it: going back would not help."""
    uploader = uploading(any_remote, any_remote.claim())
    for sequence in (1, 2):
        files = {name: run / name for name in contents(run)}
        uploader.offer(files, ["events.jsonl"], sequence=sequence, step=1, epoch=0.5, top1=None)
        assert uploader.wait(SECONDS), uploader.problem
    key = newest(any_remote, lines).files["best.safetensors"].key
    if damage == "missing":
        any_remote.store.delete([key])
    else:
        any_remote.store.put(key, b"bost")
    there = contents(run)
    del there["best.safetensors"]
    assert restored(any_remote, lines, tmp_path / "empty") == there
    url = any_remote.store.url_of(key)
    back = f"{url}: is damaged; going back to the snapshot before"
    assert lines == [back, back, f"{url}: is damaged; going on without it"]


def test_nothing_older_than_what_is_there_is_restored(
    saved_twice: tuple[Remote, dict[str, bytes]], run: Path, lines: Lines
) -> None:
    remote, _ = saved_twice
    snapshot, before = newest(remote, lines), contents(run)
    assert remote.restore(snapshot, run, lines.append, newer_than=snapshot.age) is None
    remote.store.put(snapshot.files["events.jsonl"].key, b"2\n1\n")
    attempt, sequence = snapshot.age
    older = attempt, sequence - 1
    assert remote.restore(snapshot, run, lines.append, newer_than=older) is None
    assert contents(run) == before


def test_when_no_snapshot_is_whole_nothing_is_touched(
    saved_twice: tuple[Remote, dict[str, bytes]], run: Path, lines: Lines
) -> None:
    remote, _ = saved_twice
    before = contents(run)
    key = newest(remote, lines).files["best.safetensors"].key
    remote.store.put(key, b"bost")
    with pytest.raises(InputError, match="no snapshot is whole: give another --remote"):
        remote.restore(newest(remote, lines), run, lines.append)
    assert contents(run) == before


def test_a_bucket_that_cannot_be_read_is_not_taken_for_damaged(
    server: FaultyS3, remote: Remote, run: Path, uploading: Uploading, lines: Lines, tmp_path: Path
) -> None:
    uploader = uploading(remote, remote.claim())
    save(uploader, run, 1)
    save(uploader, run, 2)
    snapshot = newest(remote, lines)
    server.inject("error", "GET .*(manifest|one.pt)")
    with pytest.raises(InputError, match="the server failed"):
        remote.newest(lines.append)
    with pytest.raises(InputError, match="the server failed"):
        remote.restore(snapshot, tmp_path / "empty", lines.append)
    assert contents(tmp_path / "empty") == {}
    assert lines == []


def test_a_place_that_cannot_be_written_is_named(
    any_remote: Remote, run: Path, uploading: Uploading, lines: Lines, tmp_path: Path
) -> None:
    save(uploading(any_remote, any_remote.claim()), run, 1)
    place = tmp_path / "file" / "run"
    place.parent.write_bytes(b"")
    with pytest.raises(InputError, match=rf"^{place}: cannot be written: Not a directory$"):
        any_remote.restore(newest(any_remote, lines), place, lines.append)
