"""Frozen features of a set of images: the one door through which evaluations reach models.

Letters: N images, B images of a batch, C channels, H and W pixels, T tokens, P = h*w patches, D features.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES

# Families that this package computes itself; everything else is opened by `AutoModel`.
OUR_MODELS = {model_type: model_class for model_type, (_, model_class) in BACKBONES.items()}

MODEL_FILES = ("config.json", "preprocessor_config.json")
_SAME_MODEL = "give a folder in which both are of the same model."

Picture = Image.Image | np.ndarray


class Images(Protocol):
    """Images by row number, each PIL or a uint8 array (H, W, C)."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Picture: ...


@dataclass(frozen=True)
class ImageList:
    """Images that are in memory already."""

    pictures: Sequence[Picture]

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, i: int) -> Picture:
        return self.pictures[i]


@dataclass(frozen=True)
class Features:
    """What a frozen model says about N images.

    Attributes:
        cls: the normalised CLS token of each image, float32 (N, D), on the CPU.
        labels: the class of each image, int64 (N,), if it was given.
        patches: the normalised patch tokens, row by row from the top left, float32 (N, P, D), if they were asked for.
        grid: rows and columns of the patches (h, w), P = h * w, if they were asked for.
        unreadable: a message for each further image that could not be read and is left out of the above.
    """

    cls: Tensor
    labels: Tensor | None = None
    patches: Tensor | None = None
    grid: tuple[int, int] | None = None
    unreadable: tuple[str, ...] = ()

    def patch_maps(self) -> Tensor:
        """The patch tokens in their places, float32 (N, h, w, D).

        Raises:
            ValueError: if they were not kept.
        """
        if self.patches is None or self.grid is None:
            raise ValueError("these features have no patches; ask extract_features for them with with_patches=True.")
        return self.patches.unflatten(1, self.grid)


