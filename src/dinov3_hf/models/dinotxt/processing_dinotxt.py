"""Images and texts to the inputs of dino.txt."""

import os
from typing import Any

from transformers import ProcessorMixin

from dinov3_hf.models.dinotxt.tokenization_dinotxt import DinoTxtTokenizer
from dinov3_hf.models.remote_code import RemoteCodeMixin, remote_name


class DinoTxtProcessor(RemoteCodeMixin, ProcessorMixin):
    """
    An image processor of DINOv3 and a [`DinoTxtTokenizer`]: `processor(images=..., text=..., return_tensors="pt")`.

    Texts are padded to the length of the context and cut there, by default; a text that is cut keeps its end token.

    Args:
        image_processor: As `build_image_processor` makes it.
        tokenizer ([`DinoTxtTokenizer`]):
            With `model_max_length` the context of the text tower.
    """

    def __init__(self, image_processor: Any = None, tokenizer: DinoTxtTokenizer | None = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)
        self.auto_map = {"AutoProcessor": remote_name("DinoTxtProcessor")}

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """
        Args:
            images: An image or a list of images.
            text: A text or a list of texts.
            kwargs: As in [`ProcessorMixin.__call__`]. `padding` and `truncation` are `"max_length"` and `True` unless
                they are given.

        Returns:
            `pixel_values` (images, C, H, W) and `input_ids` (texts, T).
        """
        if text is not None:
            kwargs = {"padding": "max_length", "truncation": True, **kwargs}
        return super().__call__(images=images, text=text, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save as [`ProcessorMixin.save_pretrained`] does, and the image processor in a file of its own, as DINOv3."""
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)
