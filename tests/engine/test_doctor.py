"""The doctor: each finding by what it measured, and no check that takes the others with it."""

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pitstop import cli
from pitstop.core.errors import InputError
from pitstop.core.recipe import LrFinder, Recipe, bundled_recipes, load_recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.packed import PackedDataset
from pitstop.engine import calibrate as measuring
from pitstop.engine import doctor
from pitstop.engine.doctor import CHECKS, checked, data, learning, machine, speed
from pitstop.engine.doctor.data import class_sets
from pitstop.engine.doctor.learning import compared, equal, images_a_class, learned, trial_recipe
from pitstop.engine.doctor.machine import link_kinds, rounding
from pitstop.engine.doctor.patient import Check, Patient, SkippedError
from pitstop.engine.doctor.speed import busy, sampled
from pitstop.engine.lr_finder import NoSuggestion, Search, Suggestion
from pitstop.engine.verify import Verdict
from pitstop.io.host import Mount
from pitstop.plan.cost import IMAGENET
from pitstop.report.diagnosis import Finding
from pitstop.runtime.devices import Device

from .conftest import TINY

SECRET = "a-secret-that-nobody-prints"


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    monkeypatch.setattr(measuring, "DISK_BYTES", 2**20)
    monkeypatch.setattr(speed, "LOADED", 0.02)


@pytest.fixture
def patient(
    tiny: Callable[..., Recipe], digits: PackedDataset, tmp_path: Path
) -> Callable[..., Patient]:
    """Returns a patient with a device and data, in which the given is otherwise."""

    def patient(**changes: object) -> Patient:
        known: dict[str, object] = {
            "recipe": tiny(data=str(digits.path)),
            "thorough": True,
            "scratch": tmp_path,
            "say": lambda line: None,
            "device": Device.choose("fp32", compile=False),
            "data": digits,
        }
        return Patient(**{**known, **changes})  # pyright: ignore[reportArgumentType]

    return patient


def found(check: str, patient: Patient) -> Finding:
    return checked(check, CHECKS[check], patient)


# Failures


def raising(error: BaseException) -> Callable[[Patient], Finding]:
    def check(patient: Patient) -> Finding:
        raise error

    return check


@pytest.mark.parametrize(
    ("error", "verdict", "figure"),
    [
        (InputError("photos: is empty: name another"), "fail", "photos: is empty: name another"),
        (RuntimeError("CUDA error: 700\nlong story"), "fail", "RuntimeError: CUDA error: 700"),
        (SkippedError("there is no GPU"), "skipped", "there is no GPU"),
    ],
)
def test_what_goes_wrong_in_a_check_is_its_finding(patient, error, verdict, figure) -> None:
    assert checked("x", raising(error), patient()) == Finding("x", verdict, figure)


def test_the_user_can_interrupt_a_check(patient) -> None:
    with pytest.raises(KeyboardInterrupt):
        checked("x", raising(KeyboardInterrupt()), patient())


def test_checks_after_a_failed_one_say_what_they_lack(patient) -> None:
    without = patient(data=None, device=None)
    assert found("precision", without).figure == "there is no device to do it on"
    for check in ("classes", "mount", "integrity", "disk"):
        assert found(check, without) == Finding(check, "skipped", "the data could not be opened")
    assert found("loader", patient()).figure == "how fast it trains is not known"
    assert found("resume", patient()).verdict == "skipped"


@pytest.mark.parametrize("check", ["integrity", "lr", "learning", "resume"])
def test_quick_leaves_out_what_takes_minutes(patient, check) -> None:
    quick = patient(thorough=False, speeds={16: 1.0})
    assert found(check, quick).figure == "takes minutes: leave --quick out"


# Learning


def test_the_report_that_called_chance_ready_for_production_fails() -> None:
    judged = learned(1.2, 4.5, [50] * 100, images=1000)
    assert judged.verdict == "fail"
    assert "top-1 1.2% (chance 1.0%), loss 4.500 (a guess 4.605)" in judged.figure


@pytest.mark.parametrize(
    ("top1", "loss", "verdict"),
    [
        (45.0, 1.7, "ok"),
        (45.0, math.log(10) + 0.01, "fail"),
        (10.0, 2.2, "fail"),
        (12.0, 2.2, "fail"),  # 500 images: the standard deviation of chance is 1.3
        (13.0, 2.2, "ok"),
        (math.nan, 2.2, "fail"),
        (45.0, math.nan, "fail"),
    ],
)
def test_accuracy_at_chance_or_a_loss_above_a_guess_fails(top1, loss, verdict) -> None:
    assert learned(top1, loss, [50] * 10, images=1000).verdict == verdict


