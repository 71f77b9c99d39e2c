"""What a run takes and costs: against published runs, and as its parts say."""

import json
import math
from typing import Any

import pytest

from pitstop.core.errors import InputError
from pitstop.core.interval import optimal_interval
from pitstop.core.recipe import load_recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan import cost
from pitstop.plan.calibration import Calibration, Decode, Speed
from pitstop.plan.cost import IMAGENET, Estimate, as_json, estimate
from pitstop.plan.interruptions import expected_seconds
from pitstop.plan.machines import LOCAL, Machine, find_machine, machines
from pitstop.plan.prices import Price


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PITSTOP_CONFIG", str(tmp_path / "config"))


P4D = find_machine("p4d.24xlarge")

RESNET50 = {16: 14.9, 24: 21.7, 32: 28.7, 40: 35.6, 56: 49.4, 88: 77.2}
RESNET18 = {16: 35.0, 24: 51.6, 32: 68.9, 40: 85.5, 56: 119.4, 88: 187.3}

AS_RESNET18: dict[str, Any] = {
    "model.name": "resnet18",
    "batch_size": 1024,
    "lr_per": 1024,
    "lr": 0.5,
    "optimizer.weight_decay": 5.0e-5,
}


def bundled(name: str, **options: Any) -> Timeline:
    return Timeline.planned(load_recipe(name, options), IMAGENET)


def plan(samples: int = 10_000, **stated: Any) -> Timeline:
    recipe = {"name": "one", "epochs": 4, "batch_size": 100, "model": "resnet50", **stated}
    return Timeline.planned(parse_recipe(recipe, "test"), samples)


def changed(machine: Machine, **fields: Any) -> Machine:
    return machine.model_copy(update=fields)


def minutes(timeline: Timeline, machine: Machine) -> float:
    """Of a run whose data are there, as FFCV's logs have it."""
    return estimate(timeline, machine).undisturbed_seconds / 60


# Against published runs: FFCV's logs; of these the plan knows the runs of 16 epochs only


@pytest.mark.parametrize(("epochs", "published"), RESNET50.items())
def test_resnet50_takes_what_is_published(epochs, published):
    predicted = minutes(bundled("fast", epochs=epochs, compile=False), P4D)
    assert predicted == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(("epochs", "published"), RESNET18.items())
def test_resnet18_takes_what_is_published(epochs, published):
    one = changed(P4D, gpus=1)
    every_epoch = AS_RESNET18 | {"epochs": epochs, "compile": False}
    assert minutes(bundled("fast", **every_epoch), one) == pytest.approx(published, rel=0.1)
    at_the_end = every_epoch | {"eval.every": 1000}  # as FFCV's code does
    assert minutes(bundled("fast", **at_the_end), one) == pytest.approx(published, rel=0.03)


def test_the_sprint_takes_an_hour_rather_than_the_claimed_45_minutes():
    """At the published rates its phases take 57 minutes; its header says so."""
    sprint = estimate(bundled("sprint"), P4D, spot=True)
    assert sprint.training_seconds / 60 == pytest.approx(57, rel=0.05)
    assert sprint.minutes > 45
    assert sprint.dollars == pytest.approx(sprint.minutes / 60 * 11)


# Bottlenecks


def test_a_gpu_machine_with_few_cores_waits_for_the_decoder():
    slow = estimate(bundled("fast"), changed(P4D, vcpus=8))
    assert slow.bottleneck == "cpu decode"
    assert slow.images_per_second == pytest.approx(4 * cost.DECODE.value)
    assert estimate(bundled("fast"), P4D).bottleneck == "gpu"


def test_what_does_not_stay_in_memory_is_read_from_the_disk():
    small = changed(P4D, memory_gib=64, disk_mb_per_second=100)
    slow = estimate(bundled("fast"), small)
    assert slow.bottleneck == "disk"
    assert slow.images_per_second == pytest.approx(100e6 / 54_000)
    assert "disk" not in estimate(bundled("fast"), P4D).segments[0].rates
    part = bundled("fast", data_fraction=0.5)
    assert estimate(part, small).bottleneck == "gpu"  # half of the data does stay


def test_a_machine_without_disks_reads_a_volume():
    p3 = find_machine("p3.2xlarge")
    disk = estimate(bundled("fast"), p3).segments[0].rates["disk"]
    assert disk.value == pytest.approx(125e6 / 54_000)
    assert "assumed" in disk.source


def test_nodes_add_up_unless_their_network_is_too_slow():
    one, two = (estimate(bundled("fast"), P4D, nodes=nodes) for nodes in (1, 2))
    assert two.images_per_second == pytest.approx(2 * one.images_per_second)
    assert "network" not in one.segments[0].rates
    slow = estimate(bundled("fast"), changed(P4D, network_gbps=10), nodes=2)
    assert slow.bottleneck == "network"
    step = 25.56e6 * 4 * 8 / (0.8 * 10e9)  # all of the fp32 gradients, for two nodes
    assert slow.images_per_second == pytest.approx(4096 / step)


