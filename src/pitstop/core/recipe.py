"""Recipes: what to train and how, as data.

A recipe is a YAML file. Whatever may differ from phase to phase is a field of `PhaseSettings`; the
recipe states it once for all phases and a phase states only its difference. Loading resolves all
that: `extends`, overrides, defaults and durations, so that a loaded recipe's phases are complete.
"""

import copy
import math
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pitstop.core.errors import InputError
from pitstop.core.length import Length
from pitstop.core.schedule import Cosine, LrSchedule, Value, Varying, named, within
from pitstop.core.strict import Strict, did_you_mean


def _up_to(high: float) -> AfterValidator:
    """Returns a check that a `Value` is at most `high`."""

    def check(value: float | Varying) -> float | Varying:
        values = [v for _, v in value.keypoints] if isinstance(value, Varying) else [value]
        if max(values) > high:
            raise ValueError(f"{max(values):g} must be at most {high:g}")
        return value

    return AfterValidator(check)


Momentum = Annotated[Value, within(0, 1)]
Alpha = Annotated[Value, within(0, math.inf)]
Magnitude = Annotated[Value, within(0, math.inf)]
Share = Annotated[Value, within(0, math.inf), _up_to(1)]
Turn = Annotated[Value, within(0, math.inf), _up_to(0.5)]
HalfLife = Annotated[Value, within(1e-3, math.inf)]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

MOST_EPOCHS = 100_000

BUNDLED = Path(__file__).parent.parent / "recipes"


class Crop(Strict):
    """RandomResizedCrop, with torchvision's distribution (Szegedy et al., arXiv 1409.4842)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that is kept, up to 1."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How the crop is resized; both are antialiased."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {list(self.scale)} must be 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)} must be 0 < low <= high")
        return self


class RandAugment(Strict):
    """RandAugment (arXiv 1909.13719), as torchvision's; with `increasing` as timm's `inc1`.

    `prob`, of each operation, and `magnitude_std` have timm's meaning.
    """

    name: Literal["rand_augment"] = "rand_augment"
    num_ops: int = Field(default=2, ge=1)
    """Operations an image, one after the other."""
    magnitude: Magnitude = 9.0
    """Their strength, from 0 to 30 on torchvision's scale; with `increasing` from 0 to 10,
    timm's."""
    magnitude_std: float = Field(default=0.0, ge=0)
    """Standard deviation of each operation's magnitude, which stays on the scale."""
    prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that an operation is done. In timm it is 0.5 unless `p` says otherwise."""
    increasing: bool = False
    """The 15 operations of timm's `inc1`, with its arguments: Invert and SolarizeAdd instead of
    Identity, a stronger Posterize."""

    @property
    def highest_magnitude(self) -> int:
        """The magnitude of full strength: torchvision's is the last of 31, timm's is 10."""
        return 10 if self.increasing else 30

    @model_validator(mode="after")
    def _magnitude_on_its_scale(self) -> Self:
        m, top = self.magnitude, self.highest_magnitude
        highest = max(v for _, v in m.keypoints) if isinstance(m, Varying) else m
        if highest > top:
            raise ValueError(f"magnitude {highest:g} must be at most {top} here")
        return self


class TrivialAugmentWide(Strict):
    """TrivialAugment with the wide space (arXiv 2103.10158), as torchvision's."""

    name: Literal["trivial_augment_wide"] = "trivial_augment_wide"


AnyAugment = Annotated[
    Annotated[RandAugment | TrivialAugmentWide, Field(discriminator="name")], BeforeValidator(named)
]
"""An augmentation policy in a recipe: a name (`rand_augment`) or a mapping with a `name`."""


class ColorJitter(Strict):
    """torchvision's ColorJitter: factors from 1 - value to 1 + value, hue in turns."""

    brightness: Share = 0.0
    """The factor is drawn from `1 - value` to `1 + value`; 0 is off."""
    contrast: Share = 0.0
    """As brightness."""
    saturation: Share = 0.0
    """As brightness."""
    hue: Turn = 0.0
    """Hues are turned by `-value` to `value` of a full turn; 0 is off."""


