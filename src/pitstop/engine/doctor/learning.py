"""The checks that train: a learning rate, ten epochs on a subset, a resume."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pitstop.core.errors import InputError
from pitstop.core.recipe import LrFinder, Recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.manifest import read_manifest
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.packed import packed_source
from pitstop.data.sources.select import subset_source
from pitstop.engine.doctor.patient import Patient, SkippedError, needed
from pitstop.engine.drops import plain
from pitstop.engine.lr_finder import Search, Suggestion
from pitstop.engine.train import search_lr
from pitstop.engine.verify import Verdict, verify_resume
from pitstop.io.records import read_events, rows
from pitstop.io.run_directory import RunDirectory
from pitstop.report.diagnosis import Finding

SECONDS = 120.0
"""That the search for the lr, or the training on a subset, may take."""

FAR = 10.0
"""A recipe's lr and a suggestion that differ by more are told."""

EPOCHS, CLASSES, TRAIN, VAL, LEAST_TRAIN = 10, 10, 100, 50, 20
"""Of the training on a subset: epochs, and at most so many classes, with so many images each."""

BATCH = 32
"""Of the training on a subset: 310 steps with all images."""


def lr(patient: Patient) -> Finding:
    """Finds the lr that a range test suggests, and compares the recipe's."""
    device, opened, speeds = patient.need_device(), patient.need_data(), patient.need_speeds()
    patient.need_time()
    recipe = patient.recipe
    spec = recipe.lr_finder or LrFinder(fallback=recipe.phases[0].peak_lr())
    segment = Timeline.planned(recipe, len(opened.train)).segments[0]
    seconds = (
        spec.iterations * segment.batch_size / speeds.get(segment.resolution, min(speeds.values()))
    )
    if seconds > SECONDS:
        raise SkippedError(
            f"{spec.iterations} steps of {segment.batch_size} images take {seconds / 60:.0f} min "
            "here: `pitstop lr-find` does it"
        )
    found = search_lr(recipe, spec, opened, device, workers=patient.workers)
    first = recipe.phases[0]
    return compared(found, None if first.lr == "auto" else first.peak_lr())


def compared(found: Search, own: float | None) -> Finding:
    """Judges a search beside the recipe's own lr, None where that is to be found."""
    numbers = {"suggested": found.peak, "recipe": own}
    if not isinstance(found.result, Suggestion):
        return Finding("lr", "warn", found.explained(), "see docs/lr-finder.md", numbers)
    said = found.explained() + ("" if own is None else f"; the recipe's is {own:g}")
    if own is not None and not 1 / FAR <= own / found.peak <= FAR:
        return Finding("lr", "warn", said, f"try --lr {found.peak:.2g}", numbers)
    return Finding("lr", "ok", said, numbers=numbers)


def learning(patient: Patient) -> Finding:
    """Trains ten epochs on some images of some classes, twice: the second time it is killed."""
    device, opened, speeds = patient.need_device(), patient.need_data(), patient.need_speeds()
    patient.need_time()
    recipe = trial_recipe(patient.recipe)
    a_class = images_a_class(speeds, recipe.phases[0].resolution, len(opened.classes))
    subset = _subset(opened, a_class, patient)
    file = patient.scratch / "trial.yaml"
    stated = plain(recipe) | {"data": str(subset.path)}
    file.write_text(yaml.safe_dump(stated, sort_keys=False))
    command = [sys.executable, "-P", "-m", "pitstop", "train", str(file), "--nproc", "1"]
    command += ["--max-fruitless-starts", "0"]
    command += [] if device.torch_device.type == "cpu" else ["--deterministic"]
    torch.cuda.empty_cache()  # others are to train on it now
    runs = patient.scratch / "runs"
    try:
        patient.resumed = verify_resume(command, runs, kills=2, seed=0, say=patient.say)
    except InputError as error:
        return Finding("learning", "fail", _why(runs) or str(error), "mend what it says")
    events = read_events(RunDirectory(runs / "uninterrupted").events)
    last = [*rows(events)][-1]
    counts = np.bincount(subset.val.labels, minlength=len(subset.classes)).tolist()
    return learned(last.val_top1, last.val_loss, counts, images=len(subset.train))


