"""JSON file with the facts of the multi-crop augmentation: probabilities, ranges, sizes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dinov3_hf.data import photometric
from dinov3_hf.data.multicrop import ASPECT_RANGE, MultiCropViews
from dinov3_hf.data.photometric import Distortions
from dinov3_hf.models.dinov3_vit.image_processing import IMAGE_STATISTICS

from .compare import Comparison
from .masking import STANDARD_ERRORS

NUM_DRAWS = 5000  # images with 8 local crops
NOT_YET = "not in the package yet: "
JITTER = ("brightness", "contrast", "saturation", "hue")
LEFT_OUT = {
    "gaussian_blur/*argument*": "how the original says it; the effective probabilities are compared",
    "measured_shapes/gram_distorted/*": NOT_YET + "distorted crops for the Gram teacher",
    "measured_shapes/local_subset/*": NOT_YET + "local crops cut from the global ones",
}


def check_augmentation(content: dict[str, Any], compare: Comparison) -> None:
    """Constants exactly; shares of distorted crops within the error of many draws; sizes of the views of an image."""
    compare.expected = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in _numbers(content)}
    compare.left_out = LEFT_OUT
    compare.rtol = 1e-9  # the file's decimals
    _check_constants(compare)
    _check_shares(compare)
    _check_shapes(compare)
    compare.finish()
    compare.notes.append("what the file says in words is not compared")


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and lists of numbers, by the path to them."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{name}/{key}" if name else key)
    elif isinstance(content, int | float) or (isinstance(content, list) and not any(map(_is_text, content))):
        yield name, content


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_constants(compare: Comparison) -> None:
    views, distortions = MultiCropViews(32, 16), Distortions()
    mean, std = IMAGE_STATISTICS["web"]
    for name, ours in {
        "random_resized_crop/aspect_ratio": ASPECT_RANGE,
        "random_resized_crop/global_scale_default": views.global_crop_scale,
        "random_resized_crop/local_scale_default": views.local_crop_scale,
        **{f"colour_jitter/{name}": reach for name, reach in zip(JITTER, distortions.jitter, strict=True)},
        "gaussian_blur/kernel_size": 2 * photometric.BLUR_RADIUS + 1,
        "gaussian_blur/sigma_range": photometric.BLUR_SIGMA_RANGE,
        "solarize/threshold": 255 * photometric.SOLARIZE_THRESHOLD,
        "normalisation/mean": mean,
        "normalisation/std": std,
    }.items():
        compare.check(name, torch.tensor(ours, dtype=torch.float64))


def _check_shares(compare: Comparison) -> None:
    """How often each operation is applied, within the error of as many draws."""
    rng = np.random.default_rng(0)
    draws = [Distortions().draw(8, rng) for _ in range(NUM_DRAWS)]
    drawn = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}  # (images, crops, ...)
    blurred = drawn["blur_sigma"] > 0
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    views = MultiCropViews(5, 5, num_local_crops=0, global_crop_scale=(1.0, 1.0))
    first = [views(image, rng)["global_crops"][0, 0] for _ in range(NUM_DRAWS)]  # a gradient from left to right
    flipped = np.array([crop[0, 0] > crop[0, -1] for crop in first])
    for name, applied in {
        "horizontal_flip/probability_if_enabled": flipped,
        "colour_jitter/apply_probability": drawn["jitter"],
        "greyscale_probability": drawn["greyscale"],
        "gaussian_blur/global_crop_1/effective_apply_probability": blurred[:, 0],
        "gaussian_blur/global_crop_2/effective_apply_probability": blurred[:, 1],
        "gaussian_blur/local_crops/effective_apply_probability": blurred[:, 2:],
        "solarize/probability": drawn["solarize"][:, 1],
    }.items():
        if name in compare.expected:
            expected = compare.expected[name].item()
            atol = STANDARD_ERRORS * (expected * (1 - expected) / applied.size) ** 0.5
            compare.check_pair(name, float(applied.mean()), expected, atol=atol)
    others = np.delete(drawn["solarize"], 1, axis=1)
    compare.check_pair("solarize/only_on", bool(others.any()), False)


def _check_shapes(compare: Comparison) -> None:
    """Sizes of the views, cut as large and as many as those recorded."""
    names = {"global_crops": "global_crops", "local_crops": "local_crops", "gram_crops": "gram_teacher_crops"}
    for case in ("plain", "gram_no_distortions"):
        recorded = {
            ours: compare.expected[f"measured_shapes/{case}/{native}"].int()
            for ours, native in names.items()
            if f"measured_shapes/{case}/{native}" in compare.expected
        }
        sizes = {ours.replace("crops", "crop_size"): int(shapes[0, -1]) for ours, shapes in recorded.items()}
        views = MultiCropViews(**sizes, num_local_crops=len(recorded["local_crops"]))
        sample = views(np.zeros((300, 400, 3), dtype=np.uint8), np.random.default_rng(0))
        for ours in recorded:
            shapes = torch.tensor([crop.shape for crop in sample[ours]], dtype=torch.float64)
            compare.check(f"measured_shapes/{case}/{names[ours]}", shapes)
        # Local crops are cut from the image, not from the global ones.
        compare.check(f"measured_shapes/{case}/offsets", torch.empty(0, dtype=torch.float64))