class RandomErasing(Strict):
    """Random erasing (arXiv 1708.04896) of normalised images, as torchvision's and timm's."""

    prob: Share = 0.5
    """Probability that a box of an image is erased."""
    scale: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest share of the image's area in the box, 0 to 1."""
    ratio: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest height over width of the box."""
    mode: Literal["const", "pixel"] = "const"
    """What comes there. `const`: the mean color; `pixel`: normal noise, of its own for each
    pixel."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {list(self.scale)} must be 0 <= low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)} must be 0 < low <= high")
        return self


class Mix(Strict):
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), with timm's names and meaning."""

    mixup_alpha: Alpha = 0.0
    """Mixup's share is drawn from Beta(alpha, alpha); 0 is off (arXiv 1710.09412)."""
    cutmix_alpha: Alpha = 0.0
    """The same for CutMix's area; 0 is off (arXiv 1905.04899)."""
    prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that a batch (with `elem`: an image) is mixed at all."""
    switch_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability that it is CutMix and not mixup, where both are on."""
    mode: Literal["batch", "elem"] = "batch"
    """`batch`: one draw for the whole batch; `elem`: one for each image."""


class Model(Strict):
    """A timm model: `name` and `kwargs` go to `timm.create_model`."""

    name: str = "resnet50"
    """A name that `timm.create_model` knows."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """What else `timm.create_model` is given, such as `{drop_path_rate: 0.05}`."""
    blurpool: bool = False
    """A 3x3 blur before each convolution of stride above 1 with at least 16 input channels (arXiv
    1904.11486)."""
    weights: str | None = None
    """What training starts from: a run's directory, a `.safetensors` file, its URL in a bucket, or
    `timm` for the pretrained weights of `name` (with its tag, such as `resnet50.a1_in1k`)."""
    prior_bias: bool = False
    """The classifier's bias starts at -log(classes): what BCE needs to begin at each class's prior
    (arXiv 1708.02002, section 4.1)."""


class Optimizer(Strict):
    """What all optimizers share. `weight_decay` is for tensors of two or more dimensions."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of tensors of two or more dimensions."""
    norm_weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the others (norms, biases), and of what the model itself exempts."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """The lr of each layer is this times that of the layer above; the head's is the lr itself.
    Layers are timm's."""
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Patterns of parameters' names to factors of their lr, such as `{"stem.*": 0.1}`; of several
    that match the last counts."""


class Sgd(Optimizer):
    """torch.optim.SGD; with `decoupled_weight_decay` as Composer's DecoupledSGDW."""

    name: Literal["sgd"] = "sgd"
    momentum: Momentum = 0.9
    """Share of the step before in the next one."""
    nesterov: bool = False
    """Nesterov's momentum, as torch has it."""
    decoupled_weight_decay: bool = False
    """A step takes `weight_decay x lr / peak lr` of each weight off, apart from the gradient (arXiv
    1711.05101, with Composer's scale)."""


class RmsProp(Optimizer):
    """torch.optim.RMSprop."""

    name: Literal["rmsprop"] = "rmsprop"
    momentum: Momentum = 0.9
    """Share of the step before in the next one."""
    alpha: float = Field(default=0.99, ge=0, lt=1)
    """Smoothing of the squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squares."""

    @field_validator("momentum")
    @classmethod
    def _has_momentum_throughout(cls, value: float | Varying) -> float | Varying:
        if isinstance(value, Varying) and any(v == 0 for _, v in value.keypoints):
            raise ValueError("torch's RMSprop cannot go through a momentum of 0: write 1e-6")
        return value


class AdamW(Optimizer):
    """torch.optim.AdamW (arXiv 1711.05101). `momentum` is its beta1."""

    name: Literal["adamw"] = "adamw"
    momentum: Momentum = 0.9
    """beta1: smoothing of the gradient."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Smoothing of the squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squares."""


class Lamb(AdamW):
    """timm.optim.Lamb (arXiv 1904.00962). `momentum` is its beta1."""

    name: Literal["lamb"] = "lamb"  # pyright: ignore[reportIncompatibleVariableOverride]
    eps: float = Field(default=1e-6, gt=0)
    """Added to the root of the squares."""


