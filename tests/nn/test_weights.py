"""Weights to start from: where they come from, which head stays, what is refused."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.io.objects import open_store
from pitstop.nn.models import build
from pitstop.nn.weights import Weights, load, parse, read

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}
FIVE = ("ant", "bee", "cat", "dog", "eel")
HEAD = {"fc.weight", "fc.bias"}


def resnet(classes: int = 5, seed: int = 0, blurpool: bool = False) -> nn.Module:
    return build(Model(name="resnet18", kwargs=TINY, blurpool=blurpool), classes, seed)


def of_pitstop(model: nn.Module, classes: tuple[str, ...]) -> bytes:
    header = {"pitstop": json.dumps({"classes": classes})}
    return safetensors_bytes(model.state_dict(), header)


def weights(model: nn.Module, classes: tuple[str, ...] | None = None) -> Weights:
    return Weights("them", model.state_dict(), classes)


def taken_over(model: nn.Module, source: nn.Module) -> set[str]:
    """The tensors that are the source's."""
    theirs, own = source.state_dict(), model.state_dict()
    assert theirs.keys() == own.keys()
    same = {key for key in own if own[key].shape == theirs[key].shape}
    return {key for key in same if torch.equal(own[key], theirs[key])}


def named(name: object, **spec) -> Model:
    return Model(name="resnet18", kwargs=TINY, weights=str(name), **spec)


@pytest.fixture
def source() -> nn.Module:
    """A model of which no tensor is as in a new one."""
    model = resnet(seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 100)
    return model


# Where they come from


@pytest.mark.parametrize("best", [True, False])
def test_of_a_run_the_best_are_taken_or_else_the_last(tmp_path: Path, source, best):
    (tmp_path / "last.safetensors").write_bytes(of_pitstop(resnet(seed=2), FIVE))
    taken = "best" if best else "last"
    (tmp_path / f"{taken}.safetensors").write_bytes(of_pitstop(source, FIVE))
    (tmp_path / "best-raw.safetensors").write_bytes(b"of no interest")
    found = parse(read(named(tmp_path)), "it")
    assert found.classes == FIVE
    assert all(torch.equal(found.tensors[k], v) for k, v in source.state_dict().items())


def test_a_plain_file_of_anybodys_is_as_good(tmp_path: Path, source):
    save_file(source.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = parse(read(named(tmp_path / "model.safetensors")), "it")
    assert found.classes is None
    assert load(resnet(), found, FIVE) == (
        "weights of it: head kept: 5 classes, whose names they do not tell"
    )


def test_a_file_in_a_bucket_is_read(bucket: str, source):
    open_store(bucket).put("runs/a/best.safetensors", of_pitstop(source, FIVE))
    found = parse(read(named(f"{bucket}/runs/a/best.safetensors")), "it")
    assert found.classes == FIVE
    assert torch.equal(found.tensors["conv1.weight"], source.conv1.weight)


def test_timms_pretrained_weights_are_its_own(tmp_path: Path):
    """From a file in place of the hub; through all that timm does to a checkpoint."""
    source = timm.create_model("resnet18", **TINY)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors")}}
    spec = Model(name="resnet18", kwargs={**TINY, **overlay}, weights="timm")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = parse(read(spec), "timm")
    assert torch.equal(torch.get_rng_state(), before)
    model = build(spec, 5, 0)
    note = load(model, found, FIVE)
    assert note == "weights of timm: head reset: 1,000 classes there, 5 here"
    assert taken_over(model, source) == set(model.state_dict()) - HEAD


# What becomes of the head


def test_all_but_the_head_is_taken_over_when_the_classes_are_more_or_fewer(source):
    model, new = resnet(classes=3), resnet(classes=3)
    note = load(model, weights(source, FIVE), ("a", "b", "c"))
    assert note == "weights of them: head reset: 5 classes there, 3 here"
    assert taken_over(model, source) == set(model.state_dict()) - HEAD
    assert taken_over(model, new) >= HEAD


@pytest.mark.parametrize("classes", [FIVE[::-1], ("a", "b", "c", "d", "e")])
def test_a_head_for_as_many_other_classes_is_not_kept(source, classes):
    model = resnet()
    note = load(model, weights(source, FIVE), classes)
    assert note == "weights of them: head reset: 5 classes there too, of other names or order"
    assert taken_over(model, source) == set(model.state_dict()) - HEAD


def test_a_head_for_the_same_classes_is_kept(source):
    model = resnet()
    note = load(model, weights(source, FIVE), FIVE)
    assert note == "weights of them: head kept: the same 5 classes"
    assert taken_over(model, source) == set(model.state_dict())


def test_weights_without_a_head_get_a_new_one(source):
    body = {key: value for key, value in source.state_dict().items() if key not in HEAD}
    model, new = resnet(), resnet()
    note = load(model, Weights("them", body, None), FIVE)
    assert note == "weights of them: head reset: they have none; 5 here"
    assert taken_over(model, source) == set(model.state_dict()) - HEAD
    assert taken_over(model, new) >= HEAD


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ("head.", "head_dist.")),
        ("convnext_atto", ("head.fc.",)),
        ("cifarnet", ("head.",)),
    ],
)
def test_the_head_is_what_the_model_says_it_is(name, heads):
    source, model = build(Model(name=name), 7, 1), build(Model(name=name), 3, 0)
    note = load(model, weights(source), ("a", "b", "c"))
    assert note == "weights of them: head reset: 7 classes there, 3 here"
    expected = {key for key in model.state_dict() if not key.startswith(heads)}
    assert expected <= taken_over(model, source)


