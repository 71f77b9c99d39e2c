"""pitstop against timm's own train.py: accuracy at equal wall time.

Method. Both train timm's `resnet18` on the JPEGs of CIFAR-10, enlarged to 64 px, on the same cores
in bf16 autocast, channels_last, and evaluate once, at the end, the 10,000 test images at 64 px with
the whole image in view. Two short probes say how long an epoch of each takes. timm gets as many
epochs as fit the budget, and pitstop as many as fit the time that these take, less 15%. Wall
time is that of the whole process: start-up, training, evaluation, saving, pictures. Seed by seed,
timm first. pitstop's packing of the images, once for all runs, is printed and not counted.

timm runs in two ways:

documented  the settings that its training documentation calls good "for a wide range of ResNet
            architecture" (hfdocs/source/training_script.mdx, SE-ResNeXt-26-D): SGD with lr 0.1 per
            224 images, weight decay 1e-4, cosine, random erasing 0.4; all else as it is by default
            (RandomResizedCrop from 0.08, color jitter 0.4, label smoothing 0.1). Its warm-up of 5
            of 160 epochs is the shortest here, one; the rate is set per update.
short       the same made fit for few epochs: crops and weight decay of pitstop's recipe, neither
            erasing nor color jitter

timm's script is not in its package: give the path of train.py from a checkout. Commit
aa4b5850c1543fa488abf260f18390eda46cf85d of huggingface/pytorch-image-models works; the model, data
and optimizers are those of the installed timm. Stopped, the same command goes on.

    python benchmarks/against_timm.py --timm-train pytorch-image-models/train.py
"""

import argparse
import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import proof

RESOLUTION = 64
MARGIN = 0.15
"""The share of its time that pitstop leaves: a machine's speed drifts between probe and run."""

COMMON = (
    *("--model", "resnet18", "--num-classes", "10", "--input-size", "3", RESOLUTION, RESOLUTION),
    *("--crop-pct", "1.0", "--interpolation", "bilinear", "--device", "cpu"),
    *("--amp", "--amp-dtype", "bfloat16", "--channels-last", "--val-interval", "10000"),
    *("--validation-batch-size", "500", "--batch-size", "128", "--sched", "cosine"),
    *("--lr-base", "0.1", "--lr-base-size", "224", "--warmup-epochs", "1", "--sched-on-updates"),
)
WAYS = {
    "documented": ("--weight-decay", "1e-4", "--reprob", "0.4", "--remode", "pixel"),
    "short": ("--weight-decay", "5e-4", "--color-jitter", "0", "--scale", "0.35", "1.0"),
}
"""After COMMON, for each of the ways that timm runs in."""


def timm_run(
    script: Path, way: str, data: Path, out: Path, *, epochs: int, seed: int, cores: int
) -> proof.Result:
    """Trains with timm's script; returns the last top-1 (%) and the wall time (s)."""
    shutil.rmtree(out, ignore_errors=True)
    command = (
        *(sys.executable, "-P", script, "--data-dir", data, "--val-split", "test"),
        *(*COMMON, *WAYS[way], "--epochs", epochs, "--seed", seed, "--workers", cores),
        *("--output", out.parent, "--experiment", out.name),
    )
    seconds = proof.seconds_of(command, out.with_suffix(".log"))
    with (out / "summary.csv").open() as file:
        *_, last = csv.DictReader(file)
    return {"top1": float(last["eval_top1"]), "seconds": seconds, "epochs": epochs}


def images(options: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the folder of images, and what pitstop packs it into."""
    folder = proof.extracted(options.data, options.out / "images")
    packed = options.out / "packed"
    if not packed.exists():
        command = (*proof.PITSTOP, "data", "pack", folder, packed)
        seconds = proof.seconds_of(command, options.out / "pack.log")
        print(f"packed the images once in {seconds:.1f} s")
    return folder, packed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--timm-train", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--minutes", type=float, default=10, help="a run (default 10)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of timm")
    parser.add_argument("--seeds", type=int, default=3, help="(default 3)")
    parser.add_argument("--cores", type=int, default=2, help="(default 2)")
    parser.add_argument("--data", type=Path, default=proof.CIFAR10, help="a .tar.gz of train, test")
    parser.add_argument("--out", type=Path, default=Path("runs/against-timm"))
    options = parser.parse_args()
    script, out, cores = options.timm_train, options.out, options.cores
    proof.use_cores(cores)
    folder, packed = images(options)

    def timm(way: str, name: str, epochs: int, seed: int) -> proof.Result:
        run = out / f"timm-{way}" / name
        more = {"epochs": epochs, "seed": seed, "cores": cores}
        result = run.with_suffix(".json")
        return proof.once(result, lambda: timm_run(script, way, folder, run, **more))

    def pitstop(name: str, epochs: float, seed: int) -> proof.Result:
        run, recipe = out / "pitstop" / name, proof.RECIPES / "against_timm.yaml"
        more = ("--data", packed, "--epochs", epochs, "--seed", seed, "--set", f"threads={cores}")
        result = run.with_suffix(".json")
        return proof.once(result, lambda: proof.pitstop_run(recipe, run, *more))

    way = options.ways[0]
    probes = {float(n): timm(way, f"probe-{n}", n, 0)["seconds"] for n in (1, 2)}
    timm_epochs = max(1, int(proof.epochs_within(60 * options.minutes, probes)))
    (_, one), (_, two) = sorted(probes.items())
    seconds = (one + (timm_epochs - 1) * (two - one)) * (1 - MARGIN)
    probes = {n: pitstop(f"probe-{n:g}", n, 0)["seconds"] for n in (0.5, 1.5)}
    epochs = round(proof.epochs_within(seconds, probes), 2)
    print(f"timm: {timm_epochs} epochs; pitstop: {epochs} epochs, expected in {seconds:.0f} s")

    sides: dict[str, list[proof.Result]] = {"pitstop": []}
    sides |= {f"timm, {way}": [] for way in options.ways}
    for seed in range(options.seeds):
        for way in options.ways:
            sides[f"timm, {way}"].append(timm(way, f"seed-{seed}", timm_epochs, seed))
        sides["pitstop"].append(pitstop(f"seed-{seed}", epochs, seed))
        print(f"\nafter {seed + 1} of {options.seeds} seeds\n\n{proof.table(sides)}", flush=True)
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    about = {"benchmark": "against_timm", "train.py": digest, **proof.machine()}
    print(json.dumps(about | {"runs": sides}))


if __name__ == "__main__":
    main()