def load_model(source: str, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Open a model with the image processor that was saved beside it.

    Args:
        source: a folder written by `save_pretrained`, or the name of a repository on the Hub.
        device: where the model goes.

    Returns:
        The model in float32 and evaluation mode, and the image processor.

    Raises:
        FileNotFoundError: if `source` is a folder without a model or image processor, or a path where nothing is.
        ValueError: if its weights cannot be read, or are not those that its configuration asks for.
    """
    folder = Path(source)
    if folder.is_dir():
        if not _is_model_folder(folder):
            # Of a training run, `teacher` rather than `checkpoint-100`.
            models = sorted(filter(_is_model_folder, folder.iterdir()), reverse=True)
            remedy = f"give {models[0]}" if models else "give a folder that save_pretrained wrote, processor included"
            raise FileNotFoundError(f"{source} is no model folder (it needs {' and '.join(MODEL_FILES)}); {remedy}.")
    elif source.count("/") != 1 or source.startswith((".", "/", "~")) or folder.parent.is_dir():
        raise FileNotFoundError(f"there is no model folder {source}; give one, or the OWNER/NAME of a Hub repository.")
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{folder / 'config.json'} cannot be read; copy or download the folder again.") from error
        raise FileNotFoundError(f"there is no folder {source}, and as a Hub repository it fails: {error}") from error
    model, fresh = load_weights(OUR_MODELS.get(config.model_type, AutoModel), source, dtype=torch.float32)
    # What of other families may be a pooler, of ours never.
    if config.model_type in OUR_MODELS and fresh:
        raise ValueError(f"the weights of {source} lack {min(fresh)}, which its config.json asks for; {_SAME_MODEL}")
    return model.to(device).eval(), AutoImageProcessor.from_pretrained(source)


def load_weights(model_class: Any, source: str, **options: Any) -> tuple[Any, set[str]]:
    """
    `model_class.from_pretrained(source, **options)`.

    Returns:
        The model, and the names of tensors that were drawn at random, because the files lack them.

    Raises:
        FileNotFoundError: if `source` is a folder without weights.
        ValueError: if they cannot be read, or have other shapes than its configuration asks for.
    """
    folder = Path(source)
    try:
        loaded: Any = model_class.from_pretrained(source, output_loading_info=True, **options)
    except OSError as error:
        if not folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{source} has no weights (model.safetensors); copy or download them again."
        ) from error
    except SafetensorError as error:
        raise ValueError(f"the weights of {source} cannot be read ({error}); copy or download them again.") from error
    except RuntimeError as error:  # shapes differ; transformers has logged which
        raise ValueError(f"the weights of {source} do not fit its config.json; {_SAME_MODEL}") from error
    model, report = loaded
    return model, set(report["missing_keys"])


def _is_model_folder(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES)


def input_size(processor: BaseImageProcessor) -> int:
    """Side in pixels of the square images that `processor` makes by itself.

    Raises:
        ValueError: if they are not square.
    """
    settings = processor.to_dict()
    size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    sides = set(size.values())
    if len(sides) != 1:
        raise ValueError(f"the image processor makes images of {size}, which are not square; give the size.")
    return sides.pop()


def check_divisible(size: int, patch_size: int) -> None:
    """Refuse an input side that is not a whole number of patches.

    Raises:
        ValueError: naming the nearest sides that are.
    """
    if size < patch_size or size % patch_size:
        below = size // patch_size * patch_size
        nearest = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise ValueError(f"image size {size} is not a multiple of the patch size {patch_size}; use {nearest}.")


def to_picture(image: Picture) -> Image.Image:
    """A PIL image of an array (H, W, C) of uint8 with C = 1 or 3; a PIL image is returned as it is."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _is_beyond_pil(image: Picture) -> TypeGuard[np.ndarray]:
    """Whether it has a number of channels that PIL images do not have, or have with transparency only."""
    return isinstance(image, np.ndarray) and image.shape[-1] not in (1, 3)


def center_crop(image: Picture, size: int) -> Picture:
    """The usual view of a photo in evaluations: 256 -> 224, and other sizes in that proportion.

    The short side is resized to 256/224 of `size` (bicubic) and the central `size` x `size` pixels are kept.

    Returns:
        A PIL image, or uint8 (size, size, C) of an array that has neither 1 nor 3 channels.
    """
    if _is_beyond_pil(image):  # channel by channel, which is what happens to those of a PIL image
        channels = [center_crop(Image.fromarray(channel), size) for channel in np.moveaxis(image, -1, 0)]
        return np.stack([np.asarray(channel) for channel in channels], axis=-1)
    picture = to_picture(image)
    scale = size * 256 / 224 / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


@torch.inference_mode()
def extract_features(
    model: PreTrainedModel,
    images: Images,
    processor: BaseImageProcessor,
    labels: Iterable[int] | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    with_patches: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    bf16: bool = False,
    progress: str | None = None,
    max_unreadable_share: float = 0.0,
) -> Features:
    """Features of `images` by `model`, which is put in evaluation mode for the while.

    Args:
        model: any model that takes `pixel_values` (B, C, H, W). Its `last_hidden_state` is [CLS, registers, patches]
            (B, T, D), or a feature map (B, D, h, w) beside a `pooler_output`, which then takes the place of CLS.
        images: N images, read one by one as they are needed; `ImageList` wraps a list of them.
        processor: makes `pixel_values` of them.
        labels: their N classes.
        size: side in pixels, or (height, width), to which each image is resized; `None` leaves it to the processor.
        with_patches: keep the patch tokens, 4 * P * D bytes an image.
        num_workers: processes that read and prepare images; 0 does it in this one.
        bf16: run the model in bfloat16 autocast; the features are float32 in any case.
        progress: what the progress bar is called (shown in a terminal only); `None` shows none.
        max_unreadable_share: share of the images, in [0, 1], that may be unreadable; they and their labels are left
            out, so that the features are fewer than N.

    Raises:
        ValueError: if there are no images or too many cannot be read, if `labels` are not as many, if a side is no
            multiple of the patch size, or if processor and model disagree about the number of channels.
    """
    if len(images) == 0:
        raise ValueError("there are no images to compute features of.")
    targets = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)  # (N,)
    if targets is not None and len(targets) != len(images):
        raise ValueError(f"{len(images)} images have {len(targets)} labels.")

    prepare = _Prepare(images, processor, size)
    rows: Any = range(len(images))  # any sequence will do
    # A generator of its own: the loader draws a number, and a training run must not notice that it is measured.
    loader = DataLoader(rows, batch_size, num_workers=num_workers, collate_fn=prepare, generator=torch.Generator())
    bar = tqdm(total=len(images), desc=progress, unit=" images", disable=True if progress is None else None)
    cls, patches, grid = [], [], None
    kept: list[int] = []  # rows
    unreadable: list[str] = []
    with bar, evaluation_mode(model):
        for rows_read, pixel_values, errors in loader:  # pixel_values (B, C, H, W)
            kept += rows_read
            unreadable += errors
            if len(unreadable) > max_unreadable_share * len(images):
                raise ValueError(_too_many(unreadable, len(images), max_unreadable_share))
            bar.update(len(rows_read) + len(errors))
            if not rows_read:
                continue
            if pixel_values.shape[1] != model.config.num_channels:
                raise ValueError(
                    f"the image processor makes images of {pixel_values.shape[1]} channels, and the model takes "
                    f"{model.config.num_channels}; image_mean and image_std need one value a channel."
                )
            grid = patch_grid(model, *pixel_values.shape[-2:])
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                output = model(pixel_values=pixel_values.to(model.device))
            tokens = output.last_hidden_state  # (B, T, D) or (B, D, h, w)
            # Copies: a view would keep all tokens of the batch in memory.
            pooled = tokens[:, 0] if tokens.ndim == 3 else output.pooler_output.flatten(1)  # (B, D)
            cls.append(pooled.to("cpu", torch.float32, copy=True))
            if with_patches:
                if grid is None:
                    raise ValueError(f"a model of type {model.config.model_type} has no patches of one size.")
                patches.append(tokens[:, -grid[0] * grid[1] :].to("cpu", torch.float32, copy=True))  # (B, P, D)
    if not kept:
        raise ValueError(_too_many(unreadable, len(images), max_unreadable_share))
    return Features(
        torch.cat(cls),
        None if targets is None else targets[kept],
        torch.cat(patches) if with_patches else None,
        grid if with_patches else None,
        tuple(unreadable),
    )