def test_the_bottleneck_of_the_run_is_that_of_most_of_its_time():
    phases = [
        {"duration": "1ep", "resolution": 64},
        {"duration": "3ep", "resolution": 320},
    ]
    whole = estimate(plan(phases=phases), changed(P4D, vcpus=56))
    assert [part.bottleneck for part in whole.segments] == ["cpu decode", "gpu"]
    assert whole.bottleneck == "gpu"


# The parts of the time


def test_all_seconds_are_those_of_the_parts():
    whole = estimate(bundled("sprint"), P4D, spot=True)
    steps = sum(part.segment.steps * part.segment.batch_size for part in whole.segments)
    assert whole.training_seconds == pytest.approx(steps / whole.images_per_second)
    assert whole.work_seconds == pytest.approx(
        whole.training_seconds + whole.compile_seconds + whole.evaluation_seconds
    )
    stretches = expected_seconds(
        whole.work_seconds, whole.interval_seconds, 1.0, whole.restart.value, 0.05
    )
    around = whole.preparation.value + whole.startup.value
    assert whole.seconds == pytest.approx(around + stretches)
    assert whole.minutes == pytest.approx(whole.seconds / 60)
    assert 0 < whole.interruptions < 0.1
    assert whole.interruption_seconds > whole.interruptions * whole.restart.value


@pytest.mark.parametrize("name", ["p4d.24xlarge", "g5.xlarge", "p3.2xlarge"])
def test_more_epochs_take_longer(name):
    taken = [
        estimate(bundled("fast", epochs=count), find_machine(name), spot=True).seconds
        for count in (3, 4, 16, 16.5, 88)
    ]
    assert taken == sorted(set(taken))


def test_each_shape_is_compiled_on_a_gpu_unless_told_otherwise():
    phases = [{"duration": "2ep", "resolution": 64}, {"duration": "2ep", "resolution": 96}]
    compiled = estimate(plan(phases=phases), P4D)
    assert compiled.compile_seconds == 2 * cost.COMPILE.value
    assert cost.COMPILE.source in compiled.sources
    plain = estimate(plan(phases=phases, compile=False), P4D)
    assert plain.compile_seconds == 0
    assert cost.COMPILE.source not in plain.sources


def test_evaluations_take_the_images_times_the_views():
    few = changed(P4D, gpus=1)
    once = estimate(plan(eval={"every": 4}), few, evaluation_images=10_000)
    assert once.evaluation_seconds == pytest.approx(10_000 / (3 * 2470))
    often = estimate(plan(), few, evaluation_images=10_000)
    assert often.evaluation_seconds == pytest.approx(4 * once.evaluation_seconds)
    mirrored = estimate(
        plan(eval={"every": 4, "flip_average": True}), few, evaluation_images=10_000
    )
    assert mirrored.evaluation_seconds == pytest.approx(2 * once.evaluation_seconds)
    both = estimate(
        plan(eval={"every": 4, "also": [{"flip_average": True}]}), few, evaluation_images=10_000
    )
    assert both.evaluation_seconds == pytest.approx(3 * once.evaluation_seconds)


def test_a_tenth_of_the_images_is_held_out_where_nothing_else_is_known():
    held_out = estimate(plan(samples=9000), P4D)
    assert held_out.evaluation_seconds == pytest.approx(4 * 1000 / held_out.evaluation.value)
    imagenet = estimate(bundled("sprint"), P4D)
    assert imagenet.evaluation_seconds == pytest.approx(60 * 50_000 / imagenet.evaluation.value)


def test_the_finder_takes_its_steps():
    found = estimate(plan(lr="auto", lr_finder={"fallback": 0.1, "iterations": 50}), P4D)
    assert found.finder_seconds == pytest.approx(50 * 100 / found.images_per_second)


@pytest.mark.parametrize(
    ("every", "share"), [("2ep", 2 / 4), ("100 steps", 100 / 400), ("400 steps", 1)]
)
def test_checkpoints_come_at_the_recipes_interval(every, share):
    saved = estimate(plan(checkpoint={"every": every}), P4D)
    assert saved.interval_seconds == pytest.approx(share * saved.work_seconds)
    assert saved.checkpoint_seconds == math.ceil(1 / share)


def test_checkpoints_may_come_by_the_clock_or_at_the_best_interval():
    minutes = estimate(plan(checkpoint={"every": "10 min"}), P4D)
    assert minutes.interval_seconds == 600
    often = {"every": "auto", "interruptions_per_hour": 0.5}
    best = estimate(plan(checkpoint=often), P4D, spot=True)
    assert best.interval_seconds == optimal_interval(1.0, 7200)


def test_machines_on_demand_stay_and_those_on_spot_do_not():
    assert estimate(bundled("fast"), P4D).interruptions == 0
    spot = estimate(bundled("fast"), P4D, spot=True)
    assert spot.interruptions_per_hour.value == 0.05
    stated = estimate(bundled("fast"), P4D, interruptions_per_hour=1)
    assert stated.interruptions > spot.interruptions > 0
    both = estimate(bundled("fast"), P4D, spot=True, nodes=2)
    assert both.interruptions_per_hour.value == 0.1