AnyOptimizer = Annotated[
    Annotated[Sgd | RmsProp | AdamW | Lamb, Field(discriminator="name")], BeforeValidator(named)
]
"""An optimizer in a recipe: a name (`adamw`) or a mapping with a `name`."""


class Ema(Strict):
    """Averaged weights and buffers. After `half_life` steps a weight's share has halved.

    Warm-up is min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
    """

    half_life: HalfLife = 1000.0
    """Steps after which a weight's share has halved."""
    every: int = Field(default=1, ge=1)
    """Steps from one update to the next."""
    lookahead: bool = False
    """Each update also sets the model to the average (Lookahead, arXiv 1907.08610)."""


class Protocol(Strict):
    """How images are shown to a model that is evaluated. `resolution`: the last phase's."""

    resolution: int | None = Field(default=None, ge=1)
    """Side of the center crop in pixels; in `also`, left out, that of `eval`."""
    crop_ratio: float = Field(default=0.875, gt=0, le=1)
    """Side of the crop over the short side of the resized image."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How the image is resized; both are antialiased."""
    flip_average: bool = False
    """The mean of the logits of the image and its mirror image."""
    translate_average: int = Field(default=0, ge=0)
    """In pixels, 0 is off: half from the image and half from the two that lie so many pixels up and
    left, and down and right of it (airbench's multi-crop evaluation, arXiv 2404.00498, section
    3.5)."""


class Eval(Protocol):
    """The evaluation protocol; `every` is in epochs."""

    batch_size: int = Field(default=256, ge=1)
    """Images at once."""
    every: int = Field(default=1, ge=1)
    """Epochs from one evaluation to the next; there is always one at the end."""
    also: tuple[Protocol, ...] = ()
    """More protocols, by which the end of the run is evaluated too."""


