"""Images a second: what is published, and what follows for other sizes, models and GPUs."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.plan.calibration import Calibration, Speed
from pitstop.plan.rates import (
    footprints_file,
    images_per_second,
    measured_images_per_second,
    model_key,
    model_size,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("gpu", "resolution", "rate"),
    [("A100", 160, 3508), ("A100", 192, 2595), ("A100", 224, 2470), ("V100", 224, 1200)],
)
def test_what_is_published_is_taken_as_it_is(gpu, resolution, rate):
    figure = images_per_second(gpu, "resnet50", resolution)
    assert figure.value == rate
    assert figure.source.startswith("published: ")


def test_what_was_measured_on_eight_gpus_holds_on_eight_and_else_sharing_costs():
    assert images_per_second("A100", "resnet50", 160, gpus=8).value == 3508
    assert images_per_second("A100", "resnet50", 224, gpus=8).value == pytest.approx(0.95 * 2470)


def test_beyond_the_known_sizes_the_rate_goes_with_the_pixels():
    figure = images_per_second("V100", "resnet50", 112)
    assert figure.value == pytest.approx(4 * 1200)
    assert "by FLOPs" in figure.source


@given(
    st.sampled_from(["A100", "H100", "V100", "A10G", "L4"]),
    st.sampled_from(["resnet18", "resnet50", "vit_small_patch16_224"]),
    st.integers(32, 512),
    st.sampled_from([1, 8]),
)
def test_larger_images_are_never_faster(gpu, model, resolution, gpus):
    smaller, larger = (
        images_per_second(gpu, model, side, gpus=gpus).value
        for side in (resolution, resolution + 1)
    )
    assert larger < smaller


def test_a_gpu_without_figures_is_so_many_times_another():
    h100, a100 = (images_per_second(gpu, "resnet50", 160) for gpu in ("H100", "A100"))
    assert h100.value == pytest.approx(2.1 * a100.value)
    assert "derived" in h100.source


def test_another_model_is_compared_where_somebody_has_measured_both():
    figure = images_per_second("V100", "resnet101", 224)
    assert figure.value == pytest.approx(1200 * 748 / 1218)
    assert "timm" in figure.source


def test_a_model_that_nobody_listed_is_taken_by_its_counted_flops():
    with pytest.raises(InputError, match=r"model mine: .*--memory"):
        images_per_second("V100", "mine", 224)
    footprints_file().parent.mkdir(parents=True)
    counted = {
        "mine@112": {"gmacs": 4.11 / 2, "params": 3_000_000, "steps": {}},
        "mine2@224": {"gmacs": 1, "params": 1},
    }
    footprints_file().write_text(json.dumps(counted))
    assert model_size("mine").gmacs == pytest.approx(2 * 4.11)
    assert model_size("mine").parameters == 3
    assert images_per_second("V100", "mine", 224).value == pytest.approx(1200 / 2)


def test_a_damaged_cache_of_counted_flops_is_as_none():
    footprints_file().parent.mkdir(parents=True)
    footprints_file().write_text('{"mine@112": 3')
    with pytest.raises(InputError, match="--memory"):
        model_size("mine")


def test_a_model_of_another_shape_has_another_key():
    small = Model(name="resnet18", kwargs={"layers": [1, 1, 1, 0]})
    assert model_key(small) != model_key(Model(name="resnet18"))
    dropping = Model(name="resnet50", kwargs={"drop_path_rate": 0.05}, blurpool=True)
    assert model_key(dropping) == "resnet50"


def speed(model: str, resolution: int, images: float) -> Speed:
    return Speed(
        model=model,
        resolution=resolution,
        batch_size=64,
        precision="bf16",
        images_per_second=images,
    )


MEASURED = Calibration(
    date="2026-11-22",
    device="EPYC, 2 cores",
    cores=2,
    gpus=0,
    memory_gib=24,
    training=(speed("resnet18", 64, 100), speed("resnet18", 128, 40)),
    disk_mb_per_second=300,
    startup_seconds=5,
    save_seconds=0.1,
)


@pytest.mark.parametrize(
    ("model", "resolution", "rate"),
    [
        ("resnet18", 64, 100),
        ("resnet18", 256, 10),
        ("resnet18", 90, 63.3),
        ("resnet50", 128, 40 * 1.82 / 4.11),
    ],
)
def test_measured_rates_are_taken_and_scaled_the_same_way(model, resolution, rate):
    figure = measured_images_per_second(MEASURED, MEASURED.training, model, resolution)
    assert figure.value == pytest.approx(rate, rel=0.01)
    assert figure.source.startswith("measured: pitstop calibrate, 2026-11-22")


def test_of_two_measured_phases_of_a_size_the_slower_one_is_taken():
    twice = (speed("resnet18", 64, 80), speed("resnet18", 64, 90))
    for speeds in (twice, twice[::-1]):
        assert measured_images_per_second(MEASURED, speeds, "resnet18", 64).value == 80
