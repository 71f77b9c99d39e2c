"""Real launchers, real ranks, real signals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.launch import agent, local
from pitstop.launch.local import Nodes, launch

LAUNCHER = Path(__file__).with_name("launcher.py")

PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
here = Path(__file__).parent

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def end(code):
    if local_rank == 0:
        Path(os.environ["PITSTOP_OUTCOME"]).write_text(str(code))
    os._exit(0)

def wait_for(path):
    while not path.exists():
        time.sleep(0.01)

def add_up():
    import torch, torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    return int(x)
"""
WORK_UNTIL_A_SIGNAL = """
signals = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
say("pid", os.getpid())
while not signals:
    time.sleep(0.01)
"""

Script = Callable[[str], list[str]]


@pytest.fixture
def script(tmp_path) -> Script:
    """Returns the command that runs a rank with this source."""

    def script(source: str) -> list[str]:
        path = tmp_path / "rank.py"
        path.write_text(PREAMBLE + source)
        return [sys.executable, str(path)]

    return script


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A directory for temporary files, of which none are left."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield
    assert [*path.iterdir()] == []


def start(command: list[str], nproc=2, restarts=0, nodes=1, place="-", endpoint="-", popen=None):
    """Starts a launcher of its own; its output is text, both streams in one."""
    words = [sys.executable, LAUNCHER, nproc, restarts, nodes, place, endpoint, *command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    popen = popen or (lambda *w, **options: subprocess.Popen([*map(str, w)], text=True, **options))
    return popen(*words, **streams)


def pids(launcher, count=2) -> list[int]:
    """Waits until that many ranks have said that they work; returns their ids."""
    found = []
    while len(found) < count:
        line = launcher.stdout.readline()
        assert line, "the launcher ended"
        if line.startswith("pid"):
            found.append(int(line.split()[1]))
    return found


def ends(launcher, timeout=60) -> tuple[int, str]:
    out, _ = launcher.communicate(timeout=timeout)
    return launcher.returncode, out


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"


def sweep(tmp_path: Path) -> None:
    """Removes what a killed launcher leaves."""
    for path in (tmp_path / "scratch").iterdir():
        shutil.rmtree(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ranks_see_their_place_and_their_share_of_the_cores(script, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    before = dict(os.environ)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS GLOO_SOCKET_IFNAME"
    command = script(f"say(json.dumps([os.environ[name] for name in '{names}'.split()]))")
    assert launch([*command, "--lr", "0.1"], nproc=2) == 0
    seen = sorted(json.loads(line) for line in capfd.readouterr().out.splitlines())
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert seen == [[str(n), str(n), "2", "2", threads, "lo"] for n in (0, 1)]
    assert dict(os.environ) == before


def test_a_users_thread_count_stays(script, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launch([*script("say(os.environ['OMP_NUM_THREADS'], *sys.argv[1:])"), "a b"], nproc=1)
    assert capfd.readouterr().out == "7 a b\n"


@pytest.mark.parametrize("code", [0, 2, 75, 76, 130])
def test_the_exit_code_is_the_one_that_the_ranks_decided_on(script, capfd, code):
    assert launch(script(f"end({code})"), nproc=2, max_restarts=3) == code
    assert capfd.readouterr().err == ""


def test_a_killed_rank_is_named_and_takes_the_others_along(script, capfd):
    command = script(
        "say('pid', os.getpid())\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(70))\n"
        "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)"
    )
    assert launch(command, nproc=2) == 70
    said = capfd.readouterr()
    assert said.err == "pitstop: rank 1 was killed by SIGKILL\n"
    assert all(gone(int(line.split()[1])) for line in said.out.splitlines())


def test_the_cause_is_the_killed_rank_and_not_one_that_failed_for_it(script, capfd):
    command = script(
        "if rank == 1:\n"
        "    (here / 'dying').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "wait_for(here / 'dying')\n"
        "os._exit(70)"
    )
    assert launch(command, nproc=2) == 70
    assert capfd.readouterr().err == "pitstop: rank 1 was killed by SIGKILL\n"


def test_a_failed_rank_is_named_with_its_exit_code(script, capfd):
    assert launch(script("sys.exit(70 if rank == 0 else 0)"), nproc=2) == 70
    assert capfd.readouterr().err == "pitstop: rank 0 failed with exit code 70\n"


def test_three_restarts_after_a_collective(script, capfd):
    command = script("assert add_up() == 2\nend(0) if attempt == 3 else os._exit(70)")
    assert launch(command, nproc=2, max_restarts=3) == 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("failed with exit code 70; all ranks start again") for line in lines)


def test_an_outcome_of_an_attempt_before_does_not_count(script):
    command = script(
        "if attempt == 0 and rank == 0: end(75)\n"
        "if attempt == 0: wait_for(Path(os.environ['PITSTOP_OUTCOME']))\n"
        "os._exit(70)"
    )
    assert launch(command, nproc=2, max_restarts=1) == 70


def test_sigterm_reaches_the_ranks_and_they_save(script):
    launcher = start(script(WORK_UNTIL_A_SIGNAL + "end(75)"))
    workers = pids(launcher)
    launcher.terminate()
    assert ends(launcher) == (75, "")
    assert all(map(gone, workers))


def test_a_signal_while_the_ranks_still_start_is_an_interruption(script):
    launcher = start(script("say('pid', os.getpid())\ntime.sleep(60)"))
    workers = pids(launcher)
    launcher.terminate()
    assert ends(launcher) == (75, "pitstop: stopped before there was anything to save\n")
    assert all(map(gone, workers))


def test_ranks_that_do_not_end_are_killed(script, monkeypatch, capfd):
    monkeypatch.setattr(local, "SHUTDOWN_SECONDS", 0.5)
    command = script(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if rank == 0: os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    assert launch(command, nproc=2, max_restarts=3) == 70
    assert "did not end within 0.5 s of the signal and were killed" in capfd.readouterr().err


def test_a_second_ctrl_c_kills_at_once(script):
    launcher = start(script(WORK_UNTIL_A_SIGNAL + "say('saving')\ntime.sleep(60)"))
    workers = pids(launcher)
    launcher.send_signal(signal.SIGINT)
    assert launcher.stdout.readline() == "saving\n"
    launcher.send_signal(signal.SIGINT)
    assert ends(launcher)[0] == 130
    assert all(map(gone, workers))


@pytest.mark.parametrize(
    ("place", "number"),
    [("-", signal.SIGTERM), ("-", signal.SIGINT), (0, signal.SIGTERM), (1, signal.SIGTERM)],
)
def test_a_signal_while_the_other_machine_is_awaited(script, place, number):
    port = free_port()
    launcher = start(script(""), nodes=2, place=place, endpoint=f"127.0.0.1:{port}")
    if place == 1:
        with socket.create_server(("127.0.0.1", port)) as server:  # answers, but is no store
            server.accept()[0].close()
            launcher.send_signal(number)
            answer = ends(launcher)
    else:
        while not _answers(port):
            time.sleep(0.05)
        launcher.send_signal(number)
        answer = ends(launcher)
    assert answer == (75, "pitstop: stopped before there was anything to save\n")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("place", [None, 0, 1])
def test_a_machine_that_nobody_joins_says_so(script, monkeypatch, capfd, place):
    monkeypatch.setattr(agent, "JOIN_SECONDS", 1)
    endpoint = f"127.0.0.1:{free_port()}"
    assert launch(script(""), nproc=1, nodes=Nodes(2, place, endpoint)) == 70
    reason = "no answer from" if place == 1 else "fewer than 2 machines came to"
    assert capfd.readouterr().err.startswith(f"pitstop: {reason} {endpoint}")


def test_an_endpoint_without_an_address_or_with_a_taken_port_is_refused(script):
    with pytest.raises(InputError, match=r"--rdzv-endpoint no\.invalid: no\.invalid has no addr"):
        launch(script(""), nproc=1, nodes=Nodes(2, endpoint="no.invalid"))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is taken"):
            launch(script(""), nproc=1, nodes=Nodes(2, 0, f"127.0.0.1:{port}"))


@pytest.mark.parametrize("places", [("-", "-"), (1, 0)])
def test_two_launchers_meet_and_meet_again_after_a_failure(script, places):
    command = script(
        "if attempt == 0: os._exit(70)\n"
        "assert add_up() == 2\n"
        "end(76 if sys.argv[1] in ('-', str(rank)) else 2)"
    )
    endpoint = f"127.0.0.1:{free_port()}"
    both = [start([*command, str(p)], 1, 1, 2, p, endpoint) for p in places]
    for launcher in both:
        code, out = ends(launcher)
        assert code == 76
        assert out.endswith("failed with exit code 70; all ranks start again\n")


def test_a_signal_to_one_machine_lets_all_save(script):
    """Nobody waits for whoever was signalled."""
    command = script(
        "signal.signal(signal.SIGTERM, lambda *_: (here / 'stop').touch())\n"
        "say('pid', os.getpid())\n"
        "wait_for(here / 'stop')\n"
        "end(75)"
    )
    endpoint = f"127.0.0.1:{free_port()}"
    both = [start(command, 1, 3, 2, place, endpoint) for place in (0, 1)]
    for launcher in both:
        pids(launcher, 1)
    both[1].terminate()
    assert [ends(launcher, 20) for launcher in both] == [(75, "")] * 2


STEPS = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(70))
print("begins", rank, flush=True)
while not (here / "finish").exists():
    if add_up() != 2: os._exit(70)
    (here / f"sum-{rank}-{os.getpid()}").touch()
    time.sleep(0.05)
add_up()
end(0)
"""


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("places", [("-", "-"), (0, 1)])
def test_a_machine_whose_power_is_cut_comes_back(script, tmp_path, machines, places):
    """Its number is the one it had; the other one waits for it in between."""
    first, second = machines
    command = script(STEPS)

    def begin(machine, place):
        return start(command, 1, 1, 2, place, first.address, popen=machine.popen)

    def work(rank: int) -> set[Path]:
        return set(tmp_path.glob(f"sum-{rank}-*"))

    a, b = begin(first, places[0]), begin(second, places[1])
    try:
        _until(lambda: work(0) and work(1))
        before = work(1)
        second.kill()
        assert ends(b)[0] == -signal.SIGKILL
        b = begin(second, places[1])
        _until(lambda: work(1) - before)
        (tmp_path / "finish").touch()
        ended = ends(a), ends(b)
    finally:
        a.kill()
        b.kill()
    assert [(code, out.count("begins")) for code, out in ended] == [(0, 2), (0, 1)]
    sweep(tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("places", [("-", "-"), (0, 1)])
def test_who_is_left_without_the_machine_at_the_endpoint_says_so(
    script, tmp_path, machines, places
):
    first, _ = machines
    command = script("(here / f'begun-{rank}').touch()\ntime.sleep(60)")
    a, b = (
        start(command, 1, 1, 2, place, first.address, popen=machine.popen)
        for machine, place in zip(machines, places, strict=True)
    )
    _until(lambda: len([*tmp_path.glob("begun-*")]) == 2)
    first.kill()
    assert ends(a)[0] == -signal.SIGKILL
    code, out = ends(b)
    assert code == 70
    assert out.endswith(
        f"pitstop: no answer from {first.address}, where the machines meet: "
        "start the command again on every machine\n"
    )
    sweep(tmp_path)


def _until(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"count": 2}, "--nodes 2: give --rdzv-endpoint HOST:PORT"),
        ({"rank": 0}, "want --nodes, more than 1"),
        ({"endpoint": "a"}, "want --nodes, more than 1"),
        ({"count": 2, "rank": 2, "endpoint": "a"}, "--node-rank 2: must be from 0 to 1"),
        ({"count": 2, "endpoint": "a:b"}, "--rdzv-endpoint a:b: write it as HOST:PORT"),
        ({"count": 2, "endpoint": "a:70000"}, "write it as HOST:PORT"),
        ({"count": 2, "endpoint": ""}, "write it as HOST:PORT"),
    ],
)
def test_nodes_that_cannot_meet_are_refused(nodes, message):
    with pytest.raises(InputError, match=message):
        Nodes(**nodes)


@pytest.mark.parametrize(
    ("endpoint", "point"),
    [
        ("gpu-1", ("gpu-1", 29400)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[::1]:5", ("::1", 5)),
        ("[fe80::1]", ("fe80::1", 29400)),
    ],
)
def test_an_endpoint_is_a_host_and_a_port(endpoint, point):
    assert Nodes(2, endpoint=endpoint).meeting_point() == point
