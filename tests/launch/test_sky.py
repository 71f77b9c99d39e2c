"""SkyPilot's tasks: their keys, and their scripts, which a shell runs here.

PITSTOP_SKY_PYTHON names a Python that has SkyPilot (`pip install skypilot` in an environment of its
own): then SkyPilot reads a task too.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pitstop.core.errors import InputError
from pitstop.core.recipe import load_recipe
from pitstop.launch import sky
from pitstop.launch.request import Request

OPTIONS = ("--epochs", "3", "--set", "model.kwargs={layers: [1, 1]}")

REQUEST = Request(
    "mine",
    load_recipe("demo"),
    "demo",
    "s3://bucket/my data",
    OPTIONS,
    spot=True,
    nodes=2,
    remote="s3://bucket/run",
)


def composed(folder: Path, request: Request = REQUEST, **options: Any) -> dict[str, Any]:
    """The task as SkyPilot reads it."""
    return yaml.safe_load(sky.compose(request, folder, **options).to_yaml())


def test_a_task_is_a_managed_job_that_recovers(tmp_path: Path) -> None:
    task = composed(tmp_path, gpus="A100:8", infra="aws/us-east-1", disk_gb=300)
    assert (task["name"], task["num_nodes"]) == ("mine", 2)
    assert task["resources"] == {
        "accelerators": "A100:8",
        "infra": "aws/us-east-1",
        "disk_size": 300,
        "use_spot": True,
        "job_recovery": {"recover_on_exit_codes": [75]},
    }


def shell(script: str, home: Path, **environment: str) -> list[list[str]]:
    """Runs a script in a home; returns what it called, but for the shell's own: words."""
    calls = home / "calls"
    for name in ("pitstop-env/bin/pitstop", ".local/bin/uv"):
        program = home / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" --- >> {calls}\n')
        program.chmod(0o755)
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", **environment}
    subprocess.run(["bash", "-c", script], check=True, env=environment, stdout=subprocess.DEVNULL)
    texts = calls.read_text().split("---\n")[:-1]
    calls.unlink()
    return [text.splitlines() for text in texts]


def test_each_node_trains_with_its_own_number(tmp_path: Path) -> None:
    run = composed(tmp_path)["run"]
    environment = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.3"}
    [words] = shell(run, tmp_path, **environment)
    assert words[:3] == ["pitstop-env/bin/pitstop", "train", "pitstop-files/recipe.yaml"]
    assert words[3:5] == ["--data", "s3://bucket/my data"]
    at = words.index("--epochs")
    assert tuple(words[at : at + 4]) == OPTIONS
    stated = dict(zip(words[3::2], words[4::2], strict=True))
    assert stated["--remote"] == "s3://bucket/run"
    assert (stated["--nodes"], stated["--node-rank"]) == ("2", "1")
    assert stated["--rdzv-endpoint"] == "10.0.0.7:29400"
    assert stated["--max-restarts"] == "3"


def test_a_single_node_meets_nobody(tmp_path: Path) -> None:
    [words] = shell(composed(tmp_path, replace(REQUEST, nodes=1))["run"], tmp_path)
    assert not {"--nodes", "--node-rank", "--rdzv-endpoint"} & {*words}


def test_the_setup_installs_the_wheel_that_is_mounted(tmp_path: Path) -> None:
    task = composed(tmp_path)
    folder = Path(task["file_mounts"]["~/pitstop-files"])
    sky.write(REQUEST, sky.compose(REQUEST, tmp_path / "task"), tmp_path / "task")
    home = tmp_path / "home"
    (home / "pitstop-files").mkdir(parents=True)
    [wheel] = (tmp_path / "task" / folder.name).glob("*.whl")
    (home / "pitstop-files" / wheel.name).write_bytes(wheel.read_bytes())
    *_, install = shell(task["setup"], home)
    assert install[:3] == [".local/bin/uv", "pip", "install"]
    assert install[-1] == f"{home}/pitstop-files/{wheel.name}[aws]"


