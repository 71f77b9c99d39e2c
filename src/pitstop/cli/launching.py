"""Where `pitstop train` becomes several processes."""

import os
import sys
from collections.abc import Sequence

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import LAUNCHER
from pitstop.launch.local import Nodes, launch
from pitstop.runtime.place import Place

RANK = (sys.executable, "-P", "-m", "pitstop")
"""What runs a rank, before its arguments; -P: the working directory is no place to import from."""


def launch_ranks(
    arguments: Sequence[str], *, nproc: int | None, nodes: Nodes, device: str, max_restarts: int
) -> int | None:
    """Runs a command line once a rank and returns the exit code.

    Returns None where this process is to train itself: as one of the ranks, or the only one.
    """
    if Place.find() is not None:
        if LAUNCHER not in os.environ and (nproc is not None or nodes.count > 1):
            raise InputError(
                "--nproc and --nodes start ranks, but torchrun or SLURM has started this one: "
                "leave them out"
            )
        return None
    nproc = nproc or _gpus(device) or 1
    if nproc == nodes.count == 1 and max_restarts == 0:
        return None
    return launch([*RANK, *arguments], nproc=nproc, nodes=nodes, max_restarts=max_restarts)


def _gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()