class LrFinder(Strict):
    """The range test that finds `lr: auto` (Smith, arXiv 1506.01186).

    The lr rises exponentially from `start_lr` to `end_lr` over `iterations` steps.
    """

    fallback: float = Field(gt=0)
    """The peak lr where the curve has no suggestion; also that of plans."""
    iterations: int = Field(default=100, ge=10)
    """Steps of the test."""
    start_lr: float = Field(default=1e-5, gt=0)
    """The lr of its first step."""
    end_lr: float = Field(default=1.0, gt=0)
    """The lr of its last step; the test ends before where training fails."""
    policy: Literal["min0.1", "steepest", "valley"] = "min0.1"
    """`min0.1`: a tenth of the lr of the lowest loss; `steepest`: where the loss falls fastest;
    `valley`: halfway down the longest fall, after fastai's default."""
    multiplier: float = Field(default=1.0, gt=0)
    """From the found lr to the peak."""
    floor: float | None = Field(default=None, gt=0)
    """The found lr is at least this."""
    cap: float | None = Field(default=None, gt=0)
    """The found lr is at most this."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.start_lr >= self.end_lr:
            raise ValueError(f"end_lr {self.end_lr:g} must be above start_lr {self.start_lr:g}")
        if self.floor is not None and self.cap is not None and self.floor > self.cap:
            raise ValueError(f"floor {self.floor:g} is above cap {self.cap:g}")
        return self


class Checkpoint(Strict):
    """When to save (`1ep`, `500 steps`, `10 min`; always at the end) and what to keep."""

    every: str = "1ep"
    """When to save: `1ep`, `500 steps`, `10 min`, or `auto`, the interval by which saves and lost
    work together cost least. Also at the end, when stopped, and after an evaluation among the
    best."""
    interruptions_per_hour: float = Field(default=0.05, gt=0)
    """How often the machine is expected to be taken away, for `every: auto`."""
    keep_last: int = Field(default=2, ge=1)
    """So many of the latest are kept."""
    keep_best: int = Field(default=1, ge=0)
    """So are so many of the highest top-1."""
    keep_every: str | None = None
    """So is one for every so many epochs, such as `5ep`."""

    @field_validator("every")
    @classmethod
    def _epochs_steps_minutes_or_auto(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*\s*(ep|steps|min)|auto", value):
            raise ValueError(f"write {value!r} as '1ep', '500 steps', '10 min' or 'auto'")
        return value

    @field_validator("keep_every")
    @classmethod
    def _epochs(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d*\s*ep", value):
            raise ValueError(f"write {value!r} as epochs: '5ep'")
        return value

    @property
    def mtbf_seconds(self) -> float:
        """The expected time from one interruption to the next."""
        return 3600 / self.interruptions_per_hour


def amount_and_unit(every: str) -> tuple[int, str]:
    """Splits `500 steps` into (500, "steps"); `auto` has no amount."""
    unit = every.lstrip("0123456789 ")
    return int(every.removesuffix(unit)), unit


class Divergence(Strict):
    """What is done about a loss, gradient or weight that is not finite.

    The run goes back to the last good checkpoint and tries again otherwise.
    """

    retries: int = Field(default=2, ge=0)
    """How often, before the run is given up with exit code 76."""
    policy: Literal["skip", "lower_lr"] = "skip"
    """`skip`: without the images of the steps from the checkpoint to the divergence; epochs and
    schedules stay as they are. `lower_lr`: with the same images and a lower lr to the end."""
    factor: float = Field(default=0.5, gt=0, lt=1)
    """By which `lower_lr` multiplies the lr, at each retry."""


class PhaseSettings(Strict):
    """What may differ from phase to phase."""

    resolution: int | tuple[int, int] = 224
    """Side of the square in pixels. `[low, high]` is a ramp: at most 4 sizes of equal length; those
    between are multiples of 16."""
    batch_size: int = Field(default=256, ge=1)
    """Images a step, over all ranks and micro-batches."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Micro-batches in which a batch is computed. Batch norm sees each alone."""
    data_fraction: float = Field(default=1.0, gt=0, le=1)
    """Train on the first `floor(fraction x N)` images of the packed order: every class in
    proportion, a smaller fraction inside a larger one."""
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = 0.1
    """The peak of the learning rate; the schedule is in units of it. `auto`: what the `lr_finder`
    finds."""
    lr_per: int | None = Field(default=None, ge=1)
    """With `lr_per: 256`, the peak is `lr x batch_size / 256`."""
    lr_cap: float | None = Field(default=None, gt=0)
    """The peak is at most this."""
    lr_scale: float = Field(default=1.0, gt=0)
    """Multiplies the peak, after the cap."""
    lr_schedule: LrSchedule = Cosine()
    """The curve, in units of the peak."""
    crop: Crop = Crop()
    """Random crop."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirroring. `random`: by the toss of a coin; `alternating`: an image in every second pass,
    from a side of its own on (arXiv 2404.00498)."""
    translate: int = Field(default=0, ge=0)
    """Each image is moved by up to so many pixels along both axes; its edge is reflected."""
    color_jitter: ColorJitter | None = None
    """Random brightness, contrast, saturation and hue."""
    augment: AnyAugment | None = None
    """A policy of augmentation."""
    random_erasing: RandomErasing | None = None
    """Boxes of the image are erased."""
    augment_scale: float = Field(default=1.0, ge=0)
    """Multiplies the strength of `color_jitter`, the magnitude of `rand_augment` and the `prob` of
    `random_erasing`, each up to the highest that it has. What is off stays off."""
    repeated_augmentation: int = Field(default=1, ge=1)
    """An image comes so often in a row; an epoch has as many draws as before, so it shows one image
    in so many (arXiv 1901.09335)."""
    mix: Mix | None = None
    """Mixup and CutMix."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes (arXiv 1512.00567)."""
    freeze: tuple[str, ...] = ()
    """Names of modules, such as `layer1`, or patterns of them, such as `layer[12]`, whose
    parameters stand still."""
    frozen_batch_norm: Literal["eval", "train"] = "eval"
    """Whether batch statistics of frozen modules stand still too (`eval`), or go on (`train`)."""
    optimizer_state: Literal["keep", "reset", "reset_frozen"] = "keep"
    """What the optimizer remembers (momentum) when the phase begins. `keep`: all; `reset`: nothing;
    `reset_frozen`: nothing of what the phase freezes, which thaws without it."""

    @field_validator("resolution")
    @classmethod
    def _sides(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError(f"{value} must be a side in pixels, or [low, high]")
        return value

    def peak_lr(self) -> float:
        """Returns the phase's peak learning rate: scaled by the batch, capped, then `lr_scale`."""
        assert self.lr != "auto"
        peak = self.lr if self.lr_per is None else self.lr * self.batch_size / self.lr_per
        return min(peak, self.lr_cap or peak) * self.lr_scale


class Phase(PhaseSettings):
    """A stretch of the run. What it does not state it has from the recipe."""

    name: str = ""
    """For tables, logs and plots."""
    duration: Length | Literal["rest"] = "rest"
    """How long. `rest`: what the other phases leave."""

    @model_validator(mode="after")
    def _micro_batches(self) -> Self:
        if self.grad_accum_steps > self.batch_size:
            raise ValueError(
                f"grad_accum_steps {self.grad_accum_steps} leaves micro-batches of batch_size "
                f"{self.batch_size} empty: lower it"
            )
        return self

    @model_validator(mode="after")
    def _moved_within_itself(self) -> Self:
        low = self.resolution if isinstance(self.resolution, int) else self.resolution[0]
        if self.translate >= low:
            raise ValueError(f"translate {self.translate} must be less than the resolution {low}")
        return self

    def epochs(self) -> float:
        """Returns the phase's length in epochs; only for the phases of a loaded recipe."""
        assert isinstance(self.duration, Length)
        assert self.duration.unit == "ep"
        return self.duration.amount


class Recipe(PhaseSettings):
    """What to train and how. Phases are complete: each states every setting."""

    name: str = "recipe"
    """The default of `--out` is `runs/NAME`."""
    data: str | None = None
    """The default of `--data`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything random: order, crops, flips, mixing, initial weights, dropout."""
    epochs: float = Field(gt=0)
    """Length of the run."""
    phases: tuple[Phase, ...] = Field(min_length=1)
    """What happens, in order."""
    model: Annotated[Model, BeforeValidator(named)] = Model()
    """What is trained."""
    optimizer: AnyOptimizer = Sgd()
    """How weights follow from gradients."""
    loss: Literal["cross_entropy", "bce", "bce_sum"] = "cross_entropy"
    """`bce` is the mean over the classes of binary cross entropy, `bce_sum` the sum, both as
    timm's."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest 2-norm of the whole gradient."""
    agc: float | None = Field(default=None, gt=0)
    """Adaptive gradient clipping (arXiv 2102.06171), as timm's: a gradient's largest norm over that
    of its weights, unit by unit, of all layers but the classifier. The paper takes 0.01. Not
    together with `clip_grad_norm`."""
    ema: Ema | None = None
    """An average of the weights, which is then what is evaluated."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel: red, green, blue, in units of 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by per channel, after that."""
    eval: Eval = Eval()
    """The protocol of evaluations, and how often they come."""
    lr_finder: LrFinder | None = None
    """How `lr: auto` is found."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save, and what to keep."""
    divergence: Divergence = Divergence()
    """What is done about numbers that are not finite."""
    sync_bn: bool = False
    """Batch norm over the whole micro-batch of all ranks; needs GPUs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto`: a GPU where torch finds one, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the forward pass. `auto`: on CUDA bf16 where the GPU computes in it, else fp16; on a CPU
    bf16 where the processor computes in it, else fp32; on a Mac's GPU fp32."""
    compile: bool | Literal["auto"] | CompileMode = "auto"
    """Whether the model is compiled, and in which of torch.compile's modes. `auto`: on CUDA only;
    `true`: in mode `default`."""
    deterministic: bool = False
    """The same bits on each run on a GPU too: nothing is chosen by timing. An operation that has no
    such kernel ends the run."""
    threads: int | None = Field(default=None, ge=1)
    """Threads that compute on a CPU; `null`: all cores. Small models are faster with one, and do
    not suffer when another program wants a core."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Threads that decode images, of each rank; `auto`: the machine's ranks share its cores."""
    prefetch: int = Field(default=4, ge=1)
    """Batches that are decoded ahead."""
    target_accuracy: float | None = Field(default=None, gt=0, le=100)
    """Percent: the run ends at the first evaluation whose top-1 reaches it."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_phases(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("a recipe is a mapping of keys to values")
        raw = dict(cast("dict[str, Any]", data))
        cls.check_keys(raw)
        phases = [_completed(phase, raw) for phase in _stated_phases(raw.get("phases"))]
        raw["epochs"], durations = _resolve_durations(
            raw.get("epochs"), [phase.get("duration", "rest") for phase in phases]
        )
        for i, (phase, duration) in enumerate(zip(phases, durations, strict=True)):
            phase["duration"] = duration
            phase["name"] = phase.get("name") or f"phase {i + 1}"
        raw["phases"] = phases
        return raw

    @model_validator(mode="after")
    def _clips_once(self) -> Self:
        if self.agc is not None and self.clip_grad_norm is not None:
            raise ValueError("agc and clip_grad_norm both clip: give one of them")
        return self

    @model_validator(mode="after")
    def _lr_can_be_found(self) -> Self:
        if not self.has_auto_lr():
            return self
        if self.lr_finder is None:
            raise ValueError("lr: auto needs an lr_finder: at least `lr_finder: {fallback: 0.1}`")
        if any(phase.lr == "auto" and phase.lr_per is not None for phase in self.phases):
            raise ValueError("lr_per: lr: auto is found for the batch as it is: leave lr_per out")
        return self

    def has_auto_lr(self) -> bool:
        """Tells whether a phase's lr is still to be found."""
        return any(phase.lr == "auto" for phase in self.phases)

    def with_lr(self, lr: float) -> "Recipe":
        """Returns the recipe with `lr` wherever it says `auto`."""
        phases = [p.model_copy(update={"lr": lr}) if p.lr == "auto" else p for p in self.phases]
        own = {"lr": lr} if self.lr == "auto" else {}
        return self.model_copy(update={"phases": tuple(phases), **own})

    def eval_resolution(self) -> int:
        """Returns the side in pixels at which the model is evaluated."""
        last = self.phases[-1].resolution
        return self.eval.resolution or (last if isinstance(last, int) else last[1])

    def identity(self) -> dict[str, Any]:
        """Returns what decides the result, as flat `phases.0.batch_size`-like keys to values.

        Left out: circumstance (device, precision, compile, deterministic, threads, workers,
        prefetch), what only observes (checkpoint), when to stop early (target_accuracy), names, and
        the settings that each phase repeats. Also what to do about a divergence: what was done is
        an amendment.
        """
        aside = {"data", "name", "checkpoint", "divergence", "target_accuracy"}
        aside |= {"device", "precision", "compile", "deterministic"}
        aside |= {"threads", "workers", "prefetch"}
        stated = self.model_dump(mode="json", exclude=aside | set(PhaseSettings.model_fields))
        for phase in stated["phases"]:
            del phase["name"]
        return _flat(stated)


def _stated_phases(stated: Any) -> list[dict[str, Any]]:
    if stated is None:
        return [{"duration": "100%"}]
    phases = cast("list[Any]", stated)
    if phases == []:
        raise ValueError("phases is empty: leave it out for a single phase")
    if not isinstance(stated, list | tuple) or not all(isinstance(p, dict) for p in phases):
        raise ValueError("phases is a list of mappings, each with a duration")
    for i, phase in enumerate(phases):
        with _located(f"phases.{i}"):
            Phase.check_keys(phase)
    return list(phases)


@contextmanager
def _located(where: str) -> Generator[None]:
    """Says where a ValueError raised inside comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _completed(phase: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the phase with what it leaves to the recipe; its own lr_schedule spans the phase."""
    inherited = {key: recipe[key] for key in PhaseSettings.model_fields if key in recipe}
    full = {**inherited, **phase}
    schedule = phase.get("lr_schedule")
    if isinstance(schedule, str):
        full["lr_schedule"] = {"name": schedule, "over": "phase"}
    elif isinstance(schedule, dict):
        full["lr_schedule"] = {"over": "phase", **cast("dict[str, Any]", schedule)}
    return full


def _resolve_durations(epochs: Any, stated: list[Any]) -> tuple[float, list[str]]:
    """Returns the epochs of the run, and of each phase as `Nep`."""
    lengths: list[Length | str] = []
    for i, duration in enumerate(stated):
        with _located(f"phases.{i}.duration"):
            lengths.append(duration if duration == "rest" else Length.parse(duration))
    own = [d for d in lengths if isinstance(d, Length)]
    relative = len(own) < len(lengths) or any(d.unit == "%" for d in own)
    if epochs is None:
        if relative:
            raise ValueError("epochs is missing: say how many, or give every duration as 'Nep'")
        epochs = sum(d.amount for d in own)
    try:
        total = float(epochs)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"epochs {str(epochs)[:40]!r} is not a number of epochs") from None
    if not 0 < total <= MOST_EPOCHS:
        raise ValueError(f"epochs {total:g} must be more than 0 and at most {MOST_EPOCHS:,}")
    used = sum(d.epochs(total) for d in own)
    rests = len(lengths) - len(own)
    if rests > 1:
        raise ValueError("only one phase can last for the 'rest': give the others a duration")
    if (rests == 0 and abs(used - total) > 1e-6 * total) or (rests == 1 and used >= total):
        hint = "write durations as percentages (50%)" if rests == 0 else "raise epochs"
        raise ValueError(f"phases add up to {used:g} epochs, but epochs is {total:g}: {hint}")
    each = [round(d.epochs(total) if isinstance(d, Length) else total - used, 9) for d in lengths]
    return total, [f"{amount!r}ep" for amount in each]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
    elif isinstance(value, list) and any(isinstance(v, dict) for v in cast("list[Any]", value)):
        items = {str(i): v for i, v in enumerate(cast("list[Any]", value))}
    if not items:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


