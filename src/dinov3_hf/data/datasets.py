"""The data set of multi-crop samples on top of the sources of images."""

from typing import Any

from torch.utils.data import Dataset

from dinov3_hf.data.decoding import Content, UnreadableImage, open_image
from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.sampler import SampleKey
from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.data.sources.base import ImageSource
from dinov3_hf.data.sources.mixture import parts_of

MAX_REPLACEMENTS = 20


class SSLDataset(Dataset[dict[str, Any]]):
    """Multi-crop views and masks of one image each, for keys as `StreamSampler` yields them.

    An image that cannot be read is replaced by another one of its source, drawn at random by the position.

    Args:
        images: the pictures.
        views: cuts the crops and draws their photometric parameters.
        masks: gives the masks of both global crops.
        seed: of the run.
    """

    def __init__(self, images: ImageSource, views: MultiCropViews, masks: MaskSampler, seed: int):
        self.sources = [part.source for part in parts_of(images)]
        self.views = views
        self.masks = masks
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Return what `MultiCropViews` returns, and

        - `mask`: bool (2, P)
        - `image`: its place in the global batch, from 0
        - `unreadable`: name and reason of each image, or shard of a stream, that could not be read, usually none

        Raises:
            ValueError: one image after the other cannot be read.
        """
        source = self.sources[key.source]
        index = key.index
        content: Content = source.content(index) if key.content is None else key.content
        unreadable = list(key.failures)
        for attempt in range(1 + MAX_REPLACEMENTS):
            rng = random_generator(self.seed, Stream.VIEWS, key.source, key.epoch, index)
            try:
                views = self.views(open_image(content, source.num_channels), rng)
            except UnreadableImage as error:
                unreadable.append((source.name(index), str(error)))
                draw = random_generator(self.seed, Stream.REPLACEMENTS, key.position, attempt)
                index = int(draw.integers(len(source)))
                content = source.content(index)
            else:
                image = key.position % self.masks.batch_size
                return views | {"mask": self.masks(key.position), "image": image, "unreadable": unreadable}
        name, reason = unreadable[len(key.failures)]
        raise ValueError(
            f"{name} cannot be read ({reason}), nor can {MAX_REPLACEMENTS} images drawn in its place; check the "
            "training images."
        )
