"""Views of a photo: cut as uint8 in the worker and distorted in batches, against torchvision's transforms on PIL.

    python benchmarks/data_views.py

A 500 x 375 JPEG becomes 2 x 224 and 8 x 96 pixel crops with the published distortions, on one CPU thread. With a GPU
the batched half runs there.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from harness import append_results, paired_medians
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


def torchvision_transform(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
    """One crop, everything in the worker, on PIL images."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur),
            v2.RandomSolarize(128, solarize),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="images of a batch")
    parser.add_argument("--seconds", type=float, default=30, help="how long to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    with tempfile.TemporaryDirectory() as folder:
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            Image.fromarray(getattr(data, name)()).resize((500, 375)).save(Path(folder) / f"{name}.jpg", quality=90)
        images = load_images(folder)
        masks = MaskSampler(14, batch_size=args.images, seed=0)
        dataset = SSLDataset(images, MultiCropViews(224, 96), masks, seed=0)
        keys = [SampleKey(i, 0, i // len(images), i % len(images)) for i in range(args.images)]
        photometric = Photometric(MEAN, STD).to(device)

        def worker() -> dict:
            return collate_views([dataset[key] for key in keys])

        batch = worker()

        def on_device() -> list[Tensor]:
            return [
                photometric(batch[f"{kind}_crops"].to(device), batch[f"{kind}_photometric"])
                for kind in ("global", "local")
            ]

        first, second = (torchvision_transform(224, (0.32, 1.0), *extra) for extra in ((0.0, 0.0), (0.9, 0.2)))
        local = torchvision_transform(96, (0.05, 0.32), 0.5, 0.0)

        def peer() -> list[Tensor]:
            samples = []
            for key in keys:
                image = Image.fromarray(images.image(key.index))
                samples.append([first(image), second(image), *(local(image) for _ in range(8))])
            return [torch.stack(crops) for crops in zip(*samples, strict=True)]

        candidates = {
            "torchvision on PIL, worker": peer,
            "ours, worker": worker,
            f"ours, batched on {device}": on_device,
        }
        seconds = paired_medians(candidates, args.seconds)
    base = seconds["torchvision on PIL, worker"]
    rows = [
        [name, f"{1000 * value / args.images:.2f}", f"{args.images / value:.0f}", f"{value / base:.3f}"]
        for name, value in seconds.items()
    ]
    append_results(
        f"Views, 2 x 224 + 8 x 96 px of a 500 x 375 JPEG, batch {args.images}",
        ["stage", "ms an image", "images / s", "/ first row"],
        rows,
        ["torchvision", "pillow"],
    )


if __name__ == "__main__":
    main()
