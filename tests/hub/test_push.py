"""`dinov3-hf push` against a Hub on localhost: what goes up, what comes back, and what happens when it fails."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from dinov3_hf.hub.model_card import is_generated, write_model_card
from tests.hub.client import environment
from tests.hub.server import DROP, HOLD
from tests.testing_utils import run_python, save_tiny_vit

MODEL_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_tiny_vit(tmp_path / "tiny")
    return tmp_path / "tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_hub(hub, name="me/tiny", revision="main") -> set[str]:
    return set(hub.repositories[name].files(revision)) - {".gitattributes"}


def card_on_hub(hub, name="me/tiny") -> str:
    return hub.repositories[name].files()["README.md"].decode()


def test_what_was_pushed_opens_from_the_hub_without_this_package(hub, client, folder, tmp_path):
    model = save_tiny_vit(folder, untie_global_and_local_cls_norm=True)
    before = contents(folder)
    status, printed, error = client.push(folder, "me/tiny", "--license", "apache-2.0", TQDM_POSITION="-1")
    assert status == 0, error
    assert f"{folder} is at {hub.url}/me/tiny\n" in printed
    assert '    model = AutoModel.from_pretrained("me/tiny")\n' in printed
    assert "model.safetensors: 100%" in error  # the bar that a terminal would show
    assert contents(folder) == before
    assert on_hub(hub) == MODEL_FILES | {"extras.safetensors"}
    assert not hub.repositories["me/tiny"].private
    assert is_generated(card_on_hub(hub))
    assert ModelCard(card_on_hub(hub)).data["license"] == "apache-2.0"

    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32)
    program = f"""
import sys
sys.modules["dinov3_hf"] = None
import torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("me/tiny")
assert AutoImageProcessor.from_pretrained("me/tiny").size.height == 32
torch.manual_seed(0)
with torch.no_grad():
    torch.save(model(torch.randn(1, 3, 32, 32)).pooler_output, {str(tmp_path / "outputs.pt")!r})
