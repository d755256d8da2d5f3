"""From native constructor arguments, weights and names to our ViT and back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dinov3_hf.convert.dinov3_vit import config_from_native, state_dict_from_native
from dinov3_hf.models.dinov3_vit import modeling_dinov3_vit
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

from .compare import Declined


def vit_config(native: Mapping[str, Any]) -> DINOv3ViTConfig:
    """Our configuration for native keyword arguments.

    Raises:
        Declined: a RoPE table in float16.
        ValueError: an argument that the original does not have.
    """
    if native.get("pos_embed_rope_dtype") == "fp16":
        raise Declined("RoPE table in float16 (pos_embed_rope_dtype: fp16)")
    return config_from_native(native)


def build_vit(native: Mapping[str, Any], weights: Mapping[str, Tensor]) -> DINOv3ViTModel:
    """Our ViT for native keyword arguments, with native weights loaded."""
    config = vit_config(native)
    model = DINOv3ViTModel(config)
    model.load_state_dict(state_dict_from_native(weights, config))
    return model


class RecordedDraws:
    """Random numbers that are replayed in the order in which they were recorded."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._uniform = _numbered(inputs, "draw_")
        self._permutations = _numbered(inputs, "perm_")
        self.bounds: list[tuple[float, float, int]] = []  # lowest, highest, how many: of every uniform draw so far

    def __bool__(self) -> bool:
        return bool(self._uniform or self._permutations)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, every forward of a ViT takes the recorded numbers from the first on; all have to be taken."""
        uniform, permutations = list(self._uniform), list(self._permutations)
        self.bounds = []

        def draw_uniform(low: float, high: float, count: int, device: torch.device) -> Tensor:
            self.bounds.append((low, high, count))
            return _take(uniform, count, "uniform numbers")

        def draw_permutation(n: int, device: torch.device) -> Tensor:
            return _take(permutations, n, "permutations")

        with (
            mock.patch.object(modeling_dinov3_vit, "draw_uniform", draw_uniform),
            mock.patch.object(modeling_dinov3_vit, "draw_permutation", draw_permutation),
        ):
            yield
        if uniform or permutations:
            raise ValueError(f"{len(uniform) + len(permutations)} recorded draws were not taken.")


def _numbered(inputs: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    numbers = {int(name.removeprefix(prefix)): values for name, values in inputs.items() if name.startswith(prefix)}
    return [numbers[number] for number in sorted(numbers)]


def _take(recorded: list[Tensor], count: int, what: str) -> Tensor:
    if not recorded:
        raise ValueError(f"More {what} are drawn than were recorded.")
    values = recorded.pop(0)
    if len(values) != count:
        raise ValueError(f"{count} {what} are drawn where {len(values)} were recorded.")
    return values