def test_interruptions_that_let_no_run_end_are_refused():
    with pytest.raises(InputError, match="no run is expected to end"):
        estimate(bundled("sprint"), P4D, interruptions_per_hour=1e5)


# Money, and SageMaker's limits


def test_dollars_are_those_of_all_nodes_at_the_markets_price():
    price = Price(10.0, 4.0, "2026-11-22", "us-east-1", "test")
    for spot, hour in ((False, 10.0), (True, 4.0)):
        two = estimate(bundled("fast"), P4D, nodes=2, spot=spot, price=price)
        assert two.dollars == pytest.approx(two.seconds / 3600 * 2 * hour)
        assert two.sources[-1] == "test (2026-11-22, us-east-1)"


def test_without_a_price_there_are_no_dollars():
    unknown = estimate(bundled("fast"), changed(P4D, name="mine"))
    assert unknown.price is None
    assert unknown.dollars is None
    assert as_json(unknown)["dollars"] is None


def test_sagemakers_limits_have_room():
    for name in ("g5.xlarge", "p4d.24xlarge"):
        run = estimate(bundled("fast"), find_machine(name), spot=True)
        assert run.max_run_seconds % 60 == 0
        assert run.max_wait_seconds % 60 == 0
        assert 0 <= run.max_run_seconds - 1.5 * run.seconds < 60
        assert run.max_wait_seconds >= run.max_run_seconds + 3600


# This machine


def measured(**fields: Any) -> Machine:
    speed = Speed(
        model="resnet18", resolution=64, batch_size=64, precision="bf16", images_per_second=100
    )
    calibration = Calibration(
        **{
            "date": "2026-11-22",
            "device": "EPYC, 2 cores",
            "cores": 2,
            "gpus": 0,
            "memory_gib": 24,
            "training": (speed,),
            "evaluation": (speed.model_copy(update={"images_per_second": 300}),),
            "decode": (
                Decode(resolution=64, stored="short side 400", images_per_second_a_core=1000),
            ),
            "disk_mb_per_second": 300,
            "startup_seconds": 5,
            "save_seconds": 0.25,
            **fields,
        }
    )
    return Machine(
        name=LOCAL,
        gpu="A100" if calibration.gpus else None,
        gpus=calibration.gpus,
        gpu_memory_gib=None,
        vcpus=2,
        memory_gib=24,
        network_gbps=0,
        disk_gb=0,
        disk_mb_per_second=300,
        calibration=calibration,
    )


SMALL: dict[str, Any] = {"model": "resnet18", "resolution": 64}


def test_cores_that_train_have_less_time_to_decode():
    both = estimate(plan(**SMALL), measured())
    assert both.images_per_second == pytest.approx(1 / (1 / 100 + 1 / 2000))
    assert both.bottleneck == "cpu"


def test_cores_that_training_leaves_alone_decode_meanwhile():
    apart = estimate(plan(**SMALL, threads=1), measured())
    assert apart.images_per_second == pytest.approx(100)


def test_a_measured_gpu_does_not_wait_for_the_cores():
    gpu = estimate(plan(**SMALL), measured(gpus=1))
    assert gpu.images_per_second == pytest.approx(100)
    assert gpu.bottleneck == "gpu"


def test_of_this_machine_all_is_measured_and_nothing_is_staged():
    here = estimate(plan(**SMALL), measured(), evaluation_images=1000)
    assert (here.startup.value, here.save.value) == (5, 0.25)
    assert (here.preparation.value, here.compile_seconds, here.dollars) == (0, 0, None)
    assert here.evaluation.value == pytest.approx(1 / (1 / 300 + 1 / 2000))
    sources = [source for source in here.sources if "measured" not in source]
    assert all(source.startswith("derived: 11 us") for source in sources)
    assert here.restart.value == 5


def test_nodes_like_this_one_are_refused():
    with pytest.raises(InputError, match="--nodes"):
        estimate(plan(**SMALL), measured(), nodes=2)


# As data


def test_the_json_holds_what_was_asked_for_in_all_and_by_segment():
    run = estimate(bundled("sprint"), P4D, spot=True)
    told = json.loads(json.dumps(as_json(run), allow_nan=False))
    keys = ("minutes", "dollars", "images_per_second", "bottleneck")
    assert [told[key] for key in keys] == [getattr(run, key) for key in keys]
    assert len(told["segments"]) == 3
    for segment in told["segments"]:
        assert all(segment[key] for key in keys)
        assert segment["rates"][segment["bottleneck"]]["images_per_second"] == pytest.approx(
            segment["images_per_second"]
        )
        assert all(rate["source"] in told["sources"] for rate in segment["rates"].values())
    assert told["price"]["spot"] == 11.0
    parts = [segment["minutes"] + segment["compile_minutes"] for segment in told["segments"]]
    assert sum(parts) < told["minutes"]


def test_every_number_says_where_it_is_from():
    words = ("measured", "published", "derived", "fitted", "assumed", "as stated")
    for machine in machines():
        run: Estimate = estimate(bundled("sprint"), machine, spot=True, nodes=2)
        assert [source for source in run.sources if not source.startswith(words)] == []