"""
    opened = run_python("-c", program, **environment(hub, tmp_path / "home"))
    assert opened.returncode == 0, opened.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), model(pixels).pooler_output, rtol=0, atol=1e-6)
    ours = (
        "from dinov3_hf import DINOv3ViTModel\nm = DINOv3ViTModel.from_pretrained('me/tiny')\nprint(m.local_cls_norm)"
    )
    assert client.python(ours).startswith("LayerNorm")


def test_a_native_variant_brings_its_code(hub, client, tmp_path):
    save_tiny_vit(tmp_path / "m", norm_type="rmsnorm")
    status, printed, error = client.push(tmp_path / "m", "tiny")  # of one's own
    assert status == 0, error
    assert 'AutoModel.from_pretrained("me/tiny", trust_remote_code=True)' in printed
    assert any(name.endswith(".py") for name in on_hub(hub))
    assert "states no licence; --license ID states one" in error


def test_a_missing_image_processor_is_said(hub, client, folder):
    (folder / "preprocessor_config.json").unlink()
    status, _, error = client.push(folder, "me/tiny", "--license", "mit")
    assert status == 0
    assert "no preprocessor_config.json says how images are prepared" in error


def test_the_output_folder_of_a_run(hub, client, tmp_path):
    save_tiny_vit(tmp_path / "run" / "teacher")
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    status, printed, error = client.push(tmp_path / "run", "me/tiny", "--json", "--private", "--message", "First")
    assert status == 0, error
    facts = json.loads(printed)
    assert facts["folder"] == str(tmp_path / "run" / "teacher")
    assert set(facts["files"]) == MODEL_FILES
    assert (facts["repository"], facts["url"], facts["revision"]) == ("me/tiny", f"{hub.url}/me/tiny", "main")
    assert facts["commit"] == hub.repositories["me/tiny"].sha()
    assert hub.repositories["me/tiny"].private
    assert on_hub(hub) == MODEL_FILES


def test_pickles_and_training_state_stay(hub, client, folder):
    for name in ("pytorch_model.bin", "weights.pth", "train_data.json", ".secret", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("x")
    status, _, error = client.push(folder, "me/tiny")
    assert status == 0, error
    assert on_hub(hub) == MODEL_FILES | {"notes.txt"}
    assert "left out: .secret, pytorch_model.bin, runs, train_data.json, weights.pth\n" in error


def test_a_branch(hub, client, folder):
    status, printed, error = client.push(folder, "me/tiny", "--revision", "v2")
    assert status == 0, error
    assert f"{hub.url}/me/tiny/tree/v2" in printed and 'from_pretrained("me/tiny", revision="v2")' in printed
    assert on_hub(hub, revision="v2") == MODEL_FILES
    assert on_hub(hub) == set()
    assert client.push(folder, "me/tiny", "--revision", "v2")[0] == 0


def test_large_files_go_up_in_parts(hub, client, folder):
    hub.part_size = 10_000
    assert client.push(folder, "me/tiny")[0] == 0
    assert hub.kinds().count("upload") == -(-(folder / "model.safetensors").stat().st_size // 10_000) > 3
    assert hub.repositories["me/tiny"].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_pushing_again_sends_nothing_twice(hub, client, folder):
    assert client.push(folder, "me/tiny")[0] == 0
    hub.requests.clear()
    assert client.push(folder, "me/tiny")[0] == 0
    assert not {"upload", "commit"} & set(hub.kinds())
    (folder / "notes.txt").write_text("x")
    assert client.push(folder, "me/tiny")[0] == 0
    assert "upload" not in hub.kinds() and hub.kinds().count("commit") == 1


def test_cards_that_somebody_edited_stay(hub, client, folder):
    assert client.push(folder, "me/tiny")[0] == 0
    edited = card_on_hub(hub) + "\nMine.\n"
    files = hub.repositories["me/tiny"].branches["main"]
    files.append({**files[-1], "README.md": edited.encode()})
    status, _, error = client.push(folder, "me/tiny", "--license", "mit")
    assert status == 0
    assert "the model card on the Hub has been edited; it was left alone" in error
    assert card_on_hub(hub) == edited

    # One that was edited here is what its author wants to publish.
    (folder / "README.md").write_text("By hand.\n")
    status, _, error = client.push(folder, "me/tiny")
    assert status == 0 and "states no licence" in error
    assert card_on_hub(hub) == "By hand.\n"


def test_a_licence_is_written_into_a_card_of_ours(hub, client, folder):
    write_model_card(folder, title="A title", sections={"More": "text"})
    before = contents(folder)
    assert client.push(folder, "me/tiny", "--license", "mit")[0] == 0
    card = card_on_hub(hub)
    assert ModelCard(card).data["license"] == "mit"
    assert is_generated(card) and "# A title" in card and "## More" in card
    assert contents(folder) == before


LOGIN = "run `hf auth login`"


@pytest.mark.parametrize(
    ("kind", "how", "says"),
    [
        ("create", 401, ["does not know your token", LOGIN]),
        ("create", 403, ["you may not write to me/tiny", "use a token with write access"]),
        ("create", DROP, ["the connection to http://127.0.0.1", "nothing is lost"]),
        ("create", 500, ["has a problem (500", "nothing is lost"]),
        ("batch", 403, ["you may not write to me/tiny"]),
        ("upload", 403, ["you may not write to me/tiny"]),
        ("commit", 500, ["has a problem (500 injected 500)", "nothing is lost: the same command goes on"]),
        ("commit", 403, ["you may not write to me/tiny"]),
        ("commit", 409, ["is being changed by somebody else", "nothing is lost"]),
        ("commit", 404, ["is not found at", "check OWNER/NAME"]),
        ("commit", DROP, ["the connection to http://127.0.0.1", "nothing is lost"]),
    ],
)
def test_a_failed_push_loses_nothing_and_can_be_repeated(hub, client, folder, kind, how, says):
    before = contents(folder)
    hub.fail(kind, how)
    status, printed, error = client.push(folder, "me/tiny")
    assert status == 1
    assert printed == ""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.endswith(lines[0] + "\n") and "Traceback" not in error
    assert all(part in lines[0] for part in says), lines[0]
    assert contents(folder) == before

    hub.requests.clear()
    status, _, error = client.push(folder, "me/tiny")
    assert status == 0, error
    assert on_hub(hub) == MODEL_FILES
    assert hub.repositories["me/tiny"].files()["model.safetensors"] == before["model.safetensors"]
    if kind == "commit":  # the weights had arrived
        assert "upload" not in hub.kinds()


def test_a_connection_that_breaks_once_is_mended(hub, client, folder):
    hub.fail("upload", DROP)
    status, _, error = client.push(folder, "me/tiny")
    assert status == 0, error
    assert hub.kinds().count("upload") == 2
    assert hub.repositories["me/tiny"].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_connection_that_breaks_each_time(hub, client, folder):
    before = contents(folder)
    hub.fail("upload", DROP, times=6)
    status, _, error = client.push(folder, "me/tiny")
    assert status == 1
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "the connection to http://127.0.0.1" in line and "nothing is lost" in line
    assert contents(folder) == before
    assert client.push(folder, "me/tiny")[0] == 0


def test_a_push_that_is_killed_can_be_repeated(hub, client, folder):
    save_tiny_vit(folder, untie_global_and_local_cls_norm=True)  # two large files
    before = contents(folder)
    hub.fail("upload", HOLD)
    pid = client.start(folder, "me/tiny")
    assert hub.held.wait(60)
    os.kill(pid, signal.SIGKILL)
    hub.release.set()
    assert client.wait(pid)[0] == -signal.SIGKILL
    assert on_hub(hub) == set()
    assert contents(folder) == before
    arrived = len(hub.objects)
    hub.requests.clear()
    assert client.push(folder, "me/tiny")[0] == 0
    assert hub.kinds().count("upload") == 2 - arrived
    assert on_hub(hub) == MODEL_FILES | {"extras.safetensors"}


def test_ctrl_c_ends_at_once(hub, client, folder):
    save_tiny_vit(folder, untie_global_and_local_cls_norm=True)  # two large files, sent from threads
    hub.fail("upload", HOLD)
    pid = client.start(folder, "me/tiny")
    assert hub.held.wait(60)
    os.kill(pid, signal.SIGINT)
    status, _, error = client.wait(pid)  # the server still holds the request
    assert status == 130
    assert error.endswith("\ninterrupted; the same command goes on\n")
    assert not hub.release.is_set() and on_hub(hub) == set()
    hub.release.set()
    assert client.push(folder, "me/tiny")[0] == 0
    assert on_hub(hub) == MODEL_FILES | {"extras.safetensors"}


def test_the_last_word_is_not_a_progress_bar(client):
    program = """
