import sys

import pytest

from pitstop.data.bench import bench, cheaper_packing, forget
from pitstop.data.machines import MACHINES
from pitstop.data.pack import pack
from pitstop.data.packed import LEVEL_MARGIN, PackedDataset
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.folder import folder_source


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    out = tmp_path_factory.mktemp("digits") / "packed"
    pack(digits_source(), out, workers=1)
    return PackedDataset.open(out)


def test_each_number_of_threads_and_each_part_is_measured(digits):
    said: list[str] = []
    measured = bench(digits, resolution=16, threads=(1, 3), seconds=0.05, say=said.append)
    assert list(measured.images_per_second) == [1, 3]
    assert all(rate > 0 for rate in measured.images_per_second.values())
    assert {"read", "decode", "resize"} <= set(measured.microseconds)
    assert all(spent > 0 for spent in measured.microseconds.values())
    assert measured.stored == (8, 8)
    assert measured.sample == 6 * 256  # the batches of one epoch; the last one goes on into another
    assert (measured.cold_images_per_second is not None) == (sys.platform == "linux")
    assert said == ["first read, threads: 3", "threads: 1", "threads: 3", "each part"]


def test_a_dataset_smaller_than_a_batch_can_be_measured(folder, tmp_path):
    pack(folder_source(folder), tmp_path / "out", short_side=48, levels=(24,), workers=1)
    dataset = PackedDataset.open(tmp_path / "out")
    large, small = (
        bench(dataset, resolution=side, threads=(1,), seconds=0.01) for side in (42, 21)
    )
    assert (large.sample, small.sample) == (12, 12)
    assert min(small.stored) == 24 < min(large.stored)


def test_forgetting_leaves_the_dataset_as_it_is(digits):
    before = [digits.train.read(row) for row in range(20)]
    assert forget(digits.path) == (sys.platform == "linux")
    assert [digits.train.read(row) for row in range(20)] == before


@pytest.mark.parametrize(
    ("resolution", "short_side", "levels", "options"),
    [
        (224, 400, [], ["--short-side 256"]),
        (224, None, [], ["--short-side 256"]),
        (224, 256, [], []),
        (160, 400, [], ["--short-side 256", "--levels 192"]),
        (160, 256, [192], []),
        (160, 256, [160], ["--levels 192"]),
        (128, 400, [160], []),
    ],
)
def test_what_is_not_in_use_yet_is_proposed(resolution, short_side, levels, options):
    assert cheaper_packing(resolution, {"short_side": short_side, "levels": levels}) == options


@pytest.mark.parametrize("resolution", [96, 112, 128, 160, 176, 192])
def test_a_proposed_level_serves_the_resolution(resolution):
    *_, option = cheaper_packing(resolution, {"short_side": None, "levels": []})
    level = int(option.removeprefix("--levels "))
    assert LEVEL_MARGIN * resolution <= level < LEVEL_MARGIN * resolution + 16


def test_a_machine_has_enough_if_its_threads_deliver_what_its_gpus_want():
    machine = MACHINES["p4d.24xlarge"]  # 8 GPUs of 2,470 images/s, 96 threads
    a_thread = 2470 * 8 / 96
    enough, short = machine.need(224, a_thread + 1), machine.need(224, a_thread - 1)
    assert (enough.enough, enough.workers) == (True, 12)
    assert (short.enough, short.workers) == (False, 12)
    assert machine.need(224, 1000).workers == 3
    assert enough.wanted_images_per_second == 19760


def test_what_gpus_want_is_what_was_published():
    a100, h100 = (MACHINES[name].gpu for name in ("p4d.24xlarge", "p5.48xlarge"))
    assert a100.rate(224)[:2] == (2470, "published")
    assert a100.rate(160)[:2] == (3508, "published")
    assert a100.rate(192)[:2] == (2595, "published")
    assert h100.rate(224)[:2] == (5187, "derived")
    assert MACHINES["p3.8xlarge"].gpu.rate(224)[:2] == (1200, "published")


def test_a_rate_that_is_not_known_is_derived_from_the_nearest_by_pixels():
    a100 = MACHINES["p4d.24xlarge"].gpu
    rate = a100.rate(112)
    assert rate.images_per_second == pytest.approx(3508 * (160 / 112) ** 2)
    assert rate.basis == "derived"
    assert rate.source.startswith("160 px by the number of pixels")
