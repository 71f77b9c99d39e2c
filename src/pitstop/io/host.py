"""What the system says of the machine: where a directory is mounted, what memory is left."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MOUNTS = Path("/proc/self/mounts")
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
"""Of the container that this process may run in: its limits lie here."""

PARALLEL = ("lustre", "beegfs", "gpfs", "ceph", "glusterfs")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", *PARALLEL)
LOCAL_FUSE = ("fuseblk", "fuse.fuse-overlayfs")

Kind = Literal["local", "network", "FUSE"]


@dataclass(frozen=True)
class Mount:
    """A mounted file system."""

    point: Path
    """Where."""
    system: str
    """Its type, as the system names it: `ext4`, `nfs4`, `fuse.s3fs`."""

    @property
    def kind(self) -> Kind:
        """Whether what is read comes from this machine, over a network, or through a process."""
        if self.system.startswith("fuse") and self.system not in LOCAL_FUSE:
            return "FUSE"
        return "network" if self.system in NETWORK else "local"


def mount_of(path: Path, mounts: Path = MOUNTS) -> Mount | None:
    """Returns the file system in which a path lies; None where the system does not list them.

    Args:
        mounts: the list, as in proc(5); Linux has it. Of two at one place, the later one counts.
    """
    if not mounts.exists():
        return None
    path = path.resolve()
    found = None
    for line in mounts.read_text().splitlines():
        _, escaped, system, *_ = line.split()
        point = Path(_unescaped(escaped))
        if path.is_relative_to(point) and (found is None or point.is_relative_to(found.point)):
            found = Mount(point, system)
    return found


def _unescaped(text: str) -> str:
    """Returns a path of the list, in which a space is `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def available_memory(memory: Path = MEMORY, group: Path = GROUP) -> int | None:
    """Returns the bytes that programs can still take; None where the system does not say.

    Args:
        memory: as in proc(5).
        group: of the control group, version 2, whose limit may be lower.
    """
    if sys.platform != "linux" or not memory.exists():
        return None
    stated = dict(line.split(":", 1) for line in memory.read_text().splitlines())
    free = int(stated["MemAvailable"].split()[0]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def total_memory() -> int:
    """Returns the bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
