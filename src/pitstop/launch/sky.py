"""SkyPilot: a managed job on any cloud, on several nodes, that is started again where it is cheap.

https://docs.skypilot.co/en/latest/reference/yaml-spec.html says what a task may hold. SkyPilot's
own check of it lets unknown keys through in places: on the machine of the user all of
`job_recovery` (`sky/utils/schemas.py`, 0.14.1), where a slip means that nothing recovers. Here all
keys are checked.

The run is kept by pitstop's own `--remote`, not in a bucket that SkyPilot mounts: a file there is
not durable when it is closed, and two machines can both create it.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import INTERRUPTED
from pitstop.core.strict import Strict
from pitstop.io.objects import SCHEMES
from pitstop.io.storage import write_text
from pitstop.launch.local import DEFAULT_PORT
from pitstop.launch.request import Request, recipe_yaml, train_command
from pitstop.launch.wheel import build_wheel

FILES = "pitstop-files"
"""The folder, in the home of each node, of the wheel and the recipe."""

RECIPE = "recipe.yaml"
TASK = "task.yaml"

RESTARTS = 3
"""Of the ranks, on their node. SkyPilot itself starts again only what was interrupted: it would
start what ended by decision (diverged, budget spent) again too."""

PASSED_ON = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
"""What says where a bucket is; none of it is secret."""

ExitCode = Annotated[int, Field(ge=0, le=255)]


class JobRecovery(Strict):
    """When and where SkyPilot starts a managed job again."""

    strategy: Literal["EAGER_NEXT_REGION", "FAILOVER"] | None = None
    max_restarts_on_errors: int | None = Field(default=None, ge=0)
    recover_on_exit_codes: tuple[ExitCode, ...] = ()


class Candidate(Strict):
    """What a node may be."""

    infra: str | None = None
    cloud: str | None = None
    region: str | None = None
    zone: str | None = None
    accelerators: str | dict[str, float | None] | tuple[str, ...] | None = None
    instance_type: str | None = None
    cpus: str | int | float | None = None
    memory: str | int | float | None = None
    use_spot: bool | None = None
    disk_size: int | str | None = None
    disk_tier: Literal["low", "medium", "high", "ultra", "best"] | None = None
    network_tier: Literal["standard", "best"] | None = None
    local_disk: str | None = None
    max_hourly_cost: float | None = Field(default=None, gt=0)
    image_id: str | dict[str, str] | None = None
    labels: dict[str, str] | None = None


class Resources(Candidate):
    """What a node may be, and candidates to choose from."""

    any_of: tuple[Candidate, ...] | None = None
    ordered: tuple[Candidate, ...] | None = None
    job_recovery: JobRecovery | None = None


class Bucket(Strict):
    """A bucket that is mounted, or copied from."""

    name: str | None = None
    source: str | tuple[str, ...] | None = None
    store: str | None = None
    persistent: bool | None = None
    mode: Literal["MOUNT", "COPY", "MOUNT_CACHED"] | None = None


def _kind(mount: Any) -> str:
    return "path" if isinstance(mount, str) else "bucket"


Mount = Annotated[
    Annotated[str, Tag("path")] | Annotated[Bucket, Tag("bucket")], Discriminator(_kind)
]

EnvironmentName = Annotated[str, Field(pattern="^[a-zA-Z_][a-zA-Z0-9_]*$")]


class Additions(Strict):
    """What the user may add to a task."""

    resources: Resources = Resources()
    envs: dict[EnvironmentName, str] | None = None
    file_mounts: dict[str, Mount] | None = None
    setup: str | None = None
    config: dict[str, Any] | None = None


class Task(Additions):
    """A task of SkyPilot, as far as it is of use here."""

    name: str
    num_nodes: int = Field(default=1, ge=1)
    run: str

    def to_yaml(self) -> str:
        """Returns the file."""
        head = {"name": self.name, "num_nodes": self.num_nodes}
        data = head | self.model_dump(mode="json", exclude_none=True)
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes scripts as people do."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)  # pyright: ignore[reportUnknownMemberType]


_Dumper.add_representer(str, _text)


def read_additions(path: Path) -> Additions:
    """Reads what the user adds to the task: a file with some keys of a SkyPilot task.

    Raises:
        InputError: it is not one, or it has a key that SkyPilot does not know or that is the
            launcher's (name, num_nodes, run, ...).
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError):
        raise InputError(f"{path}: is not YAML") from None
    try:
        return Additions.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error, raw)}") from None


