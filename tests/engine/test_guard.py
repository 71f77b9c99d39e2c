"""What is never lost: a machine, a disk, a bucket, money."""

import errno
import shutil
from contextlib import suppress
from types import SimpleNamespace

import pytest

from pitstop.core.errors import InputError
from pitstop.core.safeguards import Safeguards
from pitstop.engine import guard
from pitstop.engine.outcome import BUDGET_SPENT, FINISHED, INTERRUPTED, NOT_DURABLE
from pitstop.engine.verify import differences
from pitstop.io.ledger import Ledger
from pitstop.io.records import read_events
from pitstop.io.remote import Remote
from pitstop.io.run_directory import RunDirectory
from pitstop.io.upload import Uploader
from pitstop.runtime import checkpoint


@pytest.fixture
def whole(trainer, tmp_path):
    """Returns the directory of a run that nobody touched."""
    assert trainer(tmp_path / "whole") == FINISHED
    return tmp_path / "whole"


@pytest.fixture
def bucket(tmp_path):
    return Safeguards(remote=str(tmp_path / "bucket"), max_fruitless_starts=None)


def test_an_emptied_machine_goes_on_from_the_bucket_alone(trainer, whole, bucket, tmp_path):
    out = tmp_path / "machine"
    starts = 0
    while trainer(out, steps=4, safeguards=bucket) == INTERRUPTED:
        assert "restored step" in trainer.said or starts == 0
        shutil.rmtree(out)
        starts += 1
    assert starts == 3
    assert differences(RunDirectory(out), RunDirectory(whole)) == []
    assert Ledger(RunDirectory(out).ledger).lost() == (0, 0.0)
    lines = RunDirectory(out).ledger.read_text().splitlines()
    assert sum('"kind":"start"' in line for line in lines) == starts + 1
    shutil.rmtree(out)
    assert trainer(out, safeguards=bucket) == FINISHED
    assert trainer.steps == 0  # the end is there too
    assert differences(RunDirectory(out), RunDirectory(whole)) == []


def test_what_is_newer_here_is_not_overwritten(trainer, whole, bucket, tmp_path):
    out = tmp_path / "machine"
    assert trainer(out, steps=4, safeguards=bucket) == INTERRUPTED
    assert trainer(out, steps=4) == INTERRUPTED  # without the bucket
    assert trainer(out, safeguards=bucket) == FINISHED
    assert "restored" not in trainer.said
    assert "resuming at step 8" in trainer.said
    assert differences(RunDirectory(out), RunDirectory(whole)) == []


def test_what_is_damaged_here_is_taken_from_the_bucket(trainer, whole, bucket, tmp_path):
    out = tmp_path / "machine"
    assert trainer(out, steps=6, safeguards=bucket) == INTERRUPTED
    (newest,) = out.glob("checkpoints/*step-00000006*.pt")
    newest.write_bytes(newest.read_bytes()[:-1])
    assert trainer(out, safeguards=bucket) == FINISHED
    assert "is damaged" in trainer.said
    assert "resuming at step 6" in trainer.said
    assert differences(RunDirectory(out), RunDirectory(whole)) == []


def test_a_copy_that_is_damaged_does_not_bring_back_an_older_one(
    trainer, whole, bucket, monkeypatch, tmp_path
):
    out = tmp_path / "machine"
    monkeypatch.setattr("pitstop.io.upload.KEEP", 9)
    assert trainer(out, steps=5, safeguards=bucket) == INTERRUPTED
    shutil.copytree(out, tmp_path / "before")
    assert trainer(out, steps=3, safeguards=bucket) == INTERRUPTED
    shutil.rmtree(out)
    (tmp_path / "before").rename(out)
    newest = Remote(bucket.remote).newest(print)
    (key,) = (f.key for name, f in newest.files.items() if name.endswith("00000008.pt"))
    flipped = bytearray((tmp_path / "bucket" / key).read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "bucket" / key).write_bytes(flipped)
    assert trainer(out, safeguards=bucket) == FINISHED
    assert "resuming at step 5" in trainer.said
    assert "restored" not in trainer.said
    assert differences(RunDirectory(out), RunDirectory(whole)) == []