def test_what_is_written_is_all_that_the_task_mounts(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    task = sky.compose(REQUEST, folder)
    path = sky.write(REQUEST, task, folder)
    read = yaml.safe_load(path.read_text())
    mounted = Path(read["file_mounts"]["~/pitstop-files"])
    assert load_recipe(str(mounted / "recipe.yaml")) == load_recipe("demo")
    assert [wheel.suffix for wheel in mounted.iterdir()].count(".whl") == 1
    with pytest.raises(InputError, match="--to"):
        sky.write(REQUEST, task, folder)


def test_a_run_that_nothing_keeps_is_refused(tmp_path: Path) -> None:
    for remote in (None, "/mnt/run", "file:///mnt/run", "ftp://host/run"):
        with pytest.raises(InputError, match="--remote"):
            composed(tmp_path, replace(REQUEST, remote=remote))
    with pytest.raises(InputError, match="--data"):
        composed(tmp_path, replace(REQUEST, data=None))


def test_where_the_bucket_is_travels_but_no_secret(tmp_path: Path, aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_REGION", "eu-west-1")
    aws.setenv("AWS_SESSION_TOKEN", "token")
    assert composed(tmp_path)["envs"] == {"AWS_REGION": "eu-west-1"}


# What the user adds


@pytest.fixture
def added(tmp_path: Path):
    """Reads a file of additions."""

    def added(text: str) -> sky.Additions:
        (tmp_path / "more.yaml").write_text(text)
        return sky.read_additions(tmp_path / "more.yaml")

    return added


def test_additions_are_kept_and_options_win(tmp_path: Path, added: Any) -> None:
    additions = added("""
        resources:
          cpus: 8+
          accelerators: L4:1
          any_of: [{infra: aws}, {infra: gcp/us-central1}]
          job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [70]}
        file_mounts:
          /data: {source: "s3://bucket", mode: COPY}
          /etc/own: ./own
        envs: {NCCL_DEBUG: INFO}
        setup: echo first
    """)
    task = composed(tmp_path, gpus="A100:8", additions=additions)
    resources = task["resources"]
    assert (resources["cpus"], resources["accelerators"]) == ("8+", "A100:8")
    assert resources["any_of"] == [{"infra": "aws"}, {"infra": "gcp/us-central1"}]
    assert resources["job_recovery"] == {"strategy": "FAILOVER", "recover_on_exit_codes": [70, 75]}
    assert task["file_mounts"]["/data"] == {"source": "s3://bucket", "mode": "COPY"}
    assert task["file_mounts"]["/etc/own"] == "./own"
    assert "~/pitstop-files" in task["file_mounts"]
    assert task["envs"]["NCCL_DEBUG"] == "INFO"
    assert task["setup"].startswith("echo first\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("resources: {use_spots: true}", "resources: unknown key 'use_spots'.*use_spot"),
        (
            "resources: {job_recovery: {recover_on_exit_code: [75]}}",
            "resources.job_recovery: unknown key 'recover_on_exit_code'.*recover_on_exit_codes",
        ),
        ("resources: {any_of: [{infra: aws}, {regoin: x}]}", "resources.any_of.1: .*'region'"),
        ("resources: {job_recovery: {recover_on_exit_codes: [256]}}", "exit_codes.0: .*255"),
        ("resources: {disk_tier: huge}", "resources.disk_tier: "),
        ("file_mounts: {/data: {sorce: s3://b}}", "file_mounts./data: unknown key 'sorce'"),
        ("envs: {my-name: x}", "envs"),
        ("run: echo", "unknown key 'run'"),
        ("num_nodes: 3", "unknown key 'num_nodes'"),
        ("- a", "more.yaml"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_key_that_skypilot_would_not_read_is_refused(text: str, problem: str, added: Any) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        added(text)
    assert "more.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


# SkyPilot itself


def test_it_is_submitted_where_sky_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = sky.submission(REQUEST, tmp_path / "task.yaml")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not sky.submit(command)
    program = tmp_path / "sky"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit $CODE\n')
    program.chmod(0o755)
    monkeypatch.setenv("CODE", "0")
    assert sky.submit(command)
    said = (tmp_path / "said").read_text()
    assert said == f"jobs launch --name mine --yes --detach-run {tmp_path}/task.yaml\n"
    monkeypatch.setenv("CODE", "3")
    with pytest.raises(InputError, match="exit code 3"):
        sky.submit(command)


ASKED = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
[resources] = task.resources
print(json.dumps({
    "nodes": task.num_nodes,
    "name": task.name,
    "spot": resources.use_spot,
    "recovery": resources.job_recovery,
    "accelerators": resources.accelerators,
    "mounts": task.file_mounts,
}))
"""


@pytest.mark.skipif("PITSTOP_SKY_PYTHON" not in os.environ, reason="PITSTOP_SKY_PYTHON is not set")
def test_skypilot_reads_the_task(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    path = sky.write(REQUEST, sky.compose(REQUEST, folder, gpus="A100:8", infra="aws"), folder)
    command = [os.environ["PITSTOP_SKY_PYTHON"], "-c", ASKED, str(path)]
    said = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )
    read = json.loads(said.stdout.splitlines()[-1])
    assert (read["nodes"], read["name"], read["spot"]) == (2, "mine", True)
    assert read["recovery"]["recover_on_exit_codes"] == [75]
    assert read["accelerators"] == {"A100": 8}
    assert read["mounts"] == {"~/pitstop-files": str(folder / "files")}