def trial_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe's model, optimizer and loss in ten plain epochs with small batches.

    The lr goes with the square root of the batch (Krizhevsky, arXiv 1404.5997). What makes the
    first epochs look worse than they are (mixing, augmentation, smoothing, averages) is left out.
    """
    first = recipe.with_lr(recipe.lr_finder.fallback if recipe.lr_finder else 0.0).phases[0]
    raw = plain(recipe)
    side = first.resolution if isinstance(first.resolution, int) else first.resolution[0]
    phase = raw["phases"][0] | {
        "name": "trial",
        "duration": "rest",
        "resolution": side,
        "batch_size": BATCH,
        "grad_accum_steps": 1,
        "data_fraction": 1.0,
        "lr": first.peak_lr() * math.sqrt(BATCH / first.batch_size),
        "lr_per": None,
        "lr_cap": None,
        "lr_scale": 1.0,
        "lr_schedule": {"name": "onecycle"},
        "color_jitter": None,
        "augment": None,
        "random_erasing": None,
        "repeated_augmentation": 1,
        "mix": None,
        "label_smoothing": 0.0,
        "freeze": [],
        "optimizer_state": "keep",
    }
    changed: dict[str, Any] = {"name": "trial", "epochs": EPOCHS, "phases": [phase], "ema": None}
    changed |= {"lr_finder": None, "target_accuracy": None, "checkpoint": {}, "sync_bn": False}
    changed["eval"] = raw["eval"] | {"every": EPOCHS, "also": []}
    return parse_recipe(raw | changed, f"{recipe.name}, for ten epochs")


def images_a_class(speeds: dict[int, float], side: int | tuple[int, int], classes: int) -> int:
    """Returns how many training images of a class ten epochs may have within `SECONDS`."""
    slowest = min(speeds.values())
    rate = slowest if isinstance(side, tuple) else speeds.get(side, slowest)
    count = min(classes, CLASSES)
    fit = int(SECONDS * rate / (EPOCHS * count))
    if fit < LEAST_TRAIN:
        least = EPOCHS * count * LEAST_TRAIN / rate / 60
        raise SkippedError(f"{EPOCHS} epochs of {count * LEAST_TRAIN} images take {least:.0f} min")
    return min(TRAIN, fit)


def _subset(opened: PackedDataset, train: int, patient: Patient) -> PackedDataset:
    """Packs some images of some classes, which lie far apart in the list: alike are neighbours."""
    chosen = [*opened.classes[:: max(1, len(opened.classes) // CLASSES)]][:CLASSES]
    source = subset_source(packed_source(opened.path), chosen, train=train, val=VAL)
    made = read_manifest(opened.path)["made"]
    place = patient.scratch / "subset"
    pack(
        source,
        place,
        short_side=made["short_side"],
        quality=made["quality"],
        workers=patient.workers,
    )
    return PackedDataset.open(place)


def _why(runs: Path) -> str | None:
    """Returns the last line of the log of a training that did not end well."""
    logs = sorted(runs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    lines = [line for log in logs[-1:] for line in log.read_text().splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


def learned(top1: float, loss: float, counts: Sequence[int], *, images: int) -> Finding:
    """Judges what ten epochs on a subset came to.

    Accuracy at chance, or a loss that is not below that of a guess, is failed. Chance is the
    largest class; at it is what lies within two standard deviations of its accuracy.

    Args:
        top1: percent of the validation images.
        loss: their mean cross entropy.
        counts: validation images of each class.
        images: trained on.
    """
    n, guess = sum(counts), math.log(len(counts))
    chance = max(counts) / n
    beyond = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / n))
    said = (
        f"{EPOCHS} epochs of {images:,} images of {len(counts)} classes: top-1 {top1:.1f}% "
        f"(chance {100 * chance:.1f}%), loss {loss:.3f} (a guess {guess:.3f})"
    )
    numbers = {"top1": top1, "loss": loss, "chance": 100 * chance, "guess_loss": guess}
    fix = "it does not learn: see docs/troubleshooting.md, 'The loss stays where it is'"
    if not top1 > beyond or not loss <= guess:
        return Finding("learning", "fail", said, fix, numbers)
    return Finding("learning", "ok", said, numbers=numbers)


def resume(patient: Patient) -> Finding:
    """Finds whether the training that was killed ended as the one that nobody touched."""
    patient.need_time()
    verdict = needed(patient.resumed, "the ten epochs were not trained to their end")
    return equal(verdict)


def equal(verdict: Verdict) -> Finding:
    """Judges a killed run beside another."""
    numbers = {"kills": verdict.kills, "lost_steps": verdict.lost_steps}
    if not verdict.equal:
        first, *_ = verdict.differences
        said = f"the killed run ended otherwise: {len(verdict.differences)} differences, {first}"
        fix = "`pitstop verify-resume` repeats it; --deterministic on a GPU"
        return Finding("resume", "fail", said, fix, numbers)
    if verdict.kills == 0:
        fix = "`pitstop verify-resume --kills 5` tries more"
        return Finding("resume", "warn", "no kill found the run at work", fix, numbers)
    said = f"{verdict.kills} kills, {verdict.lost_steps} steps trained again: equal, bit by bit"
    return Finding("resume", "ok", said, numbers=numbers)
