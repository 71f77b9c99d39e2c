"""airbench94 as it is, on two CPU cores: what `pitstop train cifar` is measured against.

The network, the loop, the hyperparameters and the evaluation are those of legacy/airbench94.py of
https://github.com/KellerJordan/cifar10-airbench (Keller Jordan, "94% on CIFAR-10 in 3.29 seconds on
a single GPU", arXiv 2404.00498), copyright (c) 2024 Keller Jordan, MIT licence.

Three things differ. float32 weights under bf16 autocast take the place of half precision, which a
CPU has no kernels for. The images are those of a folder of JPEGs, the same as pitstop's, decoded
once and kept as a tensor. And the first 5,000 images, which whiten, are of all classes.

Usage: python benchmarks/airbench.py [--data cifar10.tar.gz] [--seeds 0,1,2] [--epochs 9.9]
"""

import argparse
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

DATA = Path(__file__).parents[2] / "shared/data/cifar10.tar.gz"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pitstop/airbench"

BATCH_SIZE = 1024
LR = 11.5  # per 1024 examples
MOMENTUM = 0.85
WEIGHT_DECAY = 0.0153  # per 1024 examples, decoupled from the learning rate
BIAS_SCALER = 64.0
LABEL_SMOOTHING = 0.2
WHITEN_BIAS_EPOCHS = 3
TRANSLATE = 2
WIDTHS = (64, 256, 256)
BATCHNORM_MOMENTUM = 0.6
SCALING_FACTOR = 1 / 9

MEAN = torch.tensor((0.4914, 0.4822, 0.4465))[:, None, None]
STD = torch.tensor((0.2470, 0.2435, 0.2616))[:, None, None]

Images = tuple[torch.Tensor, torch.Tensor]
"""Normalised float32 [N, 3, 32, 32], channels_last; labels int64 [N]."""


# Data