# Loading


def bundled_recipes() -> dict[str, Path]:
    """Returns the recipes that come with pitstop, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Returns the file of a bundled recipe's name or of a path.

    Raises:
        InputError: there is none.
    """
    bundled = bundled_recipes()
    if name in bundled:
        return bundled[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if path.is_file():
            return path
        raise InputError(f"{name}: no such recipe file")
    meant = did_you_mean(name, list(bundled))
    raise InputError(f"no recipe {name!r}{meant}; `pitstop recipes` lists them")


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads, extends, overrides and validates a recipe.

    Args:
        name: a bundled recipe's name, or a path to a YAML file.
        overrides: dotted keys to values, such as {"phases.1.resolution": 192}.

    Raises:
        InputError: naming the file, the key and the fix.
    """
    path = find_recipe(name)
    raw = read_raw(path, seen=())
    raw.setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    return parse_recipe(raw, str(name))


def parse_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    """Validates a recipe given as plain data. `origin` names it in messages."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{origin}: {_first_problem(error, raw)}") from None


def _first_problem(error: ValidationError, raw: dict[str, Any]) -> str:
    """Returns the first problem as `phases.0.lr: what is wrong`."""
    first = error.errors()[0]
    keys = _users_keys(first["loc"], raw)
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        what = _which_name(first.get("ctx", {}), keys, raw)
        keys.append("name")
    elif first["type"] == "missing":
        keys.append(str(first["loc"][-1]))
        what = "is missing"
    elif first["type"] == "tuple_type":
        what = f"{first['input']!r} should be a list, such as [{first['input']}]"
    elif first["type"] != "value_error":
        what = f"{what[0].lower()}{what[1:]}, not {str(first['input'])[:60]!r}"
    return f"{'.'.join(keys)}: {what}" if keys else what


