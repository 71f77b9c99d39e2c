"""What a machine of a launch does: its script runs here, with fakes for what only a machine has."""

import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.core.recipe import load_recipe
from pitstop.launch.ec2_boot import LONGEST_USER_DATA, UNIT, Boot, compose, compose_packing
from pitstop.launch.ec2_plan import Image, Offer, Plan, Settings
from pitstop.launch.ec2_volume import Volume
from pitstop.launch.request import Request

WHEEL = "pitstop-1.0-py3-none-any.whl"
IMAGE = Image("ami-1", "Deep Learning OSS Nvidia Driver AMI (Ubuntu 22.04)", "/dev/sda1", 40)
VOLUME = Volume("vol-0abc", "us-east-1a", 100, "available", None, None, False)
NASTY = 'it\'s "$HOME" `id` $(id) \\ *; exit 9 #'


def planned(*options: str, data: str = "s3://bucket/my data", remote: str | None = None) -> Plan:
    """Returns the plan of a launch."""
    request = Request("run-1", load_recipe("demo"), "demo", data, options, spot=True, remote=remote)
    settings = Settings("g5.xlarge", files="s3://bucket/files", max_run=90)
    offers = (Offer("us-east-1a", 0.42),)
    return Plan(request, settings, "us-east-1", IMAGE, offers, volume=None, staged=True)


