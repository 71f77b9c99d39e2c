"""A file is seen as an evaluation sees it; what cannot be read is named and skipped."""

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
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.folder import folder_source
from pitstop.engine.evaluate import evaluate
from pitstop.engine.predict import image_files, load, predictions
from pitstop.runtime.ranks import Ranks

from .saved_run import save_run

FORMATS = {
    "plain.jpg": ("RGB", {}),
    "gray.jpg": ("L", {}),
    "print.jpg": ("CMYK", {}),
    "turned.jpg": ("RGB", {"exif": 6}),
    "clear.png": ("RGBA", {}),
    "palette.gif": ("P", {}),
    "deep.png": ("I;16", {}),
    "old.bmp": ("RGB", {}),
    "scan.tiff": ("RGB", {}),
    "web.webp": ("RGB", {}),
}


def draw(path: Path, mode: str, options: dict[str, int], rng: np.random.Generator) -> None:
    """Draws an image of one kind; no two are alike."""
    pixels = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").resize((45, 31), Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    saved = {}
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        saved["exif"] = exif
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **saved)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A class folder: two photos to train on, and one of each format to evaluate on."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        draw(tmp_path / "photos" / "train" / name / "1.png", "RGB", {}, rng)
        for file, (mode, options) in FORMATS.items():
            draw(tmp_path / "photos" / "val" / name / file, mode, options, rng)
    return tmp_path / "photos"


@pytest.fixture
def run(digits: PackedDataset, tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", digits)


def test_a_file_of_any_format_is_seen_as_an_evaluation_sees_it_packed(photos, tmp_path):
    pack(folder_source(photos), tmp_path / "packed", workers=1)
    data = PackedDataset.open(tmp_path / "packed")
    trained = load(save_run(tmp_path / "run", data))
    expected: dict[str, torch.Tensor] = {}

    def seen(logits: torch.Tensor, labels: torch.Tensor) -> None:
        for row in logits.softmax(1):
            expected[data.val.name(len(expected))] = row

    evaluate(
        trained.model,
        data.val,
        trained.recipe,
        trained.device,
        Ranks(),
        weights="raw",
        workers=1,
        seen=seen,
    )
    files = image_files([photos / "val"])
    found = list(predictions(trained, files, top=9, workers=2, skipped=pytest.fail))
    assert len(found) == len(expected) == 2 * len(FORMATS)
    for prediction in found:
        row = expected[str(prediction.file.relative_to(photos))]
        by_name = dict(prediction.likeliest)
        assert by_name == pytest.approx(
            dict(zip(data.classes, row.tolist(), strict=True)), rel=1e-4
        )
        assert prediction.likeliest[0][1] >= prediction.likeliest[1][1]
    assert len({prediction.likeliest[0][1] for prediction in found}) > len(FORMATS)


def test_folders_are_searched_at_any_depth_and_files_taken_as_they_are(photos, tmp_path):
    odd = photos / "letter.txt"
    odd.write_text("mine")
    (photos / ".hidden.png").write_bytes(b"")
    found = image_files([odd, photos / "train"])
    assert found == [odd, photos / "train/cat/1.png", photos / "train/dog/1.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no images"):
        image_files([tmp_path / "empty"])
    with pytest.raises(InputError, match="nothing: does not exist"):
        image_files([tmp_path / "nothing"])


# The command


@pytest.fixture
def mixed(digits: PackedDataset, tmp_path: Path) -> Path:
    """70 digits, more than go through the model at once, and two files that are none."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(70):
        (folder / f"{i:02}.png").write_bytes(digits.val.read(i % len(digits.val)))
    (folder / "05-cut.png").write_bytes(digits.val.read(0)[:60])
    (folder / "66-empty.jpg").write_bytes(b"")
    return folder


def predict(*arguments: object) -> int:
    return cli.run(["predict", *map(str, arguments), "--workers", "2"])


def test_damaged_images_are_named_and_the_others_come_in_their_order(run, mixed, capfd):
    assert predict(run, mixed, "--top", 3) == 0
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert [Path(line.split()[0]).name for line in lines] == [f"{i:02}.png" for i in range(70)]
    assert all(line.count("%") == 3 for line in lines)
    skipped = said.err.splitlines()
    assert len(skipped) == 2
    assert skipped[0].startswith(f"skipped {mixed / '05-cut.png'}: ")
    assert skipped[1] == f"skipped {mixed / '66-empty.jpg'}: empty file"


def test_when_all_are_damaged_it_fails(run, mixed, capfd):
    assert predict(run, mixed / "05-cut.png", mixed / "66-empty.jpg") == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "pitstop: none of the 2 images can be read: name others"


def test_csv_json_and_text_say_the_same(run, mixed, digits, capfd):
    image = mixed / "03.png"
    assert predict(run, image, "--json", "--top", 99) == 0
    (told,) = json.loads(capfd.readouterr().out)
    assert told["file"] == str(image)
    assert {each["class"] for each in told["predictions"]} == set(digits.classes)
    chances = [each["probability"] for each in told["predictions"]]
    assert sum(chances) == pytest.approx(1)
    assert chances == sorted(chances, reverse=True)
    assert predict(run, image, "--csv", "--top", 2) == 0
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert [row["class"] for row in rows] == [x["class"] for x in told["predictions"][:2]]
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert float(rows[0]["probability"]) == pytest.approx(chances[0], rel=1e-5)
    assert predict(run, image) == 0
    assert f"{told['predictions'][0]['class']} {100 * chances[0]:.2f}%" in capfd.readouterr().out


def test_a_run_is_taken_from_its_url_too(run, mixed, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))
    said = []
    for place in (run, f"file://{run}", f"file://{run}", run / "best.safetensors"):
        assert predict(place, mixed / "03.png", "--json") == 0
        said.append(capfd.readouterr().out)
    assert len(set(said)) == 1


def test_what_cannot_be_asked_is_refused(run, mixed, capfd):
    assert predict(run, mixed, "--csv", "--json") == 2
    assert "take one of them" in capfd.readouterr().err
    assert predict("nothing", mixed) == 2
    assert "nothing: does not exist" in capfd.readouterr().err
