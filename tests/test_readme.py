"""Every command of the README, typed as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.convert.files import tiny_native
from tests.hub.client import TOKEN, environment
from tests.hub.server import running_hub
from tests.testing_utils import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(command: list[str], folder: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder as the README assumes it: the repository's scripts, some photos, and a short quickstart behind it."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "training_scripts").symlink_to(REPOSITORY / "training_scripts")
    (desk / "photos" / "holiday").mkdir(parents=True)
    for i in range(3):
        Image.radial_gradient("L").convert("RGB").rotate(30 * i).save(desk / "photos" / "holiday" / f"{i}.jpg")
    Image.radial_gradient("L").convert("RGB").save(desk / "photo.jpg")
    torch.save(tiny_native(), desk / "dinov3_vits16_pretrain.pth")
    [quickstart] = re.findall(
        r"pretrain\.py (quickstart_digits --output_dir \S+)", (REPOSITORY / "Makefile").read_text()
    )
    short = ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "2"]
    script = str(REPOSITORY / "training_scripts" / "pretrain.py")
    printed = run([sys.executable, script, *quickstart.split(), *short], desk)
    assert re.search(r"at step +0: +\d+\.\d %\n.*at step +2: .*\n.*at step +4: .*", printed)
    return desk


def test_make_targets_exist():
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["quickstart", "test", "install"]
    for target in targets:
        run(["make", "--dry-run", target], REPOSITORY)


def test_quickstart_takes_a_folder_with_a_space_in_its_name():
    printed = run(["make", "--dry-run", "quickstart", "DATA=my photos"], REPOSITORY)
    assert '--output_dir runs/quickstart --train_data "my photos"\n' in printed
    assert 'runs/quickstart/teacher "my photos" -o' in printed


def test_every_program_is_covered():
    programs = {command.split()[0] for command in COMMANDS}
    assert programs == {"make", "pip", "accelerate", "python", "dinov3-hf"}


def test_training_commands(desk):
    for command in COMMANDS:
        if command.startswith(("accelerate", "python")):
            # The Hub is out of reach; the quickstart's teacher is a model like any other.
            command = command.replace("facebook/dinov3-vits16-pretrain-lvd1689m", "runs/quickstart/teacher")
            shorter = ["--max_steps", "4", "--save_steps", "2"] if "--help" not in command else []
            run([*shlex.split(command), *shorter], desk)
    for name in ("photos", "photos_gram", "photos_highres", "mine"):
        assert (desk / "runs" / name / "teacher" / "model.safetensors").is_file(), name


def test_commands_on_the_model(desk):
    with running_hub() as hub:
        online = environment(hub, desk / "home") | TOKEN | {"PATH": ENVIRONMENT["PATH"]}
        for command in COMMANDS:
            if command.startswith("dinov3-hf"):
                run(shlex.split(command), desk, **online)
        assert "model.safetensors" in hub.repositories["me/vits16"].files()
    before, back = (torch.load(desk / name) for name in ("dinov3_vits16_pretrain.pth", "back.pth"))
    assert before.keys() == back.keys() and all(torch.equal(before[name], back[name]) for name in before)
    for name in ("pca.png", "similarity.png", "checkpoints.png", "health.png"):
        with Image.open(desk / name) as picture:
            assert min(picture.size) > 64


def test_python_needs_transformers_alone(desk):
    program = f"import sys\nsys.modules['dinov3_hf'] = None\n{PYTHON}\nprint(outputs.pooler_output.shape)"
    assert "torch.Size([1, 96])" in run([sys.executable, "-c", program], desk)
