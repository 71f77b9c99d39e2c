"""SageMaker's container: a made-up /opt/ml, real processes, real signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pitstop.cli.launch.common import get_train
from pitstop.core.errors import InputError
from pitstop.data.sources.folder import FolderListing
from pitstop.data.sources.layout import class_folders
from pitstop.launch import container
from pitstop.launch.container import Job, Relay, data_of, options, run, train_arguments
from pitstop.launch.sagemaker import METRICS, SWITCHES

pytestmark = pytest.mark.timeout(120)

START = Path(container.__file__).with_name("sagemaker_start.py")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """No variables of SageMaker; a cache of its own."""
    for name in [name for name in os.environ if name.startswith("SM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_config(base: Path, **files: Any) -> None:
    """Writes files of input/config, as SageMaker does."""
    folder = base / "input" / "config"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def make_channel(base: Path, name: str, *files: str) -> Path:
    folder = base / "input" / "data" / name
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What `pitstop train` makes of its arguments."""
    assert arguments[0] == "train"
    return get_train().make_context("train", arguments[1:]).params


def job(base: Path, environment: dict[str, str] | None = None) -> Job:
    return Job(base, environment or {})


# Hyperparameters


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"epochs": "18"}, ["--epochs=18"]),
        ({"batch_size": "256", "lr": "1e-3"}, ["--batch-size=256", "--lr=1e-3"]),
        ({"seed": 3, "lr": 0.5}, ["--seed=3", "--lr=0.5"]),
        ({"model": '"resnet50"'}, ["--model=resnet50"]),
        ({"compile": "true"}, ["--compile"]),
        ({"compile": "True"}, ["--compile"]),
        ({"compile": "False"}, ["--no-compile"]),
        ({"compile": False}, ["--no-compile"]),
        ({"no_compile": "true"}, ["--no-compile"]),
        ({"deterministic": "False", "rebase": "false"}, []),
        ({"deterministic": True}, ["--deterministic"]),
        ({"set": '["ema.decay=0.9", "bn=x"]'}, ["--set=ema.decay=0.9", "--set=bn=x"]),
        ({"phases.1.lr": "0.5"}, ["--set=phases.1.lr=0.5"]),
        ({"optimizer.nesterov": "False"}, ["--set=optimizer.nesterov=false"]),
        ({"model": '["true"]'}, ["--model=true"]),
        ({"preemption_command": "--odd"}, ["--preemption-command=--odd"]),
        ({"recipe": "fast", "resume": "s3://b/x", "sagemaker_region": "eu-west-1"}, []),
    ],
)
def test_hyperparameters_are_options_of_train(stated, expected):
    assert options(stated) == expected


def test_the_switches_are_those_of_train():
    """Which options take no value is known to the launcher and the container by heart."""
    flags = [p for p in get_train().params if p.param_type_name == "option" and p.is_flag]
    names = {name for flag in flags for name in (*flag.opts, *flag.secondary_opts)}
    assert names - {"--help"} == set(SWITCHES)
    assert {f.name for f in flags if f.secondary_opts} == set(container.TWO_WAY)


# What the files say


def test_a_job_is_a_command_line_that_train_accepts(tmp_path):
    make_channel(tmp_path, "pitstop", "recipe.yaml")
    training = make_channel(tmp_path, "training", "manifest.json", "shard-0.arrow")
    (tmp_path / "checkpoints").mkdir()
    write_config(
        tmp_path,
        hyperparameters={"recipe": "fast", "epochs": "18", "compile": "False"},
        inputdataconfig={"pitstop": {}, "training": {"TrainingInputMode": "File"}},
        checkpointconfig={"S3Uri": "s3://b/c/", "LocalPath": "/opt/ml/checkpoints"},
    )
    said = parsed(train_arguments(job(tmp_path)))
    assert said["recipe"] == str(tmp_path / "input/data/pitstop/recipe.yaml")
    assert (said["data"], said["out"]) == (str(training), tmp_path / "model")
    assert said["remote"] == str(tmp_path / "checkpoints")
    assert (said["epochs"], said["compile"], said["nodes"]) == (18, False, 1)


