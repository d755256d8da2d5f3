"""What docs/hub.md shows, typed as it stands there, against a Hub on localhost."""

import re
import shlex

import pytest

from tests.testing_utils import REPOSITORY, save_tiny_vit

PAGE = (REPOSITORY / "docs" / "hub.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
COMMANDS = [line.partition("dinov3-hf push ")[2] for line in LINES if "dinov3-hf push " in line]


@pytest.fixture
def desk(tmp_path):
    """A folder with what the page assumes."""
    for name in ("runs/photos/teacher", "runs/photos/checkpoint-5000/teacher", "vits16"):
        save_tiny_vit(tmp_path / name)
    return tmp_path


def test_commands(hub, client, desk):
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        status, printed, error = client.push(*shlex.split(command), folder=desk)
        assert status == 0, (command, error)
        assert hub.url in printed
    assert set(hub.repositories) == {"me/my-vit", "me/vits16"}
    assert set(hub.repositories["me/my-vit"].branches) == {"main", "step-5000"}
    assert hub.repositories["me/vits16"].private


def test_python(hub, client, desk):
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    client.python(program, folder=desk)
    assert {"model.safetensors", "preprocessor_config.json", "README.md"} <= set(hub.repositories["me/my-vit"].files())


def test_messages_are_those_of_the_code():
    sources = "".join(path.read_text() for path in (REPOSITORY / "src" / "dinov3_hf" / "hub").glob("*.py"))
    rows = re.findall(r"^\| (.*) \| .* \|$", PAGE.partition("\n| it says | do |\n|---|---|\n")[2], re.MULTILINE)
    messages = [message for row in rows for message in row.split("; ")]
    assert len(messages) > 8
    for message in messages:
        assert message.partition("`")[0].strip() in sources, message
