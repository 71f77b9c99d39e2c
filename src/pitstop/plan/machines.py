"""Machines that can be rented, as data: `machines.yaml`. And `local`, this one."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel

from pitstop.core.errors import InputError
from pitstop.core.strict import Strict, did_you_mean
from pitstop.plan import calibration
from pitstop.plan.calibration import Calibration

SAGEMAKER = "ml."
"""What SageMaker puts before the name of a machine."""

LOCAL = "local"


class Claim(Strict):
    """What somebody said that a recipe takes on a machine. Nobody here has verified it."""

    recipe: str
    minutes: tuple[float, float]
    """From, to."""
    dollars: float
    source: str


class Machine(Strict):
    """A machine, whole."""

    name: str
    gpu: str | None
    """The kind, as in `rates.yaml`; None: it trains on its processor."""
    gpus: int
    gpu_memory_gib: float | None
    """Of each GPU."""
    vcpus: int
    """Hardware threads."""
    memory_gib: float
    network_gbps: float
    disk_gb: float
    """Local NVMe, all together; 0: only volumes on the network."""
    disk_mb_per_second: float
    """What it reads."""
    claims: tuple[Claim, ...] = ()
    calibration: Calibration | None = None
    """What was measured on it; of `local` alone."""

    @property
    def cores(self) -> int:
        """Physical cores: of a rented machine, two hardware threads are one."""
        return self.calibration.cores if self.calibration else self.vcpus // 2


def find_machine(name: str) -> Machine:
    """Returns the machine of a name: `g5.xlarge`, `ml.g5.xlarge` (SageMaker's), `local`.

    Raises:
        InputError: there is none; or `local` has not been calibrated.
    """
    if name == LOCAL:
        return _local()
    known = _table()
    machine = known.get(name.removeprefix(SAGEMAKER))
    if machine is None:
        meant = did_you_mean(name, [LOCAL, *known, *(SAGEMAKER + each for each in known)])
        raise InputError(f"no machine {name!r} is known{meant}; known: local, {', '.join(known)}")
    return machine.model_copy(update={"name": name})


def machines() -> list[Machine]:
    """Returns every machine of EC2 that is known, in the order of the file."""
    return list(_table().values())


def _local() -> Machine:
    measured = calibration.load()
    if measured is None:
        raise InputError("machine local: not measured yet: run `pitstop calibrate` first")
    return Machine(
        name=LOCAL,
        gpu=measured.device if measured.gpus else None,
        gpus=measured.gpus,
        gpu_memory_gib=measured.gpu_memory_gib,
        vcpus=measured.cores,
        memory_gib=measured.memory_gib,
        network_gbps=0,
        disk_gb=0,
        disk_mb_per_second=measured.disk_mb_per_second,
        calibration=measured,
    )


class _File(BaseModel, extra="forbid"):
    """machines.yaml: columns, rows by the name of the machine, claims by the same."""

    columns: list[str]
    machines: dict[str, list[str | float]]
    claims: dict[str, list[Claim]]


@cache
def _table() -> dict[str, Machine]:
    text = Path(__file__).with_name("machines.yaml").read_text(encoding="utf-8")
    file = _File.model_validate(yaml.safe_load(text))
    return {
        name: Machine.model_validate(
            {"name": name, **dict(zip(file.columns, row, strict=True))}
            | {"claims": file.claims.get(name, [])}
        )
        for name, row in file.machines.items()
    }
