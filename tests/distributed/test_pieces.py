"""Tensors that are cut anywhere come back whole, in any other cut; what is missing or damaged is said."""

import pytest
import torch
from torch import Tensor

from dinov3_hf.distributed.pieces import Piece, StateReader, on_host, state_file, write_pieces

SHAPES = {"param/matrix": (7, 5), "exp_avg/matrix": (7, 5), "param/vector": (11,), "num_steps": ()}
# Where each number of ranks cuts: by rows, evenly, anywhere.
CUTS = {1: [], 2: [20], 3: [12, 24], 5: [1, 2, 17, 34]}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.tensor(123456789) if name == "num_steps" else torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }


def write(folder, num_ranks: int) -> None:
    for rank, (start, stop) in enumerate(zip([0, *CUTS[num_ranks]], [*CUTS[num_ranks], 35], strict=True)):
        pieces = [
            Piece(name, SHAPES[name], start, tensor.view(-1)[start:stop])
            for name, tensor in tensors().items()
            if start < tensor.numel()
        ]
        write_pieces(state_file(folder, rank, num_ranks), on_host(pieces))


@pytest.mark.parametrize("num_ranks", CUTS)
def test_what_any_number_of_ranks_writes_comes_back_whole(tmp_path, num_ranks):
    write(tmp_path / "state", num_ranks)
    assert len(list((tmp_path / "state").iterdir())) == num_ranks
    reader = StateReader(tmp_path / "state")
    assert sorted(reader.names()) == sorted(SHAPES)
    for name, tensor in tensors().items():
        assert reader.has(name) and reader.shape(name) == SHAPES[name]
        found = reader.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert not reader.has("param/other")


@pytest.mark.parametrize("num_ranks", CUTS)
def test_every_range_can_be_read(tmp_path, num_ranks):
    write(tmp_path, num_ranks)
    reader, flat = StateReader(tmp_path), tensors()["param/matrix"].view(-1)
    for start in range(35):
        for stop in (start + 1, min(start + 9, 35), 35):
            assert torch.equal(reader.read("param/matrix", start, stop), flat[start:stop]), (start, stop)


def test_pieces_on_the_host_stay_while_training_goes_on():
    weight = torch.ones(3)
    (piece,) = on_host([Piece("weight", (3,), 0, weight)])
    weight.zero_()
    assert piece.values.tolist() == [1, 1, 1]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_is_missing(tmp_path, rank):
    write(tmp_path, 3)
    state_file(tmp_path, rank, 3).unlink()
    reader = StateReader(tmp_path)
    with pytest.raises(ValueError, match=r"has not all of param/matrix; name another checkpoint\.$"):
        reader.tensor("param/matrix")
    start, stop = [*zip([0, 12, 24], [12, 24, 35], strict=True)][rank]
    with pytest.raises(ValueError, match="has not all of param/matrix"):
        reader.read("param/matrix", stop - 1, stop)
    for other_start, other_stop in [(0, 12), (12, 24), (24, 35)]:
        if other_start != start:
            reader.read("param/matrix", other_start, other_stop)


def test_more_than_there_is(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(ValueError, match="has not all of param/vector"):
        StateReader(tmp_path).read("param/vector", 5, 12)


def test_no_state(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError,
            match=r"holds no training state \(rank-\*\.safetensors\), as those of earlier .*; name another",
        ):
            StateReader(folder)


def damaged_header(data: bytes) -> bytes:
    return data[:8] + b"x" + data[9:]


def without_shapes(data: bytes) -> bytes:
    return data.replace(b"shapes", b"sharks", 1)


def renamed_piece(data: bytes) -> bytes:
    return data.replace(b"vector@0", b"vector@x", 1)


@pytest.mark.parametrize(
    "damage", [damaged_header, without_shapes, renamed_piece, lambda data: data[:100], lambda data: b""]
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, damage):
    write(tmp_path, 2)
    path = state_file(tmp_path, 0, 2)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} is no file of a training state .*; name another") as refused:
        StateReader(tmp_path)
    assert "\n" not in str(refused.value)
