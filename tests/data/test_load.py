"""Loaders: batches follow from the timeline, and their pixels are torchvision's."""

import gc
import io
import os
import re
import shutil
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pitstop.core.errors import InputError
from pitstop.core.order import Order
from pitstop.core.recipe import Crop, Eval, parse_recipe
from pitstop.core.rng import Stream, generator
from pitstop.core.timeline import Timeline
from pitstop.data import packed
from pitstop.data.augment import crop_boxes
from pitstop.data.load import Batch, EvalLoader, Loader
from pitstop.data.manifest import STAGING
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset, PackedSplit
from pitstop.data.sources.folder import folder_source

TRAIN, VAL = 37, 19
PHASES = [
    {"duration": "2ep", "resolution": 16},
    {"duration": "2ep", "resolution": 24, "batch_size": 5},
]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset of JPEGs of random sizes, each different."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            place = root / "folder" / split / f"class{i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            size = tuple(rng.integers(20, 80, 2).tolist())
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(place / f"{i}.jpg")
    pack(folder_source(root / "folder"), root / "packed", workers=1, shard_bytes=20_000)
    return root / "packed"


@pytest.fixture(scope="session")
def dataset(photos: Path) -> PackedDataset:
    return PackedDataset.open(photos)


def timeline(**stated) -> Timeline:
    recipe = {"epochs": 4, "batch_size": 8, "resolution": 16, **stated}
    return Timeline(parse_recipe(recipe, "test"), num_samples=TRAIN)


def loaded(split: PackedSplit, plan: Timeline, steps=None, *, workers=2, **options) -> list[Batch]:
    steps = range(plan.last) if steps is None else steps
    with Loader(split, plan, steps, workers=workers, **options) as batches:
        return list(batches)


def pixels(split: PackedSplit, row: int) -> torch.Tensor:
    """An image as Pillow decodes it, uint8 [3, H, W]."""
    with Image.open(io.BytesIO(split.read(row))) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.step, one.share) == (other.step, other.share)
    assert np.array_equal(one.ids, other.ids)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


def assert_all_same(some: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(some, others, strict=True):
        assert_same(one, other)


def damaged(photos: Path, tmp_path: Path, row: int) -> tuple[PackedDataset, Path]:
    """A copy of the dataset where the bytes of a training image are zeros."""
    dataset = PackedDataset.open(shutil.copytree(photos, tmp_path / "damaged"))
    data = dataset.train.read(row)
    for shard in dataset.path.glob("train-*.arrow"):
        content = shard.read_bytes()
        if (at := content.find(data)) >= 0:
            shard.write_bytes(content[:at] + bytes(len(data)) + content[at + len(data) :])
            return PackedDataset.open(dataset.path), shard
    raise AssertionError("the image is in no shard")


# Training batches


def test_the_images_are_those_of_the_order_with_their_labels(dataset):
    plan = timeline(phases=PHASES)
    order = Order(plan)
    batches = loaded(dataset.train, plan)
    assert [batch.step for batch in batches] == list(range(plan.last))
    for batch in batches:
        assert np.array_equal(batch.ids, order.ids(batch.step))
        assert batch.labels.tolist() == [
            int(dataset.train.name(row).split("/")[1].removeprefix("class")) for row in batch.ids
        ]
    order.close()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_the_crop_and_resize_by_torchvision(dataset, interpolation):
    crop = {"scale": [0.3, 1.0], "interpolation": interpolation}
    plan = timeline(seed=5, crop=crop, flip="none")
    mode = v2.InterpolationMode(interpolation)
    for batch in loaded(dataset.train, plan, range(3)):
        assert batch.images.dtype == torch.uint8
        rng = generator(5, Stream.CROP, batch.step)
        boxes = crop_boxes(dataset.train.sizes[batch.ids], Crop(**crop), rng)
        for image, row, box in zip(batch.images, batch.ids, boxes.tolist(), strict=True):
            expected = v2.functional.resized_crop(
                pixels(dataset.train, int(row)), *box, [16, 16], mode, antialias=True
            )
            assert torch.equal(image, expected)


def test_batches_are_in_channels_last(dataset):
    (batch,) = loaded(dataset.train, timeline(), [0])
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_the_number_of_workers_and_of_batches_ahead_has_no_say(dataset):
    plan = timeline(phases=PHASES, flip="alternating")
    one = loaded(dataset.train, plan, workers=1, prefetch=1)
    assert_all_same(one, loaded(dataset.train, plan, workers=4, prefetch=7))


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_a_loader_that_starts_anywhere_gives_what_comes_there(dataset, flip):
    plan = timeline(phases=PHASES, flip=flip)
    whole = loaded(dataset.train, plan)
    for start in (1, 5, plan.segments[1].first, plan.last - 1):
        assert_all_same(whole[start:], loaded(dataset.train, plan, range(start, plan.last)))
    assert_all_same(whole[5:3:-1], loaded(dataset.train, plan, [5, 4]))
    assert loaded(dataset.train, plan, []) == []


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_the_ranks_shares_are_the_global_batch(dataset, world, flip):
    plan = timeline(phases=PHASES, flip=flip)
    ranks = [loaded(dataset.train, plan, rank=rank, world=world) for rank in range(world)]
    for batch, *shares in zip(loaded(dataset.train, plan), *ranks, strict=True):
        assert max(map(len, (s.ids for s in shares))) - min(len(s.ids) for s in shares) <= 1
        assert np.array_equal(np.concatenate([share.ids for share in shares]), batch.ids)
        assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)
        for share in shares:
            assert np.array_equal(batch.ids[share.share], share.ids)


