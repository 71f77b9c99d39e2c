"""How this machine is."""

from pathlib import Path

import pytest

from pitstop.report import vitals
from pitstop.report.vitals import Gpu, Machine, parse_gpus


def test_this_machine_is_sane(tmp_path: Path) -> None:
    now = Machine().look(tmp_path)
    assert now.cores >= 1
    assert now.load >= 0
    assert 0 < now.disk_free <= now.disk_total
    assert now.memory_used is None or 0 < now.memory_used < (now.memory_total or 0)


def test_the_processors_share_is_that_since_the_look_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(vitals, "STAT", stat)
    # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text("cpu 100 0 0 900 0 0 0 0 7 7\ncpu0 1 1\n")
    machine = Machine()
    assert machine.look(tmp_path).cpu is None, "no time has passed"
    stat.write_text("cpu 110 5 5 940 20 2 2 16 9 9\ncpu0 1 1\n")
    assert machine.look(tmp_path).cpu == pytest.approx(40)
    stat.unlink()
    assert machine.look(tmp_path).cpu is None


def test_gpus_as_nvidia_smi_tells_them() -> None:
    told = "0, 98, 34312, 81559, 312.07, 700.00\n1, [N/A], 0, 81559, [Not Supported], 700.00\n"
    first, second = parse_gpus(told)
    assert first == Gpu(0, 98, 34312 * 2**20, 81559 * 2**20, 312.07, 700)
    assert (second.index, second.busy, second.power) == (1, None, None)


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "exec sleep 60"])
def test_an_nvidia_smi_that_fails_is_asked_once(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(vitals, "SMI_SECONDS", 0.5)
    machine = Machine()
    assert [machine.look(tmp_path).gpus for _ in range(2)] == [(), ()]
    assert (tmp_path / "asked").read_text() == "asked\n"
