"""The training loop, and what stands around it."""

import time
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rich.console import Console

from pitstop import __version__
from pitstop.core.recipe import Recipe
from pitstop.core.timeline import Timeline
from pitstop.data.load import Loader
from pitstop.data.packed import PackedDataset
from pitstop.engine.evaluate import Evaluation, evaluate
from pitstop.engine.meter import Meter, Reading, described
from pitstop.engine.resume import Course, Wish, changed_circumstance, set_course
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.io.records import Event, Records
from pitstop.io.run_directory import RunDirectory
from pitstop.nn.freezing import freeze
from pitstop.nn.models import check_resolutions
from pitstop.report.plotter import Plotter
from pitstop.report.progress import Progress
from pitstop.runtime.checkpoint import Checkpointer, Restored, SaveSchedule
from pitstop.runtime.devices import Device
from pitstop.runtime.preemption import Preemption


@dataclass(frozen=True)
class Outcome:
    """How a run, or this part of it, ended."""

    status: str
    exit_code: int


FINISHED = Outcome("finished", 0)
TARGET_MET = Outcome("target met", 0)
INTERRUPTED = Outcome("interrupted", 75)
DIVERGED = Outcome("diverged", 76)


def train(
    wish: Wish,
    data: PackedDataset,
    run: RunDirectory,
    *,
    workers: int,
    preemption: Preemption,
    console: Console,
) -> Outcome:
    """Trains a recipe on a dataset in a run directory: from the start, or from where it stands.

    A run that has finished is left alone. The caller holds the run's lock.

    Args:
        wish: the recipe, and what to do if the run had another.
        workers: threads that decode images.
        preemption: entered by the caller; when it asks, the run saves and ends with INTERRUPTED.

    Raises:
        InputError: the run is of another recipe or dataset, or the recipe does not fit the data.
    """
    checkpointer = Checkpointer(run, wish.recipe.checkpoint)
    try:
        restored = checkpointer.restore(console.print)
        saved = restored[1] if restored else None
        status = (run.read() or {}).get("status")
        course = set_course(
            wish,
            saved,
            ended=status in (FINISHED.status, TARGET_MET.status),
            digest=data.digest,
            num_samples=len(data.train),
        )
        if (ended := _has_ended(status, restored, course, wish.recipe)) is not None:
            console.print(f"{run.path}: this run has ended: {ended.status}; --extend N goes on")
            return ended
        progress = Progress(console, course.timeline, f"{wish.recipe.name} in {run.path}")
        training = Training(
            wish.recipe, course, restored, data, run, checkpointer, workers, preemption, progress
        )
        with closing(training.records), progress:
            training.announce()
            return training.finish(training.loop())
    finally:
        checkpointer.close()


def check(wish: Wish, data: PackedDataset) -> None:
    """Raises InputError for whatever would refuse the wish as a new run; nothing is written."""
    course = set_course(wish, None, ended=False, digest=data.digest, num_samples=len(data.train))
    device = Device.choose(wish.recipe.precision, wish.recipe.compile, wish.recipe.threads)
    state = TrainState.initial(wish.recipe, len(data.classes), device)
    _check_model(state, course.timeline)


def _check_model(state: TrainState, timeline: Timeline) -> None:
    """Raises InputError for what a recipe asks that the model cannot give."""
    for segment in timeline.segments:
        freeze(state.model, segment.phase.freeze)
    sides = {timeline.recipe.eval_resolution()}
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