def _users_keys(location: tuple[int | str, ...], raw: Any) -> list[str]:
    """Returns those parts of pydantic's location that are keys of the user's data.

    The others are its own: the chosen member of a union, a marker of keys.
    """
    keys: list[str] = []
    for part in location:
        if isinstance(raw, dict) and part in raw:
            raw = cast("dict[Any, Any]", raw)[part]
        elif isinstance(raw, list | tuple) and isinstance(part, int):
            raw = cast("list[Any]", raw)[part]
        else:
            continue
        keys.append(str(part))
    return keys


_USUAL_KINDS = {"optimizer": "sgd", "lr_schedule": "cosine", "augment": "rand_augment"}


def _which_name(context: dict[str, Any], keys: list[str], raw: Any) -> str:
    """Returns what is wrong with the `name` that says which kind a mapping is of."""
    if "expected_tags" in context:
        names = context["expected_tags"].replace("'", "").split(", ")
        given = str(context["tag"])
        return f"{given[:60]!r} is not one of {', '.join(names)}{did_you_mean(given, names)}"
    kind = _USUAL_KINDS.get(keys[-1] if keys else "", "...")
    return f"is missing: say which kind, such as `name: {kind}`"


class _Loader(yaml.SafeLoader):
    """YAML without surprises: a key that is given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        own = [key for key, _ in pairs if key.tag != "tag:yaml.org,2002:merge"]
        keys: list[Any] = [self.construct_object(key, deep=True) for key in own]  # pyright: ignore[reportUnknownMemberType]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_raw(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the file's mapping laid over that of the recipe it extends, and nothing filled in.

    Args:
        path: a recipe.
        seen: the recipes that extend it.

    Raises:
        InputError: it, or what it extends, cannot be read or is no mapping.
    """
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself, by way of {seen[-1].name}")
    try:
        raw: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "is not YAML"
        raise InputError(f"{path}:{line} {problem}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values")
    own = dict(cast("dict[str, Any]", raw))
    parent = own.pop("extends", None)
    if parent is None:
        return own
    beside = path.parent / str(parent)
    try:
        base = beside if beside.is_file() else find_recipe(str(parent))
    except InputError as error:
        raise InputError(f"{path}: extends: {error}") from None
    return _merged(read_raw(base, (*seen, path.resolve())), own)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else, lists of phases included, replaces.

    A mapping that gives another `name` (of an optimizer, say) replaces too: the keys of one kind
    mean nothing to another. Of a model these are its `kwargs`.
    """
    out = dict(base)
    for key, value in own.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            before, after = cast("dict[str, Any]", old), cast("dict[str, Any]", value)
            same_kind = after.get("name", before.get("name")) == before.get("name")
            if key == "model" and not same_kind:
                before, same_kind = _without_kwargs(before), True
            out[key] = _merged(before, after) if same_kind else after
        else:
            out[key] = value
    return out


def _without_kwargs(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "kwargs"}


def _override(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `phases.1.resolution` in place; the mappings on the way are made where absent."""
    *path, last = dotted.split(".")
    _refuse_if_hidden(raw, dotted)
    node: Any = raw
    for part in path:
        node = _child(node, part, dotted)
    if last == "name" and path == ["model"]:
        cast("dict[str, Any]", node).pop("kwargs", None)
    elif last == "name" and path and path[-1] in _USUAL_KINDS:
        cast("dict[str, Any]", node).clear()  # the keys of one kind mean nothing to another
    node[_key(node, last, dotted)] = value


