"""What training changes, and nothing else does."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pitstop.core.recipe import Recipe
from pitstop.nn import ema, models, optimizers
from pitstop.runtime.devices import Device


@dataclass
class TrainState:
    """Model, average, optimizer, and the number of steps done."""

    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    step: int

    @classmethod
    def initial(cls, recipe: Recipe, num_classes: int, device: Device) -> "TrainState":
        """Returns the state before the first step; it follows from the recipe alone."""
        model = device.place(models.build(recipe.model, num_classes, recipe.seed))
        average = ema.shadow(model) if recipe.ema else None
        return cls(model, average, optimizers.build(recipe.optimizer, model), 0)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as nested tensors and plain data, sharing the tensors' memory."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        if self.ema:
            self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def evaluated_model(self) -> nn.Module:
        """Returns the model that counts: the average where there is one."""
        return self.ema or self.model
