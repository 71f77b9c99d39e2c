"""torchvision's downloads are played by `fetch`, which lays out a miniature of the archive.

What torchvision does with it (checksums, unpacking, annotations) is its own.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as datasets
from torchvision.datasets import utils

from pitstop import cli
from pitstop.core.errors import InputError
from pitstop.data.packed import PackedDataset
from pitstop.data.sources import download
from pitstop.data.sources.download import DATASETS, downloaded

from .conftest import read_all
from .test_cifar import TEN, hundred_python, ten_python

Serve = Callable[[Mapping[str, bytes]], list[str]]


@pytest.fixture
def serve(monkeypatch) -> Serve:
    """Serves archives by file name; returns the list of what was fetched. No others are there."""

    def serve(files: Mapping[str, bytes]) -> list[str]:
        fetched: list[str] = []

        def fetch(url: str, filename: str | Path, *_: object) -> None:
            name = url.rpartition("/")[2]
            if name not in files:
                raise OSError(f"no network to {name}")
            fetched.append(name)
            Path(filename).write_bytes(files[name])

        monkeypatch.setattr(utils, "_urlretrieve", fetch)
        monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
        monkeypatch.setattr(utils, "_is_remote_location_available", lambda: False)
        return fetched

    return serve


def tgz(files: Mapping[str, bytes]) -> bytes:
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return md5(data, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(
    ("name", "kind", "files", "classes", "counts"),
    [
        ("cifar10", datasets.CIFAR10, ten_python, 10, (50, 10)),
        ("cifar100", datasets.CIFAR100, hundred_python, 100, (100, 100)),
    ],
)
def test_cifar(serve, tmp_path, monkeypatch, name, kind, files, classes, counts):
    archive = tgz(files())
    fetched = serve({kind.filename: archive})
    with pytest.raises(InputError, match=f"{name} was not downloaded .*corrupted"):
        downloaded(name, tmp_path)  # the miniature has another checksum
    monkeypatch.setattr(kind, "tgz_md5", digest(archive))
    fetched.clear()
    for _ in range(2):
        source = downloaded(name, tmp_path)
        assert len(source.classes) == classes
        assert (len(source.train), len(source.val)) == counts
    assert fetched == []  # what is whole is not fetched again
    assert len(read_all(source, tmp_path / "spool")) == sum(counts)


def imagenette(images, monkeypatch) -> dict[str, bytes]:
    kinds = sorted(datasets.Imagenette._WNID_TO_CLASS)
    files = {
        f"imagenette2-160/{split}/{kind}/{kind}_{n}.JPEG": images(n)
        for split in ("train", "val")
        for n, kind in enumerate(kinds)
    }
    archive = tgz(files)
    known = {"160px": ("https://x/imagenette2-160.tgz", digest(archive))}
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", known)
    return {"imagenette2-160.tgz": archive}


def food101(images, monkeypatch) -> dict[str, bytes]:
    names = {kind: [f"{kind}/{n}" for n in range(3)] for kind in ("waffles", "apple_pie")}
    images_by_name = {
        f"food-101/images/{name}.jpg": images(int(name[-1]))
        for some in names.values()
        for name in some
    }
    splits = {"train": slice(0, 2), "test": slice(2, 3)}
    meta = {
        f"food-101/meta/{split}.json": json.dumps({k: some[part] for k, some in names.items()})
        for split, part in splits.items()
    }
    archive = tgz({**images_by_name, **{name: text.encode() for name, text in meta.items()}})
    monkeypatch.setattr(datasets.Food101, "_MD5", digest(archive))
    return {"food-101.tar.gz": archive}


def pets(images, monkeypatch) -> dict[str, bytes]:
    breeds = {"Abyssinian": 1, "yorkshire_terrier": 2}
    photos = {f"images/{kind}_{n}.jpg": images(n) for kind in breeds for n in range(3)}
    lines = {
        f"annotations/{split}.txt": "".join(
            f"{kind}_{n} {number} 1 1\n" for kind, number in breeds.items() for n in numbers
        ).encode()
        for split, numbers in (("trainval", (0, 1)), ("test", (2,)))
    }
    archives = {"images.tar.gz": tgz(photos), "annotations.tar.gz": tgz(lines)}
    known = tuple((f"https://x/{name}", digest(data)) for name, data in archives.items())
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", known)
    return archives


def dtd(images, monkeypatch) -> dict[str, bytes]:
    kinds = ("banded", "zigzagged")
    files = {f"dtd/images/{kind}/{kind}_{n}.jpg": images(n) for kind in kinds for n in range(3)}
    for split, numbers in (("train1", (0, 1)), ("val1", (2,))):
        lines = [f"{kind}/{kind}_{n}.jpg\n" for kind in kinds for n in numbers]
        files[f"dtd/labels/{split}.txt"] = "".join(lines).encode()
    archive = tgz(files)
    monkeypatch.setattr(datasets.DTD, "_MD5", digest(archive))
    return {"dtd-r1.0.1.tar.gz": archive}


def eurosat(images, monkeypatch) -> dict[str, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for kind in ("Forest", "River"):
            for n in range(4):
                archive.writestr(f"2750/{kind}/{kind}_{n}.jpg", images(n))
    right, check = digest(out.getvalue()), utils.check_integrity
    monkeypatch.setattr(utils, "check_integrity", lambda path, md5=None: check(path, md5 and right))
    return {"EuroSAT.zip": out.getvalue()}


def flowers102(images, monkeypatch) -> dict[str, bytes]:
    savemat = pytest.importorskip("scipy.io", reason="flowers102 needs scipy").savemat
    labels, splits = io.BytesIO(), io.BytesIO()
    savemat(labels, {"labels": np.arange(1, 307) % 102 + 1})
    ids = {name: np.arange(102) + 1 + 102 * n for n, name in enumerate(("trnid", "valid", "tstid"))}
    savemat(splits, ids)
    photos = tgz({f"jpg/image_{n:05}.jpg": images(n % 7) for n in range(1, 307)})
    served = {
        "image": ("102flowers.tgz", photos),
        "label": ("imagelabels.mat", labels.getvalue()),
        "setid": ("setid.mat", splits.getvalue()),
    }
    known = {key: (name, digest(data)) for key, (name, data) in served.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", known)
    return dict(served.values())


@pytest.mark.parametrize(
    ("name", "made", "classes", "counts", "example"),
    [
        (
            "imagenette-160",
            imagenette,
            10,
            (10, 10),
            ("val/n01440764/n01440764_0.JPEG", "tench", 0),
        ),
        ("food101", food101, 2, (4, 2), ("images/waffles/2.jpg", "waffles", 2)),
        ("pets", pets, 2, (4, 2), ("images/Abyssinian_1.jpg", "Abyssinian", 1)),
        ("dtd", dtd, 2, (4, 2), ("images/banded/banded_2.jpg", "banded", 2)),
        ("eurosat", eurosat, 2, (6, 2), ("2750/River/River_3.jpg", "River", 3)),
        ("flowers102", flowers102, 102, (102, 102), ("jpg/image_00003.jpg", "sweet pea", 3)),
    ],
)
def test_what_torchvision_unpacks(
    serve, tmp_path, monkeypatch, images, name, made, classes, counts, example
):
    archives = made(images, monkeypatch)
    fetched = serve(archives)
    for _ in range(2):
        source = downloaded(name, tmp_path / "root")
        assert len(source.classes) == classes
        assert (len(source.train), len(source.val)) == counts
    assert sorted(fetched) == sorted(archives)
    read = read_all(source, tmp_path / "spool")
    assert len(read) == sum(counts)
    ending, kind, number = example
    (item,) = (i for i in (*source.train, *source.val) if i.name.endswith(ending))
    assert (source.classes[item.label], read[item.name]) == (kind, images(number))


def test_an_interrupted_download_is_not_taken_for_whole(serve, tmp_path, monkeypatch, images):
    archives = imagenette(images, monkeypatch)
    fetched = serve(archives)
    with monkeypatch.context() as patched:

        def killed(path: str, to: str, compression: object) -> None:
            (Path(to) / "imagenette2-160/train/n01440764").mkdir(parents=True)
            (Path(to) / "imagenette2-160/train/n01440764/half.JPEG").write_bytes(b"half")
            raise KeyboardInterrupt

        patched.setitem(utils._ARCHIVE_EXTRACTORS, ".tar", killed)
        with pytest.raises(KeyboardInterrupt):
            downloaded("imagenette-160", tmp_path)
    source = downloaded("imagenette-160", tmp_path)
    assert (len(source.train), len(source.val)) == (10, 10)
    assert fetched == ["imagenette2-160.tgz"]  # the archive was whole: it is not fetched again
    assert set(read_all(source, tmp_path).values()) == {images(n) for n in range(10)}


def test_the_command_packs(serve, tmp_path, monkeypatch, capfd):
    archive = tgz(ten_python())
    serve({datasets.CIFAR10.filename: archive})
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digest(archive))
    arguments = ["--root", str(tmp_path / "root"), "--workers", "1", "--json"]
    assert cli.run(["data", "get", "cifar10", str(tmp_path / "out"), *arguments]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["classes"], answer["train"], answer["val"]) == (10, 50, 10)
    assert PackedDataset.open(tmp_path / "out").classes == tuple(TEN)


def test_refuses_in_one_line(serve, tmp_path, monkeypatch):
    serve({})
    with pytest.raises(
        InputError, match="there is no dataset 'cifar' to get; did you mean 'cifar1"
    ):
        downloaded("cifar", tmp_path)
    with pytest.raises(InputError, match="known are cifar10, cifar100, dtd"):
        downloaded("x", tmp_path)
    monkeypatch.setattr(download, "find_spec", lambda name: "scipy, whether it is here or not")
    for name in DATASETS:
        with pytest.raises(InputError, match=rf"{name} was not downloaded \(.*no network") as error:
            downloaded(name, tmp_path)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(download, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install scipy"):
        downloaded("flowers102", tmp_path)
