"""What `pitstop calibrate` has measured on this machine: the rates of the machine `local`."""

from pathlib import Path

from pydantic import Field, ValidationError

from pitstop.core.errors import InputError
from pitstop.core.strict import Strict
from pitstop.io.cache import cache_directory
from pitstop.io.storage import write_text

AGAIN = "run `pitstop calibrate` again"


class Speed(Strict):
    """Images a second of the whole machine, data apart."""

    model: str
    resolution: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    precision: str
    images_per_second: float = Field(gt=0)


class Decode(Strict):
    """Images a second that the loader of training makes on one core."""

    resolution: int = Field(ge=1)
    stored: str
    """How the images are stored, in words: `short side 400`."""
    images_per_second_a_core: float = Field(gt=0)


class Calibration(Strict):
    """A machine's measured rates."""

    date: str
    device: str
    """In words: `AMD EPYC 9R14, 2 cores`, `8 x NVIDIA A100-SXM4-40GB`."""
    cores: int = Field(ge=1)
    """On which the decoding was measured, each of them as fast as that."""
    gpus: int = Field(ge=0)
    gpu_memory_gib: float | None = None
    """Of each GPU."""
    memory_gib: float = Field(gt=0)
    training: tuple[Speed, ...] = Field(min_length=1)
    evaluation: tuple[Speed, ...] = ()
    """Of one view of each image."""
    decode: tuple[Decode, ...] = ()
    disk_mb_per_second: float = Field(gt=0)
    startup_seconds: float = Field(ge=0)
    """From the command to the first step."""
    save_seconds: float = Field(ge=0)
    """For which a save stops the training."""


def calibration_file() -> Path:
    """Returns where this machine's calibration is kept."""
    return cache_directory() / "calibration.json"


def load() -> Calibration | None:
    """Returns what was measured on this machine; None where nothing was.

    Raises:
        InputError: the file is damaged, or of another version of pitstop.
    """
    path = calibration_file()
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise InputError(f"{path}: {where}: {first['msg']}: {AGAIN}") from None


def save(calibration: Calibration) -> Path:
    """Keeps the calibration in place of the one before; returns the file."""
    path = calibration_file()
    write_text(path, calibration.model_dump_json(indent=2) + "\n")
    return path
