"""Fine-tuning against training from scratch, at equal time, on few images of new classes.

Method. A small ResNet is trained on six classes of CIFAR-10 (recipes/six_classes.yaml). From its
weights, four_classes.yaml trains the head for the other four, then all layers; from_scratch.yaml
trains the same network with a higher rate from random weights, in as many steps of the same batch
and resolution: steps with frozen layers take less time, so that it has no less time. Once with 30
training images of each class, once with 500; both are evaluated on the 4,000 test images of the
four classes. Seconds are those of the whole process. What the training of the six classes took,
once, is printed and not counted. Stopped, the same command goes on.

    python benchmarks/finetuning.py
"""

import argparse
import json
from pathlib import Path

import proof

KNOWN = "airplane,automobile,bird,cat,deer,dog"
NEW = "frog,horse,ship,truck"
EPOCHS = {30: 60, 500: 15}
"""Epochs by training images of a class: 225 and 938 steps of 32."""


def subset(source: Path, classes: str, to: Path, *options: object) -> Path:
    """Returns a packed dataset of some classes, made at the first time."""
    if not to.exists():
        command = (*proof.PITSTOP, "data", "subset", source, to, "--classes", classes, *options)
        proof.seconds_of(command, to.with_suffix(".log"))
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="(default 3)")
    parser.add_argument("--cores", type=int, default=2, help="(default 2)")
    parser.add_argument("--scale", type=float, default=1, help="of all epochs, to try it out")
    parser.add_argument("--data", type=Path, default=proof.CIFAR10, help="what to take classes of")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    options = parser.parse_args()
    out = options.out
    proof.use_cores(options.cores)

    def run(recipe: str, name: str, *more: object) -> proof.Result:
        threads = ("--set", f"threads={options.cores}")
        made = out / f"{name}.json"
        path = proof.RECIPES / f"{recipe}.yaml"
        return proof.once(made, lambda: proof.pitstop_run(path, out / name, *more, *threads))

    known = subset(options.data, KNOWN, out / "six-classes")
    epochs = 8 * options.scale
    first = run("six_classes", "weights", "--data", known, "--epochs", epochs)
    print(f"six classes: top-1 {first['top1']:.2f}% in {first['seconds']:.1f} s")
    weights = f"model.weights={(out / 'weights').resolve()}"
    tables: dict[str, dict[str, list[proof.Result]]] = {}
    for images, epochs in EPOCHS.items():
        new = subset(options.data, NEW, out / f"four-classes-{images}", "--train", images)
        sides: dict[str, list[proof.Result]] = {"fine-tuned": [], "from scratch": []}
        for seed in range(options.seeds):
            more = ("--data", new, "--epochs", epochs * options.scale, "--seed", seed)
            name = f"{images}-images/seed-{seed}"
            tuned = run("four_classes", f"fine-tuned/{name}", *more, "--set", weights)
            scratch = run("from_scratch", f"from-scratch/{name}", *more)
            sides["fine-tuned"].append(tuned)
            sides["from scratch"].append(scratch)
        print(f"\n{images} images a class\n\n{proof.table(sides)}", flush=True)
        tables[str(images)] = sides
    about = {"benchmark": "finetuning", **proof.machine(), "six classes": first}
    print(json.dumps(about | {"runs": tables}))


if __name__ == "__main__":
    main()
