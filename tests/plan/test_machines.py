"""The table of machines, SageMaker's names for them, and this machine."""

import pytest

from pitstop.core.errors import InputError
from pitstop.plan import calibration
from pitstop.plan.calibration import Calibration, Speed
from pitstop.plan.machines import find_machine, machines
from pitstop.plan.prices import find_price
from pitstop.plan.rates import images_per_second


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PITSTOP_CONFIG", str(tmp_path / "config"))


def test_every_family_is_there_and_each_machine_has_a_rate_and_a_price():
    families = {machine.name.split(".")[0] for machine in machines()}
    assert families == {"g5", "g6", "p3", "p3dn", "p4d", "p4de", "p5"}
    for machine in machines():
        assert machine.gpu is not None
        assert images_per_second(machine.gpu, "resnet50", 224).value > 100
        price = find_price(machine.name)
        assert price is not None
        assert price.on_demand is not None
        assert price.spot is not None
        assert price.spot < price.on_demand


def test_the_machine_of_the_sprint_is_what_aws_says():
    machine = find_machine("p4d.24xlarge")
    assert (machine.gpu, machine.gpus, machine.gpu_memory_gib) == ("A100", 8, 40)
    assert (machine.vcpus, machine.cores, machine.memory_gib) == (96, 48, 1152)


def test_sagemakers_machine_is_the_same_one_at_another_price():
    own, plain = find_machine("ml.g5.12xlarge"), find_machine("g5.12xlarge")
    assert own.model_copy(update={"name": plain.name}) == plain
    theirs, ours = find_price("ml.g5.12xlarge"), find_price("g5.12xlarge")
    assert theirs is not None
    assert ours is not None
    assert theirs.on_demand > ours.on_demand


def test_what_the_source_systems_claimed_stands_beside_the_machines():
    claims = {m.name: (c.minutes, c.dollars) for m in machines() for c in m.claims}
    assert claims == {
        "p4d.24xlarge": ((45, 45), 8.25),
        "p3.8xlarge": ((90, 90), 5.25),
        "g5.12xlarge": ((150, 150), 5.00),
        "g6.12xlarge": ((180, 240), 4.80),
    }


def test_an_unknown_machine_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match=r"'p4d\.24xlage'.*did you mean 'p4d\.24xlarge'"):
        find_machine("p4d.24xlage")


def test_this_machine_is_known_when_it_has_been_measured():
    with pytest.raises(InputError, match="pitstop calibrate"):
        find_machine("local")
    speed = Speed(
        model="resnet18", resolution=64, batch_size=64, precision="bf16", images_per_second=103
    )
    measured = Calibration(
        date="2026-11-22",
        device="EPYC, 2 cores",
        cores=2,
        gpus=0,
        memory_gib=24,
        training=(speed,),
        disk_mb_per_second=300,
        startup_seconds=5,
        save_seconds=0.1,
    )
    calibration.save(measured)
    machine = find_machine("local")
    assert (machine.gpu, machine.cores, machine.calibration) == (None, 2, measured)
