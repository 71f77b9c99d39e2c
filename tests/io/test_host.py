"""What the system says of the machine, read from files as Linux writes them."""

from pathlib import Path

import pytest

from pitstop.io.host import available_memory, mount_of

MOUNTS = r"""overlay / overlay rw,relatime 0 0
/dev/sda1 /data ext4 rw 0 0
server:/export /data/images nfs4 rw 0 0
/dev/sdb1 /data/images/fast\040disk xfs rw 0 0
s3fs /bucket fuse.s3fs rw 0 0
/dev/sdc1 /windows fuseblk rw 0 0
10.0.0.1@tcp:/fsx /scratch lustre rw 0 0
tmpfs /bucket tmpfs rw 0 0
s3 /bucket fuse.mountpoint-s3 ro 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    (tmp_path / "mounts").write_text(MOUNTS)
    return tmp_path / "mounts"


@pytest.mark.parametrize(
    ("path", "system", "kind"),
    [
        ("/home/me", "overlay", "local"),
        ("/data/imagenet", "ext4", "local"),
        ("/data/images-2", "ext4", "local"),
        ("/data/images", "nfs4", "network"),
        ("/data/images/train/cat", "nfs4", "network"),
        ("/data/images/fast disk/train", "xfs", "local"),
        ("/bucket/train", "fuse.mountpoint-s3", "FUSE"),
        ("/windows/photos", "fuseblk", "local"),
        ("/scratch/photos", "lustre", "network"),
    ],
)
def test_a_path_is_on_the_innermost_and_latest_mount(mounts, path, system, kind) -> None:
    found = mount_of(Path(path), mounts)
    assert found is not None
    assert (found.system, found.kind) == (system, kind)


def test_where_mounts_are_not_listed_none_is_known(tmp_path: Path) -> None:
    assert mount_of(tmp_path, tmp_path / "not there") is None


def test_the_memory_that_is_left_is_bounded_by_the_containers_limit(tmp_path: Path) -> None:
    stated = tmp_path / "meminfo"
    stated.write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:     600 kB\n")
    group = tmp_path / "cgroup"
    assert available_memory(stated, group) == 600 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100000\n")
    assert available_memory(stated, group) == 600 * 1024
    (group / "memory.max").write_text("300000\n")
    assert available_memory(stated, group) == 200000
    (group / "memory.current").write_text("400000\n")
    assert available_memory(stated, group) == 0
    assert available_memory(tmp_path / "not there", group) is None
