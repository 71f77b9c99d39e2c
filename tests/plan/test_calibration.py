"""What was measured on this machine is kept, and read back as it was."""

import pytest

from pitstop.core.errors import InputError
from pitstop.plan import calibration
from pitstop.plan.calibration import Calibration, Decode, Speed

MEASURED = Calibration(
    date="2026-11-22",
    device="AMD EPYC, 2 cores",
    cores=2,
    gpus=0,
    memory_gib=24,
    training=(
        Speed(
            model="resnet18",
            resolution=64,
            batch_size=64,
            precision="bf16",
            images_per_second=103.5,
        ),
    ),
    decode=(Decode(resolution=64, stored="short side 400", images_per_second_a_core=1177),),
    disk_mb_per_second=310.5,
    startup_seconds=4.2,
    save_seconds=0.04,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))


def test_what_is_saved_is_loaded():
    assert calibration.load() is None
    assert calibration.save(MEASURED) == calibration.calibration_file()
    assert calibration.load() == MEASURED
    calibration.save(MEASURED.model_copy(update={"startup_seconds": 9.0}))
    loaded = calibration.load()
    assert loaded is not None
    assert loaded.startup_seconds == 9.0


@pytest.mark.parametrize(
    ("text", "where"),
    [("{", "JSON"), ("[]", "JSON"), ('{"date": "2026-11-22", "speed": 3}', "speed")],
)
def test_a_damaged_file_is_refused_in_one_line_with_the_fix(text, where):
    path = calibration.calibration_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        calibration.load()
    message = str(refused.value)
    assert str(path) in message
    assert where in message
    assert "pitstop calibrate" in message
    assert "\n" not in message
