"""Augmentation of a batch: pitstop's, batched, against torchvision's, image by image.

Method. Both augment the same images in memory, as each has them: pitstop a batch as the loader
hands it out (uint8, channels last in memory), torchvision a list of contiguous uint8 tensors
[3, H, W]. pitstop works in place, as in training: the batch is filled anew before each pair, off
the clock. Drawing the parameters is part of both, and each repeat draws others. Repeats are
interleaved, and the order within a pair alternates; the first pair of each policy warms up. The
result is the median of the pairs' ratios, torchvision's seconds over pitstop's. Images are smooth
patterns with a little noise, unless --images names a folder of JPEGs. Nothing is compiled on
either side; torch takes --threads threads for both. Nothing else should be running.

    python benchmarks/augment.py --threads 2 --repeats 7
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import v2

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.nn.augment import augment, draw

POLICIES: dict[str, tuple[dict[str, Any], v2.Transform]] = {
    "RandAugment n=2 m=9": (
        {"augment": {"name": "rand_augment", "num_ops": 2, "magnitude": 9}},
        v2.RandAugment(num_ops=2, magnitude=9),
    ),
    "TrivialAugmentWide": ({"augment": "trivial_augment_wide"}, v2.TrivialAugmentWide()),
    "ColorJitter 0.4, hue 0.1": (
        {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
        v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    ),
}
"""What each policy is called in a recipe, and in torchvision."""


@dataclass(frozen=True)
class Pair:
    """Seconds of a batch."""

    pitstop: float
    torchvision: float


def patterns(size: int, side: int) -> torch.Tensor:
    """Returns images uint8 [size, 3, side, side]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(size, 3, 14, 14, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic") * 255
    noise = torch.randn(smooth.shape, generator=generator) * 6
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def photos(folder: Path, size: int, side: int) -> torch.Tensor:
    """Returns the folder's first JPEGs, resized and cropped, like `patterns`."""
    crop = v2.Compose([v2.RGB(), v2.Resize(side), v2.CenterCrop(side)])
    paths = sorted(folder.rglob("*.[jJ][pP]*[gG]"))[:size]
    assert paths, f"{folder}: no JPEGs"
    images = torch.stack([crop(decode_jpeg(read_file(str(path)))) for path in paths])
    return images.repeat(-(-size // len(images)), 1, 1, 1)[:size]


def measure(images: torch.Tensor, policy: str, repeats: int) -> list[Pair]:
    """Returns the seconds of each pair but the first."""
    stated, transform = POLICIES[policy]
    size, _, side, _ = images.shape
    recipe = parse_recipe({"epochs": 1, "batch_size": size, "resolution": side, **stated}, policy)
    timeline = Timeline(recipe, num_samples=size * (repeats + 1))
    batch = torch.empty_like(images, memory_format=torch.channels_last)
    single = list(images.contiguous())

    def ours(step: int) -> None:
        draws = draw(timeline.settings_at(step), slice(0, size))
        assert draws is not None
        augment(batch, draws)

    def theirs(step: int) -> None:
        torch.manual_seed(step)
        for image in single:
            transform(image)

    pairs = []
    for step in range(repeats + 1):
        batch.copy_(images)  # for it is augmented in place
        order = (ours, theirs) if step % 2 else (theirs, ours)
        taken = {side: seconds_of(side, step) for side in order}
        pairs.append(Pair(taken[ours], taken[theirs]))
    return pairs[1:]


def seconds_of(side: Callable[[int], None], step: int) -> float:
    started = time.perf_counter()
    side(step)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=256, help="images (default 256)")
    parser.add_argument("--resolution", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of a policy (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs (default: patterns)")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, side = options.batch_size, options.resolution
    images = photos(options.images, size, side) if options.images else patterns(size, side)
    result: dict[str, Any] = {
        "benchmark": "augment",
        "batch_size": size,
        "resolution": side,
        "threads": options.threads,
        "repeats": options.repeats,
        "images": "photos" if options.images else "patterns",
        "torch": torch.__version__,
        "policies": {},
    }
    for policy in POLICIES:
        pairs = measure(images, policy, options.repeats)
        result["policies"][policy] = {
            "ratio": round(median(pair.torchvision / pair.pitstop for pair in pairs), 3),
            "ratios": [round(pair.torchvision / pair.pitstop, 3) for pair in pairs],
            "pitstop_ms": round(1000 * median(pair.pitstop for pair in pairs), 2),
            "torchvision_ms": round(1000 * median(pair.torchvision for pair in pairs), 2),
        }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"augmentation of {size} {result['images']} at {side} px, {options.threads} threads, "
        f"medians of {options.repeats}, torch {torch.__version__}"
    )
    print(f"  {'':<26}{'pitstop':>12}{'torchvision':>14}{'ratio':>8}")
    for policy, figures in result["policies"].items():
        ours, theirs = figures["pitstop_ms"], figures["torchvision_ms"]
        print(f"  {policy:<26}{ours:>9.1f} ms{theirs:>11.1f} ms{figures['ratio']:>8.2f}")


if __name__ == "__main__":
    main()
