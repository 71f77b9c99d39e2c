"""The cores of this machine."""

import os


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_a_rank(ranks: int) -> int:
    """Returns the share of each of so many ranks in the cores, at least one."""
    return max(1, cores() // ranks)
