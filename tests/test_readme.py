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
from tests.forks import ENVIRONMENT
from tests.hub.client import TOKEN, running_client
from tests.hub.server import running_hub
from tests.testing_utils import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
# Two steps of a few images.
SHORTER = [
    *("--max_steps", "2", "--save_steps", "1", "--global_batch_size", "8", "--per_device_train_batch_size", "null"),
    *("--koleo_group_size", "8"),
]
ON_PATH = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ON_PATH, capture_output=True, text=True, timeout=300, check=False)
    return printed_by(done)


def printed_by(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{shlex.join(done.args)}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def desk(forks, tmp_path_factory) -> Path:
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
    short = ["--max_steps", "2", "--save_steps", "1", "--eval_steps", "1"]
    script = REPOSITORY / "training_scripts" / "pretrain.py"
    printed = printed_by(forks.run(script, *quickstart.split(), *short, folder=desk))
    assert re.search(r"at step +0: +\d+\.\d %\n.*at step +1: .*\n.*at step +2: .*", printed)
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


def test_training_commands(forks, desk):
    """The launcher as it stands once: what it does is the same for every script. On two processes it takes longer, see
    tests/scripts/test_engines.py."""
    with_launcher = 0
    for command in COMMANDS:
        if command.startswith(("accelerate", "python")):
            # The Hub is out of reach; the quickstart's teacher is a model like any other.
            command = command.replace("facebook/dinov3-vits16-pretrain-lvd1689m", "runs/quickstart/teacher")
            shorter = SHORTER if "--help" not in command else []
            launcher, script, arguments = re.fullmatch(r"(.*?)(\S+\.py) (.*)", command).groups()
            if launcher == "accelerate launch " and not with_launcher:
                with_launcher += 1
                run([*shlex.split(command), *shorter], desk)
            else:
                printed_by(forks.run(script, *shlex.split(arguments), *shorter, folder=desk))
    assert with_launcher == 1
    for name in ("photos", "photos_gram", "photos_highres", "mine"):
        assert (desk / "runs" / name / "teacher" / "model.safetensors").is_file(), name
    for name in ("vit", "vit_gated"):
        assert (desk / "runs" / "students" / name / "model.safetensors").is_file(), name


def test_commands_on_the_model(desk, tmp_path):
    with running_hub() as hub, running_client(hub, tmp_path) as client:
        for command in COMMANDS:
            if command.startswith("dinov3-hf"):
                words = ["-m", "dinov3_hf", *shlex.split(command)[1:]]
                printed_by(client.forks.run(*words, folder=desk, environment=TOKEN))
        assert "model.safetensors" in hub.repositories["me/vits16"].files()
    before, back = (torch.load(desk / name) for name in ("dinov3_vits16_pretrain.pth", "back.pth"))
    assert before.keys() == back.keys() and all(torch.equal(before[name], back[name]) for name in before)
    for name in ("pca.png", "similarity.png", "checkpoints.png", "health.png"):
        with Image.open(desk / name) as picture:
            assert min(picture.size) > 64


def test_python_needs_transformers_alone(desk):
    program = f"import sys\nsys.modules['dinov3_hf'] = None\n{PYTHON}\nprint(outputs.pooler_output.shape)"
    assert "torch.Size([1, 96])" in run([sys.executable, "-c", program], desk)
