import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dinov3_hf.distributed.reductions import rank
from dinov3_hf.objectives.contrastive import contrastive_loss
from tests.reference.processes import run_in_processes


def embeds(num_pairs: int = 12, width: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, num_pairs, width, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def plain_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The equation, with all similarities at once."""
    logits = images @ texts.T * scale
    pairs = torch.arange(len(images))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def gradients(loss_function, *tensors: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = loss_function(*leaves, **options)
    return loss.detach(), *torch.autograd.grad(3 * loss, leaves)


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
@pytest.mark.parametrize("scale", [torch.tensor(14.0), torch.tensor([100.0]), torch.tensor(0.0)])
def test_equals_the_equation_with_its_gradients(scale, chunk_size):
    found = gradients(contrastive_loss, *embeds(), scale, chunk_size=chunk_size)
    exact = gradients(plain_loss, *(tensor.double() for tensor in (*embeds(), scale)))
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=3e-5)


def test_embeddings_of_any_length():
    images, texts = (10 * each for each in embeds())
    found = gradients(contrastive_loss, images, texts, torch.tensor(1.0))
    for ours, expected in zip(found, gradients(plain_loss, images, texts, torch.tensor(1.0)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.invariant
def test_order_of_pairs_and_the_two_sides_do_not_matter():
    images, texts = embeds()
    scale = torch.tensor(20.0)
    expected = contrastive_loss(images, texts, scale)
    torch.testing.assert_close(contrastive_loss(images.flip(0), texts.flip(0), scale), expected)
    torch.testing.assert_close(contrastive_loss(texts, images, scale), expected)


def test_without_a_scale_all_texts_are_alike():
    loss = contrastive_loss(*embeds(), torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(12))


def test_bfloat16_is_computed_in_float32():
    images, texts = (each.bfloat16() for each in embeds())
    expected = contrastive_loss(images.float(), texts.float(), torch.tensor(50.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(images, texts, torch.tensor(50.0))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


@pytest.mark.parametrize("other", [embeds(8)[1], embeds(12, 4)[1], embeds()[1][:, None]])
def test_what_is_no_pair_is_refused(other):
    with pytest.raises(ValueError, match="give one text for each image"):
        contrastive_loss(embeds()[0], other, torch.tensor(1.0))


def test_an_empty_batch_and_a_chunk_of_none_are_refused():
    with pytest.raises(ValueError, match="give one text for each image"):
        contrastive_loss(torch.zeros(0, 4), torch.zeros(0, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match="chunk_size 0"):
        contrastive_loss(*embeds(), torch.tensor(1.0), chunk_size=0)


def share_of_this_process(num_processes: int) -> dict[str, torch.Tensor]:
    shares = [each.chunk(num_processes)[rank()] for each in embeds()]
    names = ("loss", "images", "texts", "scale")
    return dict(zip(names, gradients(contrastive_loss, *shares, torch.tensor(14.0), chunk_size=3), strict=True))


@pytest.mark.invariant
@pytest.mark.parametrize("num_processes", [2, 3])
def test_the_number_of_processes_does_not_matter(num_processes):
    results = run_in_processes(share_of_this_process, num_processes, num_processes)
    loss, *expected = gradients(contrastive_loss, *embeds(), torch.tensor(14.0))
    torch.testing.assert_close(torch.stack([result["loss"] for result in results]).mean(), loss)
    # Data parallel training takes the mean of the gradients over the processes.
    for name, gradient in zip(("images", "texts"), expected, strict=False):
        found = torch.cat([result[name] for result in results]) / num_processes
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)
    found = torch.stack([result["scale"] for result in results]).mean()
    torch.testing.assert_close(found, expected[-1], rtol=1e-5, atol=1e-6)


PEAK = """
import resource, torch
from dinov3_hf.objectives.contrastive import contrastive_loss

def peak(num_pairs):
    images, texts = torch.nn.functional.normalize(torch.randn(2, num_pairs, 8), dim=-1).requires_grad_().unbind()
    contrastive_loss(images, texts, torch.tensor(14.0), chunk_size=64).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(-peak(64) + peak(4096))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is another one")
def test_memory_is_that_of_a_chunk():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    # All similarities of 4096 pairs are 64 MiB of float32, those of a chunk 1 MiB.
    assert int(done.stdout) < 16 * 1024
