"""The training loop, and what stands around it."""

import time
from collections.abc import Callable, Iterator

from rich.console import Console

from pitstop.core.recipe import LrFinder, Recipe
from pitstop.core.timeline import Amendment, FoundLr, MicroBatch, Timeline, parse_amendments
from pitstop.core.tracking import Tracking
from pitstop.data.load import Batch, Loader
from pitstop.data.packed import PackedDataset
from pitstop.engine.evaluate import Evaluation, evaluate, protocols, side
from pitstop.engine.guard import Guard
from pitstop.engine.initialize import initialize
from pitstop.engine.journal import Journal, Silence
from pitstop.engine.lr_finder import Search, search
from pitstop.engine.meter import Meter, Trouble
from pitstop.engine.micro_batch import fitting_parts
from pitstop.engine.minutes import fitted
from pitstop.engine.outcome import (
    BUDGET_SPENT,
    DIVERGED,
    FINISHED,
    INTERRUPTED,
    NOT_DURABLE,
    OUTCOMES,
    TARGET_MET,
    Outcome,
)
from pitstop.engine.resume import Course, Wish, check_in_common, restore, retried, set_course
from pitstop.engine.state import TrainState, load_weights
from pitstop.engine.step import Stage, check_shares, train_step
from pitstop.io.run_directory import RunDirectory
from pitstop.nn.freezing import freeze
from pitstop.nn.models import check_resolutions
from pitstop.runtime.checkpoint import Checkpointer, Restored, SaveSchedule
from pitstop.runtime.devices import Device
from pitstop.runtime.preemption import Preemption
from pitstop.runtime.ranks import ENDING, Decision, Ranks

LEAST_LOSS_SCALE = 1.0
"""fp16 begins at a scale of 65,536 and halves it with each step that it must skip. Below this, some
17 have been skipped in a row: the gradients themselves are not finite."""

STOPS = (None, INTERRUPTED, BUDGET_SPENT, NOT_DURABLE, DIVERGED)
"""What a run stops for between two steps, as the ranks tell each other."""


def train(
    wish: Wish,
    data: PackedDataset,
    run: RunDirectory,
    *,
    device: Device,
    ranks: Ranks,
    workers: int,
    preemption: Preemption,
    console: Console,
    guard: Guard | None,
    tracking: Tracking | None = None,
) -> Outcome:
    """Trains a recipe on a dataset in a run directory: from the start, or from where it stands.

    A run that has finished is left alone. All ranks call this; rank 0 holds the run's lock.

    Args:
        wish: the recipe, and what to do if the run had another.
        device: this rank's.
        ranks: entered by the caller.
        workers: threads that decode images.
        preemption: entered by the caller; when it asks, the run saves and ends with INTERRUPTED.
        guard: rank 0's.
        tracking: who else is told of the run.

    Raises:
        InputError: the run is of another recipe or dataset, or the recipe does not fit the data.
    """
    checkpointer = Checkpointer(run, wish.recipe.checkpoint)
    try:
        common = wish.in_common() | {
            "dataset": data.digest,
            "precision": device.circumstance()["precision"],
        }
        check_in_common(common, ranks)
        status, restored = restore(run, checkpointer, ranks, console.print)
        course = set_course(
            wish,
            restored[1] if restored else None,
            ended=status in (FINISHED.status, TARGET_MET.status),
            digest=data.digest,
            num_samples=len(data.train),
        )
        if (ended := _has_ended(status, restored, course, wish.recipe)) is not None:
            if ranks.main:
                console.print(f"{run.path}: this run has ended: {ended.status}; --extend N goes on")
            return ended if guard is None else guard.settle(ended)
        top1 = None
        notes: tuple[str, ...] = ()
        if restored is not None:
            state = checked_state(course, data, device, ranks)
            state.load(restored[1])
            top1 = restored[0].top1
        else:
            state, notes = first_state(course, data, device, ranks, workers=workers)
            if wish.limit is not None:
                course = fitted(wish, course, state, data, device, ranks, console, workers=workers)
        resumes, restored = restored is not None, None  # it is as large as the state
        journal = Silence()
        if guard is not None:
            journal = Journal(
                wish.recipe,
                course,
                data,
                run,
                checkpointer,
                device,
                ranks,
                console,
                guard,
                tracking or Tracking(),
                step=state.step,
                resumes=resumes,
                evaluated=top1 is not None,
            )
        with journal:
            journal.announce(state.step, notes)
            training = Training(
                wish, course, data, state, device, ranks, journal, workers, preemption, top1
            )
            return training.run(lambda: restore(run, checkpointer, ranks, console.print)[1])
    finally:
        checkpointer.close()


