"""What a machine of a launch does: the user data that cloud-init runs, from `ec2_boot.sh`."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pitstop.core.errors import InputError
from pitstop.launch.ec2_plan import MOUNT, Offer, Plan
from pitstop.launch.ec2_volume import Volume
from pitstop.launch.request import train_command

ROOT = "/opt/pitstop"
"""The folder of a machine in which all is."""

UNIT = "/etc/systemd/system/pitstop.service"

RECIPE = "recipe.yaml"

LONGEST_USER_DATA = 16_384
"""Bytes, before they are encoded; EC2 takes no more."""

PACKING_MINUTES = 720
"""After which a machine that packs ends itself."""


@dataclass(frozen=True)
class Boot:
    """What a machine does."""

    user_data: str
    steps: tuple[tuple[str, ...], ...]
    """The commands, one after the other; if one fails, the rest is left out."""
    environment: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        """The last step: the training."""
        return list(self.steps[-1])


def compose(
    plan: Plan,
    *,
    wheel: str,
    offer: Offer | None = None,
    volume: Volume | None = None,
    root: str = ROOT,
    mount: str = MOUNT,
) -> Boot:
    """Returns what the machine that trains does.

    Args:
        wheel: the name of the wheel in the files.
        offer: where it runs: its price goes into the run's ledger.
        volume: what is mounted at `mount`.
        root: its folder; that of a rehearsal may be any.
        mount: where it has the volume.
    """
    request = plan.request
    data = f"{mount}/data" if plan.settings.prepare else request.data
    scratch = f"{root}/scratch"
    steps: list[tuple[str, ...]] = []
    if plan.staged and data is not None:
        steps.append(("pitstop", "data", "stage", data, f"{scratch}/data"))
        data = f"{scratch}/data"
    price = ("--price", f"{offer.dollars:g}") if offer and offer.dollars is not None else ()
    train = train_command(
        (*price, *request.train_options),
        recipe=f"{root}/files/{RECIPE}",
        data=data,
        out=f"{scratch if request.remote else mount}/runs/{request.name}",
        remote=request.remote,
    )
    steps.append(("pitstop", *train))
    return _boot(plan, steps, wheel, volume, plan.max_minutes, root=root, mount=mount)


def compose_packing(plan: Plan, *, wheel: str, volume: Volume) -> Boot:
    """Returns what the machine does that packs onto a new volume."""
    source, data = plan.settings.prepare or "", f"{MOUNT}/data"
    steps = [("pitstop", "data", "pack", source, data)]
    if plan.downloaded:
        copy = f"{MOUNT}/source"
        steps = [
            ("aws", "s3", "sync", "--only-show-errors", source, copy),
            ("pitstop", "data", "pack", copy, data),
            ("rm", "-rf", copy),
        ]
    return _boot(plan, steps, wheel, volume, PACKING_MINUTES, formats=True)


def _boot(
    plan: Plan,
    steps: Sequence[tuple[str, ...]],
    wheel: str,
    volume: Volume | None,
    max_minutes: int | None,
    *,
    formats: bool = False,
    root: str = ROOT,
    mount: str = MOUNT,
) -> Boot:
    environment = {
        "HOME": "/root",
        "AWS_REGION": plan.region,
        "AWS_DEFAULT_REGION": plan.region,
        "PITSTOP_CACHE": f"{root}/scratch/cache",
        "PYTHONUNBUFFERED": "1",
    }
    values = {
        "ROOT": root,
        "MOUNT": mount,
        "UNIT": UNIT,
        "LAUNCH": plan.request.name,
        "FILES": plan.files,
        "WHEEL": wheel,
        "VOLUME": volume.id if volume else "",
        "FORMAT": "yes" if formats else "",
        "MAX_MINUTES": str(max_minutes or ""),
    }
    lines = [
        "#!/bin/bash",
        *(f"{name}={shlex.quote(value)}" for name, value in values.items()),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        "steps() {",
        *(f"    {shlex.join(step)}" for step in steps[:-1]),
        f"    exec {shlex.join(steps[-1])}",
        "}",
    ]
    script = Path(__file__).with_name("ec2_boot.sh").read_text(encoding="utf-8")
    user_data = "\n".join([*lines, script])
    if len(user_data.encode()) > LONGEST_USER_DATA:
        raise InputError(
            f"the options of train are too long: the user data of a machine would have more than "
            f"{LONGEST_USER_DATA} bytes: put them into a recipe"
        )
    return Boot(user_data, tuple(steps), environment)