def _refuse_if_hidden(raw: dict[str, Any], dotted: str) -> None:
    """Raises InputError when phases state their own value of what is set for all of them."""
    key = dotted.partition(".")[0]
    phases: Any = raw.get("phases")
    if key not in PhaseSettings.model_fields or not isinstance(phases, list):
        return
    stated = [
        i for i, p in enumerate(cast("list[Any]", phases)) if isinstance(p, dict) and key in p
    ]
    if stated:
        first = f"phases.{stated[0]}"
        raise InputError(f"{dotted}: {first} states its own {key}: use --set {first}.{dotted}=...")


def _child(node: Any, part: str, dotted: str) -> Any:
    """Returns a copy of what is below `part`, put in its place: aliases of it stay as they are."""
    key = _key(node, part, dotted)
    below = cast("dict[str, Any]", node).get(part, {}) if key == part else node[key]
    node[key] = copy.copy(below)
    return node[key]


def _key(node: Any, part: str, dotted: str) -> str | int:
    """Returns `part` as a key of a mapping or an index of a list."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise InputError(f"--set {dotted}: there is nothing below {node!r} to set {part!r} of")
    size = len(cast("list[Any]", node))
    if not part.isdecimal() or int(part) >= size:
        raise InputError(f"--set {dotted}: {part!r} is not an index from 0 to {size - 1}")
    return int(part)
