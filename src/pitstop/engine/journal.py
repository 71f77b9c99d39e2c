"""What a run says, writes and keeps: the part of training that only rank 0 does."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.console import Console

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe
from pitstop.core.timeline import StepSettings
from pitstop.core.tracking import Tracking
from pitstop.data.packed import PackedDataset
from pitstop.engine.evaluate import Evaluation, described
from pitstop.engine.guard import Guard
from pitstop.engine.lr_finder import Search, write_curve
from pitstop.engine.meter import Reading, Trouble
from pitstop.engine.outcome import DIVERGED, INTERRUPTED, NOT_DURABLE, Outcome
from pitstop.engine.resume import Course, changed_circumstance
from pitstop.engine.state import TrainState
from pitstop.io.records import Event, Records, lost_work
from pitstop.io.run_directory import RunDirectory
from pitstop.report.plotter import Plotter
from pitstop.report.progress import Progress
from pitstop.report.tracker import Trackers
from pitstop.runtime.checkpoint import Checkpointer, is_among_best
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks


class Journal:
    """The records, run.json, checkpoints, plots, trackers and terminal of a run: a context manager.

    Args:
        recipe: as it is asked for now: with its circumstances.
        course: what the run follows.
        data: what it trains on.
        run: where it is written.
        checkpointer: the run's.
        device, ranks: what it runs on.
        console: what is said goes there.
        guard: of the run's cost and its copy.
        tracking: who else is told of the run.
        step: where the run begins or goes on.
        resumes: whether it goes on from a checkpoint.
        evaluated: whether that checkpoint was saved after its step's evaluation.
    """

    def __init__(
        self,
        recipe: Recipe,
        course: Course,
        data: PackedDataset,
        run: RunDirectory,
        checkpointer: Checkpointer,
        device: Device,
        ranks: Ranks,
        console: Console,
        guard: Guard,
        tracking: Tracking,
        *,
        step: int,
        resumes: bool,
        evaluated: bool,
    ) -> None:
        self.recipe, self.course, self.timeline = recipe, course, course.timeline
        self.data, self.run, self.checkpointer = data, run, checkpointer
        self.device, self.ranks = device, ranks
        self.guard, self.resumes = guard, resumes
        checkpointer.attempt, checkpointer.when_saved = guard.attempt, guard.saved
        self.saved_step = step if resumes else 0
        lost = lost_work(run, self.saved_step)
        guard.begin(
            self.saved_step,
            world=ranks.world,
            machine=device.name,
            lost_steps=lost[0],
            lost_seconds=lost[1],
        )
        self.records = Records(run, step if resumes else None, evaluated=evaluated)
        self.why: str | None = None
        """Why the run ends, where its outcome does not say all."""
        self.progress = Progress(console, self.timeline, f"{recipe.name} in {run.path}")
        self.plotter = Plotter(run)
        self.trackers = Trackers(run, tracking)
        self.reading: Reading | None = None
        self.images, self.seconds = 0, 0.0

    def __enter__(self) -> "Journal":
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.trackers.finish(hurried=True)
        self.progress.__exit__(*error)
        self.records.close()

    def say(self, line: str) -> None:
        """Shows a line."""
        self.progress.say(line)

    def track(self) -> None:
        """Has the trackers told, and shows what they answer."""
        for line in self.trackers.update():
            self.say(line)

    def announce(self, step: int, notes: Sequence[str] = ()) -> None:
        """Says and records how the run starts or goes on; `notes` are more lines of it."""
        last = self.timeline.last
        lines = [*self.course.notes, *notes]
        circumstance = self.device.circumstance() | {"ranks": self.ranks.world}
        circumstance |= {name: version(name) for name in ("timm", "numpy")}
        if self.resumes:
            lines.append(f"resuming at step {step} of {last}, epoch {self.epoch(step):.2f}")
            before = {"ranks": 1} | (self.run.read() or {}).get("circumstance", {})
            changed = changed_circumstance(before, circumstance)
            lines += [changed] if changed else []
        else:
            images = f"{len(self.data.train):,} images of {len(self.data.classes)} classes"
            lines.append(f"{self.recipe.name}: {self.timeline.epochs:.4g} epochs of {images}")
        self.records.add("start", step, circumstance=circumstance, version=__version__)
        for line in lines:
            self.note(line, step)
        self.run.write(
            version=__version__,
            recipe=self.recipe.model_dump(mode="json"),
            identity={"dataset": self.data.digest, **self.course.stated.identity()},
            found_lr=self.course.found_lr,
            circumstance=circumstance,
            data={"packed": str(self.data.path), "source": self.recipe.data},
        )
        self.write_run_json("running", step)
        self.track()

    def note(self, line: str, step: int) -> None:
        """Says and records a line."""
        self.say(line)
        self.records.add("note", step, text=f"-- {line}")

    def searched(self, search: Search) -> None:
        """Records a search for the lr, and has its curve drawn."""
        self.records.add("lr_find", 0, **search.as_record())
        write_curve(self.run.lr_curve, search)
        if (problem := self.plotter.update()) is not None:
            self.say(problem)

    def amended(self, course: Course, step: int) -> None:
        """Follows a course that was amended at `step`, and says how: in its last note."""
        self.course, self.timeline = course, course.timeline
        self.note(course.notes[-1], step)
        self.run.write(found_lr=course.found_lr)

    def diverged(self, trouble: Trouble | None, step: int) -> None:
        """Says and records at what the run diverged, as found out after so many steps."""
        where = self.checkpointer.rejected
        if trouble is not None:
            step, where = trouble.step, trouble.explained()
            known = asdict(trouble)
            del known["step"]
            self.records.add("diverged", step, **known)
        self.why = f"not finite at step {step}: {where}"
        self.note(self.why, step)

    def went_back(self, course: Course, step: int, *, evaluated: bool) -> None:
        """Goes on from a checkpoint of `step` steps; what was recorded since is cut off."""
        self.records.close()
        self.records = Records(self.run, step, evaluated=evaluated)
        self.records.add("note", step, text=f"-- {self.why}")
        self.why, self.reading = None, None
        self.amended(course, step)
        self.write_run_json("running", step)

    def trained(self, reading: Reading) -> None:
        """Records what was trained since the last time."""
        self.reading = reading
        self.images += reading.images
        self.seconds += reading.seconds
        step = reading.last.step + 1
        utilization = self.device.utilization()
        self.records.add(
            "train",
            step,
            first=reading.first.step,
            epoch=self.epoch(step),
            **_described(reading.last),
            images=reading.images,
            loss=reading.loss,
            top1=reading.top1,
            top5=reading.top5,
            ids=reading.ids,
            seconds=round(reading.seconds, 4),
            wait_seconds=round(reading.wait_seconds, 4),
            grad_norm=reading.grad_norm,
            **({} if utilization is None else {"utilization": utilization}),
        )
        self.look(step)

    def evaluated(self, step: int, result: Evaluation, seconds: float) -> None:
        """Records an evaluation, shows it, and has the plots drawn."""
        self.records.add(
            "val",
            step,
            epoch=self.epoch(step),
            **_described(self.timeline.settings_at(step - 1)),
            loss=result.loss,
            top1=result.top1,
            top5=result.top5,
            images=len(self.data.val),
            seconds=round(seconds, 4),
            memory_mb=self.device.memory_mb(),
            protocol=result.protocol,
            **({"also": [_figures(each) for each in result.also]} if result.also else {}),
        )
        self.show(val_top1=result.top1)
        self.write_run_json("running", step)
        if (problem := self.plotter.update()) is not None:
            self.say(problem)
        self.look(step)

    def look(self, step: int) -> None:
        """Looks after what happens beside the training: trackers, uploads, the ledger."""
        self.track()
        durable, problem = self.guard.look(step, self.saved_step)
        if durable is not None:
            age = round(time.monotonic() - durable.monotonic, 1)
            self.records.add("durable", durable.step, at=step, age_seconds=age)
            self.run.write(durable={"step": durable.step, "time": durable.wall})
        if problem is not None:
            self.note(f"not uploaded: {problem}", step)
        if self.guard.ledger.problem is not None:
            self.say(self.guard.ledger.problem)

    def copy_is_due(self) -> bool:
        """Says whether the bucket wants a newer checkpoint."""
        return self.guard.copy_is_due()

    def reason_to_stop(self) -> Outcome | None:
        """Says whether the run has to end: it diverged, or the guard wants it to."""
        if self.checkpointer.rejected is not None:
            return DIVERGED
        return self.guard.reason_to_stop()

    def is_among_best(self, step: int, top1: float) -> bool:
        """Tells whether an evaluation that was recorded is one whose checkpoint to keep."""
        others = [e["top1"] for at, e in self.records.evaluations.items() if at != step]
        return is_among_best(top1, others, self.recipe.checkpoint)

    def save(self, state: TrainState) -> float:
        """Saves a checkpoint of the state; the records are on disk before it.

        Returns:
            The seconds for which training stood still.
        """
        started = time.perf_counter()
        self.records.sync()
        step, evaluations = state.step, self.records.evaluations
        best = self.records.best()
        self.checkpointer.save(
            state.state_dict() | self.course.saved(self.data.digest),
            epoch=self.epoch(step),
            top1=evaluations[step]["top1"] if step in evaluations else None,
            best=best is not None and best["step"] == step,
            metadata=self.metadata(),
        )
        if (problem := self.checkpointer.problem) is not None:  # of the save before
            self.note(problem, step)
        else:
            self.saved_step = step
        return time.perf_counter() - started

    def settle(self, outcome: Outcome) -> Outcome:
        """Waits until all is saved; a state that could not be, as it is not finite, diverged."""
        self.checkpointer.wait()
        if self.checkpointer.problem is not None:
            raise InputError(self.checkpointer.problem)
        return DIVERGED if self.checkpointer.rejected is not None else outcome

    def close(self, outcome: Outcome, step: int, reason: str | None) -> Outcome:
        """Says and records how the run ended, and makes it durable.

        Args:
            reason: what interrupted it, if something did.
        """
        self.end(outcome, step)
        self.trackers.end()
        if outcome != INTERRUPTED and (problem := self.plotter.finish()) is not None:
            self.say(problem)  # what interrupts a run may not wait for pictures
        durable = self.guard.finish(outcome, step, self.saved_step, reason)
        if durable != outcome:
            self.end(durable, step)
        elif outcome != NOT_DURABLE and (newest := self.guard.durable) is not None:
            self.say(f"{self.guard.asked.remote}: holds step {newest.step}")
            self.run.write(durable={"step": newest.step, "time": newest.wall})
        for line in self.trackers.finish(hurried=outcome == INTERRUPTED):
            self.say(line)
        return durable

    def end(self, outcome: Outcome, step: int) -> None:
        """Says and records an outcome."""
        self.write_run_json(outcome.status, step, exit_code=outcome.exit_code)
        for line in self.closing_lines(outcome, step):
            self.say(line)
            self.records.add("note", step, text=line)

    def show(self, val_top1: float | None = None) -> None:
        """Updates the progress display."""
        reading = self.reading
        if reading is None:
            return
        step = reading.last.step + 1
        best = self.records.best()
        self.progress.update(
            step=step,
            epoch=self.epoch(step),
            phase=reading.last.segment.phase.name,
            loss=reading.mean_loss,
            top1=100 * reading.top1 / reading.images,
            lr=reading.last.lr,
            images_per_second=reading.images / reading.seconds,
            wait_share=reading.wait_seconds / reading.seconds,
            memory_mb=self.device.memory_mb(),
            val_top1=val_top1,
            best_top1=best["top1"] if best else None,
        )

    def write_run_json(self, status: str, step: int, exit_code: int | None = None) -> None:
        """Writes where the run stands."""
        self.run.write(
            status=status,
            exit_code=exit_code,
            step=step,
            steps=self.timeline.last,
            epoch=round(self.epoch(step), 4),
            epochs=round(self.timeline.epochs, 4),
            metrics=_metrics(self.records.last()),
            best=_metrics(self.records.best()),
            wall_seconds=round(self.records.wall_seconds(), 3),
            images_per_second=round(self.images / self.seconds, 1) if self.seconds else None,
        )

    def closing_lines(self, outcome: Outcome, step: int) -> list[str]:
        """Returns the end of the text log: how it ended, the best and the last checkpoint, time."""
        lines = [f"{outcome.status} at step {step}, epoch {self.epoch(step):.2f}"]
        for figures in self.records.evaluations.get(step, {}).get("also", ()):
            lines.append(f"also top1 {figures['top1']:.2f} by {described(figures['protocol'])}")
        if self.why is not None:
            lines.append(f"{self.why}; the checkpoints before it stand; lower lr")
        for which, manifest in self.checkpointer.best_and_last().items():
            top1 = "" if manifest.top1 is None else f", top1 {manifest.top1:.2f}"
            lines.append(f"{which}: {self.run.checkpoints / manifest.file}{top1}")
        if outcome == NOT_DURABLE:
            lines.append(f"{self.guard.problem}: the checkpoints here stand; start it again")
        if self.guard.asked.price is not None:
            lines.append(f"spent: ${self.guard.ledger.spent():.2f} of all starts")
        wall = time.strftime("%H:%M:%S", time.gmtime(self.records.wall_seconds()))
        return [*lines, f"total wall time: {wall}"]

    def epoch(self, step: int) -> float:
        """Returns the epochs done after so many steps."""
        return self.timeline.epoch(step)

    def metadata(self) -> dict[str, Any]:
        """Returns what it takes to use the weights, for the header of a safetensors file."""
        recipe = self.timeline.recipe
        kept = recipe.model_dump(mode="json", include={"name", "model", "mean", "std", "eval"})
        kept["eval"]["resolution"] = recipe.eval_resolution()
        precision = self.device.circumstance()["precision"]
        return {**kept, "precision": precision, "classes": list(self.data.classes)}


class Silence:
    """The journal of the other ranks."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def say(self, line: str) -> None: ...

    def announce(self, step: int, notes: Sequence[str] = ()) -> None: ...

    def searched(self, search: Search) -> None: ...

    def diverged(self, trouble: Trouble | None, step: int) -> None: ...

    def went_back(self, course: Course, step: int, *, evaluated: bool) -> None: ...

    def copy_is_due(self) -> bool:
        return False

    def reason_to_stop(self) -> Outcome | None:
        return None

    def amended(self, course: Course, step: int) -> None: ...

    def trained(self, reading: Reading) -> None: ...

    def evaluated(self, step: int, result: Evaluation, seconds: float) -> None: ...

    def is_among_best(self, step: int, top1: float) -> bool:
        return False

    def show(self) -> None: ...

    def save(self, state: TrainState) -> float:
        return 0.0

    def settle(self, outcome: Outcome) -> Outcome:
        return outcome

    def close(self, outcome: Outcome, step: int, reason: str | None) -> Outcome:
        return outcome


def _described(settings: StepSettings) -> dict[str, object]:
    """Returns what events say of a step's settings."""
    segment = settings.segment
    return {
        "phase": segment.phase.name,
        "resolution": segment.resolution,
        "batch_size": segment.batch_size,
        "lr": settings.lr,
        "momentum": settings.momentum,
    }


def _metrics(val: Event | None) -> dict[str, Any] | None:
    """Returns an evaluation with its protocol, as run.json has it."""
    if val is None:
        return None
    keys = ("top1", "top5", "loss", "epoch", "step", "protocol", "also")
    return {key: val[key] for key in keys if key in val}


def _figures(result: Evaluation) -> dict[str, Any]:
    """Returns an evaluation by one more protocol, as events have it."""
    figures = asdict(result)
    del figures["also"]
    return figures