def check(wish: Wish, data: PackedDataset, device: Device, ranks: Ranks) -> None:
    """Raises InputError for whatever would refuse the wish as a new run; nothing is written."""
    course = set_course(wish, None, ended=False, digest=data.digest, num_samples=len(data.train))
    state = checked_state(course, data, device, ranks)
    load_weights(state, wish.recipe, data.classes, Ranks())


def first_state(
    course: Course, data: PackedDataset, device: Device, ranks: Ranks, *, workers: int
) -> tuple[TrainState, tuple[str, ...]]:
    """Returns the state before the first step, and what to say of the weights that are in it.

    Raises:
        InputError: as `checked_state`; or the weights that the recipe names cannot be had.
    """
    state = checked_state(course, data, device, ranks)
    notes = load_weights(state, course.recipe, data.classes, ranks)
    initialize(state, data.train, course.timeline, device, ranks, workers=workers)
    return state, notes


def checked_state(course: Course, data: PackedDataset, device: Device, ranks: Ranks) -> TrainState:
    """Returns the state that a course begins with, before any weights are loaded.

    Raises:
        InputError: the model cannot give what the recipe asks, or the ranks cannot share a batch.
    """
    state = TrainState.initial(course.timeline.recipe, len(data.classes), device, ranks.world)
    check_model(state, course.timeline)
    check_shares(course.timeline, device, ranks)
    return state


def check_model(state: TrainState, timeline: Timeline) -> None:
    """Raises InputError for what a recipe asks that the model cannot give."""
    for segment in timeline.segments:
        freeze(state.model, segment.phase.freeze)
    sides = {side(spec) for spec in protocols(timeline.recipe)}
    sides |= {segment.resolution for segment in timeline.segments}
    check_resolutions(state.model, timeline.recipe.model.name, sides)


def _has_ended(
    status: str | None, restored: Restored | None, course: Course, recipe: Recipe
) -> Outcome | None:
    """Says how the run has ended before, if there is nothing left to do."""
    if restored is None:
        return None
    manifest, _ = restored
    if status == FINISHED.status and manifest.step >= course.timeline.last:
        return FINISHED
    target = recipe.target_accuracy
    met = target is not None and manifest.top1 is not None and manifest.top1 >= target
    return TARGET_MET if status == TARGET_MET.status and met else None


def search_lr(
    recipe: Recipe, spec: LrFinder, data: PackedDataset, device: Device, *, workers: int
) -> Search:
    """Searches for the lr as a new run of the recipe would, and leaves nothing behind.

    Raises:
        InputError: the recipe does not fit the data.
    """
    ranks = Ranks()
    course = Course(recipe, (), len(data.train))
    state, _ = first_state(course, data, device, ranks, workers=workers)
    training = Training(
        Wish(recipe), course, data, state, device, ranks, Silence(), workers, Preemption()
    )
    found = training.search_lr(spec)
    assert found is not None
    return found