def _too_many(unreadable: list[str], num_images: int, max_share: float) -> str:
    if max_share == 0:
        return unreadable[0]
    return (
        f"{len(unreadable):,} of {num_images:,} images cannot be read, more than max_unreadable_share {max_share:g} "
        f"allows; the first: {unreadable[0]}"
    )


def patch_size(model: PreTrainedModel) -> int | None:
    """Side in pixels of what a token of `model` stands for; None for families without tokens (other ConvNets)."""
    if isinstance(model.config, DINOv3ConvNextConfig):
        return model.config.stride  # its `patch_size` is that of feature maps
    return model.config.to_dict().get("patch_size")  # the dictionary: not every family's config has the field


def patch_grid(model: PreTrainedModel, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of the patches of a `height` x `width` image; None for families without patches.

    Raises:
        ValueError: if a side is no multiple of the patch size.
    """
    side = patch_size(model)
    if side is None:
        return None
    check_divisible(height, side)
    check_divisible(width, side)
    return height // side, width // side


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the while: in training mode even a frozen DINOv3 draws random RoPE scales."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Prepare:
    """Row numbers -> those that could be read, their pixel values (B, C, H, W), and messages about the others.

    A class, because worker processes must be able to receive it.
    """

    images: Images
    processor: BaseImageProcessor
    size: int | tuple[int, int] | None

    def __call__(self, rows: list[int]) -> tuple[list[int], Tensor | None, list[str]]:
        options: dict[str, Any] = {}
        if self.size is not None:
            height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
            options = {"size": {"height": height, "width": width}, "do_center_crop": False}
        pictures: dict[int, Any] = {}
        errors = []
        for row in rows:
            try:
                image = self.images.image(row)
                pictures[row] = image if _is_beyond_pil(image) else to_picture(image)
            except ValueError as error:
                errors.append(str(error))
        if not pictures:
            return [], None, errors
        batch = list(pictures.values())
        if isinstance(batch[0], np.ndarray):
            _check_statistics(self.processor, batch[0].shape[-1])
            options["input_data_format"] = "channels_last"
        return list(pictures), self.processor(batch, return_tensors="pt", **options)["pixel_values"], errors


def _check_statistics(processor: BaseImageProcessor, num_channels: int) -> None:
    num_values = len(processor.to_dict()["image_mean"])
    if num_values != num_channels:
        raise ValueError(
            f"the images have {num_channels} channels, and the image processor makes images of {num_values}; "
            "image_mean and image_std need one value a channel."
        )
