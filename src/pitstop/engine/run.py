"""From what the user names (a recipe, data, a directory) to a run: the engine's front door."""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as ProgressBar
from safetensors import SafetensorError, safe_open
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.machine import cores, cores_a_rank
from pitstop.core.recipe import LrFinder, Recipe, parse_recipe
from pitstop.core.safeguards import Safeguards
from pitstop.core.tracking import Tracking
from pitstop.data.open import open_dataset
from pitstop.data.pack import PackingStoppedError
from pitstop.data.packed import PackedDataset
from pitstop.data.resolve import DIGITS
from pitstop.engine.calibrate import calibrate
from pitstop.engine.evaluate import protocols, side
from pitstop.engine.guard import Guard
from pitstop.engine.lr_finder import Search
from pitstop.engine.outcome import INTERRUPTED, Outcome
from pitstop.engine.resume import Wish
from pitstop.engine.train import check, search_lr, train
from pitstop.io.run_directory import RunDirectory
from pitstop.nn import models
from pitstop.plan.calibration import Calibration
from pitstop.runtime.checkpoint import copy_checkpoint
from pitstop.runtime.devices import Device
from pitstop.runtime.place import Place, is_restarted
from pitstop.runtime.preemption import Preemption, notice_sources
from pitstop.runtime.ranks import DEFAULT_TIMEOUT, Ranks


def run_training(
    wish: Wish,
    out: Path,
    *,
    resume: Path | None = None,
    start_over: bool = False,
    rank_timeout: float = DEFAULT_TIMEOUT,
    safeguards: Safeguards | None = None,
    tracking: Tracking | None = None,
) -> Outcome:
    """Trains in the run directory `out`, going on with the run that is there.

    A process that torchrun or SLURM has started as one of several ranks trains with the others.

    Args:
        wish: the recipe, which names its data, and what to do if the run had another.
        resume: a checkpoint, or a run, to begin from instead; `out` must hold no run yet.
        start_over: move a run that is in the way aside.
        rank_timeout: seconds after which a rank that does not answer is given up.
        safeguards: of money and durability.
        tracking: who else is told of the run.

    Raises:
        InputError: naming the file, key or option, and the fix.
        RankFailedError: another rank failed.
    """
    assert wish.recipe.data is not None
    wish = replace(wish, recipe=_with_absolute_data(wish.recipe))
    place = Place.find() or Place()
    console = Console(highlight=False, soft_wrap=True, quiet=place.local_rank > 0)
    run = RunDirectory(out)
    stated = wish.recipe.workers
    workers = cores_a_rank(place.local_world) if stated == "auto" else stated
    safeguards = safeguards or Safeguards()
    notices = (
        notice_sources(safeguards.preemption_file, safeguards.preemption_command)
        if place.local_rank == 0
        else ()
    )
    with Preemption(notices) as preemption, Ranks(place, rank_timeout) as ranks:
        if ranks.main:
            run.refuse_foreign()
        device = _device(wish.recipe, place.local_rank)
        if ranks.world > 1 and device.torch_device.type == "mps":
            raise InputError("a Mac's GPU is for one rank: give --device cpu for several")
        data = None
        with ranks.node_first("data"), suppress(PackingStoppedError):
            data = open_data(
                str(wish.recipe.data),
                workers,
                console,
                lambda: preemption.requested or ranks.already("stopped"),
            )
        stopped = ranks.any("stopped", lambda: data is None or preemption.requested)
        if data is None or stopped:
            return INTERRUPTED

        def go_on(guard: Guard | None = None) -> Outcome:
            return train(
                wish,
                data,
                run,
                device=device,
                ranks=ranks,
                workers=workers,
                preemption=preemption,
                console=console,
                guard=guard,
                tracking=tracking,
            )

        if not ranks.main:
            return go_on()
        if start_over and run.path.exists() and not is_restarted():
            check(wish, data, device, ranks)
            with run.lock():
                aside = run.set_aside()
            console.print(f"moved the run that was there to {aside}")
        with run.lock():
            copied = resume is not None and copy_checkpoint(resume, run)
            try:
                starts_over = start_over and not is_restarted()
                with Guard(run, safeguards, starts_over=starts_over, say=console.print) as guard:
                    return go_on(guard)
            except InputError:
                if copied:
                    run.remove()
                raise