@dataclass
class FakeMachine:
    """A folder with programs that write down how they were called."""

    here: Path
    boot: Boot
    variables: dict[str, str]

    def program(self, name: str, does: str = "") -> None:
        """Puts a program in place: it notes its arguments, and then does something."""
        path = self.here / "programs" / name
        path.parent.mkdir(exist_ok=True)
        note = f'printf "%s\\0" {name} "$@" $"\\n" >> {shlex.quote(str(self.here / "calls"))}'
        path.write_text(f"#!/bin/bash\n{note}\n{does}\n")
        path.chmod(0o755)

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts the script."""
        text = self.boot.user_data.replace(f"UNIT={UNIT}", f"UNIT={self.here}/unit.service")
        assert "unit.service" in text
        script = self.here / "user-data"
        script.write_text(text)
        path = f"{self.here / 'programs'}:/usr/bin:/bin"
        return subprocess.Popen(
            ["bash", script, *arguments],
            text=True,
            stderr=subprocess.PIPE,
            env={"PATH": path, **self.variables},
        )

    def run(self, *arguments: str) -> int:
        """Runs the script; returns its exit code."""
        with self.popen(*arguments) as process:
            self.said = process.communicate()[1]
        return process.returncode

    @property
    def calls(self) -> list[list[str]]:
        """What was called, by words."""
        path = self.here / "calls"
        if not path.exists():
            return []
        return [call.split("\0")[:-1] for call in path.read_text().split("\\n\0")[:-1]]

    def called(self, name: str) -> list[list[str]]:
        """The calls of one program, without its name."""
        return [call[1:] for call in self.calls if call[0] == name]


def machine(
    tmp_path: Path, plan: Plan, volume: Volume | None = None, **variables: str
) -> FakeMachine:
    """Returns a machine with no disks of its own, on which every program does as it is told."""
    root, mount = str(tmp_path / "root"), str(tmp_path / "volume")
    boot = compose(plan, wheel=WHEEL, volume=volume, root=root, mount=mount)
    return _machine(tmp_path, boot, variables)


def _machine(tmp_path: Path, boot: Boot, variables: dict[str, str]) -> FakeMachine:
    made = FakeMachine(tmp_path, boot, variables)
    for name in ("pitstop", "aws", "mount", "mkfs.ext4", "mdadm", "udevadm", "lsblk"):
        made.program(name)
    made.program("mountpoint", "exit 1")
    made.program("blkid", "exit 2")
    made.program("systemctl")
    made.program("shutdown")
    (tmp_path / "root").mkdir(exist_ok=True)
    return made


def test_the_commands_arrive_word_by_word(tmp_path: Path) -> None:
    plan = planned("--preemption-command", NASTY, "--set", "model.kwargs={}", remote="s3://b/r")
    fake = machine(tmp_path, plan)
    assert fake.run("run") == 0, fake.said
    root = str(tmp_path / "root")
    assert fake.called("pitstop") == [list(step[1:]) for step in fake.boot.steps]
    assert fake.called("pitstop")[0] == [
        "data",
        "stage",
        "s3://bucket/my data",
        f"{root}/scratch/data",
    ]
    assert fake.boot.command[-4:] == ["--preemption-command", NASTY, "--set", "model.kwargs={}"]
    assert fake.boot.command[:2] == ["pitstop", "train"]


def test_the_price_of_the_zone_is_that_of_the_run_unless_the_user_knows_better() -> None:
    offer = Offer("us-east-1b", 0.3717)
    command = compose(planned("--price", "9"), wheel=WHEEL, offer=offer).command
    assert command.index("0.3717") < command.index("9")  # the last one counts
    assert [word for word in command if word == "--price"] == ["--price", "--price"]
    assert "--price" not in compose(planned(), wheel=WHEEL, offer=Offer(None, None)).command


def test_without_a_bucket_the_run_is_on_the_volume() -> None:
    command = compose(planned(), wheel=WHEEL, volume=VOLUME).command
    assert command[command.index("--out") + 1] == "/volume/runs/run-1"
    assert "--remote" not in command


def test_a_stage_that_fails_ends_the_start_with_its_exit_code(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned())
    fake.program("pitstop", "exit 2")
    assert fake.run("run") == 2
    assert len(fake.called("pitstop")) == 1


def test_a_signal_reaches_the_training_itself(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned())
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    train = f"trap 'kill $!; exit 75' TERM; sleep 60 & echo up > {ready}; wait"
    fake.program("pitstop", f"[[ $1 == data ]] || {{ {train}; }}")
    with fake.popen("run") as process:
        assert ready.read_text() == "up\n"
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 75


@pytest.mark.parametrize("status", ["0", "2", "76", "77"])
def test_the_machine_ends_when_the_run_is_decided(tmp_path: Path, status: str) -> None:
    fake = machine(tmp_path, planned(), EXIT_CODE="exited", EXIT_STATUS=status)
    fake.run("ended")
    assert fake.called("systemctl") == [["poweroff"]]
    assert f"pitstop-launch: exit code {status}\n" in fake.said


@pytest.mark.parametrize("ending", ["exited 75", "exited 70", "exited 1", "killed KILL"])
def test_the_machine_stays_when_the_run_is_to_start_again(tmp_path: Path, ending: str) -> None:
    code, status = ending.split()
    fake = machine(tmp_path, planned(), EXIT_CODE=code, EXIT_STATUS=status)
    fake.run("ended")
    assert fake.called("systemctl") == []


PYTHON = """
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
esac
"""


def test_the_installation(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned())
    fake.program("python3.13", "exit 1")
    fake.program("python3.12", PYTHON)
    assert fake.run() == 0, fake.said
    root = tmp_path / "root"
    assert fake.called("aws") == [
        [
            "s3",
            "cp",
            "--recursive",
            "--only-show-errors",
            "s3://bucket/files/run-1",
            f"{root}/files",
        ],
        ["s3", "rm", "--recursive", "--only-show-errors", "s3://bucket/files/run-1"],
    ]
    installed = [call for call in fake.called("python3.12") if "pip" in call]
    assert installed == [["-m", "pip", "install", "--quiet", f"{root}/files/{WHEEL}"]]
    assert fake.called("systemctl")[-1] == ["enable", "--now", "--no-block", "pitstop.service"]
    assert ["poweroff"] not in fake.called("systemctl")
    assert fake.called("shutdown")[0][:2] == ["-P", "+90"]
    assert (root / "boot").read_text().startswith("#!/bin/bash\n")


def test_a_failed_installation_ends_the_machine(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned())
    fake.program("python3.13", PYTHON)
    fake.program("aws", "exit 5")
    assert fake.run() == 5
    assert fake.called("systemctl") == [["poweroff"]]


def test_the_service_ends_the_machine_in_a_crash_loop_and_never_repeats_a_decision(
    tmp_path: Path,
) -> None:
    fake = machine(tmp_path, planned())
    fake.program("python3.13", PYTHON)
    assert fake.run() == 0, fake.said
    unit = tmp_path / "unit.service"
    lines = unit.read_text().splitlines()
    for line in (
        "Restart=on-failure",
        "RestartPreventExitStatus=2 76 77",
        "StartLimitAction=poweroff",
        "KillMode=mixed",
        f"ExecStart=/bin/bash {tmp_path}/root/boot run",
        f"ExecStopPost=/bin/bash {tmp_path}/root/boot ended",
    ):
        assert line in lines
    if shutil.which("systemd-analyze"):
        check = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit]
        checked = subprocess.run(check, capture_output=True, text=True)
        assert "unit.service" not in checked.stderr, checked.stderr


DISKS = """
case $1 in
    -dnpo) printf '/dev/nvme0n1 vol0root\n/dev/nvme1n1 vol0other\n/dev/nvme2n1 vol0abc\n' ;;
    -nrpo) echo "${@: -1}"; echo "${@: -1}p1 ext4" ;;
