"""What a run goes on from: the recipe it began with, what was decided since, and what is asked now.

Identity (the recipe's, and the dataset's digest) decides the result: a difference refuses to
resume. Circumstance (device, precision, threads, versions) may change, and a change is announced.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.core.recipe import Divergence, Recipe, parse_recipe
from pitstop.core.timeline import (
    Amendment,
    Extend,
    Fit,
    FoundLr,
    LowerLr,
    Rebase,
    SkipData,
    Timeline,
    dump_amendments,
    parse_amendments,
)
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.checkpoint import Checkpointer, Manifest, Restored, parse
from pitstop.runtime.ranks import Ranks

SHOWN = 5
"""Fields that a refusal lists at most."""


@dataclass(frozen=True)
class TimeLimit:
    """Minutes that a run is to take, and its recipe with any number of epochs."""

    minutes: float
    recipe_of: Callable[[float], Recipe]
    """Raises InputError where the recipe's durations do not fit into the epochs."""


@dataclass(frozen=True)
class Wish:
    """What the command asks for: a recipe, and what to do if the run had another one."""

    recipe: Recipe
    rebase: bool = False
    extend_epochs: float | None = None
    extend_lr: float | None = None
    fit_memory: bool = False
    """Look for micro-batches that fit into the memory on other devices than GPUs too."""
    limit: TimeLimit | None = None
    """Replaces the recipe's epochs, before the first step."""

    @property
    def minutes(self) -> float | None:
        """The limit, None without one."""
        return None if self.limit is None else self.limit.minutes

    def in_common(self) -> dict[str, Any]:
        """Returns what must be the same on all ranks, by name."""
        return {
            **self.recipe.identity(),
            "checkpoint": self.recipe.checkpoint.model_dump(mode="json"),
            "divergence": self.recipe.divergence.model_dump(mode="json"),
            "target_accuracy": self.recipe.target_accuracy,
            "--rebase": self.rebase,
            "--extend": [self.extend_epochs, self.extend_lr],
            "--batch-size auto": self.fit_memory,
            "--minutes": self.minutes,
            "version of pitstop": __version__,
            "version of torch": version("torch"),
        }


