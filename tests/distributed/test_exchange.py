"""Every image arrives where it belongs, and at a cost that does not grow with the ranks."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov3_hf.distributed.exchange import Exchange, Layout
from dinov3_hf.distributed.reductions import rank, world_size
from tests.reference.processes import run_in_processes

SPLITS = [[1, 1, 2], [2, 2], [1, 3], [4], [1, 1, 1, 1]]


def random_layouts(seed: int, num_ranks: int) -> tuple[Layout, list[Layout]]:
    """Parts of any size that divides, ranks in any order, and as many groups as fit."""
    draw = random.Random(seed)
    num_images = 12 * num_ranks * draw.choice([1, 2])
    sizes = SPLITS[seed % len(SPLITS)] if num_ranks == 4 else [num_ranks]
    ranks = draw.sample(range(num_ranks), num_ranks)
    groups = [tuple(ranks[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]

    def layout(ranks: tuple[int, ...]) -> Layout:
        share = num_images // len(ranks)
        return Layout(ranks, draw.choice([size for size in range(1, share + 1) if share % size == 0]), num_images)

    return layout(tuple(draw.sample(range(num_ranks), num_ranks))), [layout(group) for group in groups]


def batch(num_images: int, seed: int) -> dict[str, Tensor]:
    """What each image of a batch has, in five kinds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "crops": torch.randint(256, (num_images, 3, 2, 2), generator=generator, dtype=torch.uint8),
        "mask": torch.rand(num_images, 5, generator=generator) < 0.5,
        "answer": torch.randn(num_images, 2, 7, generator=generator).bfloat16(),
        "step": torch.randn(num_images, generator=generator),
        "empty": torch.zeros(num_images, 0),
    }


def rows_of_images(num_images: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Of each image none to four rows, and their counts."""
    counts = torch.randint(5, (num_images,), generator=torch.Generator().manual_seed(seed))
    if seed % 3 == 0:
        counts[: num_images // 2] = 0
    rows = torch.randn(int(counts.sum()), 3, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return list(rows.split(counts.tolist())), counts


def exchange(num_cases: int) -> dict[str, Tensor]:
    for seed in range(num_cases):
        source, groups = random_layouts(seed, world_size())
        exchange = Exchange(source, groups)
        (mine,) = (group.positions(rank()) for group in groups if rank() in group.ranks)
        for name, rows in batch(source.num_images, seed).items():
            if name == "step":
                rows.requires_grad_()
            received = exchange.send(rows[source.positions(rank())])
            assert not received.requires_grad and received.dtype == rows.dtype
            assert torch.equal(received, rows[mine]), (seed, name)
        rows, counts = rows_of_images(source.num_images, seed)
        sent = torch.cat([rows[i] for i in source.positions(rank())])
        received, received_counts = exchange.send_ragged(sent, counts[source.positions(rank())])
        assert torch.equal(received_counts, counts[mine]), seed
        assert torch.equal(received, torch.cat([rows[i] for i in mine])), seed
    return {}


@pytest.mark.invariant
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_row_arrives(num_ranks):
    run_in_processes(exchange, num_ranks, 40)


def test_one_process_puts_its_parts_together():
    exchange(10)


def test_layouts_cover_the_batch():
    for seed in range(20):
        for layout in (random_layouts(seed, 4)[0], *random_layouts(seed, 4)[1]):
            positions = {rank: layout.positions(rank) for rank in layout.ranks}
            assert torch.equal(torch.cat([*positions.values()]).sort().values, torch.arange(layout.num_images))
            assert all((layout.holders()[images] == rank).all() for rank, images in positions.items())
            assert all(torch.equal(images, images.sort().values) for images in positions.values())


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends to others and receives from others, and bytes of everything it makes for it."""

    sent = received = made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d.alltoall_base_.default:
            _, _, _, to_here, from_here, *_ = args
            self.received += sum(to_here) - to_here[rank()]
            self.sent += sum(from_here) - from_here[rank()]
        else:
            self.made += sum(
                x.untyped_storage().nbytes()
                for x in tree_leaves(result)
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before
            )
        return result


def traffic(images_a_rank: int, groups: list[list[int]]) -> dict[str, Tensor]:
    num_images = images_a_rank * world_size()
    exchange = Exchange(
        Layout(tuple(range(world_size())), images_a_rank, num_images),
        [Layout(tuple(ranks), images_a_rank, num_images) for ranks in groups],
    )
    rows = torch.ones(images_a_rank, 1000)
    three, counts = rows.repeat_interleave(3, 0), torch.full((images_a_rank,), 3)
    results = {}
    for name, send in {
        "dense": lambda: exchange.send(rows),
        "ragged": lambda: exchange.send_ragged(three, counts),
    }.items():
        with Traffic() as bytes_of:
            send()
        results[name] = torch.tensor([bytes_of.sent, bytes_of.received, bytes_of.made])
    return results


def test_bytes_do_not_grow_with_the_ranks():
    images, row = 8, 4 * 1000
    two = run_in_processes(traffic, 2, images, [[0], [1]])
    four = run_in_processes(traffic, 4, images, [[0, 1], [2, 3]])
    for name, rows in (("dense", 1), ("ragged", 3)):
        of_an_image = rows * row + (8 if name == "ragged" else 0)  # its count
        for results in two:  # half of the batch is here already
            sent, received, made = results[name].tolist()
            assert sent == received == images * of_an_image
            # Rows to send, received, and in order; the group has two images for each of this rank's.
            assert 3 * 2 * images * rows * row <= made < 1.02 * 3 * 2 * images * rows * row
        for results in four:  # twice the images, and less of them is here
            sent, received, made = results[name].tolist()
            assert max(sent, received) <= 2 * images * of_an_image
            assert made < 1.01 * two[0][name][2]


def errors() -> dict[str, Tensor]:
    layout, rows = Layout((0, 1), 2, 8), torch.zeros(4, 3)
    one = [Layout((0,), 2, 8), Layout((1,), 4, 8)]
    exchange = Exchange(layout, one)
    for call, message in [
        (lambda: Exchange(Layout((0,), 2, 8), one), r"ranks \(0,\) are not each of 2 once"),
        (lambda: Exchange(layout, one[:1]), r"ranks \(0,\) are not each of 2 once"),
        (lambda: Exchange(layout, [*one, one[0]]), r"ranks \(0, 1, 0\) are not each of 2 once"),
        (lambda: Exchange(layout, [one[0], Layout((1,), 4, 4)]), "a group of 4 images cannot get 8"),
        (lambda: exchange.send(rows[:3]), "3 rows for images that have 4"),
        (lambda: exchange.send_ragged(rows, torch.tensor([1, 2, 3, 0])), "4 rows for images that have 6"),
        (lambda: exchange.send_ragged(rows, torch.tensor([1, 3])), "2 rows for images that have 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    return {}


def test_errors():
    with pytest.raises(ValueError, match="12 images are not a multiple of 2 on each of 4 ranks; change"):
        Layout((0, 1, 2, 3), 2, 12)
    run_in_processes(errors, 2)
