"""What only a CUDA GPU can show of augmentation: the pixels of the CPU."""

import numpy as np
import pytest
import torch

from pitstop.nn.augment import Draws, augment
from pitstop.nn.erasing import EraseDraws, erase, noise_for
from pitstop.nn.operations import FUNCTIONS, Operation

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

N = 16

RANGES: dict[Operation, tuple[float, float]] = {
    Operation.SHEAR_X: (-0.99, 0.99),
    Operation.SHEAR_Y: (-0.99, 0.99),
    Operation.TRANSLATE_X: (-40, 40),
    Operation.TRANSLATE_Y: (-40, 40),
    Operation.ROTATE: (-135, 135),
    Operation.POSTERIZE: (0, 8),
    Operation.SOLARIZE: (0, 256),
    Operation.SOLARIZE_ADD: (0, 128),
    Operation.HUE: (-0.5, 0.5),
}
WHOLE = {Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD}


def pictures() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (N, 96, 96, 3), dtype=torch.uint8, generator=draw)
    pixels[0] = 77
    pixels[1] = pixels[1, :, :, :1]
    return pixels.permute(0, 3, 1, 2)


def draws_of(*operations: Operation) -> Draws:
    rng = np.random.default_rng(0)
    arguments = np.stack([rng.uniform(*RANGES.get(op, (0, 2)), N) for op in operations])
    whole = [op in WHOLE for op in operations]
    arguments[whole] = np.rint(arguments[whole])
    return Draws(np.repeat(np.array(operations, dtype=np.int64)[:, None], N, 1), arguments)


@pytest.mark.parametrize("operation", FUNCTIONS, ids=lambda each: each.name)
def test_an_operation_gives_the_pixels_of_the_cpu(operation):
    draws = draws_of(operation)
    on_gpu = augment(pictures().cuda(), draws)
    assert on_gpu.is_cuda
    off = (on_gpu.cpu().int() - augment(pictures(), draws).int()).abs()
    assert off.max() <= (1 if operation == Operation.HUE else 0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_waits_for_the_gpu(deterministic):
    images, draws = pictures().cuda(), draws_of(*FUNCTIONS)
    augment(images, draws)
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


def test_noise_and_boxes_are_those_of_the_cpu():
    boxes = np.tile([[3, 50, 10, 60]], (N, 1))
    draws = EraseDraws(boxes, np.arange(N) * 100)
    on_gpu, on_cpu = pictures().float().cuda(), pictures().float()
    erase(on_gpu, draws, noise_for(0, 96, on_gpu.device))
    erase(on_cpu, draws, noise_for(0, 96, on_cpu.device))
    assert torch.equal(on_gpu.cpu(), on_cpu)
