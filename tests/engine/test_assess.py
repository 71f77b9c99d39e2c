"""What a model makes of each class: counts that add up, and the mistakes worth looking at."""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pitstop import cli
from pitstop.core.errors import InputError
from pitstop.data.packed import PackedDataset
from pitstop.engine.evaluate import BINS, Evaluation
from pitstop.engine.predict import EACH, Assessment, assess, examine
from pitstop.report.predictions import PAIRS, WORST, read_predictions

from .saved_run import save_run


@pytest.fixture
def run(digits: PackedDataset, tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", digits)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    """As the authors' code has it: github.com/gpleiss/temperature_scaling."""
    total = 0.0
    for lower in np.arange(bins) / bins:
        inside = (confidence > lower) & (confidence <= lower + 1 / bins)
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            total += gap * inside.mean()
    return 100 * total


def test_it_is_the_evaluation_and_each_image_counts_once(run, digits):
    found = examine(run, workers=1)
    confusion = found.confusion()
    images = len(digits.val)
    assert confusion.sum() == images
    assert confusion.sum(1).tolist() == np.bincount(digits.val.labels, minlength=10).tolist()
    assert 0 < confusion.trace() < images
    assert found.evaluation.top1 == pytest.approx(100 * confusion.trace() / images)
    one_by_one = np.zeros((10, 10), int)
    for label, answer in zip(digits.val.labels, found.answers, strict=True):
        one_by_one[label, answer] += 1
    assert (confusion == one_by_one).all()


def test_the_calibration_error_is_that_of_its_authors(run):
    found = examine(run, workers=1)
    expected = expected_calibration_error(
        found.probabilities.astype(float), found.answers == found.labels, BINS
    )
    assert BINS == 15
    assert expected > 1
    assert found.evaluation.ece == pytest.approx(expected, rel=1e-4)


def assessment(answers: list[int], probabilities: list[float], classes: int = 20) -> Assessment:
    """Of images that are all of class 0."""
    return Assessment(
        evaluation=Evaluation(0.0, 0.0, 0.0, 0.0, {}),
        classes=tuple(map(str, range(classes))),
        split=None,  # pyright: ignore[reportArgumentType]
        labels=np.zeros(len(answers), np.int64),
        answers=np.array(answers),
        probabilities=np.array(probabilities, np.float32),
    )


def test_the_mistakes_begin_with_the_surest():
    found = assessment([0, 1, 2, 0, 3], [1.0, 0.2, 0.9, 0.1, 0.5])
    assert found.mistakes().tolist() == [2, 4, 1]


def test_a_pair_that_is_confused_often_is_shown_though_others_are_surer():
    others = [1] * WORST
    often = [2] * 40
    rare = [3] * 1
    found = assessment(
        others + often + rare, [0.9] * len(others) + [0.5] * len(often) + [0.4] * len(rare)
    )
    rows = found.mistakes().tolist()
    assert rows[:WORST] == list(range(WORST))
    assert rows[WORST:] == [WORST, WORST + 1, WORST + 2, WORST + 40]  # three, and the rare one
    assert len(rows) <= WORST + PAIRS * EACH


def test_a_model_without_mistakes_shows_none():
    assert assessment([0, 0], [0.5, 0.6]).mistakes().tolist() == []


def test_the_report_reads_what_is_written(run, digits):
    returned = assess(run, workers=1)
    read = read_predictions(run / "predictions.json")
    assert read is not None
    assert read.classes == list(digits.classes)
    assert np.array(read.confusion).trace() == round(read.top1 * len(digits.val) / 100)
    assert read.protocol["weights"] == "best.safetensors"
    assert read.protocol["images"] == len(digits.val)
    assert read.mistakes
    probabilities = [mistake.probability for mistake in read.mistakes]
    assert probabilities == sorted(probabilities, reverse=True)
    for mistake, stated in zip(read.mistakes, returned["mistakes"], strict=True):
        assert mistake.label != mistake.predicted
        with Image.open(io.BytesIO(base64.b64decode(stated["jpeg"]))) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 64


def test_without_data_or_of_other_classes_it_is_refused(run, tmp_path, digits):
    with pytest.raises(InputError, match="--data: say what to evaluate on"):
        examine(run / "best.safetensors")
    with pytest.raises(InputError, match="nothing: does not exist"):
        examine(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no last weights"):
        examine(run, which="last")


# The command


def evaluated(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert cli.run(["eval", *map(str, arguments), "--workers", "1"]) == 0
    return capfd.readouterr().out


def test_eval_writes_the_confusion_and_its_figures_stay(run, digits, tmp_path, capfd):
    plain = evaluated(capfd, run, "--json")
    table = tmp_path / "tables" / "confusion.csv"
    assert evaluated(capfd, run, "--json", "--confusion", table) == plain
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == list(digits.classes)
    counts = np.array([[int(count) for count in row[1:]] for row in rows])
    assert (counts == examine(run, workers=1).confusion()).all()


def test_eval_at_several_resolutions_gives_what_each_gives_alone(run, capfd):
    both = json.loads(evaluated(capfd, run, "--json", "--resolution", "24,16"))
    alone = [json.loads(evaluated(capfd, run, "--json", "--resolution", x)) for x in (24, 16)]
    assert [both | {"also": []}, *both["also"]] == alone
    assert both["loss"] != both["also"][0]["loss"]
    lines = evaluated(capfd, run, "--resolution", "24, 16").splitlines()
    assert len(lines) == 4
    assert f"ECE {both['ece']:.2f}%" in lines[0]
    assert "resolution 16" in lines[3]


@pytest.mark.parametrize("stated", ["224,", "0", "large", "-16", "1.5"])
def test_a_resolution_that_is_none_is_refused(run, capfd, stated):
    assert cli.run(["eval", str(run), f"--resolution={stated}"]) == 2
    assert f"--resolution {stated}: write pixels" in capfd.readouterr().err


def test_logits_that_are_equal_count_as_top1_counts_them():
    """Logits of bf16 often are."""
    from pitstop.engine.evaluate import answers
    from pitstop.nn.losses import correct

    logits = torch.randint(0, 3, (500, 7), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(500) % 7
    assert (answers(logits)[0] == labels).sum() == correct(logits, labels)[0]
