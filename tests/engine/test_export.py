"""What is exported gives the original's logits wherever it is read, or is not there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pitstop import cli
from pitstop.core.errors import InputError
from pitstop.data.packed import PackedDataset
from pitstop.engine import export as module
from pitstop.engine.export import TOLERANCE, Original, export
from pitstop.engine.predict import load

from .saved_run import EVAL, MODEL, save_run


@pytest.fixture
def run(digits: PackedDataset, tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", digits)


def test_a_timm_folder_is_made_of_timm_and_says_how_images_come(run, digits, tmp_path):
    import timm
    from timm.data.config import resolve_model_data_config

    done = export(run, "timm", tmp_path / "models" / "mine")
    assert done.path == tmp_path / "models" / "mine"
    assert done.difference <= TOLERANCE
    assert [p.name for p in sorted((tmp_path / "models").iterdir())] == ["mine"]
    model = timm.create_model(f"local-dir:{done.path}", pretrained=True).eval()
    original = load(run)
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), original.model(images))
    config = resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 20, 20)
    assert config["crop_pct"] == EVAL["crop_ratio"]
    assert (list(config["mean"]), list(config["std"])) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert model.pretrained_cfg["label_names"] == list(digits.classes)
    card = (done.path / "README.md").read_text()
    assert "top-1 12.50%" in card
    assert "resolution 20" in card


def test_what_differs_is_refused_and_removed(run, tmp_path, monkeypatch):
    before = tmp_path / "out" / "model.safetensors"
    before.parent.mkdir()
    before.write_text("an export from before")

    def write_other_weights(original: Original, path: Path) -> None:
        module._write_safetensors(original, path)
        tensors = original.tensors()
        tensors["conv1.weight"] = tensors["conv1.weight"] * 1.01
        save_file(tensors, path, {"pitstop": json.dumps(original.description())})

    monkeypatch.setitem(module._WRITERS, "safetensors", write_other_weights)
    with pytest.raises(InputError, match="the logits of what was written differ") as refused:
        export(run, "safetensors", before.parent)
    assert "removed it" in str(refused.value)
    assert [*before.parent.iterdir()] == [before]
    assert before.read_text() == "an export from before"


def test_what_does_not_load_is_refused_and_removed(run, tmp_path, monkeypatch):
    monkeypatch.setitem(
        module._WRITERS, "torch", lambda original, path: path.write_bytes(b"no such file")
    )
    monkeypatch.setitem(module._READERS, "torch", "raise ValueError(open(path).read())")
    with pytest.raises(InputError, match=r"does not load \(ValueError: no such file\): removed"):
        export(run, "torch", tmp_path / "out")
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize(
    ("found", "distance"),
    [
        ([[1.0, -2.0]], 0.0),
        ([[1.0, -2.1]], 0.05),
        ([[1.0, float("nan")]], float("nan")),
        ([[1.0]], float("inf")),
    ],
)
def test_the_distance_is_of_the_largest_logit(found, distance):
    measured = module._distance(np.array([[1.0, -2.0]]), np.array(found))
    assert measured == pytest.approx(distance, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"blurpool": True}], ids=["plain", "blurpool"])
@pytest.mark.parametrize("format", ["safetensors", "torch", "onnx"])
def test_each_format_is_read_again(digits, tmp_path, format, model):
    if format == "onnx":
        for name in module.NEEDED_FOR_ONNX:
            pytest.importorskip(name, reason="the export extra is not installed")
    run = save_run(tmp_path / "run", digits, model)
    done = export(run, format, tmp_path / "out")
    assert done.path == tmp_path / "out" / module.FILES[format]
    assert done.difference <= TOLERANCE
    assert [*(tmp_path / "out").iterdir()] == [done.path]


def test_files_hold_what_it_takes_to_use_them(run, digits, tmp_path, monkeypatch):
    """A safetensors file is again what pitstop evaluates, predicts with and starts from."""
    monkeypatch.setattr(module, "_difference", lambda *_: 0.0)
    original = load_file(run / "best.safetensors")
    again = load(export(run, "safetensors", tmp_path / "one.safetensors").path)
    assert again.classes == digits.classes
    assert again.recipe.eval == load(run).recipe.eval
    assert all(torch.equal(original[k], v) for k, v in again.model.state_dict().items())
    saved = torch.load(export(run, "torch", tmp_path / "one.pt").path, weights_only=True)
    assert saved["classes"] == list(digits.classes)
    assert saved["model"]["name"] == MODEL["name"]
    assert saved["eval"]["resolution"] == 20
    assert all(torch.equal(original[k], v) for k, v in saved["state_dict"].items())


def test_a_place_that_does_not_fit_is_refused(run, tmp_path):
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match=r"one\.onnx: a file of --format torch ends in \.pt"):
        export(run, "torch", tmp_path / "one.onnx")
    with pytest.raises(InputError, match="letters: is not empty: name a folder"):
        export(run, "timm", letters)
    with pytest.raises(InputError, match=r"letter\.txt: is a file: name a folder"):
        export(run, "timm", letters / "letter.txt")
    assert [*letters.iterdir()] == [letters / "letter.txt"]


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        ({"blurpool": True}, "blurpool"),
        ({"name": "cifarnet", "kwargs": {"widths": [8, 8, 8]}}, "the model cifarnet"),
    ],
)
def test_what_timm_does_not_have_is_refused(digits, tmp_path, model, missing):
    run = save_run(tmp_path / "run", digits, model)
    with pytest.raises(InputError, match=f"timm has not {missing}: take "):
        export(run, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_extra_onnx_says_what_to_install(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnx" else name)
    arguments = ["export", str(run), "--format", "onnx", "-o", str(tmp_path / "out")]
    assert cli.run(arguments) == 2
    assert "onnx not installed: pip install 'pitstop[export]'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_format_that_nobody_knows_is_refused(run, capfd):
    assert cli.run(["export", str(run), "--format", "pickle"]) == 2
    assert "--format pickle: write one of safetensors, onnx, " in capfd.readouterr().err
