import sys

import pytest

from pitstop.data.bench import bench, cheaper_packing, forget
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