def test_resolution_and_batch_size_change_with_the_segment(dataset):
    plan = timeline(phases=PHASES)
    first, second = plan.segments
    shapes = [tuple(b.images.shape) for b in loaded(dataset.train, plan, prefetch=6)]
    assert shapes == [(8, 3, 16, 16)] * first.steps + [(5, 3, 24, 24)] * second.steps


def test_crops_differ_from_step_to_step_and_seed_to_seed(dataset):
    one, other = (loaded(dataset.train, timeline(seed=seed)) for seed in (0, 1))
    seen = defaultdict(list)
    for batch in [*one, *other]:
        for row, image in zip(batch.ids.tolist(), batch.images, strict=True):
            seen[row].append(image)
    assert len(seen) == TRAIN
    for crops in seen.values():
        assert len({crop.contiguous().numpy().tobytes() for crop in crops}) == len(crops)


# Flips


def flips(dataset: PackedDataset, plan: Timeline) -> list[tuple[int, bool]]:
    """The (row, mirrored) of all images in order: each is its unmirrored twin, or its mirror."""
    recipe = plan.recipe.model_dump(mode="json")
    for phase in recipe["phases"]:
        phase["flip"] = "none"
    still = Timeline(parse_recipe(recipe, "still"), num_samples=plan.num_samples)
    seen = []
    for batch, twin in zip(loaded(dataset.train, plan), loaded(dataset.train, still), strict=True):
        for row, image, unmirrored in zip(batch.ids, batch.images, twin.images, strict=True):
            mirrored = not torch.equal(image, unmirrored)
            assert not mirrored or torch.equal(image, unmirrored.flip(2))
            seen.append((int(row), mirrored))
    return seen


def by_image(flips: list[tuple[int, bool]]) -> list[list[bool]]:
    """Each image's flips in the order of its epochs, in the order of the images."""
    seen = defaultdict(list)
    for row, mirrored in flips:
        seen[row].append(mirrored)
    assert sorted(seen) == list(range(TRAIN))
    return [seen[row] for row in range(TRAIN)]


def test_without_flip_there_is_none(dataset):
    assert not any(mirrored for _, mirrored in flips(dataset, timeline(flip="none")))


def test_an_alternating_flip_alternates_for_each_image(dataset):
    """Also across phases of another size and batch; the first sides are about half and half."""
    seen = by_image(flips(dataset, timeline(phases=PHASES, flip="alternating")))
    for sides in seen:
        assert len(sides) >= 3
        assert all(one != other for one, other in pairwise(sides))
    assert 0.25 < np.mean([sides[0] for sides in seen]) < 0.75


def test_the_seed_decides_who_is_flipped_first(dataset):
    one, other = (
        by_image(flips(dataset, timeline(flip="alternating", seed=seed))) for seed in (0, 1)
    )
    assert one != other


def test_a_random_flip_is_a_coin_tossed_anew_in_each_step(dataset):
    seen = by_image(flips(dataset, timeline(flip="random", epochs=12)))
    tosses = [toss for sides in seen for toss in sides]
    assert abs(np.mean(tosses) - 0.5) < 5 * 0.5 / len(tosses) ** 0.5
    changes = [one != other for s in seen for one, other in pairwise(s)]
    assert abs(np.mean(changes) - 0.5) < 5 * 0.5 / len(changes) ** 0.5


# When something goes wrong


def test_an_unreadable_image_is_named_with_its_shard_and_row(photos, tmp_path):
    plan = timeline()
    order = Order(plan)
    row = int(order.ids(2)[3])
    order.close()
    dataset, shard = damaged(photos, tmp_path, row)
    name = dataset.train.name(row)
    with Loader(dataset.train, plan, range(plan.last), workers=2) as batches:
        with pytest.raises(InputError) as error:
            list(batches)
        assert f"image {name} (row " in str(error.value)
        assert f" of {shard}) cannot be read" in str(error.value)
        assert "pitstop data check" in str(error.value)


