"""What a run takes and costs on a machine: from its timeline and the rates of the machine's parts.

A segment runs at the rate of its slowest part: all of them work at the same time, since the loader
makes batches ahead. Only a machine that trains on its processor has its cores for one thing at a
time. Every number says where it is from.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pitstop.core.errors import InputError
from pitstop.core.interval import ASSUMED_SAVE_SECONDS, optimal_interval
from pitstop.core.recipe import Protocol, Recipe, amount_and_unit
from pitstop.core.timeline import Segment, Timeline
from pitstop.plan.calibration import Calibration
from pitstop.plan.interruptions import expected_interruptions, expected_seconds, saves
from pitstop.plan.machines import Machine
from pitstop.plan.prices import Price, find_price
from pitstop.plan.rates import (
    Figure,
    images_per_second,
    measured_images_per_second,
    model_key,
    model_size,
)

IMAGENET, IMAGENET_VAL = 1_281_167, 50_000
"""Training and validation images of ImageNet-1k."""

IMAGE_BYTES = Figure(54_000, "measured: ImageNet at short side 400, 69 GB")
"""Of a packed training image. pitstop's own data may be smaller: it is staged once, then kept."""

DECODE = Figure(
    1_177, "measured: benchmarks/loader.py, 2 cores, short side 400, 224 px; as fast a core there"
)
"""Images a second that the loader makes on one core. Of fewer pixels it makes no fewer."""

DECODE_PIXELS = 224

DECODE_WHOLE = Figure(
    746, "derived: 855 whole images a second and core that libjpeg-turbo decodes, 170 us to resize"
)
"""Validation images have their original bytes."""

READ = Figure(45_000, "derived: 11 us of a core to read an image at short side 256, twice that")
"""Images a second and core from the system's page cache."""

KEPT = 0.7
"""The share of a machine's memory that the page cache may fill; assumed."""

VOLUME = Figure(125, "assumed: a volume of 125 MB/s, as AWS's gp3 come")

STAGING = Figure(500, "assumed: 500 MB/s from a bucket, up to half the network and the disk's rate")

ALL_REDUCE = 0.8
"""The share of a network's nominal rate that averaging gradients gets; assumed."""

EVALUATION = Figure(3.0, "timm on an RTX 3090, ResNet-50: 3,676 images/s against 1,218")
"""How many times as fast as training an evaluation is."""

COMPILE = Figure(45, "assumed: 45 s to compile the model for each shape")

STARTUP = Figure(62, "fitted: FFCV's 16 epochs of ResNet-50, without training and evaluation")
"""What is left of its 14.9 minutes: processes, CUDA, the first batch."""

SAVE = Figure(
    ASSUMED_SAVE_SECONDS, f"assumed: a save stops training for {ASSUMED_SAVE_SECONDS:g} s"
)

BOOT = Figure(180, "assumed: 3 min until another machine is there and runs")

MARGIN = 1.5
"""`max_run_seconds` is so many times what is expected."""

LEAST_WAIT = 3600
"""Seconds that `max_wait_seconds` leaves at least for waiting."""

CPU, GPU, DECODER, DISK, MEMORY, NETWORK = "cpu", "gpu", "cpu decode", "disk", "memory", "network"


@dataclass(frozen=True)
class SegmentEstimate:
    """Steps of constant shapes. Evaluations and saves are not in it."""

    segment: Segment
    seconds: float
    """Of training; compilation is apart."""
    compile_seconds: float
    images_per_second: float
    bottleneck: str
    """Which of `rates` is the lowest."""
    rates: dict[str, Figure]
    """Images a second that each part could do alone, of all nodes: `gpu`, or `cpu` where there is
    none; `cpu decode`; `memory`, where the page cache keeps the data, else `disk`; `network`, of
    several nodes."""