def test_naming_the_largest_class_is_chance() -> None:
    assert learned(80.0, 0.3, [400, 100], images=1000).verdict == "fail"
    assert learned(90.0, 0.3, [400, 100], images=1000).verdict == "ok"


@given(st.lists(st.integers(1, 500), min_size=2, max_size=20), st.floats(0, 100))
def test_what_is_no_better_than_the_largest_class_never_passes(counts, top1) -> None:
    chance = 100 * max(counts) / sum(counts)
    judged = learned(min(top1, chance), 0.0, counts, images=1000)
    assert judged.verdict == "fail"


@pytest.mark.parametrize("name", bundled_recipes())
def test_of_every_recipe_ten_small_epochs_can_be_trained(name) -> None:
    whole = load_recipe(name)
    trial = trial_recipe(whole)
    (segment,) = Timeline(trial, num_samples=1000).segments
    assert (segment.batch_size, segment.last) == (32, 313)
    assert segment.resolution == Timeline.planned(whole, IMAGENET).segments[0].resolution
    assert (trial.model, trial.optimizer, trial.loss) == (whole.model, whole.optimizer, whole.loss)
    assert segment.phase.mix is None
    assert trial.ema is None


def test_the_lr_of_the_trial_goes_with_the_root_of_the_batch() -> None:
    stated = {"epochs": 90, "batch_size": 512, "lr": 0.4, "model": "resnet18"}
    assert trial_recipe(parse_recipe(stated, "test")).phases[0].peak_lr() == pytest.approx(0.1)
    auto = {**stated, "lr": "auto", "lr_finder": {"fallback": 0.8}}
    assert trial_recipe(parse_recipe(auto, "test")).phases[0].peak_lr() == pytest.approx(0.2)


def test_a_slow_machine_gets_fewer_images_and_a_very_slow_one_says_how_long_it_takes() -> None:
    assert images_a_class({32: 1e6}, 32, 1000) == 100
    assert images_a_class({32: 50.0}, 32, 1000) == 60  # 120 s x 50 / (10 epochs x 10 classes)
    assert images_a_class({32: 50.0}, 32, 2) == 100
    with pytest.raises(SkippedError, match="10 epochs of 200 images take 33 min"):
        images_a_class({32: 1.0}, 32, 1000)


def test_a_killed_run_must_end_as_the_other() -> None:
    same = Verdict((), kills=2, seconds=9.0, seconds_killed=12.0, lost_steps=7)
    assert equal(same).verdict == "ok"
    assert "2 kills, 7 steps" in equal(same).figure
    assert equal(Verdict((), 0, 9.0, 9.0, 0)).verdict == "warn"
    other = equal(Verdict(("model.conv1.weight differs", "top1"), 2, 9.0, 12.0, 7))
    assert (other.verdict, "model.conv1.weight differs" in other.figure) == ("fail", True)


def test_a_search_that_would_take_too_long_is_not_begun(patient, monkeypatch) -> None:
    monkeypatch.setattr(learning, "search_lr", raising(AssertionError()))
    judged = found("lr", patient(speeds={16: 1.0}))
    assert judged.verdict == "skipped"
    assert "100 steps of 15 images take 25 min here: `pitstop lr-find`" in judged.figure


@pytest.mark.parametrize(
    ("own", "verdict"), [(0.1, "ok"), (0.9, "ok"), (1.1, "warn"), (0.009, "warn"), (None, "ok")]
)
def test_the_suggested_lr_is_compared_with_the_recipes(own, verdict) -> None:
    search = Search(LrFinder(fallback=0.3), (), (), Suggestion(0.1, 5, "where it falls"))
    judged = compared(search, own)
    assert judged.verdict == verdict
    assert (judged.advice == "try --lr 0.1") == (verdict == "warn")


def test_a_curve_that_suggests_nothing_is_told() -> None:
    judged = compared(Search(LrFinder(fallback=0.3), (), (), NoSuggestion("it is flat")), 0.3)
    assert (judged.verdict, "it is flat" in judged.figure) == ("warn", True)


# The machine


def test_precision_is_measured(patient, monkeypatch) -> None:
    fp32 = Device.choose("fp32", compile=False)
    bf16 = Device(torch.device("cpu"), torch.bfloat16, compile=False)
    assert rounding(fp32) < 1e-5 < rounding(bf16) < machine.ROUNDING
    monkeypatch.setattr(machine, "auto_precision", lambda device: ("fp32", "it is alone"))
    assert found("precision", patient()).verdict == "ok"
    slow = found("precision", patient(device=bf16))
    assert (slow.verdict, slow.advice) == ("warn", "precision: auto takes fp32: it is alone")
    monkeypatch.setattr(machine, "rounding", lambda device: math.nan)
    assert found("precision", patient()).verdict == "fail"