def test_an_error_ahead_is_not_held_back_until_its_batch(photos, tmp_path):
    plan = timeline()
    order = Order(plan)
    row = int(order.ids(4)[0])
    order.close()
    dataset, _ = damaged(photos, tmp_path, row)
    with Loader(dataset.train, plan, range(plan.last), workers=1, prefetch=4) as batches:
        assert next(batches).step == 0
        batches._pool.submit(lambda: None).result()  # the one thread has tried all five
        with pytest.raises(InputError, match=r"cannot be read"):
            next(batches)


@pytest.mark.timeout(60)
def test_closing_ends_the_waiting_for_a_shard_that_never_comes(photos, tmp_path, monkeypatch):
    path = shutil.copytree(photos, tmp_path / "staging")
    (path / STAGING).write_text("{}")
    (path / "train-00001.arrow").unlink()
    waits = threading.Event()

    def somebody_is_copying(lock: Path) -> bool:
        waits.set()
        return True

    monkeypatch.setattr(packed, "is_locked", somebody_is_copying)
    dataset = PackedDataset.open(path)
    with (
        Loader(dataset.train, timeline(batch_size=16), range(1), workers=2) as batches,
        ThreadPoolExecutor() as pool,
    ):
        batch = pool.submit(next, batches)
        assert waits.wait(30)
        batches.close()
        with pytest.raises(InputError, match=r"train-00001.arrow is missing"):
            batch.result()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_2000_batches(dataset):
    def anonymous() -> int:
        """The process's memory without files, in bytes."""
        gc.collect()
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    plan = timeline(epochs=2400 * 8 / TRAIN)
    with Loader(dataset.train, plan, range(plan.last), workers=2) as batches:
        for batch in islice(batches, 400):
            assert batch.images.shape == (8, 3, 16, 16)
        before = anonymous()
        assert sum(1 for _ in batches) >= 2000
        assert anonymous() - before < 4 * 2**20


def test_memory_is_used_again_but_not_while_any_part_of_a_batch_is_held(dataset):
    plan = timeline(epochs=20)
    with Loader(dataset.train, plan, range(plan.last), workers=2, prefetch=1) as batches:
        held = next(batches).images[3]
        before = held.clone()
        addresses = [batch.images.data_ptr() for batch in batches]
    assert torch.equal(held, before)
    assert len(set(addresses)) <= 4 < len(addresses)


def test_a_shard_that_is_cut_short_while_in_use_is_said(photos, tmp_path):
    dataset = PackedDataset.open(shutil.copytree(photos, tmp_path / "cut"))
    for shard in dataset.path.glob("train-*.arrow"):
        os.truncate(shard, 100)
    with (
        Loader(dataset.train, timeline(), range(2), workers=1) as batches,
        pytest.raises(Exception, match=r"train-00000.arrow was cut short while in use: pack again"),
    ):
        next(batches)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("taken", [0, 1])
def test_closing_early_ends_the_threads(dataset, taken):
    plan = timeline()
    before = set(threading.enumerate())
    with Loader(dataset.train, plan, range(plan.last), workers=3, prefetch=10) as batches:
        for _ in range(taken):
            next(batches)
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("decode")]


@pytest.mark.timeout(60)
def test_an_error_in_the_loop_closes_too(dataset):
    plan = timeline()

    def fails() -> None:
        with Loader(dataset.train, plan, range(plan.last), workers=3) as batches:
            next(batches)
            raise KeyError("in the loop")

    with pytest.raises(KeyError, match="in the loop"):
        fails()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 7, 19, 64])
def test_each_validation_image_comes_once_in_order(dataset, batch_size):
    spec = Eval(batch_size=batch_size)
    with EvalLoader(dataset.val, spec, 16, workers=2) as batches:
        images, labels = zip(*((b.images, b.labels) for b in batches), strict=True)
    sizes = [len(batch) for batch in images]
    assert sum(sizes) == VAL
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert np.array_equal(torch.cat(labels).numpy(), dataset.val.labels)
    with EvalLoader(dataset.val, Eval(batch_size=VAL), 16, workers=1) as at_once:
        assert torch.equal(torch.cat(images), next(at_once).images)


@pytest.mark.parametrize(
    ("resolution", "crop_ratio", "interpolation"),
    [(16, 0.875, "bilinear"), (24, 1.0, "bilinear"), (17, 0.9, "bicubic"), (96, 0.95, "bilinear")],
)
def test_evaluation_images_are_torchvisions(dataset, resolution, crop_ratio, interpolation):
    spec = Eval(crop_ratio=crop_ratio, interpolation=interpolation)
    mode = v2.InterpolationMode(interpolation)
    oracle = v2.Compose(
        [
            v2.Resize(round(resolution / crop_ratio), mode, antialias=True),
            v2.CenterCrop(resolution),
        ]
    )
    with EvalLoader(dataset.val, spec, resolution, workers=2) as batches:
        (batch,) = batches
    images = batch.images
    assert images.is_contiguous(memory_format=torch.channels_last)
    for row in range(VAL):
        assert torch.equal(images[row], oracle(pixels(dataset.val, row)))