def _first_problem(error: ValidationError, raw: Any) -> str:
    """Returns the first problem as `resources.disk_tier: what is wrong`."""
    first = error.errors()[0]
    keys: list[str] = []
    for part in first["loc"]:
        if isinstance(raw, dict) and part in raw:
            raw = cast("dict[Any, Any]", raw)[part]
        elif isinstance(raw, list) and isinstance(part, int):
            raw = cast("list[Any]", raw)[part]
        else:  # a name of pydantic's own, of a member of a union
            continue
        keys.append(str(part))
    what = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(keys)}: {what}" if keys else what


def compose(
    request: Request,
    folder: Path,
    *,
    gpus: str | None = None,
    infra: str | None = None,
    instance_type: str | None = None,
    disk_gb: int | None = None,
    additions: Additions | None = None,
) -> Task:
    """Returns the task of a request.

    Args:
        folder: where `write` puts the files.
        gpus: `--gpus`, in SkyPilot's words: `A100:8`.
        infra: `--infra`: `aws`, `aws/us-east-1`, `k8s`.
        instance_type: of the cloud's machines.
        disk_gb: of each node.
        additions: the user's; what the options say wins.

    Raises:
        InputError: the run is not kept in a bucket, or names no data.
    """
    remote = request.remote
    if remote is None or remote.partition("://")[0] not in SCHEMES or remote.startswith("file:"):
        raise InputError(
            "--remote: the nodes of a managed job go away at its end, with all that is on them: "
            "give a folder of a bucket (s3://..., gs://..., az://...)"
        )
    if request.data is None:
        raise InputError(f"recipe {request.recipe.name} names no data: give --data")
    base = additions or Additions()
    stated = {
        "accelerators": gpus,
        "infra": infra,
        "instance_type": instance_type,
        "disk_size": disk_gb,
        "use_spot": request.spot,
        "job_recovery": _recovering(base.resources.job_recovery),
    }
    known = {key: value for key, value in stated.items() if value is not None}
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return Task(
        name=request.name,
        num_nodes=request.nodes,
        resources=base.resources.model_copy(update=known),
        envs=(passed | (base.envs or {})) or None,
        file_mounts={**(base.file_mounts or {}), f"~/{FILES}": str((folder / "files").absolute())},
        setup="\n".join(([base.setup.rstrip("\n")] if base.setup else []) + [_SETUP]),
        run=_run(request, request.data, remote),
        config=base.config,
    )


def _recovering(stated: JobRecovery | None) -> JobRecovery:
    stated = stated or JobRecovery()
    codes = sorted({*stated.recover_on_exit_codes, INTERRUPTED})
    return stated.model_copy(update={"recover_on_exit_codes": tuple(codes)})


_SETUP = f"""\
export PATH="$HOME/.local/bin:$PATH"
command -v uv || python3 -m pip install --user uv
test -d ~/pitstop-env || uv venv --python 3.11 ~/pitstop-env
uv pip install --python ~/pitstop-env/bin/python "$(ls ~/{FILES}/*.whl)[aws]"
"""
"""SkyPilot's images have uv, and Pythons of many ages."""

_MEETING = """\
 --node-rank "$SKYPILOT_NODE_RANK" \
--rdzv-endpoint "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)":{port}"""


def _run(request: Request, data: str, remote: str) -> str:
    """Returns the script of each node; pitstop takes its place, so that signals reach it."""
    words = train_command(
        request.train_options,
        recipe=f"{FILES}/{RECIPE}",
        data=data,
        out="pitstop-run",
        remote=remote,
        nodes=request.nodes,
        max_restarts=RESTARTS,
    )
    meeting = _MEETING.format(port=DEFAULT_PORT) if request.nodes > 1 else ""
    return f"cd ~\nexec ~/pitstop-env/bin/pitstop {shlex.join(words)}{meeting}\n"


def write(request: Request, task: Task, folder: Path) -> Path:
    """Writes the task, the wheel and the recipe into a folder; returns the path of the task.

    Raises:
        InputError: there is something of another task.
    """
    if folder.exists():
        raise InputError(f"{folder}: is there already: give another --name or --to")
    (folder / "files").mkdir(parents=True)
    build_wheel(folder / "files")
    write_text(folder / "files" / RECIPE, recipe_yaml(request.recipe_name))
    write_text(folder / TASK, task.to_yaml())
    return folder / TASK


def submission(request: Request, task_file: Path) -> list[str]:
    """Returns the command that submits a task as a managed job, and does not wait for its end."""
    options = ["--name", request.name, "--yes", "--detach-run"]
    return ["sky", "jobs", "launch", *options, str(task_file)]


def submit(command: list[str]) -> bool:
    """Runs it where `sky` is installed; returns whether it is.

    Raises:
        InputError: SkyPilot says no; it has said why.
    """
    if shutil.which(command[0]) is None:
        return False
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise InputError(f"sky jobs launch failed with exit code {code}: see above; {command[-1]}")
    return True
