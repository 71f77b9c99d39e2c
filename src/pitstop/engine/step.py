"""One step of training."""

import torch
from torch import nn

from pitstop.core.recipe import Recipe
from pitstop.core.rng import Stream, seed_for
from pitstop.core.timeline import Segment, StepSettings
from pitstop.data.load import Batch
from pitstop.engine.state import TrainState
from pitstop.nn import ema, losses, mixing
from pitstop.nn.freezing import freeze
from pitstop.nn.optimizers import set_lr_and_momentum
from pitstop.runtime.devices import Device


class Stage:
    """A segment made ready to run: its layers frozen, the model compiled for its shapes."""

    def __init__(
        self, segment: Segment, state: TrainState, device: Device, num_classes: int
    ) -> None:
        self.segment = segment
        self.device = device
        self.num_classes = num_classes
        self.model = state.model
        freeze(self.model, segment.phase.freeze)

    def compile(self) -> str | None:
        """Compiles the model where the device asks for it, with one pass that leaves no trace.

        Returns:
            What to say when it does not compile: training goes on without.
        """
        if not self.device.compile:
            return None
        self.device.compile_in_place(self.model)
        try:
            self._throw_away_pass()
        except Exception as error:  # whatever a compiler may raise
            self.device.undo_compile(self.model)
            return f"not compiled, going on in eager mode: {str(error).partition(chr(10))[0]}"
        return None

    def _throw_away_pass(self) -> None:
        """One forward and backward pass in the segment's shape; statistics and gradients go."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        micro_batch = self.segment.batch_size // self.segment.phase.grad_accum_steps
        side = self.segment.resolution
        images = torch.zeros(micro_batch, 3, side, side, device=self.device.torch_device)
        try:
            with self.device.autocast():
                logits = self.model(images.to(memory_format=torch.channels_last))
            logits.float().sum().backward()
        finally:
            self.model.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)


def train_step(
    stage: Stage, state: TrainState, batch: Batch, settings: StepSettings
) -> torch.Tensor:
    """Trains on one global batch and moves `state` one step on.

    Returns:
        (loss summed over the images, correct top-1, correct top-5), float32 [3], on the device:
        nothing here waits for it.
    """
    phase, recipe = stage.segment.phase, stage.segment.recipe
    images, targets = prepare(stage, batch, settings)
    set_lr_and_momentum(state.optimizer, settings.lr, settings.momentum)
    metrics = torch.zeros(3, device=stage.device.torch_device)
    micro_batches = zip(
        images.tensor_split(phase.grad_accum_steps),
        targets.tensor_split(phase.grad_accum_steps),
        strict=True,
    )
    for i, (x, y) in enumerate(micro_batches):
        torch.manual_seed(seed_for(recipe.seed, Stream.MODEL, settings.step, i))
        with stage.device.autocast():
            logits = stage.model(x)
        loss = losses.loss_sum(recipe.loss, logits, y, phase.label_smoothing)
        (loss / phase.batch_size).backward()
        metrics += torch.stack((loss.detach(), *losses.correct(logits.detach(), y)))
    if recipe.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(stage.model.parameters(), recipe.clip_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        ema.update(state.ema, stage.model, settings.ema_decay)
    state.step = settings.step + 1
    return metrics


def prepare(
    stage: Stage, batch: Batch, settings: StepSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the batch on the device, flipped, normalised and mixed.

    Returns:
        images float32 [B, 3, R, R] channels_last, and targets: labels int64 [B], or probabilities
        float32 [B, C] where the batch is mixed.
    """
    device = stage.device.torch_device
    images, labels = batch.images.to(device), batch.labels.to(device)
    if batch.flip is not None:
        flip = batch.flip.to(device)[:, None, None, None]
        images = torch.where(flip, images.flip(3), images)
    images = normalize(images, stage.segment.recipe)
    draws = mixing.draw(settings, batch.share)
    if draws is None:
        return images, labels
    return mixing.mix(images, labels, stage.num_classes, draws)


def normalize(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Returns uint8 images [B, 3, H, W] as float32, less the mean and over the std per channel."""
    mean = torch.tensor(recipe.mean, device=images.device)[:, None, None] * 255
    std = torch.tensor(recipe.std, device=images.device)[:, None, None] * 255
    return images.float().sub_(mean).div_(std)
