"""Compares plans: what differs, a row each, with a column for each plan."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pitstop.core.recipe import Optimizer
from pitstop.core.schedule import Varying
from pitstop.core.timeline import Segment, Timeline
from pitstop.plan.explain import as_json, augmentation, mixing, whole_phases
from pitstop.plan.notes import protocol

if TYPE_CHECKING:  # rich is imported by who prints
    from rich.table import Table

ALWAYS = ("epochs", "steps", "images seen")
"""Rows that are shown whether they differ or not."""


def compared_json(plans: list[Timeline]) -> dict[str, Any]:
    """Returns the plans and the rows in which they differ as plain data."""
    return {"plans": [as_json(plan) for plan in plans], "differences": differences(plans)}


def compared_table(plans: list[Timeline]) -> "Table":
    """Returns what rich prints."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("", box=box.SIMPLE_HEAD)
    for plan in plans:
        table.add_column(Text(plan.recipe.name))
    for row, cells in differences(plans).items():
        table.add_row(row, *map(Text, cells))
    return table


def differences(plans: list[Timeline]) -> dict[str, list[str]]:
    """Returns, by what it is about, a text for each plan; only where they are not all equal."""
    rows = {row: [tell(plan) for plan in plans] for row, tell in _ROWS.items()}
    return {row: cells for row, cells in rows.items() if row in ALWAYS or len(set(cells)) > 1}


def _in_order(values: Iterable[str]) -> str:
    """Returns what comes one after the other: `128 → 160 → 224`."""
    return " → ".join(value for value, _ in groupby(values))


def _of_segments(value: Callable[[Segment], object]) -> Callable[[Timeline], str]:
    return lambda plan: _in_order(str(value(segment)) for segment in plan.segments)


def _of_phases(parts: Callable[[Segment], Iterable[str]]) -> Callable[[Timeline], str]:
    return lambda plan: _in_order(", ".join(parts(whole)) or "none" for whole in whole_phases(plan))


def _model(plan: Timeline) -> str:
    model = plan.recipe.model
    parts = [model.name, *(f"{key} {value}" for key, value in model.kwargs.items())]
    parts += ["BlurPool"] if model.blurpool else []
    parts += [f"from {model.weights}"] if model.weights else []
    return ", ".join(parts)


def _peak_lr(plan: Timeline) -> str:
    peaks = _in_order(f"{segment.phase.peak_lr():.4g}" for segment in plan.segments)
    return f"{peaks} (fallback of auto)" if plan.lr_is_fallback else peaks


def _schedule(segment: Segment) -> str:
    schedule = segment.phase.lr_schedule
    return f"{schedule.name} over the {schedule.over}"


def _optimizer(plan: Timeline) -> str:
    optimizer = plan.recipe.optimizer
    momentum = optimizer.momentum
    parts = [optimizer.name]
    parts.append(f"momentum {'varies' if isinstance(momentum, Varying) else f'{momentum:g}'}")
    return ", ".join([*parts, *_decays(optimizer)])


def _decays(optimizer: Optimizer) -> Iterator[str]:
    yield f"weight decay {optimizer.weight_decay:g}"
    if optimizer.norm_weight_decay:
        yield f"of norms {optimizer.norm_weight_decay:g}"
    if optimizer.layer_decay is not None:
        yield f"layer decay {optimizer.layer_decay:g}"


def _clipping(plan: Timeline) -> str:
    recipe = plan.recipe
    if recipe.agc is not None:
        return f"AGC {recipe.agc:g}"
    return "none" if recipe.clip_grad_norm is None else f"norm {recipe.clip_grad_norm:g}"


def _average(plan: Timeline) -> str:
    ema = plan.recipe.ema
    if ema is None:
        return "none"
    decay = plan.settings_at(plan.last - 1).ema_decay
    return f"decay {decay:.6g}" + (", Lookahead" if ema.lookahead else "")


_ROWS: dict[str, Callable[[Timeline], str]] = {
    "training images": lambda plan: f"{plan.num_samples:,}",
    "epochs": lambda plan: f"{plan.epochs:.4g}",
    "steps": lambda plan: f"{plan.last:,}",
    "images seen": lambda plan: f"{sum(s.steps * s.batch_size for s in plan.segments):,}",
    "model": _model,
    "resolution": _of_segments(lambda s: s.resolution),
    "batch": _of_segments(lambda s: f"{s.batch_size:,}"),
    "data": _of_segments(lambda s: f"{100 * s.phase.data_fraction:.3g}%"),
    "peak lr": _peak_lr,
    "lr schedule": _of_segments(_schedule),
    "optimizer": _optimizer,
    "loss": lambda plan: plan.recipe.loss,
    "label smoothing": _of_segments(lambda s: f"{s.phase.label_smoothing:g}"),
    "augmentation": _of_phases(augmentation),
    "repeated augmentation": _of_segments(lambda s: s.phase.repeated_augmentation),
    "mixing": _of_phases(mixing),
    "frozen": _of_phases(lambda s: s.phase.freeze),
    "clipping": _clipping,
    "EMA": _average,
    "evaluation": lambda plan: protocol(plan.recipe, plan.recipe.eval),
}