@pytest.mark.parametrize("blurpool", [True, False])
def test_blurpool_takes_plain_weights_and_gives_them(source, blurpool):
    other = resnet(blurpool=not blurpool)
    other.load_state_dict(source.state_dict())
    model = resnet(blurpool=blurpool)
    load(model, weights(other, FIVE), FIVE)
    assert taken_over(model, source) == set(model.state_dict())


def test_weights_of_another_precision_are_converted(source):
    half = {key: value.half() for key, value in source.state_dict().items()}
    model = resnet()
    load(model, Weights("them", half, FIVE), FIVE)
    assert model.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(model.conv1.weight, source.conv1.weight, rtol=1e-3, atol=1e-3)


def test_old_weights_without_counts_of_batches_are_taken(source):
    old = {k: v for k, v in source.state_dict().items() if not k.endswith("batches_tracked")}
    model = resnet()
    load(model, Weights("them", old, FIVE), FIVE)
    assert set(old) <= taken_over(model, source)


# Refusals


def test_the_first_tensor_that_does_not_fit_is_named():
    other = build(Model(name="resnet18", kwargs={**TINY, "channels": [8, 16, 24, 32]}), 5, 0)
    model = resnet()
    before = resnet()
    with pytest.raises(InputError) as refusal:
        load(model, weights(other), FIVE)
    assert str(refusal.value) == (
        "model.weights: them: not of this model (ResNet): layer3.0.conv1.weight is "
        "[24, 16, 3, 3] there and [16, 16, 3, 3] here: take model.name and model.kwargs of the "
        "weights"
    )
    assert taken_over(model, before) == set(model.state_dict())


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda t: t.pop("layer2.0.bn1.bias"), r"layer2\.0\.bn1\.bias is missing there and \[16\]"),
        (lambda t: t.update(extra=torch.ones(2)), r"extra is \[2\] there and missing here"),
    ],
    ids=["missing", "unexpected"],
)
def test_too_few_and_too_many_tensors_are_refused(source, change, first):
    tensors = dict(source.state_dict())
    change(tensors)
    with pytest.raises(InputError, match=first):
        load(resnet(), Weights("them", tensors, None), FIVE)


@pytest.mark.parametrize("name", ["model.pth", "a/model.pt", "s3://bucket/pytorch_model.bin"])
def test_a_pickle_is_refused_with_the_way_out(name):
    with pytest.raises(InputError, match=r"is a pickle, .* safetensors\.torch\.save_file\("):
        read(named(name))


def test_what_is_not_there_is_refused(tmp_path: Path, bucket: str):
    for name, why in [
        ("imagenet", r"imagenet: does not exist: name a run, a \.safetensors file"),
        (tmp_path, "holds no weights of a run"),
        (f"{bucket}/runs/a", r"name a \.safetensors file in the bucket"),
        (f"{bucket}/none.safetensors", "is not there"),
    ]:
        with pytest.raises(InputError, match=rf"^model\.weights: .*{why}"):
            read(named(name))


@pytest.mark.parametrize("content", [b"", b"\x80\x04]", b"\xff" * 64, of_pitstop])
def test_a_damaged_file_is_refused(content, source):
    data = content if isinstance(content, bytes) else content(source, FIVE)[:-9]
    with pytest.raises(InputError, match=r"^model\.weights: it: is not a whole \.safetensors file"):
        parse(data, "it")


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^model\.weights: timm's for resnet18 .*network") as no:
        read(Model(name="resnet18", weights="timm"))
    assert "\n" not in str(no.value)


def test_a_model_that_timm_has_no_weights_for_is_one_line():
    with pytest.raises(InputError, match=r"^model\.weights: timm's for resnet18\.best .*name"):
        read(Model(name="resnet18.best", weights="timm"))
