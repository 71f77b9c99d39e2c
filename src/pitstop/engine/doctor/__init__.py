"""`pitstop doctor`: is this machine fit for a recipe and its data? Measured, check by check.

Each check takes the patient and returns a finding, and leaves there what later checks need. What
goes wrong in one is its finding; the others go on. Run alone: a busy machine looks like a slow one.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe
from pitstop.engine.doctor import data, learning, machine, speed
from pitstop.engine.doctor.patient import Check, Patient, SkippedError
from pitstop.report.diagnosis import Finding

CHECKS: dict[str, Check] = {
    "versions": machine.versions,
    "devices": machine.devices,
    "precision": machine.precision,
    "links": machine.links,
    "memory": machine.memory,
    "bucket": data.bucket,
    "data": data.data,
    "classes": data.classes,
    "mount": data.mount,
    "integrity": data.integrity,
    "speed": speed.speed,
    "headroom": speed.headroom,
    "disk": data.disk,
    "space": data.space,
    "loader": speed.loader,
    "utilization": speed.utilization,
    "lr": learning.lr,
    "learning": learning.learning,
    "resume": learning.resume,
}
"""In an order in which each finds what it needs."""


def examine(recipe: Recipe, *, thorough: bool, say: Callable[[str], None]) -> list[Finding]:
    """Does all checks, in an order in which each finds what it needs.

    Args:
        recipe: names the data, or none: then the checks of data are skipped.
        thorough: whether to do those that take minutes.
        say: told what is being done.
    """
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="pitstop-doctor-") as scratch:
        patient = Patient(recipe, thorough, Path(scratch), say)
        for name, of in CHECKS.items():
            say(f"checking: {name}")
            findings.append(checked(name, of, patient))
    return findings


def checked(name: str, of: Check, patient: Patient) -> Finding:
    """Returns what a check finds; that it fails or cannot be done is a finding too."""
    try:
        return of(patient)
    except SkippedError as why:
        return Finding(name, "skipped", str(why))
    except InputError as error:
        return Finding(name, "fail", str(error))
    except Exception as error:  # whatever is broken here is what we look for
        first_line = str(error).strip().partition("\n")[0]
        return Finding(name, "fail", f"{type(error).__name__}: {first_line}")