esac
"""


def test_the_volume_is_found_by_its_id_and_mounted(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned(), VOLUME)
    fake.program("lsblk", DISKS)
    assert fake.run("run") == 0, fake.said
    assert fake.called("mount") == [["-o", "noatime", "/dev/nvme2n1p1", str(tmp_path / "volume")]]
    assert fake.called("mkfs.ext4") == []


def test_a_volume_without_nvme_is_found_by_its_place(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned(), VOLUME)
    xen = "case $1 in -dnpo) printf '/dev/xvda\n/dev/xvdf\n' ;; -nrpo) echo /dev/xvdf ext4 ;; esac"
    fake.program("lsblk", xen)
    assert fake.run("run") == 0, fake.said
    assert fake.called("mount")[0][2] == "/dev/xvdf"


NO_SYSTEM = "case $1 in -dnpo) echo /dev/nvme2n1 vol0abc ;; -nrpo) echo /dev/nvme2n1 ;; esac"


def test_a_volume_of_the_user_is_never_formatted(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned(), VOLUME)
    fake.program("lsblk", NO_SYSTEM)
    assert fake.run("run") == 2
    assert "holds no file system" in fake.said
    assert fake.called("mkfs.ext4") == fake.called("pitstop") == []


@pytest.mark.parametrize(("found", "formatted"), [(2, True), (0, False)])
def test_a_new_volume_is_formatted_once(tmp_path: Path, found: int, formatted: bool) -> None:
    plan = planned()
    plan = replace(plan, settings=replace(plan.settings, prepare="s3://b/src", volume_gb=9))
    fake = _machine(
        tmp_path, _moved(compose_packing(plan, wheel=WHEEL, volume=VOLUME), tmp_path), {}
    )
    fake.program("lsblk", DISKS)
    fake.program("blkid", f"exit {found}")
    assert fake.run("run") == 0, fake.said
    assert bool(fake.called("mkfs.ext4")) is formatted
    assert fake.called("pitstop") == [["data", "pack", "s3://b/src", f"{tmp_path}/volume/data"]]


def _moved(boot: Boot, tmp_path: Path) -> Boot:
    text = boot.user_data.replace("/opt/pitstop", f"{tmp_path}/root")
    return replace(boot, user_data=text.replace("/volume", f"{tmp_path}/volume"))


def test_archives_in_a_bucket_are_copied_before_they_are_packed() -> None:
    plan = planned()
    plan = replace(plan, settings=replace(plan.settings, prepare="s3://b/tars", volume_gb=9))
    steps = compose_packing(replace(plan, downloaded=True), wheel=WHEEL, volume=VOLUME).steps
    assert [step[:3] for step in steps] == [
        ("aws", "s3", "sync"),
        ("pitstop", "data", "pack"),
        ("rm", "-rf", "/volume/source"),
    ]


NVME = """
case $2 in
    NAME,MODEL) printf '/dev/nvme0n1 Amazon Elastic Block Store\n'
        printf '/dev/nvme%sn1 Amazon EC2 NVMe Instance Storage\n' {numbers} ;;
    FSTYPE,MOUNTPOINT) echo "{taken} " ;;
esac
"""


@pytest.mark.parametrize("numbers", ["1", "1 2"])
def test_own_disks_become_one_fast_disk(tmp_path: Path, numbers: str) -> None:
    fake = machine(tmp_path, planned())
    fake.program("lsblk", NVME.format(numbers=numbers, taken=""))
    assert fake.run("run") == 0, fake.said
    device = "/dev/nvme1n1" if numbers == "1" else "/dev/md/pitstop"
    here = str(tmp_path / "root/nvme")
    assert fake.called("mount") == [["-o", "noatime", device, here]]
    assert len(fake.called("mdadm")) == len(numbers) // 2
    assert (tmp_path / "root/scratch").readlink() == Path(here)


def test_disks_that_are_in_use_are_left_alone(tmp_path: Path) -> None:
    fake = machine(tmp_path, planned())
    fake.program("lsblk", NVME.format(numbers="1", taken="LVM2_member"))
    assert fake.run("run") == 0, fake.said
    assert fake.called("mkfs.ext4") == fake.called("mount") == []
    assert (tmp_path / "root/scratch").readlink() == tmp_path / "root/disk"


def test_user_data_is_a_script_that_fits(tmp_path: Path) -> None:
    boot = compose(planned("--preemption-command", NASTY), wheel=WHEEL, volume=VOLUME)
    assert boot.user_data.startswith("#!/bin/bash\n")
    assert len(boot.user_data.encode()) < LONGEST_USER_DATA / 2
    script = tmp_path / "user-data"
    script.write_text(boot.user_data)
    checks = [["bash", "-n", script]]
    if shutil.which("shellcheck"):
        checks.append(["shellcheck", "--severity=warning", script])
    for check in checks:
        checked = subprocess.run(check, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_options_that_are_too_long_are_refused() -> None:
    with pytest.raises(InputError, match="put them into a recipe"):
        compose(planned("--preemption-command", "x" * LONGEST_USER_DATA), wheel=WHEEL)
