"""What training changes, and nothing else does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe
from pitstop.nn import ema, models, optimizers, weights
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks


@dataclass
class TrainState:
    """Model, average, optimizer, loss scale, and the number of steps done."""

    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int

    @classmethod
    def initial(
        cls, recipe: Recipe, num_classes: int, device: Device, world: int = 1
    ) -> "TrainState":
        """Returns the state before the first step; it follows from the recipe alone.

        Without the weights that the recipe may name: `load_weights` puts them in.

        Raises:
            InputError: `sync_bn` is asked for where torch cannot do it, or the optimizer's groups
                do not fit the model.
        """
        model = models.build(recipe.model, num_classes, recipe.seed)
        if recipe.sync_bn and world > 1:
            if device.torch_device.type != "cuda":
                raise InputError("sync_bn: torch has it for GPUs only: set it to false")
            model = convert_sync_batchnorm(model)
        model = device.place(model)
        average = ema.shadow(model) if recipe.ema else None
        optimizer = optimizers.build(recipe.optimizer, model, fused=device.fused)
        return cls(model, average, optimizer, device.grad_scaler(), 0)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as nested tensors and plain data, sharing the tensors' memory."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, in this precision or another."""
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        if self.ema:
            self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])

    def evaluated_model(self) -> nn.Module:
        """Returns the model that counts: the average where there is one."""
        return self.ema or self.model


def load_weights(
    state: TrainState, recipe: Recipe, classes: Sequence[str], ranks: Ranks
) -> tuple[str, ...]:
    """Puts the weights that a recipe names into the state of a run that begins, and its average.

    All ranks call this: rank 0 reads them.

    Args:
        classes: the names of those to be trained.

    Returns:
        What to say of them: nothing where the recipe names none.

    Raises:
        InputError: they cannot be read, or are of another model.
    """
    if recipe.model.weights is None:
        return ()
    data = ranks.from_main(weights.read(recipe.model) if ranks.main else None)
    found = weights.parse(data, recipe.model.weights)
    note = weights.load(state.model, found, classes)
    if state.ema is not None:
        state.ema.load_state_dict(state.model.state_dict())
    return (note,)
