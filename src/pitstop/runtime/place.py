"""Where a process stands among the ranks, from what started it: torchrun, SLURM, or nobody."""

import os
import re
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pitstop.core.exit_codes import DECIDED, FINISHED, OUTCOME, RESTARTED

PORTS = range(29500, 30500)
"""Where the ranks of a SLURM step meet: a port by the job's number, unless MASTER_PORT is given."""


@dataclass(frozen=True)
class Place:
    """A process among `world` ranks, `local_world` of them on its machine, `node`."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> "Place | None":
        """Returns the place that torchrun or a SLURM step has given this process, None if none."""
        if "RANK" in environment and "WORLD_SIZE" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
            # "4(x2),3" are 4 tasks on each of two machines and 3 on the next
            names += ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
        else:
            return None
        found = (re.match(r"\d+", environment.get(name, "")) for name in names)
        rank, world, local_rank, local_world, node = (int(n[0]) if n else 0 for n in found)
        return cls(rank, world, local_rank, max(1, local_world), node)


def meeting_point(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns MASTER_ADDR and MASTER_PORT: as they are set, else as they follow from SLURM's."""
    nodes = environment.get("SLURM_STEP_NODELIST", "localhost")
    job = environment.get("SLURM_JOB_ID", "") + "." + environment.get("SLURM_STEP_ID", "")
    port = PORTS[zlib.crc32(job.encode()) % len(PORTS)]
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """Returns the first name of a list as SLURM writes it: `gpu003` of `gpu[003-008,011],login`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Tells whether these ranks were started again after others of the same command failed."""
    return RESTARTED in environment or environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def end_process(code: int) -> NoReturn:
    """Ends a rank at once: an orderly end may wait for a process group of which a rank is lost.

    Under pitstop's own launcher, the first rank of a machine leaves the exit code for it, and what
    was decided is no failure for which it would start the ranks again.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    place, outcome = Place.find(), os.environ.get(OUTCOME)
    if outcome is not None and code in DECIDED:
        if place is not None and place.local_rank == 0:
            Path(outcome).write_text(str(code))
        code = FINISHED
    os._exit(code)