import os, signal, threading, time
from huggingface_hub.utils import tqdm
from dinov3_hf.cli.push import ending_at_once

def draw():
    bar = tqdm(total=10**9, mininterval=0)
    while True:
        bar.update()

with ending_at_once():
    for _ in range(2):
        threading.Thread(target=draw, daemon=True).start()
    time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    for _ in range(15):
        status, _, error = client.run(program)
        assert status == 130
        assert error.endswith("\ninterrupted; the same command goes on\n")


def test_nobody_is_logged_in(hub, client, folder):
    status, _, error = client.push(folder, "me/tiny", HF_TOKEN="")
    assert status == 1
    assert error == f"\nerror: you are not logged in to {hub.url}; run `hf auth login`, or set HF_TOKEN.\n"
    assert hub.requests == []


def test_tokens_that_are_unknown_or_may_only_read(hub, client, folder):
    status, _, error = client.push(folder, "me/tiny", HF_TOKEN="hf_unknown")
    assert status == 1 and f"{hub.url} does not know your token" in error.splitlines()[-1]
    status, _, error = client.push(folder, "me/tiny", HF_TOKEN="hf_reader")
    assert status == 1 and "you may not write to me/tiny" in error.splitlines()[-1]
    status, _, error = client.push(folder, "them/tiny")
    assert status == 1 and "you may not write to them/tiny" in error.splitlines()[-1]