def test_the_newer_machine_wins_though_it_has_fewer_steps(trainer, whole, bucket, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert trainer(one, steps=4, safeguards=bucket) == INTERRUPTED
    assert trainer(one, steps=6) == INTERRUPTED  # of which the bucket knows nothing
    assert trainer(other, steps=2, safeguards=bucket) == INTERRUPTED
    assert trainer(one, safeguards=bucket) == FINISHED
    assert "resuming at step 6" in trainer.said
    assert differences(RunDirectory(one), RunDirectory(whole)) == []


def test_a_run_that_another_machine_has_taken_over_ends(trainer, bucket, monkeypatch, tmp_path):
    claimed = []
    saved = guard.Guard.saved

    def taken_over(self, manifest):
        if not claimed:
            claimed.append(Remote(bucket.remote).claim())
        saved(self, manifest)
        self._uploader.wait(10)

    monkeypatch.setattr(guard.Guard, "saved", taken_over)
    monkeypatch.setattr("pitstop.engine.meter.FLUSH_SECONDS", 0.0)
    with pytest.raises(InputError, match="attempt 2 has taken this run over"):
        trainer(tmp_path / "machine", safeguards=bucket)
    assert Remote(bucket.remote).newest(print) is None


def test_no_resume_is_remembered_in_the_bucket(trainer, bucket, tmp_path):
    assert trainer(tmp_path / "one", steps=4, safeguards=bucket) == INTERRUPTED
    run = RunDirectory(tmp_path / "two")
    with guard.Guard(run, bucket, starts_over=True, say=print):
        pass  # killed before it saved anything
    assert trainer(tmp_path / "three", steps=1, safeguards=bucket) == INTERRUPTED
    assert "resuming" not in trainer.said


def test_when_the_money_is_spent_it_ends_saved(trainer, tmp_path):
    rich = Safeguards(price=3600.0, max_cost=1e9)
    assert trainer(tmp_path, steps=6, safeguards=rich) == INTERRUPTED
    poor = Safeguards(price=3600.0, max_cost=Ledger(RunDirectory(tmp_path).ledger).spent())
    assert trainer(tmp_path, safeguards=poor) == BUDGET_SPENT
    assert trainer.steps <= 1
    stated = RunDirectory(tmp_path).read()
    assert (stated["status"], stated["exit_code"]) == ("budget spent", 77)
    assert "spent: $" in trainer.said
    assert trainer(tmp_path, safeguards=rich) == FINISHED


def test_starts_in_vain_are_refused_in_the_end(trainer, tmp_path):
    patient = Safeguards(max_fruitless_starts=3)
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pitstop.engine.train.Stage", lambda *_: 1 / 0)
            with suppress(ZeroDivisionError):
                trainer(tmp_path, safeguards=patient)
    with pytest.raises(InputError, match=r"3 starts in a row have saved nothing: .* 4$"):
        trainer(tmp_path, safeguards=patient)
    assert trainer(tmp_path, safeguards=Safeguards(max_fruitless_starts=4)) == FINISHED


def test_a_bucket_that_does_not_take_anything_ends_the_run_where_that_is_asked_for(
    trainer, bucket, monkeypatch, tmp_path
):
    def refuse(self, offer):
        raise InputError("s3://bucket: access was denied")

    monkeypatch.setattr(Uploader, "_upload", refuse)
    monkeypatch.setattr("pitstop.engine.meter.FLUSH_SECONDS", 0.0)
    asked = Safeguards(remote=bucket.remote, max_durable_age=1e-6)
    assert trainer(tmp_path / "run", safeguards=asked) == NOT_DURABLE
    stated = RunDirectory(tmp_path / "run").read()
    assert (stated["status"], stated["exit_code"]) == ("not durable", 70)
    assert "the checkpoints here stand; start it again" in trainer.said
    monkeypatch.undo()
    assert trainer(tmp_path / "run", safeguards=bucket) == FINISHED


def test_a_limit_shorter_than_the_interval_of_saves_brings_saves_of_its_own(
    trainer, tiny, bucket, monkeypatch, tmp_path
):
    monkeypatch.setattr("pitstop.engine.meter.FLUSH_SECONDS", 0.0)
    clock = iter(range(0, 10**6, 3))  # each look takes three seconds
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    asked = Safeguards(remote=bucket.remote, max_durable_age=1.0)
    seldom = tiny(checkpoint={"every": "99 ep", "keep_best": 0, "keep_last": 99})
    saves = []
    saved = guard.Guard.saved
    monkeypatch.setattr(
        guard.Guard, "saved", lambda self, m: (saves.append(m.step), saved(self, m))
    )
    trainer(tmp_path / "run", recipe=seldom, safeguards=asked)
    assert saves[0] < 14


def test_the_records_tell_what_is_durable(trainer, bucket, monkeypatch, tmp_path):
    saved = guard.Guard.saved

    def waiting(self, manifest):
        saved(self, manifest)
        assert self._uploader.wait(10)

    monkeypatch.setattr(guard.Guard, "saved", waiting)
    monkeypatch.setattr("pitstop.engine.meter.FLUSH_SECONDS", 0.0)
    assert trainer(tmp_path / "run", safeguards=bucket) == FINISHED
    durable = [e for e in read_events(tmp_path / "run/events.jsonl") if e["kind"] == "durable"]
    assert [event["step"] for event in durable][:2] == [4, 8]
    assert all(0 <= event["age_seconds"] < 60 for event in durable)
    assert RunDirectory(tmp_path / "run").read()["durable"]["step"] == 14
    assert f"{bucket.remote}: holds step 14" in trainer.said


class Disk:
    """Is full for the saves of the given numbers."""

    def __init__(self, patch, full):
        self.saves, self.full, self.save = 0, full, checkpoint._save
        patch.setattr(checkpoint, "_save", self)

    def __call__(self, state, file):
        self.saves += 1
        if self.saves in self.full:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        self.save(state, file)


def test_a_full_disk_costs_one_checkpoint(trainer, whole, monkeypatch, tmp_path):
    Disk(monkeypatch, full={2})
    out = tmp_path / "run"
    assert trainer(out, steps=9) == INTERRUPTED
    assert "the checkpoint was not saved: No space left on device: make room" in trainer.said
    assert trainer(out) == FINISHED
    assert differences(RunDirectory(out), RunDirectory(whole)) == []


def test_a_disk_that_stays_full_ends_the_run_with_one_line(trainer, whole, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, full={2, 3, 4})
        with pytest.raises(InputError, match="was not saved: No space left on device: make room"):
            trainer(out)
    assert not [*out.glob("checkpoints/*.partial")]
    assert trainer(out) == FINISHED
    assert "resuming at step 4" in trainer.said
    assert differences(RunDirectory(out), RunDirectory(whole)) == []
