"""Image processors of the released models: the class of transformers with the statistics of their training images."""

from typing import Any

from transformers import DINOv3ViTImageProcessor

# (mean, standard deviation) of red, green and blue in [0, 1].
IMAGE_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "web": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "satellite": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}


def build_image_processor(images: str = "web", image_size: int = 224, **options: Any) -> DINOv3ViTImageProcessor:
    """
    The image processor to save beside a model.

    Args:
        images: `"web"` or `"satellite"`, the kind of images that the model was trained on.
        image_size: Height and width that images are resized to.
        options: Further settings of `DINOv3ViTImageProcessor`.

    Raises:
        ValueError: There are no such statistics.
    """
    if images not in IMAGE_STATISTICS:
        raise ValueError(f"there are no statistics for {images!r} images; use one of {', '.join(IMAGE_STATISTICS)}.")
    mean, std = IMAGE_STATISTICS[images]
    settings: dict[str, Any] = {
        "image_mean": list(mean),
        "image_std": list(std),
        "size": {"height": image_size, "width": image_size},
    }
    return DINOv3ViTImageProcessor(**{**settings, **options})
