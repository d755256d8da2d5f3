"""The teacher of a run goes to the Hub when the run has ended, and is not lost when that fails."""

import json
import shlex

from huggingface_hub import ModelCard

from tests.hub.server import DROP

TEACHER = {"config.json", "model.safetensors", "extras.safetensors", "heads.safetensors", "preprocessor_config.json"}

PROGRAM = """
import json, sys
from pathlib import Path
from tests.training.test_ssl_trainer import make_trainer
folder, fields = {arguments!r}
trainer = make_trainer(Path(folder), max_steps=2, push_to_hub=True, **fields)
trainer.train()
print(trainer.push_to_hub())
"""
FAILING = """
from pathlib import Path
from tests.training.test_ssl_trainer import make_trainer
make_trainer(Path({folder!r}), max_steps=1, hub_model_id="me/m").push_to_hub(revision="v2")
"""
SCRIPT = """
import runpy, sys
sys.argv = ["pretrain.py", *{arguments!r}]
runpy.run_path("training_scripts/pretrain.py", run_name="__main__")
"""
RECIPE = {
    "train_data": "digits",
    "backbone": {
        **{"patch_size": 4, "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
    },
    "dino_head": {"num_prototypes": 32, "bottleneck_dim": 16, "hidden_dim": 32},
    "ibot_head": {"num_prototypes": 32, "bottleneck_dim": 16, "hidden_dim": 32},
    **{"global_crop_size": 16, "local_crop_size": 8, "num_local_crops": 2, "global_batch_size": 16},
    **{"koleo_group_size": None, "max_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True},
}


def on_hub(hub, name):
    return set(hub.repositories[name].files()) - {".gitattributes"}


def test_push_to_hub_of_the_trainer(hub, client, tmp_path):
    arguments = (str(tmp_path / "run"), {"license": "mit", "save_strategy": "steps", "save_steps": 1})
    printed = client.python(PROGRAM.format(arguments=arguments))
    assert printed.splitlines()[-1] == f"{hub.url}/me/run"
    assert on_hub(hub, "me/run") == TEACHER | {"README.md"}  # no checkpoints, no training state
    card = hub.repositories["me/run"].files()["README.md"].decode()
    assert ModelCard(card).data["license"] == "mit"
    assert "| optimizer steps | 2 |" in card
    saved = tmp_path / "run" / "teacher" / "model.safetensors"
    assert hub.repositories["me/run"].files()["model.safetensors"] == saved.read_bytes()
    assert hub.kinds().count("commit") == 1


def test_the_command_that_repeats_a_push(hub, client, tmp_path):
    hub.fail("commit", 500)
    folder = tmp_path / "my run"
    status, _, error = client.run(FAILING.format(folder=str(folder)))
    assert status == 1
    command = error.splitlines()[-1].partition(" The command is: ")[2]
    assert shlex.split(command) == ["dinov3-hf", "push", str(folder / "teacher"), "me/m", "--revision", "v2"]
    status, _, error = client.push(*shlex.split(command)[2:])
    assert status == 0, error
    assert "model.safetensors" in hub.repositories["me/m"].files("v2")


def run_script(client, tmp_path, *arguments):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    command = [
        str(tmp_path / "recipe.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
        "--push_to_hub",
        "true",
        *arguments,
    ]
    return client.run(SCRIPT.format(arguments=command))


def test_the_script_pushes_and_a_failure_keeps_the_teacher(hub, client, tmp_path):
    hub.fail("commit", DROP)
    status, printed, error = run_script(client, tmp_path, "--hub_model_id", "them-and/me")
    assert status == 1  # before the first step
    assert "error: you may not write to them-and/me" in error.splitlines()[-1]
    assert not (tmp_path / "run").exists()

    status, printed, error = run_script(client, tmp_path, "--hub_model_id", "me/digits")
    assert status == 1
    teacher = tmp_path / "run" / "teacher"
    assert f"The trained teacher is in {teacher}" in printed
    said = error.splitlines()[-1]
    assert "error: the connection to http" in said and "nothing is lost" in said
    command = f"dinov3-hf push {teacher} me/digits"
    assert said.endswith(f" The command is: {command}")

    status, printed, error = client.push(*command.split()[2:])
    assert status == 0, error
    assert on_hub(hub, "me/digits") == TEACHER - {"extras.safetensors"} | {"README.md"}