class Training:
    """A run in progress: its state, restored or initial, and what the loop works with."""

    def __init__(
        self,
        recipe: Recipe,
        course: Course,
        restored: Restored | None,
        data: PackedDataset,
        run: RunDirectory,
        checkpointer: Checkpointer,
        workers: int,
        preemption: Preemption,
        progress: Progress,
    ) -> None:
        self.recipe, self.course, self.timeline = recipe, course, course.timeline
        self.data, self.run, self.checkpointer = data, run, checkpointer
        self.workers, self.preemption, self.progress = workers, preemption, progress
        self.device = Device.choose(recipe.precision, recipe.compile, recipe.threads)
        self.state = TrainState.initial(course.recipe, len(data.classes), self.device)
        evaluated = False
        if restored is not None:
            manifest, saved = restored
            self.state.load(saved)
            evaluated = manifest.top1 is not None
        self.saved_step = self.state.step
        _check_model(self.state, self.timeline)
        self.records = Records(run, self.state.step, evaluated=evaluated)
        self.meter = Meter(self.records, self.timeline)
        self.saves = SaveSchedule(recipe.checkpoint, self.timeline)
        self.plotter = Plotter(run)
        self.reading: Reading | None = None

    def loop(self) -> Outcome:
        """Trains until the end, or until something ends it before."""
        state, timeline = self.state, self.timeline
        if self.course.notes:
            self.save()  # an amendment is durable before what follows from it
        steps = range(state.step, timeline.last)
        self.meter.resume()
        with Loader(self.data.train, timeline, steps, workers=self.workers) as batches:
            for segment in timeline.segments_from(state.step):
                stage = Stage(segment, state, self.device, len(self.data.classes))
                if (problem := stage.compile()) is not None:
                    self.progress.say(problem)
                for step in segment.steps_from(state.step):
                    if (outcome := self.between_steps()) is not None:
                        return outcome
                    settings = timeline.settings_at(step)
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited = time.perf_counter() - asked
                    metrics = train_step(stage, state, batch, settings)
                    self.meter.add(settings, metrics, waited)
        return self.between_steps() or FINISHED

    def between_steps(self) -> Outcome | None:
        """Evaluates and saves what is due after `state.step` steps; says if the run ends here."""
        step, stop = self.state.step, self.preemption.requested
        evaluate_now = step in self.timeline.evaluations and step not in self.records.evaluations
        save_now = step > self.saved_step and self.saves.due(step)
        if evaluate_now or save_now or stop or self.meter.due():
            self.reading = self.meter.flush() or self.reading
            if self.reading is not None and not self.reading.finite:
                return DIVERGED
            if not evaluate_now:
                self.show()
        if stop:
            return INTERRUPTED
        if evaluate_now:
            before = [event["top1"] for event in self.records.evaluations.values()]
            if (evaluation := self.evaluate()) is None:
                return INTERRUPTED
            save_now = self.saves.due(step) or self.saves.is_among_best(evaluation.top1, before)
        if save_now:
            self.save()
        if evaluate_now or save_now:
            self.meter.resume()
        return self.target_met()

    def target_met(self) -> Outcome | None:
        """Says that the run ends when the evaluation here reaches the target accuracy."""
        target, here = self.recipe.target_accuracy, self.records.evaluations.get(self.state.step)
        return TARGET_MET if target and here and here["top1"] >= target else None

    def evaluate(self) -> Evaluation | None:
        """Evaluates and records the state; None when it was interrupted."""
        started = time.perf_counter()
        settings = self.timeline.settings_at(self.state.step - 1)
        result = evaluate(
            self.state.evaluated_model(),
            self.data.val,
            settings.segment.recipe,
            self.device,
            weights="raw" if self.state.ema is None else "ema",
            workers=self.workers,
            should_stop=lambda: self.preemption.requested,
        )
        if result is None:
            return None
        self.records.add(
            "val",
            self.state.step,
            epoch=self.epoch(),
            **described(settings),
            loss=result.loss,
            top1=result.top1,
            top5=result.top5,
            images=len(self.data.val),
            seconds=round(time.perf_counter() - started, 4),
            memory_mb=self.device.memory_mb(),
            protocol=result.protocol,
        )
        self.show(val_top1=result.top1)
        self.write_run_json("running")
        if (problem := self.plotter.update()) is not None:
            self.progress.say(problem)
        return result

    def save(self) -> None:
        """Saves a checkpoint of this step; the records are on disk before it."""
        self.records.sync()
        step, evaluations = self.state.step, self.records.evaluations
        best = self.records.best()
        self.checkpointer.save(
            self.state.state_dict() | self.course.saved(self.data.digest),
            epoch=self.epoch(),
            top1=evaluations[step]["top1"] if step in evaluations else None,
            best=best is not None and best["step"] == step,
            metadata=self.metadata(),
        )
        self.saved_step = step
        self.saves.saved()

    def finish(self, outcome: Outcome) -> Outcome:
        """Makes the state durable where it is worth it, and says how the run ended."""
        if outcome != DIVERGED and self.state.step > self.saved_step:
            self.save()
        self.checkpointer.wait()
        if self.checkpointer.rejected is not None:
            outcome = DIVERGED
        self.write_run_json(outcome.status, exit_code=outcome.exit_code)
        for line in self.closing_lines(outcome):
            self.progress.say(line)
            self.records.add("note", self.state.step, text=line)
        if outcome == INTERRUPTED:
            return outcome  # what interrupted it may not wait for pictures
        if (problem := self.plotter.finish()) is not None:
            self.progress.say(problem)
        return outcome

    # What is said and written

    def announce(self) -> None:
        """Says and records how the run starts or goes on."""
        step, last = self.state.step, self.timeline.last
        lines = list(self.course.notes)
        circumstance = self.device.circumstance() | {n: version(n) for n in ("timm", "numpy")}
        if step > 0:
            lines.append(f"resuming at step {step} of {last}, epoch {self.epoch():.2f}")
            before = (self.run.read() or {}).get("circumstance", {})
            changed = changed_circumstance(before, circumstance)
            lines += [changed] if changed else []
        else:
            images = f"{len(self.data.train):,} images of {len(self.data.classes)} classes"
            lines.append(f"{self.recipe.name}: {self.timeline.epochs:.4g} epochs of {images}")
        self.records.add("start", step, circumstance=circumstance, version=__version__)
        for line in lines:
            self.progress.say(line)
            self.records.add("note", step, text=f"-- {line}")
        self.run.write(
            version=__version__,
            recipe=self.recipe.model_dump(mode="json"),
            identity={"dataset": self.data.digest, **self.timeline.recipe.identity()},
            circumstance=circumstance,
            data={"packed": str(self.data.path), "source": self.recipe.data},
        )
        self.write_run_json("running")

    def show(self, val_top1: float | None = None) -> None:
        """Updates the progress display."""
        if self.reading is None:
            return
        step = self.state.step
        settings = self.timeline.settings_at(step - 1)
        best = self.records.best()
        self.progress.update(
            step=step,
            epoch=self.epoch(),
            phase=settings.segment.phase.name,
            loss=self.reading.loss,
            top1=self.reading.top1,
            lr=settings.lr,
            images_per_second=self.reading.images_per_second,
            wait_share=self.reading.wait_share,
            memory_mb=self.device.memory_mb(),
            val_top1=val_top1,
            best_top1=best["top1"] if best else None,
        )

    def write_run_json(self, status: str, exit_code: int | None = None) -> None:
        """Writes where the run stands."""
        step, meter = self.state.step, self.meter
        self.run.write(
            status=status,
            exit_code=exit_code,
            step=step,
            steps=self.timeline.last,
            epoch=round(self.epoch(), 4),
            epochs=round(self.timeline.epochs, 4),
            metrics=_metrics(self.records.last()),
            best=_metrics(self.records.best()),
            wall_seconds=round(self.records.wall_seconds(), 3),
            images_per_second=round(meter.images / meter.seconds, 1) if meter.seconds else None,
        )

    def closing_lines(self, outcome: Outcome) -> list[str]:
        """Returns the end of the text log: how it ended, the best and the last checkpoint, time."""
        lines = [f"{outcome.status} at step {self.state.step}, epoch {self.epoch():.2f}"]
        if outcome == DIVERGED:
            where = self.checkpointer.rejected or f"the loss before step {self.state.step}"
            lines.append(f"not finite: {where}; the checkpoints before it stand; lower lr")
        for which, manifest in self.checkpointer.best_and_last().items():
            top1 = "" if manifest.top1 is None else f", top1 {manifest.top1:.2f}"
            lines.append(f"{which}: {self.run.checkpoints / manifest.file}{top1}")
        wall = time.strftime("%H:%M:%S", time.gmtime(self.records.wall_seconds()))
        return [*lines, f"total wall time: {wall}"]

    def epoch(self) -> float:
        """Returns the epochs done."""
        return self.timeline.epoch(self.state.step)

    def metadata(self) -> dict[str, Any]:
        """Returns what it takes to use the weights, for the header of a safetensors file."""
        recipe = self.timeline.recipe
        kept = recipe.model_dump(mode="json", include={"name", "model", "mean", "std", "eval"})
        kept["eval"]["resolution"] = recipe.eval_resolution()
        precision = self.device.circumstance()["precision"]
        return {**kept, "precision": precision, "classes": list(self.data.classes)}


def _metrics(val: Event | None) -> dict[str, Any] | None:
    """Returns an evaluation with its protocol, as run.json has it."""
    if val is None:
        return None
    return {key: val[key] for key in ("top1", "top5", "loss", "epoch", "step", "protocol")}
