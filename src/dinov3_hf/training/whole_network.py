"""A network as one piece again, whatever the engine has made of it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dinov3_hf.distributed.engine import PARAMETER, Engine
from dinov3_hf.distributed.pieces import StateReader

Network = TypeVar("Network", bound=nn.Module)


def network_of_pieces(reader: StateReader, name: str, make: Callable[[], Network]) -> Network:
    """
    A network from the pieces that all ranks have saved, on the host, frozen.

    Args:
        reader: of the pieces.
        name: of the network in the model that was saved.
        make: makes a network like it; its values are not read.
    """
    prefix = f"{PARAMETER}/{name}."
    names = [found for found in reader.names() if found.startswith(prefix)]
    return _filled(make, {found.removeprefix(prefix): reader.tensor(found) for found in names})


@torch.no_grad()
def whole_network(engine: Engine, network: Network, make: Callable[[], Network], is_main: bool) -> Network:
    """
    The network itself, or where the engine shards it, a copy on the host of the main process; others get their shards.
    All ranks call it.

    Args:
        engine: of the network.
        network: frozen.
        make: makes a network like it; its values are not read.
        is_main: whether this process gets the copy.
    """
    if engine.holds_everything:
        return network
    tensors = {}
    for name, tensor in engine.whole_tensors(network):
        if is_main:
            tensors[name] = tensor.to("cpu", copy=True)
    return _filled(make, tensors) if is_main else network


def _filled(make: Callable[[], Network], tensors: dict[str, Tensor]) -> Network:
    with torch.device("meta"):
        network = make()
    nothing = {name: torch.empty(value.shape) for name, value in network.state_dict().items() if not value.numel()}
    network.load_state_dict(nothing | tensors, assign=True)
    return network.requires_grad_(False).eval()
