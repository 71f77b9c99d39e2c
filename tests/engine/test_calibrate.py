"""What this machine does, measured: with a clock of our own where a figure is asserted."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pitstop import cli
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.packed import PackedDataset
from pitstop.engine import calibrate as measuring
from pitstop.engine.calibrate import calibrate, kinds, quick, with_earlier
from pitstop.plan import calibration
from pitstop.plan.calibration import Calibration, Decode, Speed
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

from .conftest import TINY

STEP = 0.25
"""Seconds that a step takes by our clock, and an evaluated batch."""


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    monkeypatch.setattr(measuring, "DISK_BYTES", 2**20)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still, but for steps and evaluated batches."""
    now = SimpleNamespace(seconds=0.0)

    def slow(method: Callable[..., object]) -> Callable[..., object]:
        def slowly(*arguments: object) -> object:
            now.seconds += STEP
            return method(*arguments)

        return slowly

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(measuring, "train_step", slow(measuring.train_step))
    monkeypatch.setattr(measuring, "predict", slow(measuring.predict))
    monkeypatch.setattr(measuring, "disk_mb_per_second", lambda directory: 100.0)
    return now


def measured(recipe: Recipe, data: PackedDataset | None) -> Calibration:
    device = Device.choose("fp32", compile=False)
    found = calibrate(recipe, data, device, Ranks(), started=0.0, say=lambda what: None)
    assert found is not None
    return found


def test_speeds_are_images_over_seconds_at_each_resolution(tiny, digits, clock) -> None:
    recipe = tiny(eval={"batch_size": 8, "crop_ratio": 1.0, "flip_average": True})
    found = measured(recipe, digits)
    speeds = {speed.resolution: speed for speed in found.training}
    assert {side: speed.images_per_second for side, speed in speeds.items()} == {
        16: 15 / STEP,
        24: 10 / STEP,
    }
    assert [speed.batch_size for speed in found.training] == [15, 10]
    (evaluation,) = found.evaluation
    assert (evaluation.resolution, evaluation.batch_size) == (24, 8)
    assert evaluation.images_per_second == 8 / STEP  # of one view
    assert [decode.resolution for decode in found.decode] == [16, 24]


def test_without_data_the_loader_is_not_measured(tiny, clock) -> None:
    found = measured(tiny(), None)
    assert len(found.training) == 2
    assert found.decode == ()


def test_steps_of_one_kind_are_measured_once(tiny) -> None:
    phase = {"duration": "20%", "resolution": 16}
    phases = [phase, {**phase, "lr": 0.2}, {**phase, "mix": {"mixup_alpha": 0.1}}, phase]
    phases += [{"duration": "rest", "resolution": 24}]
    timeline = Timeline.planned(tiny(epochs=20, phases=phases), 60)
    assert [segment.phase_index for segment in kinds(timeline)] == [0, 2, 4]


def test_a_cpu_gets_batches_that_take_seconds() -> None:
    stated = {"epochs": 1, "batch_size": 1024, "grad_accum_steps": 4, "model": "resnet50"}
    cpu = Device.choose("fp32", compile=False)
    small = quick(parse_recipe({**stated, "resolution": 32}, "test"), cpu, 1).phases[0]
    large = quick(parse_recipe({**stated, "resolution": [128, 224]}, "test"), cpu, 2).phases[0]
    assert (small.batch_size, small.grad_accum_steps) == (1024, 4)
    assert (large.batch_size, large.grad_accum_steps) == (40, 4)


def example(**changes: object) -> Calibration:
    speed = Speed(model="a", resolution=32, batch_size=8, precision="fp32", images_per_second=10.0)
    stated: dict[str, object] = {
        "date": "2026-11-22",
        "device": "a machine",
        "cores": 2,
        "gpus": 0,
        "memory_gib": 4.0,
        "training": (speed,),
        "evaluation": (speed,),
        "decode": (Decode(resolution=32, stored="short side 32", images_per_second_a_core=9.0),),
        "disk_mb_per_second": 100.0,
        "startup_seconds": 1.0,
        "save_seconds": 0.1,
    }
    return Calibration.model_validate({**stated, **changes})


def test_what_was_measured_of_other_models_on_the_same_device_is_kept() -> None:
    before = example()
    (speed,) = before.training
    faster = speed.model_copy(update={"images_per_second": 20.0})
    other = speed.model_copy(update={"model": "b"})
    now = example(training=(faster, other), evaluation=(other,), decode=())
    both = with_earlier(now, before)
    assert both.training == (faster, other)
    assert both.evaluation == (other, speed)
    assert both.decode == before.decode
    elsewhere = before.model_copy(update={"device": "another"})
    assert with_earlier(now, elsewhere) == with_earlier(now, None) == now


def test_the_command_keeps_what_it_measured_and_prints_it(digits, tmp_path, capsys) -> None:
    calibration.calibration_file().parent.mkdir(parents=True)
    calibration.calibration_file().write_text("damaged")
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    command = ["calibrate", str(tmp_path / "tiny.yaml"), "--data", str(digits.path)]
    assert cli.run(command) == 0
    kept = calibration.load()
    assert kept is not None
    assert [speed.resolution for speed in kept.training] == [16, 24]
    assert kept.startup_seconds > 0
    assert kept.save_seconds > 0
    said = capsys.readouterr().out
    assert f"{kept.training[0].images_per_second:,.1f} images/s  {kept.training[0].model}" in said
    assert f"{kept.decode[1].images_per_second_a_core:,.1f} images/s  on each of" in said
    assert str(calibration.calibration_file()) in said
    assert cli.run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"][1]["batch_size"] == 10
