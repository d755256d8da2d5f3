"""Images with labels for the commands that need some: training and test images of `--data`, or all together."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dinov3_hf.data.sources.base import SPLIT_NAMES, ImageSource, NoSuchSplit, Split, part_and_row
from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.evals.features import center_crop

# In a folder without test images of its own, every fifth image of a class becomes one, in an order drawn with seed 0.
TEST_EVERY = 5


@dataclass(frozen=True)
class LabelledImages:
    """Some images of a source with their labels, read when they are asked for.

    Attributes:
        source: the images.
        rows: which of them, int64 (N,).
        labels: their classes, int64 (N,).
        class_names: what the labels stand for.
        crop: side of the centre crop that is taken of each; None leaves them whole.
    """

    source: ImageSource
    rows: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    crop: int | None

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, chosen: np.ndarray) -> "LabelledImages":
        """Those images where `chosen`, bool (N,), is true."""
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def image(self, i: int) -> np.ndarray | Image.Image:
        image = self.source.image(int(self.rows[i]))
        return image if self.crop is None else center_crop(image, self.crop)


@dataclass(frozen=True)
class JoinedImages:
    """Training and test images as one set, with the labels of the former."""

    parts: tuple[LabelledImages, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([part.labels for part in self.parts])

    @property
    def class_names(self) -> list[str]:
        return self.parts[0].class_names

    def image(self, i: int) -> np.ndarray | Image.Image:
        part, row = part_and_row(np.cumsum([len(part) for part in self.parts]), i)
        return self.parts[part].image(row)


def all_labelled(data: str, num_channels: int, size: int) -> JoinedImages:
    """All images of `data`, whatever splits there are, to be classified each by all the others.

    Arguments and errors are those of `labelled_splits`; there is no need of test images here.
    """
    train = _training_images(data, num_channels, size)
    try:
        test = _read(data, "test", num_channels, train.crop)
    except NoSuchSplit:
        return JoinedImages((train,))
    return JoinedImages((train, _labelled_like(train, test, data)))


def labelled_splits(data: str, num_channels: int, size: int) -> tuple[LabelledImages, LabelledImages]:
    """The training and the test images of `data`.

    Args:
        data: what `load_images` takes, with labels; of all but "digits" the centre of the images is used. What has no
            test images of its own is split.
        num_channels: of the model.
        size: of the model's input, in pixels.

    Raises:
        FileNotFoundError: if there is no such folder, or no images in it.
        ValueError: if images have no labels, all belong to one class, a class has test images only, all classes are
            too small, or there is a `test/` without a `train/`.
    """
    train = _training_images(data, num_channels, size)
    try:
        test = _read(data, "test", num_channels, train.crop)
    except NoSuchSplit:
        return _set_aside(train, data)
    return train, _labelled_like(train, test, data)


# Reference and query; None for the query asks for the class of each reference image, of all the others.
EvaluationImages = tuple[LabelledImages | JoinedImages, LabelledImages | None]


def evaluation_images(data: str, num_channels: int, size: int, leave_one_out: bool) -> EvaluationImages:
    """What a training run is evaluated on, as its trainer takes it."""
    return (
        (all_labelled(data, num_channels, size), None) if leave_one_out else labelled_splits(data, num_channels, size)
    )


def _training_images(data: str, num_channels: int, size: int) -> LabelledImages:
    crop = None if data == "digits" else size
    folder = Path(data).expanduser()
    test_folder = next((name for name in SPLIT_NAMES["test"] if (folder / name).is_dir()), None)
    if test_folder is not None and not (folder / "train").is_dir():
        raise ValueError(f"{data} has a sub-folder {test_folder} but none named train; put the training images there.")
    train = _read(data, "train", num_channels, crop)
    if len(train.class_names) < 2:
        raise ValueError(
            f"all images in {data} are of one class, {train.class_names[0]}; give images of several classes."
        )
    return train


def _set_aside(train: LabelledImages, data: str) -> tuple[LabelledImages, LabelledImages]:
    """`train` without every fifth image of a class, and those images."""
    is_test = np.zeros(len(train), dtype=bool)
    order = np.random.default_rng(0).permutation(len(train))
    for label in range(len(train.class_names)):
        is_test[order[train.labels[order] == label][TEST_EVERY - 1 :: TEST_EVERY]] = True
    if not is_test.any():
        raise ValueError(
            f"no class in {data} has {TEST_EVERY} images, too few to set some aside; give test images as well."
        )
    return train.subset(~is_test), train.subset(is_test)


def _read(data: str, split: Split, num_channels: int, crop: int | None) -> LabelledImages:
    source = load_images(data, split, labelled=True, num_channels=num_channels)
    assert source.labels is not None and source.class_names is not None  # because of labelled=True
    return LabelledImages(source, np.arange(len(source)), source.labels, source.class_names, crop)


def _labelled_like(train: LabelledImages, test: LabelledImages, data: str) -> LabelledImages:
    """`test` with the labels that `train` gives to the classes of the same names."""
    unknown = sorted(set(test.class_names) - set(train.class_names))
    if unknown:
        raise ValueError(
            f"the test images in {data} have classes without training images, such as {unknown[0]}; add some or "
            "remove these classes."
        )
    translation = np.array([train.class_names.index(name) for name in test.class_names])
    return replace(test, labels=translation[test.labels], class_names=train.class_names)