@dataclass(frozen=True)
class Course:
    """What the run follows: its first recipe and the amendments to it."""

    recipe: Recipe
    amendments: tuple[Amendment, ...]
    num_samples: int
    notes: tuple[str, ...] = ()

    @cached_property
    def timeline(self) -> Timeline:
        """As long as the lr is open, that of the declared fallback."""
        amendments = self.amendments
        if self.lr_is_open:
            assert self.recipe.lr_finder is not None
            fallback = FoundLr(lr=self.recipe.lr_finder.fallback)
            amendments = (*amendments, Amendment(step=0, change=fallback))
        return Timeline(self.recipe, amendments, num_samples=self.num_samples)

    @property
    def lr_is_open(self) -> bool:
        """Whether the recipe says `lr: auto`, and nothing has been found yet."""
        return self.recipe.has_auto_lr() and self.found_lr is None

    @property
    def found_lr(self) -> float | None:
        """What `lr: auto` stands for in this run, None where nothing has been searched for."""
        changes = (amendment.change for amendment in self.amendments)
        return next((change.lr for change in changes if isinstance(change, FoundLr)), None)

    @property
    def stated(self) -> Recipe:
        """The recipe as it was last stated: `lr: auto` is that, whatever was found."""
        changes = [amendment.change for amendment in self.amendments]
        rebases = [change.recipe for change in changes if isinstance(change, Rebase)]
        return rebases[-1] if rebases else self.recipe

    @property
    def minutes(self) -> float | None:
        """What the epochs were fitted to, None where they are as they were last stated."""
        changes = [a.change for a in self.amendments if isinstance(a.change, Fit | Rebase)]
        return changes[-1].minutes if changes and isinstance(changes[-1], Fit) else None

    def amended(self, amendment: Amendment, note: str) -> "Course":
        """Returns the course with one more amendment, and what to say of it."""
        return replace(self, amendments=(*self.amendments, amendment), notes=(*self.notes, note))

    def saved(self, digest: str) -> dict[str, Any]:
        """Returns the part of a checkpoint that `set_course` reads."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "amendments": dump_amendments(self.amendments),
            "dataset": digest,
        }


def check_in_common(common: dict[str, Any], ranks: Ranks) -> None:
    """Raises InputError when a rank has not in common with rank 0 what all should have.

    Gradients are averaged whatever they are of: nothing else would tell.
    """
    own = json.dumps(common)
    first = ranks.from_main(own.encode() if ranks.main else None)
    _, changes = _differences(json.loads(first), json.loads(own))
    if changes:
        raise InputError(
            f"rank {ranks.rank} is not as rank 0: {changes}: give all machines the same command, "
            "data and versions"
        )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], str]:
    """Returns the keys whose values differ, and a text that shows the first few."""
    keys = [k for k in {**before, **after} if before.get(k, ...) != after.get(k, ...)]
    shown = [f"{k} {before.get(k, 'absent')} -> {after.get(k, 'absent')}" for k in keys[:SHOWN]]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return keys, ", ".join(shown) + more


def restore(
    run: RunDirectory, checkpointer: Checkpointer, ranks: Ranks, say: Callable[[str], None]
) -> tuple[str | None, Restored | None]:
    """Returns the status in run.json and the newest whole checkpoint, each None if there is none.

    Rank 0 picks them, and sends them to the others: these need no disk in common.
    """
    head = None
    if ranks.main:
        found = checkpointer.newest(say)
        status = (run.read() or {}).get("status")
        head = json.dumps({"status": status, "manifest": asdict(found) if found else None}).encode()
    stated = json.loads(ranks.from_main(head))
    if stated["manifest"] is None:
        return stated["status"], None
    manifest = Manifest(**stated["manifest"])
    data = ranks.from_main(checkpointer.read(manifest) if ranks.main else None)
    return stated["status"], (manifest, parse(data))


def retried(course: Course, policy: Divergence, *, at: int, diverged: int) -> Course | None:
    """Returns the course that tries again from a checkpoint, None where that was done enough.

    Args:
        course: as the checkpoint has it.
        at: the checkpoint's step.
        diverged: the step by which the run had diverged.
    """
    before = [a for a in course.amendments if a.step == at]
    tries = sum(isinstance(a.change, SkipData | LowerLr) for a in before)
    if tries == policy.retries:
        return None
    if policy.policy == "skip":
        change = SkipData(batches=max(1, diverged - at))
        how = f"the next {change.batches} batches are skipped"
    else:
        change = LowerLr(factor=policy.factor)
        how = f"lr x {policy.factor:g}"
    note = f"back to step {at}: {how} (retry {tries + 1} of {policy.retries})"
    return course.amended(Amendment(step=at, change=change), note)


def set_course(
    wish: Wish, saved: dict[str, Any] | None, *, ended: bool, digest: str, num_samples: int
) -> Course:
    """Returns the course of a run, from a checkpoint (None for a new run) and what is asked now.

    An extension that is asked for again while the run has not `ended` is the one being trained.

    Raises:
        InputError: the checkpoint is of another dataset or recipe, naming what differs.
    """
    if saved is None:
        if wish.extend_epochs is not None:
            raise InputError("--extend: there is no run to extend here yet: train it first")
        return Course(wish.recipe, (), num_samples)
    if saved["dataset"] != digest:
        raise InputError(
            f"--data: its content (digest {digest[:12]}) is not what the run was trained on "
            f"({saved['dataset'][:12]}): give that data, or another --out"
        )
    recipe = parse_recipe(saved["recipe"], "checkpoint")
    course = Course(recipe, parse_amendments(saved["amendments"]), num_samples)
    course = _with_recipe(course, wish, saved["step"])
    if wish.extend_epochs is None:
        return course
    return _extended(course, wish, saved["step"], ended)


def _with_recipe(course: Course, wish: Wish, step: int) -> Course:
    """Returns the course with the wished recipe from `step` on, if it differs and may."""
    # an extension goes on from whatever the epochs came to
    minutes = wish.minutes if wish.extend_epochs is None else course.minutes
    keys, changes = _differences(
        {**course.stated.identity(), "--minutes": course.minutes},
        {**wish.recipe.identity(), "--minutes": minutes},
    )
    if not keys:
        return course
    if not wish.rebase:
        raise InputError(
            f"the run was started with another recipe: {changes}: restore that, or go on with the "
            "change from here (--rebase), start over (--no-resume), or give another --out"
        )
    fixed = [key for key in keys if _decides_what_is_saved(key)]
    if fixed:
        raise InputError(f"--rebase cannot change {', '.join(fixed)}: give another --out")
    amendment = Amendment(step=step, change=Rebase(recipe=wish.recipe))
    before, after = course.timeline, course.amended(amendment, "").timeline
    ends = f"step {before.last} to {after.last}"
    note = f"rebased at step {step}: {changes}; the end moves from {ends}"
    return course.amended(amendment, note)


def _decides_what_is_saved(key: str) -> bool:
    """Tells whether a field decides which tensors a checkpoint holds, or in which order.

    Where the weights came from, and the bias that the classifier began with, is past.
    """
    if key in ("model.weights", "model.prior_bias"):
        return False
    groups = ("optimizer.layer_decay", "optimizer.lr_scales")
    return key in ("optimizer.name", "ema") or key.startswith(("model.", *groups))


def _extended(course: Course, wish: Wish, step: int, ended: bool) -> Course:
    """Returns the course with one more phase, unless that is what is being trained already."""
    assert wish.extend_epochs is not None
    before = course.timeline
    lr = wish.extend_lr or 0.1 * before.recipe.phases[-1].peak_lr()
    change = Extend(epochs=wish.extend_epochs, lr=lr)
    wished = [a.change for a in course.amendments if isinstance(a.change, Extend | Rebase)]
    if not ended and wished and wished[-1] == change:
        return course
    amendment = Amendment(step=step, change=change)
    after = course.amended(amendment, "").timeline
    note = (
        f"extended by {wish.extend_epochs:g} epochs from lr {lr:g}: the end moves from epoch "
        f"{before.epochs:.2f} (step {before.last}) to {after.epochs:.2f} (step {after.last})"
    )
    return course.amended(amendment, note)


def changed_circumstance(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Returns a line that says what changed since the run's last start, None if nothing did."""
    changes = [f"{k} {before[k]} -> {v}" for k, v in now.items() if k in before and before[k] != v]
    if not changes:
        return None
    return f"circumstances changed: {', '.join(changes)}: from here not bit-exact"
