"""One step of training."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.order import rank_slice
from pitstop.core.recipe import Phase, Recipe
from pitstop.core.rng import Stream, seed_for
from pitstop.core.timeline import Segment, StepSettings, Timeline
from pitstop.data.load import Batch
from pitstop.engine.state import TrainState
from pitstop.nn import augment, ema, erasing, losses, mixing, translate
from pitstop.nn.freezing import freeze
from pitstop.nn.models import classifier
from pitstop.nn.optimizers import forget, set_lr_and_momentum
from pitstop.runtime.devices import WITH_GRAPHS, Device
from pitstop.runtime.ranks import Ranks, is_of_a_lost_rank


class Stage:
    """A segment made ready to run: layers frozen, gradients shared by the ranks, compiled."""

    def __init__(
        self, segment: Segment, state: TrainState, device: Device, ranks: Ranks, num_classes: int
    ) -> None:
        self.segment = segment
        self.device = device
        self.ranks = ranks
        self.num_classes = num_classes
        self.normalize = Normalizer(segment.recipe, device.torch_device)
        self.noise = _noise(segment, device.torch_device)
        freeze(state.model, segment.phase.freeze, segment.phase.frozen_batch_norm)
        head = {p for layer in classifier(state.model) for p in layer.parameters()}
        self.adaptively_clipped = [p for p in state.model.parameters() if p not in head]
        """All but the classifier's, as in the paper of adaptive gradient clipping."""
        trained = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]
        self.layers = tuple(name for name, _ in trained)
        """The names of the parameters whose gradients `train_step` measures."""
        self.trained = [p for _, p in trained]
        self.model = ranks.parallel(state.model)

    def warm_up(self) -> str | None:
        """Compiles the model where the device asks for it, and makes passes that leave no trace.

        Several ranks need one even in eager mode: after its first backward pass, DDP puts the
        gradients into other buckets, which changes the order in which they are summed. A resumed
        run must not pass its first step in the first order.

        Returns:
            What to say when the model does not compile: training goes on without.
        """
        problem = None
        if self.device.compile:
            self.device.compile_in_place(self.model)
            try:
                self._throw_away_passes()
            except Exception as error:  # whatever a compiler may raise
                if is_of_a_lost_rank(error):
                    raise
                self.device.undo_compile(self.model)
                first_line = str(error).partition("\n")[0]
                problem = f"not compiled, going on in eager mode: {first_line}"
        if self.ranks.world > 1 and (problem or not self.device.compile):
            self._throw_away_passes()
        return problem

    def _throw_away_passes(self) -> None:
        """A forward and a backward pass of each micro-batch's shape; all that they change goes."""
        side = self.segment.resolution
        share = rank_slice(self.segment.batch_size, self.ranks.rank, self.ranks.world)
        parts = torch.empty(share.stop - share.start).tensor_split(
            self.segment.phase.grad_accum_steps
        )
        # as many on each rank, whether its parts differ or not: some layers wait for the others
        shapes = [len(part) for part in {0: parts[0], len(parts) - 1: parts[-1]}.values()]
        with self.leaving_no_trace():
            for i, size in enumerate(shapes):
                images = torch.zeros(size, 3, side, side, device=self.device.torch_device)
                self.try_pass(images, shared=i == len(shapes) - 1)

    @contextmanager
    def leaving_no_trace(self) -> Generator[None]:
        """Drops gradients that come about; gives buffers and random numbers back as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        device = self.device.torch_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                yield
            finally:
                self.model.zero_grad(set_to_none=True)
                for buffer, before in buffers:
                    buffer.copy_(before)

    def try_pass(self, images: torch.Tensor, *, shared: bool) -> None:
        """Makes a forward and a backward pass of images float32 [B, 3, R, R], to no end."""
        with self.gradients(shared=shared):
            with self.device.autocast():
                logits = self.model(images.to(memory_format=torch.channels_last))
            logits.float().sum().backward()

    def gradients(self, *, shared: bool) -> AbstractContextManager[Any]:
        """Returns the context of a forward and backward pass: with or without the other ranks."""
        return nullcontext() if shared else self.ranks.without_sync(self.model)


def _noise(segment: Segment, device: torch.device) -> torch.Tensor | None:
    """Returns the noise that random erasing puts, None where it puts none."""
    spec = segment.phase.random_erasing
    if spec is None or spec.mode == "const":
        return None
    return erasing.noise_for(segment.recipe.seed, segment.resolution, device)


class Normalizer:
    """Less the mean and over the std per channel, with both on the device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._mean = (torch.tensor(recipe.mean)[:, None, None] * 255).to(device)
        self._std = (torch.tensor(recipe.std)[:, None, None] * 255).to(device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns uint8 images [B, 3, H, W] as float32."""
        return images.float().sub_(self._mean).div_(self._std)


def check_shares(timeline: Timeline, device: Device, ranks: Ranks) -> None:
    """Raises InputError for batches that cannot be cut as the recipe and the ranks want it."""
    for segment in timeline.segments:
        if device.compile in WITH_GRAPHS and segment.phase.grad_accum_steps > 1:
            raise InputError(
                f"compile: {device.compile} keeps gradients in memory that the next micro-batch "
                "takes: with grad_accum_steps, take default or max-autotune-no-cudagraphs"
            )
        parts = ranks.world * segment.phase.grad_accum_steps
        if segment.batch_size < parts:
            raise InputError(
                f"batch_size {segment.batch_size} of {segment.phase.name} is less than an image "
                f"for each of {ranks.world} ranks x {segment.phase.grad_accum_steps} "
                "grad_accum_steps: raise it, or take fewer ranks"
            )


def train_step(
    stage: Stage, state: TrainState, batch: Batch, settings: StepSettings
) -> torch.Tensor:
    """Trains on this rank's share of a global batch and moves `state` one step on.

    Args:
        stage: of the step's segment.
        state: changed in place.
        batch: on the device.
        settings: the step's.

    Returns:
        (loss summed over the share's images, correct top-1, correct top-5, and the 2-norm of the
        gradient of each of the P `stage.layers`, before clipping), float32 [3 + P], on the device:
        nothing here waits for it.
    """
    phase, recipe, ranks = stage.segment.phase, stage.segment.recipe, stage.ranks
    images, targets = prepare(stage, batch, settings)
    if settings.begins_phase:
        forget(state.optimizer, _to_forget(phase, state.model))
    set_lr_and_momentum(state.optimizer, settings.lr, settings.momentum, phase.peak_lr())
    metrics = torch.zeros(3, device=stage.device.torch_device)
    parts = phase.grad_accum_steps
    micro_batches = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
    for i, (x, y) in enumerate(micro_batches):
        torch.manual_seed(seed_for(recipe.seed, Stream.MODEL, settings.step, i, ranks.rank))
        with stage.gradients(shared=i == parts - 1):
            with stage.device.autocast():
                logits = stage.model(x)
            loss = losses.loss_sum(recipe.loss, logits, y, phase.label_smoothing)
            # the ranks' gradients are averaged: so each counts by the images that it has
            state.scaler.scale(loss * ranks.world / phase.batch_size).backward()
        metrics += torch.stack((loss.detach(), *losses.correct(logits.detach(), y)))
    state.scaler.unscale_(state.optimizer)
    norms = _grad_norms(stage.trained)
    _clip(stage, norms)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    _average(recipe, state, settings)
    state.step = settings.step + 1
    return torch.cat((metrics, norms))


def _to_forget(phase: Phase, model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that begin a phase without what the optimizer remembers of them."""
    match phase.optimizer_state:
        case "keep":
            return []
        case "reset":
            return [*model.parameters()]
        case "reset_frozen":
            return [p for p in model.parameters() if not p.requires_grad]


def _grad_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Returns the 2-norm of each parameter's gradient, float32 [P]; 0 where there is none."""
    gradients = [p.grad for p in parameters]
    there = [gradient for gradient in gradients if gradient is not None]
    norms = iter(torch._foreach_norm(there))  # pyright: ignore[reportPrivateImportUsage]
    none = torch.zeros((), device=parameters[0].device)
    return torch.stack([none if g is None else next(norms) for g in gradients])


def _clip(stage: Stage, norms: torch.Tensor) -> None:
    recipe = stage.segment.recipe
    if recipe.clip_grad_norm is not None:
        total = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(stage.trained, recipe.clip_grad_norm, total)
    if recipe.agc is not None:
        adaptive_clip_grad(stage.adaptively_clipped, recipe.agc)


def _average(recipe: Recipe, state: TrainState, settings: StepSettings) -> None:
    """Moves the average on, after each `every`-th step."""
    if state.ema is None or recipe.ema is None or (settings.step + 1) % recipe.ema.every:
        return
    ema.update(state.ema, state.model, settings.ema_decay)
    if recipe.ema.lookahead:
        ema.look_ahead(state.ema, state.model)


def prepare(
    stage: Stage, batch: Batch, settings: StepSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the batch moved, augmented, normalised, erased and mixed, in this order.

    On a CPU, augmentation overwrites the batch's images.

    Returns:
        images float32 [B, 3, R, R] channels_last, and targets: labels int64 [B], or probabilities
        float32 [B, C] where the batch is mixed.
    """
    images = batch.images
    if (shifts := translate.draw(settings, batch.share)) is not None:
        images = translate.translate(images, shifts)
    if (operations := augment.draw(settings, batch.share)) is not None:
        images = augment.augment(images, operations)
    images = stage.normalize(images)
    if (boxes := erasing.draw(settings, batch.share)) is not None:
        erasing.erase(images, boxes, stage.noise)
    mixture = mixing.draw(settings, batch.share)
    if mixture is None:
        return images, batch.labels
    return mixing.mix(images, batch.labels, stage.num_classes, mixture)
