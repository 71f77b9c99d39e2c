"""The checks of the machine: what is installed, the devices and their links, memory."""

import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from pitstop import __version__
from pitstop.engine.doctor.patient import GIB, Patient, SkippedError
from pitstop.io.host import available_memory, total_memory
from pitstop.report.diagnosis import Finding
from pitstop.runtime.devices import Device, auto_precision, machine, training

LEAST_MEMORY = 2 * GIB
"""Below this, a training of any size is short of memory (assumed)."""

ROUNDING = 0.05
"""A product in bf16 of the same 256 x 256 numbers is 0.003 off; this is a broken unit."""

LINK_GB_PER_SECOND = 5.0
"""An all-reduce below this goes through the hosts' memory or a narrow slot (assumed): ResNet-50's
100 MB of gradients take 20 ms and more."""


def versions(patient: Patient) -> Finding:
    """Finds what is installed."""
    packages = ("torch", "torchvision", "timm", "numpy", "pyarrow")
    found = {"pitstop": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in packages}
    if torch.version.cuda is not None:
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    if driver := _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"):
        found["driver"] = driver.splitlines()[0]
    said = ", ".join(f"{name} {number}" for name, number in found.items())
    return Finding("versions", "ok", said, numbers=found)


def _nvidia_smi(*arguments: str) -> str | None:
    """Returns what nvidia-smi says, None where it is not there, fails, or does not answer."""
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    try:
        return subprocess.run(
            [command, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def devices(patient: Patient) -> Finding:
    """Finds the device that the recipe would be trained on, and how many there are."""
    recipe = patient.recipe
    patient.device = Device.choose(
        recipe.precision,
        recipe.compile,
        recipe.threads,
        device=recipe.device,
        deterministic=recipe.deterministic,
    )
    there, (used, why) = machine(), training(recipe.device)["device"]
    gpus = [f"{gpu['name']} with {gpu['memory_gib']} GiB" for gpu in there["gpus"]]
    cpu = f"{there['cpu']['name']}, {there['cpu']['cores']} cores to use"
    said = f"{used} ({why}): {'; '.join([*gpus, cpu])}"
    numbers = {"device": used, "gpus": len(gpus), "cores": there["cpu"]["cores"]}
    listed = None if gpus or recipe.device == "cpu" else _nvidia_smi("--list-gpus")
    if listed:
        what = f"{said}; but the driver lists {len(listed.splitlines())} GPUs"
        fix = (
            "install a torch that is built for CUDA and no newer than the driver allows; look at "
            "CUDA_VISIBLE_DEVICES; or give device: cpu"
        )
        return Finding("devices", "fail", what, fix, numbers)
    return Finding("devices", "ok", said, numbers=numbers)


def precision(patient: Patient) -> Finding:
    """Finds whether the device computes in the recipe's precision, and right."""
    device = patient.need_device()
    name = device.circumstance()["precision"]
    fastest, why = auto_precision(device.torch_device)
    error = rounding(device)
    said = f"{name}: a product is {error:.1e} off"
    numbers = {"precision": name, "fastest": fastest, "rounding": error}
    if not error < ROUNDING:
        return Finding("precision", "fail", said, "give precision: fp32", numbers)
    if name != fastest:
        fix = f"precision: auto takes {fastest}: {why}"
        return Finding("precision", "warn", said, fix, numbers)
    return Finding("precision", "ok", f"{said}; {why}", numbers=numbers)


@torch.no_grad()
def rounding(device: Device) -> float:
    """Returns the relative error of a product of matrices in a device's precision."""
    drawn = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    one, other = drawn.to(device.torch_device).unbind()
    with device.autocast():
        product = (one @ other).double().cpu()
    exact = torch.matmul(*drawn.double().unbind())
    return ((product - exact).norm() / exact.norm()).item()


def links(patient: Patient) -> Finding:
    """Finds how the GPUs are connected, and how fast they add up gradients."""
    if patient.gpus < 2:
        raise SkippedError("fewer than two GPUs: there is nothing to connect")
    pairs = list(combinations(range(patient.gpus), 2))
    direct = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    speed = all_reduce_gb_per_second(patient.gpus, "nccl", patient.scratch)
    kinds_of_links = link_kinds(_nvidia_smi("topo", "-m") or "")
    said = f"all-reduce {speed:.1f} GB/s; {direct} of {len(pairs)} pairs reach each other directly"
    said += f"; links: {', '.join(kinds_of_links)}" if kinds_of_links else ""
    numbers = {"all_reduce_gb_per_second": speed, "direct_pairs": direct, "pairs": len(pairs)}
    if speed < LINK_GB_PER_SECOND:
        fix = "raise batch_size or grad_accum_steps; look for ACS or IOMMU settings that stop P2P"
        return Finding("links", "warn", said, fix, numbers)
    return Finding("links", "ok", said, numbers=numbers)


def link_kinds(topology: str) -> list[str]:
    """Returns the kinds of links between GPUs that `nvidia-smi topo -m` prints: NV18, PIX, ..."""
    table = [line.split() for line in topology.splitlines()]
    of_gpus = [words for words in table if "X" in words and words[0].startswith("GPU")]
    found = {kind for words in of_gpus for kind in words[1 : len(of_gpus) + 1]}
    return sorted(found - {"X"})


def all_reduce_gb_per_second(
    world: int, backend: str, scratch: Path, *, size: int = 2**26, times: int = 20
) -> float:
    """Returns the bus bandwidth of an all-reduce of `size` bytes, as nccl-tests counts it.

    Args:
        world: processes, on "nccl" each with a GPU of its own.
        scratch: a directory, where they meet.
    """
    answer, meeting = scratch / "all-reduce", scratch / "meeting"
    arguments = (world, backend, str(meeting), str(answer), size, times)
    spawn(_all_reduce, arguments, nprocs=world)
    return 2 * (world - 1) / world * size * times / float(answer.read_text()) / 1e9


def _all_reduce(
    rank: int, world: int, backend: str, meeting: str, answer: str, size: int, times: int
) -> None:
    """Is one of the processes; the first writes the seconds into `answer`."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        values = torch.zeros(size // 4, device=device)

        def add_up(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                dist.all_reduce(values)
            values[0].item()  # waits for the device
            return time.perf_counter() - started

        add_up(3)
        seconds = add_up(times)
        if rank == 0:
            Path(answer).write_text(repr(seconds))
    finally:
        dist.destroy_process_group()


def memory(patient: Patient) -> Finding:
    """Finds how much of the system's memory is left."""
    total, free = total_memory(), available_memory()
    if free is None:
        said = f"{total / GIB:.1f} GiB; how much is free, this system does not say"
        return Finding("memory", "ok", said, numbers={"total_bytes": total})
    said = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    numbers = {"total_bytes": total, "free_bytes": free}
    if free < LEAST_MEMORY:
        fix = "end what else runs here, or take a larger machine; fewer workers need less"
        return Finding("memory", "warn", said, fix, numbers)
    return Finding("memory", "ok", said, numbers=numbers)
