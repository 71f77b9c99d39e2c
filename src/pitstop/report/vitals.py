"""How the machine is that this process runs on: processor, memory, disk, GPUs."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
MEMINFO = Path("/proc/meminfo")
"""Of Linux; elsewhere what they tell is not known."""

_FEWEST_TICKS = 10
"""Of all cores together, over which a share is taken."""

_ASKED = "index,utilization.gpu,memory.used,memory.total,power.draw,power.limit"
SMI_SECONDS = 5.0


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVML: percent of the time that it was busy, bytes, watts; None is not known."""

    index: int
    busy: float | None
    memory_used: float | None
    memory_total: float | None
    power: float | None
    power_limit: float | None


@dataclass(frozen=True)
class Vitals:
    """A machine at a moment; bytes."""

    cores: int
    load: float
    """Processes that ran or wanted to, in the mean of a minute."""
    cpu: float | None
    """Percent of all cores since the look before; None at the first."""
    memory_used: float | None
    memory_total: float | None
    disk_free: float
    disk_total: float
    gpus: tuple[Gpu, ...]


class Machine:
    """This machine, to be looked at time and again."""

    def __init__(self) -> None:
        self._ticks = _cpu_ticks()
        self._smi = shutil.which("nvidia-smi")

    def look(self, disk: Path) -> Vitals:
        """Returns how it is now; of the disks, that on which the path lies."""
        used, total = _memory()
        usage = shutil.disk_usage(disk)
        return Vitals(
            cores=os.cpu_count() or 1,
            load=os.getloadavg()[0],
            cpu=self._cpu(),
            memory_used=used,
            memory_total=total,
            disk_free=usage.free,
            disk_total=usage.total,
            gpus=self._gpus(),
        )

    def _cpu(self) -> float | None:
        before, now = self._ticks, _cpu_ticks()
        if before is None or now is None or now[1] - before[1] < _FEWEST_TICKS:
            return None
        self._ticks = now
        return 100 * (now[0] - before[0]) / (now[1] - before[1])

    def _gpus(self) -> tuple[Gpu, ...]:
        """Asks nvidia-smi, which reads NVML; where it fails once, it is not asked again."""
        if self._smi is None:
            return ()
        command = [self._smi, f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(
                command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
            )
            return parse_gpus(told.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            self._smi = None
            return ()


def parse_gpus(told: str) -> tuple[Gpu, ...]:
    """Returns the GPUs of nvidia-smi's CSV; `[N/A]` and the like are not known.

    Raises:
        ValueError: it is something else.
    """
    gpus: list[Gpu] = []
    for line in told.splitlines():
        index, busy, used, total, power, limit = (cell.strip() for cell in line.split(","))
        gpus.append(
            Gpu(
                int(index),
                _number(busy),
                _number(used, 2**20),
                _number(total, 2**20),
                _number(power),
                _number(limit),
            )
        )
    return tuple(gpus)


def _number(cell: str, unit: int = 1) -> float | None:
    return None if cell.startswith("[") else float(cell) * unit


def _cpu_ticks() -> tuple[int, int] | None:
    """Returns the ticks that all cores were busy, and all ticks, since the machine began."""
    if not STAT.exists():
        return None
    ticks = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    total, idle = sum(ticks), ticks[3] + ticks[4]  # idle, and waiting for the disk
    return total - idle, total


def _memory() -> tuple[float | None, float | None]:
    """Returns the bytes in use, which no program could have, and all."""
    if not MEMINFO.exists():
        return None, None
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    total = kib["MemTotal"] * 1024
    return total - kib["MemAvailable"] * 1024, total
