"""Micro-batches that fit into the memory: tried before a segment's first step.

The global batch, its order and the schedule stay as they are: a batch that does not fit is cut
into more micro-batches. Batch norm then sees fewer images at once, as with any `grad_accum_steps`.
"""

import gc
import math
from dataclasses import replace

import torch

from pitstop.core.errors import InputError
from pitstop.core.order import rank_slice
from pitstop.core.timeline import Segment
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

TOO_LARGE = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's errors of a GPU, of a Mac's, and of a CPU's memory say."""

MOMENTS = 2
"""Tensors of a parameter's size that an optimizer makes at its first step, at most."""


def fitting_parts(
    segment: Segment, state: TrainState, device: Device, ranks: Ranks, num_classes: int
) -> int:
    """Returns how many micro-batches a batch takes to fit into the memory of each rank.

    All ranks call this, and each tries its own share without the others: a forward and a backward
    pass of its largest micro-batch, which leave no trace. What does not fit is halved. Synchronised
    batch norm does not run without the others: with it nothing is tried.

    Args:
        segment: to be trained next; its own `grad_accum_steps` are the fewest.
        state: at the segment's first step.

    Raises:
        InputError: as many micro-batches as there are images do not fit either.
    """
    parts = segment.phase.grad_accum_steps
    if segment.recipe.sync_bn and ranks.world > 1:
        return parts
    device.undo_compile(state.model)
    _free()  # what the segment before has left
    stage = Stage(segment, state, replace(device, compile=False), Ranks(), num_classes)
    share = rank_slice(segment.batch_size, ranks.rank, ranks.world)
    images, most = share.stop - share.start, segment.batch_size // ranks.world
    while not (fits := _fits(stage, state, images, parts)) and parts < most:
        parts = min(2 * parts, most)
    needed = ranks.gather([parts if fits else math.inf]).max().item()
    if needed == math.inf:
        raise InputError(
            f"{segment.phase.name}: not even a batch of {segment.batch_size} in {most} "
            f"micro-batches fits into the memory at {segment.resolution} px: lower resolution, "
            "or take a smaller model"
        )
    return int(needed)


def _fits(stage: Stage, state: TrainState, images: int, parts: int) -> bool:
    """Tells whether this rank's share of a batch fits, cut into so many micro-batches."""
    try:
        _try(stage, state, images, parts)
    except RuntimeError as error:
        known = any(words in str(error) for words in TOO_LARGE)
        if not known and not isinstance(error, torch.OutOfMemoryError):
            raise
    else:
        return True
    _free()  # the error's traceback held what was computed
    return False


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _try(stage: Stage, state: TrainState, images: int, parts: int) -> None:
    side, device = stage.segment.resolution, stage.device.torch_device
    begun = len(state.optimizer.state) > 0
    parameters = [] if begun else [p for p in state.model.parameters() if p.requires_grad]
    moments = [torch.empty_like(p) for p in parameters for _ in range(MOMENTS)]
    share = torch.zeros(images, 3, side, side, device=device)  # all of it is there in each pass
    with stage.leaving_no_trace():
        stage.try_pass(share[: math.ceil(images / parts)], shared=True)
    del moments  # they are held until here
