"""Random crops, drawn on the host for a whole batch at once."""

import numpy as np

from pitstop.core.recipe import Crop

TRIES = 10


def crop_boxes(sizes: np.ndarray, crop: Crop, rng: np.random.Generator) -> np.ndarray:
    """Returns RandomResizedCrop's boxes, with exactly torchvision's distribution.

    Ten times an area uniform in `scale` and an aspect ratio log-uniform in `ratio` are tried; the
    first box that fits is placed uniformly. If none fits, it is the largest central box whose
    aspect ratio is within `ratio`. All ten are drawn for each image, so that what an image gets
    depends on its place in the batch alone.

    Args:
        sizes: int [B, 2], (height, width) in pixels.
        crop: scale and ratio.
        rng: at the step's place; 4 x 10 x B numbers are taken from it.

    Returns:
        int64 [B, 4]: (top, left, height, width).
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    area, ratio, y, x = rng.random((4, TRIES, len(sizes)))
    area = (crop.scale[0] + area * (crop.scale[1] - crop.scale[0])) * height * width
    low, high = np.log(crop.ratio[0]), np.log(crop.ratio[1])
    ratio = np.exp(low + ratio * (high - low))
    w = np.rint(np.sqrt(area * ratio))
    h = np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    chosen = (fits.argmax(0), np.arange(len(sizes)))
    w, h, y, x = w[chosen], h[chosen], y[chosen], x[chosen]
    boxes = np.stack([y * (height - h + 1), x * (width - w + 1), h, w], axis=1)
    central = _central_boxes(height, width, crop)
    return np.where(fits.any(0)[:, None], boxes, central).astype(np.int64)


def _central_boxes(height: np.ndarray, width: np.ndarray, crop: Crop) -> np.ndarray:
    narrow, wide = width / height < crop.ratio[0], width / height > crop.ratio[1]
    h = np.where(narrow, np.rint(width / crop.ratio[0]), height)
    w = np.where(wide, np.rint(height * crop.ratio[1]), width)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
