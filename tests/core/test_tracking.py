"""Which trackers are told of a run."""

import pytest

from pitstop.core.errors import InputError
from pitstop.core.tracking import Tracking, parse_trackers


@pytest.mark.parametrize(
    ("stated", "names"),
    [
        ([], ()),
        (["wandb"], ("wandb",)),
        (["wandb,mlflow"], ("wandb", "mlflow")),
        (["mlflow", "wandb, tensorboard", "mlflow"], ("mlflow", "wandb", "tensorboard")),
    ],
)
def test_trackers_are_named_once_each_with_commas_or_without(stated, names):
    assert parse_trackers(stated) == names
    assert Tracking(parse_trackers(stated)).trackers == names


@pytest.mark.parametrize("stated", ["wandbb", "", "wandb,"])
def test_an_unknown_tracker_is_refused_with_those_that_there_are(stated):
    with pytest.raises(InputError, match=r"^--track .*wandb, tensorboard, mlflow$"):
        Tracking(parse_trackers([stated]))


def test_a_name_for_no_tracker_is_refused():
    with pytest.raises(InputError, match=r"^--track-project: .*give --track too$"):
        Tracking(project="mine")
    with pytest.raises(InputError, match=r"^--track-name: .*give --track too$"):
        Tracking(name="mine")
    with pytest.raises(InputError, match=r"^--track-name: is empty"):
        Tracking(("wandb",), name=" ")