def load(data: Path, split: str) -> Images:
    """Returns a split of an archive of class folders; pixels are decoded at the first time."""
    stat = data.stat()
    cached = CACHE / f"{data.name}-{stat.st_size}-{stat.st_mtime_ns}-{split}.npz"
    if not cached.exists():
        decode(data, split, cached)
    with np.load(cached) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    images = (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    return images.contiguous(memory_format=torch.channels_last), labels


def decode(data: Path, split: str, to: Path) -> None:
    """Writes the pixels uint8 [N, 32, 32, 3] and the labels of a split, shuffled once."""

    images, names = [], []
    with tarfile.open(data) as archive:
        for member in archive:
            if member.isfile() and f"/{split}/" in member.name:
                with Image.open(archive.extractfile(member)) as image:  # pyright: ignore[reportArgumentType]
                    images.append(np.asarray(image.convert("RGB")))
                names.append(member.name.split("/")[-2])
    labels = np.unique(names, return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(len(labels))
    to.parent.mkdir(parents=True, exist_ok=True)
    np.savez(to, images=np.stack(images)[order], labels=labels[order])


class CifarLoader:
    """Batches of the training images: flipped every other epoch, and moved by up to 2 pixels."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.labels = labels
        flipped = (torch.rand(len(images)) < 0.5)[:, None, None, None]
        images = torch.where(flipped, images.flip(-1), images)
        self.padded = F.pad(images, (TRANSLATE,) * 4, "reflect")
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.labels) // BATCH_SIZE

    def __iter__(self) -> Iterator[Images]:
        images = batch_crop(self.padded, 32)
        if self.epoch % 2 == 1:
            images = images.flip(-1)
        self.epoch += 1
        indices = torch.randperm(len(images))
        for i in range(len(self)):
            idxs = indices[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
            yield images[idxs], self.labels[idxs]


def batch_crop(images: torch.Tensor, crop_size: int) -> torch.Tensor:
    r = (images.size(-1) - crop_size) // 2
    shifts = torch.randint(-r, r + 1, size=(len(images), 2))
    shape = (len(images), 3, crop_size, crop_size)
    images_out = torch.empty(shape, memory_format=torch.channels_last)
    for sy in range(-r, r + 1):
        for sx in range(-r, r + 1):
            mask = (shifts[:, 0] == sy) & (shifts[:, 1] == sx)
            rows, columns = slice(r + sy, r + sy + crop_size), slice(r + sx, r + sx + crop_size)
            images_out[mask] = images[mask, :, rows, columns]
    return images_out


# Network


class Mul(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class BatchNorm(nn.BatchNorm2d):
    def __init__(self, num_features: int, eps: float = 1e-12) -> None:
        super().__init__(num_features, eps=eps, momentum=1 - BATCHNORM_MOMENTUM)
        self.weight.requires_grad = False


class Conv(nn.Conv2d):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            self.bias.data.zero_()
        w = self.weight.data
        torch.nn.init.dirac_(w[: w.size(1)])


class ConvGroup(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out, 3, padding="same", bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = BatchNorm(channels_out)
        self.conv2 = Conv(channels_out, channels_out, 3, padding="same", bias=False)
        self.norm2 = BatchNorm(channels_out)
        self.activ = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activ(self.norm1(self.pool(self.conv1(x))))
        return self.activ(self.norm2(self.conv2(x)))


def make_net() -> nn.Sequential:
    whiten_width = 2 * 3 * 2**2
    whiten = Conv(3, whiten_width, 2, padding=0, bias=True)
    whiten.weight.requires_grad = False
    net = nn.Sequential(
        whiten,
        nn.GELU(),
        ConvGroup(whiten_width, WIDTHS[0]),
        ConvGroup(WIDTHS[0], WIDTHS[1]),
        ConvGroup(WIDTHS[1], WIDTHS[2]),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(WIDTHS[2], 10, bias=False),
        Mul(SCALING_FACTOR),
    )
    return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def init_whitening_conv(layer: nn.Conv2d, train_images: torch.Tensor, eps: float = 5e-4) -> None:
    c, (h, w) = train_images.shape[1], layer.weight.shape[2:]
    patches = train_images.unfold(2, h, 1).unfold(3, w, 1).transpose(1, 3).reshape(-1, c, h, w)
    patches_flat = patches.view(len(patches), -1)
    est_patch_covariance = (patches_flat.T @ patches_flat) / len(patches)
    eigenvalues, eigenvectors = torch.linalg.eigh(est_patch_covariance, UPLO="U")
    eigenvalues = eigenvalues.flip(0).view(-1, 1, 1, 1)
    eigenvectors = eigenvectors.T.reshape(c * h * w, c, h, w).flip(0)
    eigenvectors_scaled = eigenvectors / torch.sqrt(eigenvalues + eps)
    layer.weight.data[:] = torch.cat((eigenvectors_scaled, -eigenvectors_scaled))


class LookaheadState:
    def __init__(self, net: nn.Module) -> None:
        self.net_ema = {k: v.clone() for k, v in net.state_dict().items()}

    def update(self, net: nn.Module, decay: float) -> None:
        for ema_param, net_param in zip(
            self.net_ema.values(), net.state_dict().values(), strict=True
        ):
            if net_param.dtype == torch.float:
                ema_param.lerp_(net_param, 1 - decay)
                net_param.copy_(ema_param)


# Evaluation


def infer_mirror(inputs: torch.Tensor, net: nn.Module) -> torch.Tensor:
    return 0.5 * net(inputs) + 0.5 * net(inputs.flip(-1))


def infer_mirror_translate(inputs: torch.Tensor, net: nn.Module) -> torch.Tensor:
    padded = F.pad(inputs, (1,) * 4, "reflect")
    moved = [padded[:, :, 0:32, 0:32], padded[:, :, 2:34, 2:34]]
    logits_translate = torch.stack([infer_mirror(each, net) for each in moved]).mean(0)
    return 0.5 * infer_mirror(inputs, net) + 0.5 * logits_translate


def evaluate(net: nn.Module, test: Images, infer: Callable[..., torch.Tensor]) -> float:
    net.eval()
    images, labels = test
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([infer(inputs, net).float() for inputs in images.split(2000)])
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def infer_basic(inputs: torch.Tensor, net: nn.Module) -> torch.Tensor:
    return net(inputs)


# Training


def train(train_images: Images, test: Images, seed: int, epochs: float) -> dict[str, Any]:
    """Trains once; returns the accuracies in percent, seconds, and the loss of each step."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    kilostep_scale = 1024 * (1 + 1 / (1 - MOMENTUM))
    lr = LR / kilostep_scale
    wd = WEIGHT_DECAY * BATCH_SIZE / kilostep_scale
    lr_biases = lr * BIAS_SCALER
    loss_fn = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING, reduction="none")
    loader = CifarLoader(*train_images)
    total_train_steps = ceil(len(loader) * epochs)
    model = make_net()
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    norm_biases = [p for k, p in named if "norm" in k]
    other_params = [p for k, p in named if "norm" not in k]
    param_configs = [
        {"params": norm_biases, "lr": lr_biases, "weight_decay": wd / lr_biases},
        {"params": other_params, "lr": lr, "weight_decay": wd / lr},
    ]
    optimizer = torch.optim.SGD(param_configs, momentum=MOMENTUM, nesterov=True)

    def get_lr(step: int) -> float:
        warmup_steps = int(total_train_steps * 0.23)
        if step < warmup_steps:
            frac = step / warmup_steps
            return 0.2 * (1 - frac) + 1.0 * frac
        frac = (step - warmup_steps) / (total_train_steps - warmup_steps)
        return 1.0 * (1 - frac) + 0.07 * frac

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, get_lr)
    alpha_schedule = 0.95**5 * (torch.arange(total_train_steps + 1) / total_train_steps) ** 3
    lookahead_state = LookaheadState(model)
    whiten = model[0]
    assert isinstance(whiten, Conv)
    assert whiten.bias is not None
    init_whitening_conv(whiten, train_images[0][:5000])

    current_steps, training, losses = 0, 0.0, []
    for epoch in range(ceil(epochs)):
        whiten.bias.requires_grad = epoch < WHITEN_BIAS_EPOCHS
        begun = time.perf_counter()
        model.train()
        for inputs, labels in loader:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(inputs)
            loss = loss_fn(outputs.float(), labels).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach() / BATCH_SIZE)
            current_steps += 1
            if current_steps % 5 == 0:
                lookahead_state.update(model, decay=alpha_schedule[current_steps].item())
            if current_steps >= total_train_steps:
                lookahead_state.update(model, decay=1.0)
                break
        training += time.perf_counter() - begun
        plain = evaluate(model, test, infer_basic)
        print(
            f"seed {seed}  epoch {epoch + 1}  loss {losses[-1]:.4f}  top1 {plain:.2f}", flush=True
        )
    views = evaluate(model, test, infer_mirror_translate)
    return {
        "seed": seed,
        "plain": plain,
        "views": views,
        "training_seconds": round(training, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "losses": [round(loss.item(), 4) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="an archive of class folders")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--epochs", type=float, default=9.9)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    train_images, test = load(options.data, "train"), load(options.data, "test")
    results = []
    for seed in map(int, options.seeds.split(",")):
        results.append(train(train_images, test, seed, options.epochs))
        shown = {key: value for key, value in results[-1].items() if key != "losses"}
        print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
