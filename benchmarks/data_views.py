"""Views of a photo: cut as uint8 in the worker and distorted in batches, against torchvision's transforms on PIL.

    python benchmarks/data_views.py

JPEGs become 2 x 256 and 8 x 112 pixel crops with the published distortions, on one CPU thread; then the same with
undistorted crops of 512 pixels for a Gram teacher. With a GPU the batched half runs there.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import append_results, paired_times
from PIL import Image
from skimage import data
from torch import Tensor
from torchvision.transforms import v2

from dinov3_hf.data.collators import collate_views
from dinov3_hf.data.datasets import SSLDataset
from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.photometric import Photometric
from dinov3_hf.data.sampler import SampleKey
from dinov3_hf.data.sources.spec import load_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL, GRAM_SIZE = 256, 112, 8, 512
BICUBIC = v2.InterpolationMode.BICUBIC
TO_NORMALIZED = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def save_photos(folder: Path, tiles: int) -> list[Path]:
    """Write four JPEGs of `tiles` x `tiles` photos of 500 x 375 pixels each."""
    photos = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    pixels = [np.asarray(photo.resize((500, 375), Image.Resampling.BICUBIC)) for photo in photos]
    paths = []
    for i in range(len(pixels)):
        rows = [
            np.hstack([pixels[(i + row + column) % len(pixels)] for column in range(tiles)]) for row in range(tiles)
        ]
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(np.vstack(rows)).save(paths[-1], quality=90)
    return paths


def torchvision_views(with_gram: bool) -> Callable[[Image.Image], list[Tensor]]:
    """The published augmentation of one image, everything in the worker, on PIL images."""

    def cut(size: int, scale: tuple[float, float]) -> v2.Compose:
        return v2.Compose([v2.RandomResizedCrop(size, scale, interpolation=BICUBIC), v2.RandomHorizontalFlip()])

    def distort(blur: float, solarize: float) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                *TO_NORMALIZED,
            ]
        )

    cut_global = cut(GRAM_SIZE if with_gram else GLOBAL_SIZE, (0.32, 1.0))
    shrink = v2.Resize(GLOBAL_SIZE, BICUBIC) if with_gram else v2.Identity()
    distort_global = [distort(0.0, 0.0), distort(0.9, 0.2)]
    local = v2.Compose([cut(LOCAL_SIZE, (0.05, 0.32)), distort(0.5, 0.0)])
    normalize = v2.Compose(TO_NORMALIZED)

    def views(image: Image.Image) -> list[Tensor]:
        crops = [cut_global(image) for _ in range(2)]
        global_crops = [distortion(shrink(crop)) for distortion, crop in zip(distort_global, crops, strict=True)]
        gram_crops = [normalize(crop) for crop in crops] if with_gram else []
        return [*global_crops, *(local(image) for _ in range(NUM_LOCAL)), *gram_crops]

    return views


def measure(paths: list[Path], with_gram: bool, num_images: int, seconds: float) -> dict[str, float]:
    """Seconds for a batch of `num_images`, stage by stage."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = load_images(paths[0].parent)
    views = MultiCropViews(GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL, gram_crop_size=GRAM_SIZE if with_gram else None)
    dataset = SSLDataset(images, views, MaskSampler(GLOBAL_SIZE // 16, batch_size=num_images, seed=0), seed=0)
    keys = [SampleKey(i, 0, i // len(images), i % len(images)) for i in range(num_images)]
    photometric = Photometric(MEAN, STD).to(device)

    def worker() -> dict:
        return collate_views([dataset[key] for key in keys])

    batch = worker()

    def on_device() -> list[Tensor]:
        return [
            photometric(batch[f"{kind}_crops"].to(device), batch.get(f"{kind}_photometric"))
            for kind in ("global", "local", *(["gram"] if with_gram else []))
        ]

    torchvision = torchvision_views(with_gram)

    def peer() -> list[Tensor]:
        samples = [torchvision(Image.open(paths[key.index]).convert("RGB")) for key in keys]
        return [torch.stack(crops) for crops in zip(*samples, strict=True)]

    ours = {"ours, worker": worker, f"ours, batched on {device}": on_device}
    candidates = {"torchvision on PIL": peer, **ours}
    times = paired_times(candidates, seconds)
    medians = {name: times.median(name) for name in candidates}
    return medians | {"ours, both": sum(medians[name] for name in ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="images of a batch")
    parser.add_argument("--seconds", type=float, default=30, help="how long to measure each of the four settings")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for tiles in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            paths = save_photos(Path(folder), tiles)
            for with_gram in (False, True):
                seconds = measure(paths, with_gram, args.images, args.seconds)
                base = seconds["torchvision on PIL"]
                setting = f"{500 * tiles} x {375 * tiles}" + (f", Gram crops of {GRAM_SIZE}" if with_gram else "")
                rows += [
                    [setting, name, f"{1000 * t / args.images:.2f}", f"{args.images / t:.0f}", f"{base / t:.1f}"]
                    for name, t in seconds.items()
                ]
    append_results(
        f"Views, 2 x {GLOBAL_SIZE} + {NUM_LOCAL} x {LOCAL_SIZE} px of a JPEG, batch {args.images}",
        ["JPEG", "stage", "ms an image", "images / s", "times as fast"],
        rows,
        ["torchvision", "pillow"],
    )


if __name__ == "__main__":
    main()
