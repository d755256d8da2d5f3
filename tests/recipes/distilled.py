"""Recipes of distillation, which are nothing without a teacher."""

from pathlib import Path

import torch

from dinov3_hf.recipes.pages import recipe_names
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.distillation_config import DistillationConfig
from tests.testing_utils import save_tiny_vit
from tests.training.test_distillation_teacher import save_heads

DISTILLED = [name for name in recipe_names() if name.startswith("distill_")]


def teacher_of(name: str, folder: Path) -> Path:
    """Writes a tiny teacher with heads for a recipe: with its patches, as the teacher that it is made for."""
    torch.manual_seed(0)
    save_tiny_vit(folder, patch_size=4 if name == "distill_small_cpu" else 16)
    save_heads(folder)
    return folder


def parse_distilled(name: str, folder: Path, *words: str) -> DistillationConfig:
    return parse_arguments(DistillationConfig, [name, "--teacher", str(teacher_of(name, folder)), *words])
