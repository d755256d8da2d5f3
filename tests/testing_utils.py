"""What tests share: marks for what a machine may lack, and running our programs as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_hf.cli.errors import run
from dinov3_hf.cli.main import parse_and_run
from dinov3_hf.distributed.engine import PARAMETER
from dinov3_hf.distributed.pieces import StateReader
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.training.checkpoint_writer import STATE

REPOSITORY = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
# A folder with real images, for the tests that want some.
TEST_DATA = Path(os.environ["DINOV3_HF_TEST_DATA"]) if "DINOV3_HF_TEST_DATA" in os.environ else None

require_test_data = pytest.mark.skipif(TEST_DATA is None, reason="DINOV3_HF_TEST_DATA names no folder of real images")


def require_gpu(test):
    missing = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(test))


def require_multi_gpu(test):
    missing = torch.cuda.device_count() < 2
    return pytest.mark.multi_gpu(pytest.mark.skipif(missing, reason="needs two CUDA devices")(test))


def require_hub(test):
    offline = "DINOV3_HF_TEST_HUB" not in os.environ
    return pytest.mark.hub(pytest.mark.skipif(offline, reason="needs the Hub; set DINOV3_HF_TEST_HUB=1")(test))


def require_package(name: str):
    """Skip where the package that is imported as `name` is not installed."""
    return pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}")


def saved_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole tensors in state/ of a checkpoint-N: param/NAME, exp_avg/NAME, exp_avg_sq/NAME and num_steps."""
    reader = StateReader(checkpoint / STATE)
    return {name: reader.tensor(name) for name in reader.names()}


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The parameters among them, by their names in the model."""
    prefix = f"{PARAMETER}/"
    state = saved_state(checkpoint)
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def run_python(*arguments: str | Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a process of its own, with `env` added to the environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"COLUMNS": "160"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_cli(*arguments: str | Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `dinov3-hf ARGUMENTS` in a process of its own."""
    return run_python("-m", "dinov3_hf", *arguments, timeout=timeout, **env)


def save_tiny_vit(folder: Path, image_size: int = 32, **fields: Any) -> DINOv3ViTModel:
    """Write a model folder, image processor included, of a random ViT: patch 8, width 24, 2 blocks, 2 registers."""
    tiny = {
        "patch_size": 8,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_register_tokens": 2,
    }
    model = DINOv3ViTModel(DINOv3ViTConfig(**tiny | fields)).eval()
    model.save_pretrained(folder)
    num_channels = model.config.num_channels
    statistics = {"image_mean": [0.5] * num_channels, "image_std": [0.25] * num_channels}
    build_image_processor(image_size=image_size, **statistics).save_pretrained(folder)
    return model


def save_labelled_images(folder: Path, num_images: int = 10, size: tuple[int, int] = (40, 48)) -> None:
    """Write `num_images` noisy photos of each of two classes, `folder`/dark/*.png and `folder`/light/*.png."""
    rng = np.random.default_rng(0)
    for name, brightness in (("dark", 40), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for i in range(num_images):
            pixels = rng.normal(brightness, 20, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


def run_in_process(
    capsys: pytest.CaptureFixture[str],
    *arguments: str | Path,
    main: Callable[[list[str]], object] = parse_and_run,
) -> tuple[int, str, str]:
    """Exit status, output and error output of `dinov3-hf ARGUMENTS`, or of another `main`, run in this process."""
    capsys.readouterr()
    status: Any = 0
    try:
        run(main, [str(argument) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    return status or 0, printed.out, printed.err
