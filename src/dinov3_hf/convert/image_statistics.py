"""Mean and standard deviation of the images that a network was trained on, as the files around it say."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dinov3_hf.models.dinov3_vit.image_processing import IMAGE_STATISTICS


class ImageStatistics(NamedTuple):
    """One number a channel, of values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: str, num_channels: int) -> "ImageStatistics":
        """Those of `"web"` or `"satellite"` images; other channels than three get the mean over the three."""
        mean, std = IMAGE_STATISTICS[images]
        if num_channels == 3:
            return cls(mean, std)
        return cls((sum(mean) / 3,) * num_channels, (sum(std) / 3,) * num_channels)

    @classmethod
    def read(cls, fields: Mapping[str, Any], mean: str, std: str) -> "ImageStatistics | None":
        """The lists under the names `mean` and `std`, if they are lists of as many numbers."""
        values = [fields.get(name) for name in (mean, std)]
        lists = [value for value in values if isinstance(value, list) and all(type(x) in (int, float) for x in value)]
        if len(lists) != 2 or len(lists[0]) != len(lists[1]):
            return None
        return cls(tuple(map(float, lists[0])), tuple(map(float, lists[1])))
