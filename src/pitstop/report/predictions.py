"""What a model makes of each class, for the page: read from `predictions.json` of a run.

The form of the file, as `pitstop.engine.predict` writes it:

    {"classes": ["cat", ...],            names; a class is meant by its place among them
     "confusion": [[50, 3, ...], ...],   images: a row a true class, a column a predicted one
     "top1": 99.4,                       percent
     "protocol": {"resolution": 32, ...},
     "mistakes": [{"label": 0, "predicted": 1, "probability": 0.98, "jpeg": "<base64>"}, ...]}

The mistakes begin with the one that the model was surest of; `jpeg` is a thumbnail of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import (
    Base64Bytes,
    BaseModel,
    Field,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pitstop.core.errors import InputError

PREDICTIONS = "predictions.json"
"""The name of the file in a run directory."""

WORST = 24
"""Mistakes that are kept and shown: those of which the model was surest."""

PAIRS = 10
"""Pairs of classes, those confused most often, of which mistakes are kept and shown."""


class Mistake(BaseModel, frozen=True):
    """An image of the class `label` that the model took for one of `predicted`."""

    label: NonNegativeInt
    predicted: NonNegativeInt
    probability: float = Field(ge=0, le=1)
    jpeg: Base64Bytes

    @field_validator("jpeg")
    @classmethod
    def _begins_as_one(cls, data: bytes) -> bytes:
        if not data.startswith(b"\xff\xd8"):
            raise ValueError("is no JPEG")
        return data


class Predictions(BaseModel, frozen=True):
    """What the model made of the validation images."""

    classes: list[str] = Field(min_length=1)
    confusion: list[list[NonNegativeInt]]
    top1: float
    protocol: dict[str, Any]
    mistakes: list[Mistake]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        count = len(self.classes)
        if len(self.confusion) != count or any(len(row) != count for row in self.confusion):
            raise ValueError(f"confusion is not {count} x {count}")
        if any(max(m.label, m.predicted) >= count for m in self.mistakes):
            raise ValueError("a mistake is of no class")
        return self


@dataclass(frozen=True)
class ClassScore:
    """How many of a class's images were taken for what they are."""

    name: str
    images: int
    right: int

    @property
    def top1(self) -> float:
        """Percent; there is at least one image."""
        return 100 * self.right / self.images


@dataclass(frozen=True)
class Confusion:
    """So many images of the class `label` were taken for `predicted`: `share` percent of them."""

    label: int
    predicted: int
    images: int
    share: float


def read_predictions(path: Path) -> Predictions | None:
    """Returns what a file holds, None where there is none.

    Raises:
        InputError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        return Predictions.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise InputError(f"{path}: is damaged ({what}): remove it, or give --data") from None


def class_scores(predictions: Predictions) -> list[ClassScore]:
    """Returns the classes that have images, the worst first."""
    scores = [
        ClassScore(name, sum(row), row[i])
        for i, (name, row) in enumerate(
            zip(predictions.classes, predictions.confusion, strict=True)
        )
        if sum(row)
    ]
    return sorted(scores, key=lambda score: score.top1)


def most_confused(predictions: Predictions, most: int) -> list[Confusion]:
    """Returns at most so many pairs of classes, those with the most images first."""
    return sorted(_confusions(predictions), key=lambda pair: (-pair.images, -pair.share))[:most]


def _confusions(predictions: Predictions) -> Iterator[Confusion]:
    for label, row in enumerate(predictions.confusion):
        for predicted, images in enumerate(row):
            if images and predicted != label:
                yield Confusion(label, predicted, images, 100 * images / sum(row))