def test_the_jobs_own_bucket_and_data_win(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    make_channel(tmp_path, "training", "a", "b")
    write_config(
        tmp_path,
        hyperparameters={"recipe": "demo", "data": "digits", "remote": "s3://b/run"},
        inputdataconfig={"training": {}},
    )
    said = parsed(train_arguments(job(tmp_path)))
    assert (said["recipe"], said["data"], said["remote"]) == ("demo", "digits", "s3://b/run")


def test_without_checkpoints_there_is_no_copy(tmp_path):
    """Alone, the machine's name is of no interest: there may be none."""
    write_config(
        tmp_path,
        hyperparameters={"recipe": "demo"},
        resourceconfig={"current_host": "no-such-host", "hosts": ["no-such-host"]},
    )
    said = parsed(train_arguments(job(tmp_path)))
    assert (said["remote"], said["data"], said["resume"]) == (None, None, None)


def test_a_place_for_checkpoints_may_be_anywhere(tmp_path):
    write_config(tmp_path, checkpointconfig={"S3Uri": "s3://b/c", "LocalPath": "/opt/ml/other/x"})
    assert job(tmp_path).checkpoints() == tmp_path / "other" / "x"
    write_config(tmp_path, checkpointconfig={"S3Uri": "s3://b/c", "LocalPath": "/data/x"})
    assert job(tmp_path).checkpoints() == Path("/data/x")


def test_variables_stand_in_for_files_that_are_missing(tmp_path):
    channel = make_channel(tmp_path / "elsewhere", "x", "train/cat/1.png")
    variables = {
        "SM_HPS": '{"recipe": "demo", "epochs": 3, "compile": false}',
        "SM_CHANNELS": '["train"]',
        "SM_CHANNEL_TRAIN": str(channel),
        "SM_HOSTS": '["algo-2", "algo-1"]',
        "SM_CURRENT_HOST": "algo-2",
        "SM_MODEL_DIR": str(tmp_path / "there"),
        "SM_OUTPUT_DIR": str(tmp_path / "out"),
    }
    found = job(tmp_path / "ml", variables)
    assert found.hyperparameters() == {"recipe": "demo", "epochs": 3, "compile": False}
    assert data_of(found) == channel
    assert (found.model, found.failure) == (tmp_path / "there", tmp_path / "out" / "failure")
    assert (found.machines().hosts, found.machines().rank) == (("algo-1", "algo-2"), 1)
    write_config(
        tmp_path / "ml",
        hyperparameters={"recipe": "fast"},
        inputdataconfig={"val": {}},
        resourceconfig={"hosts": ["algo-7"], "current_host": "algo-7"},
    )
    assert found.hyperparameters() == {"recipe": "fast"}
    assert found.channels() == ["val"]
    assert found.machines().hosts == ("algo-7",)


@pytest.mark.parametrize("rank", [0, 1])
def test_several_machines_meet_at_the_first_one(tmp_path, rank):
    hosts = ["localhost", "zeta"]
    write_config(
        tmp_path,
        hyperparameters={"recipe": "demo"},
        resourceconfig={
            "current_host": hosts[rank],
            "hosts": ["zeta", "localhost"],
            "network_interface_name": "eth7",
        },
    )
    said = parsed(train_arguments(job(tmp_path)))
    assert (said["nodes"], said["node_rank"]) == (2, rank)
    assert said["rdzv_endpoint"] == "localhost:29400"
    assert container.environment(job(tmp_path))["NCCL_SOCKET_IFNAME"] == "eth7"


def test_the_first_machines_name_may_come_late(tmp_path, monkeypatch):
    asked: list[str] = []

    def getaddrinfo(host: str, port: None) -> list[str]:
        asked.append(host)
        if len(asked) < 3:
            raise OSError("not yet")
        return []

    monkeypatch.setattr(container.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(container.time, "sleep", lambda seconds: None)
    container.await_name("algo-1", lambda: False)
    assert asked == ["algo-1"] * 3
    asked.clear()
    container.await_name("algo-1", lambda: len(asked) > 0)  # nobody waits after a stop
    assert asked == ["algo-1"]


def test_a_channel_may_hold_one_file(tmp_path):
    make_channel(tmp_path, "training", "cifar.tar.gz")
    write_config(tmp_path, inputdataconfig={"training": {}, "pitstop": {}})
    assert data_of(job(tmp_path)) == tmp_path / "input/data/training/cifar.tar.gz"


@pytest.mark.parametrize("names", [("train", "validation"), ("training", "val")])
def test_two_channels_are_one_dataset(tmp_path, names):
    train, val = names
    make_channel(tmp_path, train, "cat/1.png", "cat/2.png", "dog/3.png")
    make_channel(tmp_path, val, "cat/4.png", "dog/5.png")
    write_config(tmp_path, inputdataconfig={train: {}, val: {}, "pitstop": {}})
    for _ in range(2):  # a restart finds the links there
        joined = data_of(job(tmp_path))
        assert joined is not None
        found = class_folders(FolderListing(joined))
        assert (len(found.train), len(found.val)) == (3, 2)


@pytest.mark.parametrize("names", [("a", "b"), ("train", "val", "extra"), ("train", "training")])
def test_channels_that_mean_nothing_are_refused(tmp_path, names):
    write_config(tmp_path, inputdataconfig={name: {} for name in names})
    with pytest.raises(InputError, match="train and validation"):
        data_of(job(tmp_path))


def test_a_damaged_file_is_named(tmp_path):
    write_config(tmp_path)
    (tmp_path / "input/config/hyperparameters.json").write_text("{")
    with pytest.raises(InputError, match=r"hyperparameters\.json"):
        job(tmp_path).hyperparameters()


# The run to begin from


def make_run(folder: Path) -> Path:
    """What `fetch` takes for a run."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"status": "finished"}')
    (folder / "events.jsonl").write_text("")
    return folder


def test_the_run_before_is_fetched(tmp_path, cache):
    before = make_run(tmp_path / "before")
    write_config(tmp_path, hyperparameters={"recipe": "demo", "resume": str(before)})
    said = parsed(train_arguments(job(tmp_path)))
    assert said["resume"] == cache / "previous"
    assert (cache / "previous" / "run.json").read_text() == '{"status": "finished"}'


@pytest.mark.parametrize("place", ["checkpoints/attempts/0001/0001-step-00000005/manifest.json"])
@pytest.mark.parametrize("where", ["checkpoints", "model"])
def test_a_run_that_has_begun_goes_on_with_its_own(tmp_path, where, place):
    """Else each interruption would throw it back to the run before."""
    before = make_run(tmp_path / "before")
    own = tmp_path / (place if where == "checkpoints" else "model/events.jsonl")
    own.parent.mkdir(parents=True)
    own.touch()
    write_config(tmp_path, hyperparameters={"recipe": "demo", "resume": str(before)})
    assert parsed(train_arguments(job(tmp_path)))["resume"] is None


# Signals and exit codes


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(("import os, signal, sys", *lines))]


def when_there(path: Path, action: Callable[[], None]) -> threading.Thread:
    """Acts when the other end of the named pipe is opened, in a thread."""
    os.mkfifo(path)

    def wait() -> None:
        path.read_bytes()
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_as_sigterm(tmp_path, number):
    ready = tmp_path / "ready"
    thread = when_there(ready, lambda: os.kill(os.getpid(), number))
    command = python(
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])",
        f"open({str(ready)!r}, 'w').close()",
        "signal.sigwait([signal.SIGTERM])",
        "sys.exit(75)",
    )
    with Relay() as relay:
        assert relay.run(command, os.environ) == 75
    thread.join()


def test_a_command_that_does_not_listen_yet_is_interrupted_too(tmp_path):
    thread = when_there(tmp_path / "ready", stop_this_process)
    command = python(f"open({str(tmp_path / 'ready')!r}, 'w').close()", "signal.pause()")
    with Relay() as relay:
        assert relay.run(command, os.environ) == 75
    thread.join()


def test_a_stop_that_came_before_starts_nothing(tmp_path):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        signal.raise_signal(signal.SIGTERM)  # to this thread: others do not block it
        with Relay() as relay:
            assert relay.run(python(f"open({str(tmp_path / 'ran')!r}, 'w')"), os.environ) == 75
    finally:
        signal.sigtimedwait([signal.SIGTERM], 0)  # where nobody took it, it would end the tests
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("line", "code"),
    [("sys.exit(76)", 76), ("", 0), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_the_exit_code_is_the_commands(line, code):
    with Relay() as relay:
        assert relay.run(python(line), os.environ) == code


def test_what_is_said_is_passed_on_and_the_last_line_noted(capfd):
    command = python(
        "print('pitstop: first', file=sys.stderr)",
        "print('pitstop: last', file=sys.stderr)",
        "print('more', file=sys.stderr)",
    )
    with Relay() as relay:
        relay.run(command, os.environ)
    assert relay.said == "last"
    assert capfd.readouterr().err == "pitstop: first\npitstop: last\nmore\n"


def test_a_failure_is_one_line_for_sagemaker(tmp_path, capfd):
    write_config(tmp_path, hyperparameters={"recipe": "fsat"})
    (tmp_path / "output").mkdir()
    assert run(tmp_path) == 2
    line = (tmp_path / "output" / "failure").read_text()
    assert re.fullmatch(r"pitstop train: exit code 2: no recipe 'fsat'.*'fast'.*", line)


def test_what_the_container_finds_wrong_is_a_failure_too(tmp_path, capfd):
    write_config(tmp_path, hyperparameters={"recipe": "demo"}, inputdataconfig={"a": {}, "b": {}})
    assert run(tmp_path) == 2
    line = (tmp_path / "output" / "failure").read_text()
    assert line.startswith("pitstop train: exit code 2: channels a, b: give one")
    assert capfd.readouterr().err.startswith("pitstop: channels a, b: give one")


def test_a_failure_that_is_past_is_not_told(tmp_path, monkeypatch, capfd):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "failure").write_text("of the start before")
    monkeypatch.setattr(container, "train_arguments", lambda *_: ["--version"])
    assert run(tmp_path) == 0
    assert not (tmp_path / "output" / "failure").exists()


def test_a_failure_without_words_is_told_by_the_run(tmp_path):
    model = container.RunDirectory(tmp_path)
    model.write(status="diverged", exit_code=76, step=12, steps=40)
    line = container.failure_line(76, "", model)
    assert line == "pitstop train: exit code 76: diverged at step 12 of 40"
    assert container.failure_line(137, "", model) == "pitstop train: exit code 137: see the log"
    assert len(container.failure_line(70, "x" * 5000, model)) == 1024


# The script that starts it


def start_on_bare_python(code: Path, *packages: Path) -> subprocess.CompletedProcess[str]:
    """Runs the start script on a Python that has only these packages."""
    script = shutil.copy(START, code)
    bare = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    path = os.pathsep.join(map(str, packages))
    environment = {"PYTHONPATH": path, "PATH": os.environ["PATH"]}
    return subprocess.run([bare, script], env=environment, capture_output=True, text=True)


def make_module(folder: Path, package: str, name: str, *lines: str) -> Path:
    """Writes a module of a package, and returns the folder that the package is in."""
    place = folder
    for part in package.split("."):
        place = place / part
        place.mkdir(parents=True)
        (place / "__init__.py").touch()
    (place / f"{name}.py").write_text("\n".join(lines))
    return folder


def test_the_start_installs_the_wheel_and_keeps_a_signal_that_comes_meanwhile(tmp_path):
    """pip and pitstop are stand-ins; this pip installs by a renaming."""
    code = make_channel(tmp_path / "ml", "pitstop", "pitstop-1-py3-none-any.whl", "recipe.yaml")
    says = ("import signal, sys", "print(*sys.argv[1:], *signal.sigpending())")
    make_module(tmp_path / "wheel", "pitstop.launch", "container", *says)
    pip = (
        "import os, signal, sys",
        "print(sys.argv[-1], flush=True)",
        f"os.rename({str(tmp_path / 'wheel')!r}, {str(tmp_path / 'site')!r})",
        "os.kill(os.getppid(), signal.SIGTERM)",
    )
    done = start_on_bare_python(
        code, tmp_path / "site", make_module(tmp_path / "tools", "pip", "__main__", *pip)
    )
    assert done.stdout.splitlines() == [
        str(code / "pitstop-1-py3-none-any.whl"),
        f"{tmp_path / 'ml'} {signal.SIGTERM:d}",
    ], done.stderr


def test_a_wheel_that_cannot_be_installed_is_a_failure(tmp_path):
    code = make_channel(tmp_path / "ml", "pitstop", "pitstop-1-py3-none-any.whl")
    pip = make_module(tmp_path / "tools", "pip", "__main__", "raise SystemExit(3)")
    assert start_on_bare_python(code, pip).returncode == 3
    assert "could not install" in (tmp_path / "ml" / "output" / "failure").read_text()


# As process 1

NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
NAMESPACE += ["--kill-child"]


@pytest.fixture
def namespace() -> list[str]:
    """What runs a command as process 1."""
    try:
        tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if tried.returncode != 0:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")
    return NAMESPACE


def process_1(unshare: subprocess.Popen[str]) -> int:
    """The process under `unshare` that is process 1 of its namespace."""
    return int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())


def test_a_stop_that_comes_before_anybody_listens_is_not_lost(tmp_path, namespace):
    """It comes as soon as there is a child of process 1; nothing is trained then."""
    write_config(tmp_path, hyperparameters={"recipe": "demo"})
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "fork = os.fork\n"
        "def fork_and_stop():\n"
        "    child = fork()\n"
        "    if child == 0:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return child\n"
        "os.fork = fork_and_stop\n"
    )
    command = [*namespace, sys.executable, "-m", "pitstop.launch.container", tmp_path]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 75, done.stderr
    assert "stopped before" in (tmp_path / "output" / "failure").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_interrupted_job_goes_on_on_a_new_machine(tmp_path, namespace):
    """SIGTERM to process 1, then only what SageMaker keeps in S3 is left, then to the end."""

    def machine(base: Path) -> subprocess.Popen[str]:
        code = make_channel(base, "pitstop", "recipe.yaml")
        shutil.copy(
            Path(container.__file__).parents[1] / "recipes" / "demo.yaml", code / "recipe.yaml"
        )
        script = shutil.copy(START, code)
        write_config(
            base,
            hyperparameters={"recipe": "demo", "epochs": "6", "deterministic": "False"},
            inputdataconfig={"pitstop": {}},
            resourceconfig={"current_host": "algo-1", "hosts": ["algo-1"]},
            checkpointconfig={"S3Uri": "s3://b/c/", "LocalPath": "/opt/ml/checkpoints"},
        )
        command = [*namespace, sys.executable, script]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first, second = tmp_path / "first", tmp_path / "second"
    process = machine(first)
    assert process.stdout is not None
    for line in process.stdout:
        if "  val " in line:  # evaluated once
            os.kill(process_1(process), signal.SIGTERM)
            break
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert "interrupted at step" in (first / "output" / "failure").read_text()
    assert any((first / "model").glob("*.safetensors"))

    second.mkdir()
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    out, err = machine(second).communicate()
    assert "restored step" in out, err
    state = json.loads((second / "model" / "run.json").read_text())
    assert (state["status"], state["exit_code"]) == ("finished", 0)
    assert (second / "model" / "best.safetensors").exists()
    assert not (second / "output" / "failure").exists()
    for name, pattern in METRICS.items():
        assert re.search(pattern, out), name
    last = float(re.findall(METRICS["validation:top1"], out)[-1])
    assert last == pytest.approx(state["metrics"]["top1"], abs=0.005)
