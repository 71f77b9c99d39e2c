"""The plan's error: predicted minutes beside those that others have published.

Method. What the plan takes from FFCV's logs is their rates at 160 and 192 px and, fitted on the run
of 16 epochs alone, the start-up (ResNet-50) and the rate of ResNet-18. Here `fast`, on FFCV's
hardware, is predicted for every length that they published. Their logs begin when the data are
there, and their code compiles nothing: so both are left out. With ResNet-18 they evaluate at the
end only, so here too; the one GPU has all cores of its machine (with 12 of its 96 hardware threads
our loader would do 7,000 images a second, less than the 11,000 that it trains on at 160 px).

`fast` has 80% of its epochs at 160 px, FFCV's code 75%, since it rounds a ramp to multiples of 32
px (train_imagenet.py, get_resolution). The last columns are of phases like FFCV's.

MosaicML's and the MLPerf's figures are not used by the plan: they show how it does elsewhere.

    python benchmarks/plan_error.py
"""

import argparse
import json
from dataclasses import dataclass
from typing import Any

from pitstop.core.recipe import load_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.cost import IMAGENET, estimate
from pitstop.plan.machines import Machine, find_machine

FITTED = 16
"""The epochs of the run that the plan knows."""

RESNET50 = {16: 14.9, 24: 21.7, 32: 28.7, 40: 35.6, 56: 49.4, 88: 77.2}
RESNET18 = {16: 35.0, 24: 51.6, 32: 68.9, 40: 85.5, 56: 119.4, 88: 187.3}
"""Minutes by epochs, from FFCV's logs: ResNet-50 on 8 A100, ResNet-18 on one of a p4d.24xlarge."""

MOSAICML = {36: 27.0}
"""MosaicML's mild recipe for ResNet-50 on 8 A100."""

OPTIONS_18: dict[str, Any] = {
    "model.name": "resnet18",
    "batch_size": 1024,
    "lr_per": 1024,
    "lr": 0.5,
    "optimizer.weight_decay": 5.0e-5,
    "eval.every": 1000,
}
"""Those in the header of recipes/fast.yaml; and one evaluation, at the end."""

LIKE_FFCV: dict[str, Any] = {"phases.0.duration": "75%"}


@dataclass(frozen=True)
class Row:
    """A published run and what the plan says of it."""

    what: str
    epochs: int
    published: float
    """Minutes."""
    predicted: float
    like_theirs: float | None
    """With phases like those of the published run, where `fast` has others."""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def predict(recipe: str, machine: Machine, options: dict[str, Any]) -> float:
    """Returns the minutes of a run on a machine that has the data, nothing compiled."""
    timeline = Timeline.planned(load_recipe(recipe, options | {"compile": False}), IMAGENET)
    return estimate(timeline, machine).undisturbed_seconds / 60


def rows() -> list[Row]:
    """Returns all published runs with their predictions."""
    eight = find_machine("p4d.24xlarge")
    one = eight.model_copy(update={"gpus": 1})
    fast = [
        Row(
            what,
            epochs,
            published,
            predict("fast", machine, options | {"epochs": epochs}),
            round(predict("fast", machine, options | LIKE_FFCV | {"epochs": epochs}), 2),
        )
        for what, machine, options, logged in (
            ("ResNet-50, 8 A100", eight, {}, RESNET50),
            ("ResNet-18, 1 A100", one, OPTIONS_18, RESNET18),
        )
        for epochs, published in logged.items()
    ]
    mild = [
        Row("mild, 8 A100", epochs, published, predict("mild", eight, {"epochs": epochs}), None)
        for epochs, published in MOSAICML.items()
    ]
    return fast + mild


def report(all_rows: list[Row]) -> None:
    """Prints the result, and again as JSON."""
    print(f"{'':20}{'epochs':>7}{'published':>11}{'predicted':>11}{'error':>8}{'like theirs':>13}")
    for row in all_rows:
        like, note = "", ""
        if row.like_theirs is not None:
            like = f"{row.like_theirs / row.published - 1:+.1%}"
            note = "  fitted" if row.epochs == FITTED else ""
        print(
            f"{row.what:20}{row.epochs:7}{row.published:7.1f} min{row.predicted:7.1f} min"
            f"{row.error:+8.1%}{like:>13}{note}"
        )
    result = {
        "benchmark": "plan_error",
        "rows": [
            vars(row) | {"predicted": round(row.predicted, 2), "error": round(row.error, 4)}
            for row in all_rows
        ],
    }
    print(json.dumps(result))


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    report(rows())


if __name__ == "__main__":
    main()