@dataclass(frozen=True)
class Estimate:
    """A run on a machine, or on several alike. Times are in seconds, and expected values."""

    timeline: Timeline
    machine: Machine
    nodes: int
    spot: bool
    price: Price | None
    """Of one machine."""
    segments: tuple[SegmentEstimate, ...]
    evaluation: Figure
    """Images a second, by the recipe's first protocol."""
    evaluation_seconds: float
    """Of all evaluations."""
    finder_seconds: float
    """Of the search for `lr: auto`."""
    preparation: Figure
    """Seconds to stage the packed data from a bucket."""
    startup: Figure
    """Seconds from the command to the first step."""
    restart: Figure
    """Seconds from an interruption until training goes on, on another machine."""
    save: Figure
    """Seconds for which a save stops the training."""
    interval_seconds: float
    """Of work, from one save to the next."""
    interruptions_per_hour: Figure
    """Of all nodes: each of them stops the run."""

    @property
    def training_seconds(self) -> float:
        return sum(segment.seconds for segment in self.segments)

    @property
    def compile_seconds(self) -> float:
        return sum(segment.compile_seconds for segment in self.segments)

    @property
    def work_seconds(self) -> float:
        """What interruptions can undo: training, compilation, evaluation, the finder."""
        apart = self.compile_seconds + self.evaluation_seconds + self.finder_seconds
        return self.training_seconds + apart

    @property
    def checkpoint_seconds(self) -> float:
        """What all saves take."""
        return saves(self.work_seconds, self.interval_seconds) * self.save.value

    @property
    def undisturbed_seconds(self) -> float:
        """What the command takes on a machine that has the data and stays."""
        return self.startup.value + self.work_seconds + self.checkpoint_seconds

    @property
    def interruptions(self) -> float:
        """The expected number of interruptions."""
        return expected_interruptions(
            self.work_seconds,
            self.interval_seconds,
            self.save.value,
            self.interruptions_per_hour.value,
        )

    @property
    def interruption_seconds(self) -> float:
        """Lost work and restarts, together."""
        expected = expected_seconds(
            self.work_seconds,
            self.interval_seconds,
            self.save.value,
            self.restart.value,
            self.interruptions_per_hour.value,
        )
        return max(0.0, expected - self.work_seconds - self.checkpoint_seconds)

    @property
    def seconds(self) -> float:
        """All that is paid for: staging, start-up, work, saves and interruptions."""
        return self.preparation.value + self.undisturbed_seconds + self.interruption_seconds

    @property
    def minutes(self) -> float:
        return self.seconds / 60

    @property
    def dollars_per_hour(self) -> float | None:
        """Of all nodes; None where the price is not known."""
        hour = self.price.an_hour(spot=self.spot) if self.price else None
        return None if hour is None else hour * self.nodes

    def dollars_of(self, seconds: float) -> float | None:
        """Returns what so much of the machines costs; None where the price is not known."""
        hour = self.dollars_per_hour
        return None if hour is None else hour * seconds / 3600

    @property
    def dollars(self) -> float | None:
        """Of the whole run; None where the price is not known."""
        return self.dollars_of(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Of training, over all segments."""
        images = sum(s.segment.steps * s.segment.batch_size for s in self.segments)
        return images / self.training_seconds

    @property
    def bottleneck(self) -> str:
        """What holds training up for the longest."""
        held: defaultdict[str, float] = defaultdict(float)
        for segment in self.segments:
            held[segment.bottleneck] += segment.seconds
        return max(held, key=lambda name: held[name])

    @property
    def max_run_seconds(self) -> int:
        """For SageMaker's MaxRuntime: 1.5 times what is expected, in whole minutes."""
        return 60 * math.ceil(MARGIN * self.seconds / 60)

    @property
    def max_wait_seconds(self) -> int:
        """For SageMaker's MaxWaitTime: half as much again for waiting, and at least an hour."""
        return self.max_run_seconds + max(LEAST_WAIT, 60 * (self.max_run_seconds // 120))

    @property
    def sources(self) -> list[str]:
        """Where the numbers are from, in the words of their figures, each once."""
        return list(dict.fromkeys(_sources(self)))


def estimate(
    timeline: Timeline,
    machine: Machine,
    *,
    nodes: int = 1,
    spot: bool = False,
    price: Price | None = None,
    interruptions_per_hour: float | None = None,
    evaluation_images: int | None = None,
) -> Estimate:
    """Returns what a run takes and costs.

    Args:
        nodes: machines that train together.
        price: of one machine; by default the known one.
        interruptions_per_hour: of one machine; by default the recipe's on the spot market, none on
            demand.
        evaluation_images: by default ImageNet's 50,000 for as many training images, else 10% of all
            images, as pitstop holds out.

    Raises:
        InputError: too little is known of the model, or so many interruptions that no run ends.
    """
    if nodes > 1 and machine.calibration is not None:
        raise InputError("--nodes: what the network between machines like this one does is unknown")
    recipe = timeline.recipe
    segments = tuple(_segment(segment, machine, nodes) for segment in timeline.segments)
    evaluation = _evaluation(recipe, recipe.eval, machine, nodes)
    validation = evaluation_images or _validation_images(timeline)
    evaluation_seconds = len(timeline.evaluations) * validation / evaluation.value + sum(
        validation / _evaluation(recipe, also, machine, nodes).value for also in recipe.eval.also
    )
    preparation = _preparation(timeline, machine)
    startup = _measured(machine, lambda c: c.startup_seconds) or STARTUP
    save = _measured(machine, lambda c: c.save_seconds) or SAVE
    interruptions = _interruptions(recipe, spot, interruptions_per_hour, nodes)
    finder_seconds = _finder_seconds(timeline, segments[0])
    work = sum(s.seconds + s.compile_seconds for s in segments) + evaluation_seconds
    result = Estimate(
        timeline=timeline,
        machine=machine,
        nodes=nodes,
        spot=spot,
        price=price or find_price(machine.name),
        segments=segments,
        evaluation=evaluation,
        evaluation_seconds=evaluation_seconds,
        finder_seconds=finder_seconds,
        preparation=preparation,
        startup=startup,
        restart=_restart(machine, preparation, startup, segments),
        save=save,
        interval_seconds=_interval(timeline, work + finder_seconds, save, interruptions),
        interruptions_per_hour=interruptions,
    )
    if not math.isfinite(result.seconds):
        raise InputError(
            f"{interruptions.value:g} interruptions an hour: no run is expected to end: save more "
            "often (checkpoint.every)"
        )
    return result


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Returns an estimate as plain data; dollars are null where the price is not known."""
    price = estimate.price
    return {
        "recipe": estimate.timeline.recipe.name,
        "epochs": round(estimate.timeline.epochs, 6),
        "machine": estimate.machine.name,
        "nodes": estimate.nodes,
        "spot": estimate.spot,
        "minutes": estimate.minutes,
        "dollars": estimate.dollars,
        "dollars_per_hour": estimate.dollars_per_hour,
        "price": vars(price) if price else None,
        "images_per_second": estimate.images_per_second,
        "bottleneck": estimate.bottleneck,
        "preparation_minutes": estimate.preparation.value / 60,
        "startup_minutes": estimate.startup.value / 60,
        "training_minutes": estimate.training_seconds / 60,
        "compile_minutes": estimate.compile_seconds / 60,
        "evaluation_minutes": estimate.evaluation_seconds / 60,
        "finder_minutes": estimate.finder_seconds / 60,
        "checkpoint_minutes": estimate.checkpoint_seconds / 60,
        "checkpoint_interval_minutes": estimate.interval_seconds / 60,
        "interruptions": estimate.interruptions,
        "interruptions_per_hour": estimate.interruptions_per_hour.value,
        "interruption_minutes": estimate.interruption_seconds / 60,
        "max_run_seconds": estimate.max_run_seconds,
        "max_wait_seconds": estimate.max_wait_seconds,
        "segments": [_segment_json(estimate, segment) for segment in estimate.segments],
        "sources": estimate.sources,
    }


def _segment_json(estimate: Estimate, part: SegmentEstimate) -> dict[str, Any]:
    segment = part.segment
    return {
        "phase": segment.phase.name,
        "resolution": segment.resolution,
        "batch_size": segment.batch_size,
        "images": segment.steps * segment.batch_size,
        "minutes": part.seconds / 60,
        "compile_minutes": part.compile_seconds / 60,
        "dollars": estimate.dollars_of(part.seconds + part.compile_seconds),
        "images_per_second": part.images_per_second,
        "bottleneck": part.bottleneck,
        "rates": {
            name: {"images_per_second": rate.value, "source": rate.source}
            for name, rate in part.rates.items()
        },
    }


def _sources(estimate: Estimate) -> Iterator[str]:
    for segment in estimate.segments:
        yield from (figure.source for figure in segment.rates.values())
    yield estimate.evaluation.source
    if estimate.compile_seconds:
        yield COMPILE.source
    if estimate.preparation.value:
        yield estimate.preparation.source
    yield from (estimate.startup.source, estimate.save.source)
    if estimate.interruptions_per_hour.value:
        yield from (estimate.interruptions_per_hour.source, estimate.restart.source)
    if estimate.price and estimate.dollars is not None:
        yield estimate.price.stated


# Of a segment


def _segment(segment: Segment, machine: Machine, nodes: int) -> SegmentEstimate:
    rates = _rates(segment, machine, nodes)
    bottleneck, rate = _pace(rates, shared=machine.gpu is None and not _spare(segment, machine))
    return SegmentEstimate(
        segment=segment,
        seconds=segment.steps * segment.batch_size / rate,
        compile_seconds=COMPILE.value if _compiles(segment.recipe, machine) else 0.0,
        images_per_second=rate,
        bottleneck=bottleneck,
        rates=rates,
    )


def _pace(rates: dict[str, Figure], *, shared: bool) -> tuple[str, float]:
    """Returns what holds training up, and the images a second that all parts come to together.

    Where they are `shared`, the cores that train are those that decode.
    """
    slowest = min(rates, key=lambda name: rates[name].value)
    if not shared:
        return slowest, rates[slowest].value
    cores = 1 / (1 / rates[CPU].value + 1 / rates[DECODER].value)
    if cores < rates[slowest].value:
        return min((CPU, DECODER), key=lambda name: rates[name].value), cores
    return slowest, rates[slowest].value


def _spare(segment: Segment, machine: Machine) -> int:
    """Returns the cores that a training on the processor leaves alone."""
    return max(0, machine.cores - (segment.recipe.threads or machine.cores))


def _compiles(recipe: Recipe, machine: Machine) -> bool:
    return machine.gpu is not None if recipe.compile == "auto" else recipe.compile is not False


def _rates(segment: Segment, machine: Machine, nodes: int) -> dict[str, Figure]:
    training = _training(segment.recipe, segment.resolution, machine)
    decoders = machine.cores if machine.gpu else _spare(segment, machine) or machine.cores
    rates = {
        GPU if machine.gpu else CPU: training,
        DECODER: _decoding(segment.resolution, machine, decoders),
        **_reading(segment, machine),
    }
    rates = {name: Figure(rate.value * nodes, rate.source) for name, rate in rates.items()}
    if nodes > 1:
        rates[NETWORK] = _averaging(segment, machine, nodes)
    return rates


def _training(recipe: Recipe, resolution: int, machine: Machine) -> Figure:
    """Returns what all GPUs of a machine, or its cores, train on."""
    model = model_key(recipe.model)
    if machine.calibration:
        measured = machine.calibration
        return measured_images_per_second(measured, measured.training, model, resolution)
    assert machine.gpu is not None
    one = images_per_second(machine.gpu, model, resolution, gpus=machine.gpus)
    return Figure(one.value * machine.gpus, one.source)


def _decoding(resolution: int, machine: Machine, cores: int) -> Figure:
    if machine.calibration and machine.calibration.decode:
        near = min(machine.calibration.decode, key=lambda d: abs(d.resolution - resolution))
        rate = near.images_per_second_a_core
        source = f"measured: pitstop calibrate, {near.stored}, {near.resolution} px"
    else:
        rate = DECODE.value * min(1.0, (DECODE_PIXELS / resolution) ** 2)
        source = DECODE.source
    return Figure(rate * cores, source)


def _reading(segment: Segment, machine: Machine) -> dict[str, Figure]:
    size = segment.num_samples * IMAGE_BYTES.value
    if size <= KEPT * machine.memory_gib * 2**30:
        source = f"{READ.source}; {size / 1e9:.3g} GB stay in memory"
        return {MEMORY: Figure(READ.value * machine.cores, source)}
    disk = _disk(machine)
    return {
        DISK: Figure(
            disk.value * 1e6 / IMAGE_BYTES.value,
            f"{disk.source}; {size / 1e9:.3g} GB do not stay in memory",
        )
    }


def _disk(machine: Machine) -> Figure:
    """Returns the MB/s that the data are read at."""
    if machine.disk_mb_per_second:
        where = "measured: pitstop calibrate" if machine.calibration else "published: AWS's tables"
        return Figure(
            machine.disk_mb_per_second,
            f"{where}, a disk of at least {machine.disk_mb_per_second:,.0f} MB/s",
        )
    return VOLUME


def _averaging(segment: Segment, machine: Machine, nodes: int) -> Figure:
    """Returns the images a second at which averaging gradients takes all of a step's time.

    A ring sends and receives 2 (nodes - 1) / nodes of the fp32 gradients at each node.
    """
    parameters = model_size(model_key(segment.recipe.model)).parameters * 1e6
    sent = 2 * (nodes - 1) / nodes * 4 * parameters
    seconds = sent * 8 / (ALL_REDUCE * machine.network_gbps * 1e9)
    source = (
        f"assumed: {ALL_REDUCE:.0%} of {machine.network_gbps:g} Gb/s, {sent / 1e6:.3g} MB a step"
    )
    return Figure(segment.batch_size / seconds, source)


# Of the run


def _evaluation(recipe: Recipe, protocol: Protocol, machine: Machine, nodes: int) -> Figure:
    """Returns the images a second of an evaluation; each may be seen in several views."""
    side = protocol.resolution or recipe.eval_resolution()
    views = (2 if protocol.flip_average else 1) * (3 if protocol.translate_average else 1)
    measured = machine.calibration
    if measured and measured.evaluation:
        model = model_key(recipe.model)
        computed = measured_images_per_second(measured, measured.evaluation, model, side)
    else:
        training = _training(recipe, side, machine)
        source = (
            f"{training.source}; evaluation {EVALUATION.value:g} x as fast: {EVALUATION.source}"
        )
        computed = Figure(EVALUATION.value * training.value, source)
    if measured:
        decoded = _decoding(side, machine, machine.cores)
    else:
        decoded = Figure(DECODE_WHOLE.value * machine.cores, DECODE_WHOLE.source)
    rate = computed.value / views
    if machine.gpu is None:
        return Figure(nodes / (1 / rate + 1 / decoded.value), computed.source)
    if decoded.value < rate:
        return Figure(nodes * decoded.value, decoded.source)
    return Figure(nodes * rate, computed.source)


def _validation_images(timeline: Timeline) -> int:
    if timeline.num_samples == IMAGENET:
        return IMAGENET_VAL
    return max(1, round(timeline.num_samples / 9))


def _finder_seconds(timeline: Timeline, first: SegmentEstimate) -> float:
    finder = timeline.recipe.lr_finder
    if finder is None or not timeline.lr_is_fallback:
        return 0.0
    return finder.iterations * first.segment.batch_size / first.images_per_second


def _preparation(timeline: Timeline, machine: Machine) -> Figure:
    if machine.calibration:
        return Figure(0.0, "the data are here")
    size = max(segment.num_samples for segment in timeline.segments) * IMAGE_BYTES.value
    network = machine.network_gbps * 1000 / 8 / 2
    rate = min(STAGING.value, network, _disk(machine).value)
    return Figure(size / 1e6 / rate, f"{STAGING.source}: {size / 1e9:.3g} GB at {rate:,.0f} MB/s")


def _restart(
    machine: Machine,
    preparation: Figure,
    startup: Figure,
    segments: tuple[SegmentEstimate, ...],
) -> Figure:
    """Returns what comes before training goes on: the machine, the data, the process, the model."""
    compiled = sum(s.compile_seconds * s.seconds for s in segments) / sum(
        s.seconds for s in segments
    )
    boot = Figure(0.0, "assumed: on the same machine") if machine.calibration else BOOT
    seconds = boot.value + preparation.value + startup.value + compiled
    return Figure(seconds, f"{boot.source}; then preparation, start-up, compilation")


def _interval(timeline: Timeline, work: float, save: Figure, interruptions: Figure) -> float:
    """Returns the seconds of work between two saves."""
    policy = timeline.recipe.checkpoint
    if policy.every == "auto":
        rate = interruptions.value or policy.interruptions_per_hour
        return optimal_interval(save.value, 3600 / rate)
    amount, unit = amount_and_unit(policy.every)
    if unit == "min":
        return 60.0 * amount
    whole = timeline.epochs if unit == "ep" else timeline.last
    return work * amount / whole


def _interruptions(recipe: Recipe, spot: bool, stated: float | None, nodes: int) -> Figure:
    if stated is None and not spot:
        return Figure(0.0, "assumed: none on demand")
    each = recipe.checkpoint.interruptions_per_hour if stated is None else stated
    where = "assumed, as in the recipe" if stated is None else "as stated"
    return Figure(each * nodes, f"{where}: {each:g} interruptions an hour of each machine")


def _measured(machine: Machine, read: Callable[[Calibration], float]) -> Figure | None:
    calibration = machine.calibration
    if calibration is None:
        return None
    return Figure(read(calibration), f"measured: pitstop calibrate, {calibration.date}")
