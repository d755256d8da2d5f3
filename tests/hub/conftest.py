import pytest

from tests.hub.client import running_client
from tests.hub.server import running_hub


@pytest.fixture(scope="session")
def _hub_and_client(tmp_path_factory):
    with running_hub() as hub, running_client(hub, tmp_path_factory.mktemp("hub")) as client:
        yield hub, client


@pytest.fixture
def hub(_hub_and_client):
    """An empty Hub."""
    _hub_and_client[0].reset()
    return _hub_and_client[0]


@pytest.fixture
def client(_hub_and_client):
    """A user of it."""
    return _hub_and_client[1]