def _device(recipe: Recipe, local_rank: int = 0) -> Device:
    return Device.choose(
        recipe.precision,
        recipe.compile,
        recipe.threads,
        device=recipe.device,
        deterministic=recipe.deterministic,
        local_rank=local_rank,
    )


def run_lr_search(recipe: Recipe, spec: LrFinder) -> Search:
    """Searches for a learning rate on this process's device; nothing is written.

    Args:
        recipe: names its data.
        spec: how to search.

    Raises:
        InputError: naming the file, key or option, and the fix.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    workers = cores() if recipe.workers == "auto" else recipe.workers
    device = _device(recipe)
    data = open_data(str(recipe.data), workers, console)
    return search_lr(recipe, spec, data, device, workers=workers)


def run_calibration(recipe: Recipe, started: float) -> Calibration | None:
    """Measures this machine at what a recipe does, alone or as one of several ranks.

    Args:
        recipe: may name data, on which the loader is measured.
        started: when the command began, by `time.perf_counter`.

    Returns:
        None on other ranks than the first.

    Raises:
        InputError: naming the file, key or option, and the fix.
    """
    place = Place.find() or Place()
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=place.local_rank > 0)
    workers = cores_a_rank(place.local_world) if recipe.workers == "auto" else recipe.workers
    with Ranks(place) as ranks:
        device = _device(recipe, place.local_rank)
        data = None
        if recipe.data is not None:
            with ranks.node_first("data"):
                data = open_data(str(recipe.data), workers, console)
        return calibrate(
            recipe,
            data,
            device,
            ranks,
            started=started,
            say=lambda what: console.print(f"measuring: {what}"),
        )


def load_model(
    path: Path, protocol: dict[str, Any], circumstance: dict[str, Any]
) -> tuple[nn.Module, Recipe, list[str]]:
    """Builds the model of a safetensors file that pitstop wrote, from what its header says.

    Returns:
        the model on the CPU, a recipe with its normalisation and protocol, the class names.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["pitstop"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        why = "has no pitstop header" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: {why}: name a .safetensors file of a pitstop run") from None
    classes = metadata.pop("classes")
    metadata["eval"] |= protocol
    recipe = parse_recipe({**metadata, **circumstance, "epochs": 1}, str(path))
    model = models.build(recipe.model, len(classes), seed=0)
    model.load_state_dict(tensors)
    models.check_resolutions(model, recipe.model.name, map(side, protocols(recipe)))
    return model, recipe, classes


def open_data(
    data: str, workers: int, console: Console, should_stop: Callable[[], bool] | None = None
) -> PackedDataset:
    """Opens `--data`; if it is to be packed first, with a progress bar."""
    with ExitStack() as stack:
        bars: list[ProgressBar] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bar = ProgressBar(console=console, transient=True, disable=not console.is_terminal)
                bars.append(stack.enter_context(bar))
                bars[0].add_task("packing", total=total)
            bars[0].update(bars[0].task_ids[0], completed=done)

        return open_dataset(
            data, workers=workers, progress=progress, should_stop=should_stop, say=console.print
        )


def data_of(stated: dict[str, Any]) -> str | None:
    """Returns the data that a run's run.json names: as it was packed, if that is still there."""
    named = stated.get("data") or {}
    packed = named.get("packed")
    return packed if packed and Path(packed).exists() else named.get("source")


def _with_absolute_data(recipe: Recipe) -> Recipe:
    """Returns the recipe with its data as an absolute path, for whoever reads it elsewhere."""
    path = Path(str(recipe.data)).expanduser()
    if recipe.data == DIGITS or not path.exists():
        return recipe
    return recipe.model_copy(update={"data": str(path.resolve())})