def test_a_device_that_is_not_there_fails(patient, tiny, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    wants = patient(recipe=tiny(device="cuda"), device=None)
    judged = found("devices", wants)
    assert (judged.verdict, wants.device) == ("fail", None)
    assert "device cuda" in judged.figure


def test_gpus_that_the_driver_lists_and_torch_does_not_find_fail(
    patient, tiny, monkeypatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_nvidia_smi", lambda *arguments: "GPU 0: A100\nGPU 1: A100")
    judged = found("devices", patient(recipe=tiny(device="auto")))
    assert judged.verdict == "fail"
    assert "the driver lists 2 GPUs" in judged.figure
    assert found("devices", patient(recipe=tiny(device="cpu"))).verdict == "ok"


TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV12\tSYS\tPXB\t0-31\t0
GPU1\tNV12\t X \tSYS\tNODE\t0-31\t0
GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1
NIC0\tPXB\tNODE\tSYS\t X \t\t

Legend:
"""


def test_links_between_gpus_are_read_from_the_topology_and_no_others() -> None:
    assert link_kinds(TOPOLOGY) == ["NV12", "SYS"]
    assert link_kinds("") == []


@pytest.mark.slow
def test_an_all_reduce_is_measured_by_as_many_processes(tmp_path) -> None:
    assert machine.all_reduce_gb_per_second(2, "gloo", tmp_path, size=2**16, times=2) > 0


def test_little_memory_is_told(patient, monkeypatch) -> None:
    for free, verdict in ((2**34, "ok"), (2**30, "warn"), (None, "ok")):
        monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
        assert found("memory", patient()).verdict == verdict


def test_headroom_is_the_memory_over_what_a_step_takes(patient, monkeypatch) -> None:
    monkeypatch.setattr(speed, "available_memory", lambda: 2**40)
    taken = found("headroom", patient()).numbers["step_bytes"]
    for times, verdict, said in (
        (2.0, "ok", "room for 1.8 times"),
        (1.0, "warn", "a step of 10 images of 24 px"),
        (0.01, "fail", "not even one image fits"),
    ):
        monkeypatch.setattr(speed, "available_memory", lambda times=times: int(times * taken))
        judged = found("headroom", patient())
        assert (judged.verdict, said in judged.figure) == (verdict, True), judged
        assert 0 < judged.numbers.get("micro_batch", 5) < 10


def test_a_disk_without_room_for_checkpoints_fails(patient, monkeypatch) -> None:
    for free, verdict in ((10**12, "ok"), (1000, "fail")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(data.shutil, "disk_usage", lambda place, usage=usage: usage)
        assert found("space", patient()).verdict == verdict


def test_a_gpu_that_waits_is_told_and_setting_up_does_not_count() -> None:
    assert busy([0.0, 0.0, 0.0, 95.0, 97.0, 99.0]).verdict == "ok"
    assert busy([0.0, 40.0, 50.0, 60.0]).verdict == "warn"
    with pytest.raises(SkippedError, match="NVML"):
        busy([])


def test_the_device_is_asked_while_it_works() -> None:
    asked = threading.Event()

    def ask() -> float | None:
        if asked.is_set():
            return None
        asked.set()
        return 42.0

    assert sampled(ask, lambda: asked.wait(60)) == [42.0]


# The data


def test_classes_of_one_split_only_are_named() -> None:
    assert class_sets(["cat", "dog"], [5, 6], [1, 2]).verdict == "ok"
    unseen = class_sets(["cat", "dog"], [5, 0], [1, 2])
    assert (unseen.verdict, "(dog)" in unseen.figure) == ("fail", True)
    untested = class_sets(["cat", "dog"], [5, 6], [0, 2])
    assert (untested.verdict, "(cat)" in untested.figure) == ("warn", True)


def test_damaged_data_fail(patient, digits, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits.path, copy)
    assert found("integrity", patient(data=PackedDataset.open(copy))).verdict == "ok"
    shard = copy / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    judged = found("integrity", patient(data=PackedDataset.open(copy)))
    assert judged.verdict == "fail"
    assert "train-00000.arrow" in judged.figure


def test_a_mount_that_is_not_local_is_to_be_staged(patient, monkeypatch) -> None:
    mounts = (("ext4", "ok"), ("nfs4", "warn"), ("fuse.s3fs", "warn"), ("lustre", "warn"))
    for system, verdict in mounts:
        mount = Mount(Path("/"), system)
        monkeypatch.setattr(data, "mount_of", lambda path, mount=mount: mount)
        judged = found("mount", patient())
        assert judged.verdict == verdict
        assert ("pitstop data stage" in (judged.advice or "")) == (verdict == "warn")
    monkeypatch.setattr(data, "mount_of", lambda path: None)
    assert found("mount", patient()).verdict == "skipped"


def test_a_disk_that_is_slower_than_training_is_told_unless_memory_holds_the_data(
    patient, monkeypatch
) -> None:
    assert found("disk", patient(speeds={16: 1e-3})).verdict == "ok"
    monkeypatch.setattr(data, "available_memory", lambda: 2**40)
    assert found("disk", patient(speeds={16: 1e12})).verdict == "ok"
    monkeypatch.setattr(data, "available_memory", lambda: 0)
    slow = found("disk", patient(speeds={16: 1e12}))
    assert slow.verdict == "warn"
    assert slow.numbers["data_mb_per_second"] < slow.numbers["needed_mb_per_second"]


def test_a_loader_that_is_slower_than_training_is_told(patient, monkeypatch) -> None:
    bench = SimpleNamespace(images_per_second={speed.cores(): 100.0})
    monkeypatch.setattr(speed, "bench", lambda *data, **how: bench)
    for trained, verdict in ((99.0, "ok"), (101.0, "warn")):
        assert found("loader", patient(speeds={16: trained, 24: 9.0})).verdict == verdict


def test_a_bucket_that_says_no_is_one_line_without_a_secret(
    patient, tiny, aws, s3_endpoint
) -> None:
    import boto3

    aws.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    missing = found("bucket", patient(recipe=tiny(data="s3://doctor-not-there/photos")))
    assert missing.verdict == "fail"
    assert "there is no such bucket" in missing.figure
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="doctor")
    photos = patient(recipe=tiny(data="s3://doctor/photos"))
    empty = found("bucket", photos)
    assert (empty.verdict, "is empty" in empty.figure) == ("fail", True)
    client.put_object(Bucket="doctor", Key="photos/cat/1.jpg", Body=b"some bytes")
    client.close()
    assert found("bucket", photos).verdict == "ok"
    assert SECRET not in str([missing, empty, found("bucket", photos)])
    assert found("bucket", patient()).verdict == "skipped"


# The command


def test_the_command_says_fit_and_writes_what_it_found(digits, tmp_path, capfd) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    options = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", str(digits.path), "--quick"]
    page = tmp_path / "found.md"
    assert cli.run(["doctor", *options, "--json", "--markdown", str(page)]) == 0
    said = json.loads(capfd.readouterr().out)
    verdicts = {each["name"]: each["verdict"] for each in said["findings"]}
    assert list(verdicts) == list(CHECKS)
    assert said["fit"] is True
    figures = {each["name"]: each["numbers"] for each in said["findings"]}
    assert figures["data"]["train"] == len(digits.train)
    assert set(figures["speed"]["images_per_second"]) == {"16", "24"}
    assert verdicts["learning"] == "skipped"
    assert said["summary"] in page.read_text()


def test_the_exit_code_says_that_a_check_failed(monkeypatch, command_checks, capfd) -> None:
    command_checks({"memory": lambda patient: Finding("memory", "ok", "enough")})
    assert cli.run(["doctor"]) == 0
    command_checks({"memory": raising(RuntimeError("broken"))})
    assert cli.run(["doctor"]) == 2
    assert "NOT FIT: memory" in capfd.readouterr().out
    assert cli.run(["doctor", "--markdown", "nowhere/found.md"]) == 2
    assert "--markdown nowhere/found.md" in capfd.readouterr().err


@pytest.fixture
def command_checks(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Check]], None]:
    """Puts other checks in the place of the doctor's."""
    return lambda checks: monkeypatch.setattr(doctor, "CHECKS", checks)


@pytest.mark.slow
def test_the_demo_learns_and_resumes_here(tmp_path, capfd) -> None:
    code = cli.run(["doctor", "--json"])
    said = json.loads(capfd.readouterr().out)
    verdicts = {each["name"]: each["verdict"] for each in said["findings"]}
    assert (verdicts["learning"], verdicts["resume"]) == ("ok", "ok")
    assert verdicts["lr"] in ("ok", "warn")
    assert code == 0