class Training:
    """A run in progress, on one of its ranks: all go through the same steps."""

    def __init__(
        self,
        wish: Wish,
        course: Course,
        data: PackedDataset,
        state: TrainState,
        device: Device,
        ranks: Ranks,
        journal: Journal | Silence,
        workers: int,
        preemption: Preemption,
        top1: float | None = None,
    ) -> None:
        self.wish, self.recipe = wish, wish.recipe
        self.data, self.state, self.device, self.ranks = data, state, device, ranks
        self.journal, self.workers, self.preemption = journal, workers, preemption
        self.outcomes = 0
        self.trouble: Trouble | None = None
        """What the run diverged at."""
        self.begin(course, top1)

    def begin(self, course: Course, top1: float | None) -> None:
        """Begins, or goes on, from the state: `top1` is that of its evaluation, if it was done."""
        self.course, self.timeline = course, course.timeline
        self.saved_step = self.state.step
        self.evaluated = None if top1 is None else (self.state.step, top1)
        """The last evaluation's step and top-1."""
        self.meter = Meter(self.ranks)
        self.saves = SaveSchedule(self.recipe.checkpoint, self.timeline)

    def run(self, newest: Callable[[], Restored | None]) -> Outcome:
        """Trains until the run ends; where it diverges, goes back and tries again.

        Args:
            newest: returns the last good checkpoint.
        """
        while (outcome := self.settle(self.loop())) == DIVERGED and self.go_back(newest()):
            pass
        return self.close(outcome)

    def go_back(self, restored: Restored | None) -> bool:
        """Goes back to a checkpoint, or the beginning, to try what the recipe says.

        Returns:
            Whether there is something left to try.
        """
        ranks, diverged = self.ranks, self.state.step
        at = 0 if restored is None else restored[1]["step"]
        decided = tuple(a for a in self.course.amendments if a.step == 0)
        if restored is not None:
            decided = parse_amendments(restored[1]["amendments"])
        before = Course(self.course.recipe, decided, self.course.num_samples)
        course = retried(before, self.recipe.divergence, at=at, diverged=diverged)
        self.journal.diverged(self.trouble, diverged)
        if course is None:
            return False
        if restored is None:
            state, _ = first_state(before, self.data, self.device, ranks, workers=self.workers)
            self.state.load(state.state_dict())
        else:
            self.state.load(restored[1])
        ranks.agree(Decision())  # what was wished for before is past
        self.begin(course, restored[0].top1 if restored else None)
        self.journal.went_back(course, at, evaluated=self.evaluated is not None)
        return True

    def loop(self) -> Outcome:
        """Trains until the end, or until something ends it before."""
        if self.course.lr_is_open and not self.find_lr():
            return INTERRUPTED
        if self.course.notes:
            self.save()  # an amendment is durable before what follows from it
        self.meter.resume()
        with Loader(
            self.data.train,
            self.timeline,
            range(self.state.step, self.timeline.last),
            rank=self.ranks.rank,
            world=self.ranks.world,
            workers=self.workers,
            prefetch=self.recipe.prefetch,
            pin_memory=self.device.pin_memory,
        ) as loader:
            batches = self.device.prefetch(loader)
            while self.state.step < self.timeline.last:
                if (outcome := self.train_segment(batches)) is not None:
                    return outcome
        return self.between_steps() or FINISHED

    def find_lr(self) -> bool:
        """Finds what `lr: auto` stands for in this run; False when it was interrupted."""
        spec = self.course.stated.lr_finder
        assert spec is not None
        self.journal.say(f"lr: auto: trying {spec.start_lr:g} to {spec.end_lr:g}")
        if (found := self.search_lr(spec)) is None:
            return False
        self.journal.searched(found)
        self.amend(FoundLr(lr=found.peak), found.explained())
        return True

    def search_lr(self, spec: LrFinder) -> Search | None:
        """Returns what trying learning rates shows; None when it was interrupted."""
        self.fit_memory()
        return search(
            spec,
            self.timeline,
            self.data,
            self.state,
            self.device,
            self.ranks,
            workers=self.workers,
            should_stop=lambda: self.preemption.requested,
        )

    def fit_memory(self) -> bool:
        """Cuts the batches to come into more micro-batches where they do not fit the memory.

        Returns:
            Whether that was so.
        """
        if not self.wish.fit_memory and self.device.torch_device.type != "cuda":
            return False
        segment = self.timeline.segment_at(self.state.step)
        phase = segment.phase
        parts = fitting_parts(segment, self.state, self.device, self.ranks, len(self.data.classes))
        if parts == phase.grad_accum_steps:
            return False
        self.amend(
            MicroBatch(grad_accum_steps=parts),
            f"{phase.name} at {segment.resolution} px does not fit the memory: grad_accum_steps "
            f"{phase.grad_accum_steps} -> {parts}; batch_size stays {phase.batch_size}",
        )
        check_shares(self.timeline, self.device, self.ranks)
        return True

    def amend(self, change: FoundLr | MicroBatch, note: str) -> None:
        """Changes the course from here on. Whoever calls this sees to it that it is saved."""
        self.course = self.course.amended(Amendment(step=self.state.step, change=change), note)
        self.timeline = self.course.timeline
        self.journal.amended(self.course, self.state.step)

    def train_segment(self, batches: Iterator[Batch]) -> Outcome | None:
        """Trains through the segment that comes next; says how the run ends if it ends there."""
        state, ranks = self.state, self.ranks
        segment = self.timeline.segment_at(state.step)
        ranks.begin(f"preparing {segment.phase.name} at {segment.resolution} px")
        if self.fit_memory():
            segment = self.timeline.segment_at(state.step)
            if not self.flush():
                return DIVERGED
            self.save()  # an amendment is durable before what follows from it
            self.meter.resume()
        stage = Stage(segment, state, self.device, ranks, len(self.data.classes))
        if (problem := stage.warm_up()) is not None:
            self.journal.say(problem)
        for step in segment.steps_from(state.step):
            if (outcome := self.between_steps()) is not None:
                return outcome
            settings = self.timeline.settings_at(step)
            ranks.begin(f"waiting for the images of step {step}")
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            ranks.begin(f"training step {step}")
            metrics = train_step(stage, state, batch, settings)
            self.meter.add(settings, metrics, waited, stage.layers, batch.ids, batch.share)
        return None

    def between_steps(self) -> Outcome | None:
        """Evaluates and saves what is due after `state.step` steps; says if the run ends here."""
        step = self.state.step
        unsaved = step > self.saved_step
        evaluate_now = step in self.timeline.evaluations and not self.is_evaluated()
        reasons = [
            self.journal.reason_to_stop(),
            INTERRUPTED if self.preemption.requested else None,
        ]
        overdue = self.ranks.main and self.saves.overdue()
        wish = Decision(
            stop=max(map(STOPS.index, reasons)),
            save=unsaved and (overdue or self.preemption.at_risk or self.journal.copy_is_due()),
            flush=self.meter.due(),
        )
        decision = self.ranks.agree(wish)
        save_now = unsaved and (decision.save or self.saves.due(step))
        if evaluate_now or save_now or decision.stop or decision.flush:
            if not self.flush():
                return DIVERGED
            if not evaluate_now:
                self.journal.show()
        if decision.stop:
            return STOPS[decision.stop]
        if evaluate_now:
            if (evaluation := self.evaluate()) is None:
                return INTERRUPTED
            save_now = self.saves.due(step) or self.journal.is_among_best(step, evaluation.top1)
        if save_now:
            self.save()
        if evaluate_now or save_now:
            self.meter.resume()
        return self.target_met()

    def flush(self) -> bool:
        """Reads and records the sums; False when they, or the gradients, are not finite."""
        reading = self.meter.flush()
        if reading is None:
            return True
        scaler = self.state.scaler
        if scaler.is_enabled():  # with fp16, now and then a step is skipped
            finite_gradients = scaler.get_scale() >= LEAST_LOSS_SCALE
        else:
            finite_gradients = reading.finite_gradients
        if not (reading.finite_loss and finite_gradients):
            self.trouble = reading.trouble
            return False
        self.journal.trained(reading)
        return True

    def is_evaluated(self) -> bool:
        """Tells whether the state has been evaluated at this step."""
        return self.evaluated is not None and self.evaluated[0] == self.state.step

    def target_met(self) -> Outcome | None:
        """Says that the run ends when the evaluation here reaches the target accuracy."""
        if self.evaluated is None or not self.is_evaluated():
            return None
        return TARGET_MET if self.meets_target(self.evaluated[1]) else None

    def meets_target(self, top1: float) -> bool:
        """Tells whether an evaluation ends the run."""
        target = self.recipe.target_accuracy
        return target is not None and top1 >= target

    def evaluate(self) -> Evaluation | None:
        """Evaluates and records the state; None when it was interrupted."""
        started = time.perf_counter()
        step = self.state.step
        result = evaluate(
            self.state.evaluated_model(),
            self.data.val,
            self.timeline.settings_at(step - 1).segment.recipe,
            self.device,
            self.ranks,
            weights="raw" if self.state.ema is None else "ema",
            workers=self.workers,
            should_stop=lambda: self.preemption.requested,
            also=lambda top1: step == self.timeline.last or self.meets_target(top1),
        )
        if result is None:
            return None
        self.evaluated = step, result.top1
        self.journal.evaluated(step, result, time.perf_counter() - started)
        return result

    def save(self) -> None:
        """Saves a checkpoint of this step."""
        self.saves.saved(self.journal.save(self.state))
        self.saved_step = self.state.step
        self.preemption.saved()

    def settle(self, outcome: Outcome) -> Outcome:
        """Makes the state durable; if it cannot be, as it is not finite, the run has diverged."""
        if outcome != DIVERGED and self.state.step > self.saved_step:
            self.save()
        self.ranks.begin(ENDING)
        return self.same_for_all(self.journal.settle(outcome))

    def close(self, outcome: Outcome) -> Outcome:
        """Says how the run ended."""
        outcome = self.journal.close(outcome, self.state.step, self.preemption.reason)
        return self.same_for_all(outcome)

    def same_for_all(self, outcome: Outcome) -> Outcome:
        """Returns rank 0's outcome."""
        self.outcomes += 1
        own = OUTCOMES.index(outcome) if self.ranks.main else None
        return OUTCOMES[self.ranks.say_to_all(f"outcome/{self.outcomes}", own)]
