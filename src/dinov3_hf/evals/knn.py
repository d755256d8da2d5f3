"""k-nearest-neighbour classification of frozen features.

Letters: N training images, M test images, D features, C classes, K = max(k) neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov3_hf.evals.features import Features

# Numbers held at once (similarities, class scores): 32 Mi, up to 256 MiB, whatever the sizes of the two sets.
MAX_NUMBERS = 2**25


def knn_accuracy(
    train: Features,
    test: Features,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Percentage of test images whose class gets the most votes of their k nearest training images.

    Args:
        train: features with labels of N images.
        test: features with labels of M images.
        k: size of the neighbourhood; beyond N it counts as N.
        temperature: of the softmax over similarities.
        device: where similarities are computed.

    Returns:
        `{"knn_top1": 87.2, "knn_top5": 98.1}` in percent; top 5: the class is among the five with the most votes.
        Where fewer have any, `torch.topk` fills up with classes that have none, as in the original implementation.

    Raises:
        ValueError: if labels are missing, or k or the temperature is not positive.
    """
    return knn_accuracies(train, test, [k], temperature, device)[k]


def knn_accuracies(
    train: Features,
    test: Features,
    ks: Sequence[int],
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> dict[int, dict[str, float]]:
    """`knn_accuracy` of several neighbourhoods in one search: k -> its percentages."""
    if train.labels is None or test.labels is None:
        raise ValueError("kNN needs labels of both the training and the test images.")
    _check_settings(ks, temperature)
    similarity, index = nearest_neighbours(train.cls, test.cls, max(ks), device)  # (M, K), (M, K)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    return _accuracies(similarity, train.labels[index], test.labels, num_classes, ks, temperature)


def leave_one_out_accuracies(
    features: Features, ks: Sequence[int], temperature: float = 0.07, device: str | torch.device = "cpu"
) -> dict[int, dict[str, float]]:
    """`knn_accuracies` without images set aside: each image is classified by all the others.

    The protocol for small sets: all images vote and all are asked for.

    Args:
        features: with labels of N images, 2 or more.
        ks, temperature, device: as in `knn_accuracy`; beyond N - 1 k counts as N - 1.

    Raises:
        ValueError: if labels are missing, there is one image only, or a k or the temperature is not positive.
    """
    if features.labels is None:
        raise ValueError("kNN needs labels.")
    num_images = len(features.cls)
    if num_images < 2:
        raise ValueError("leaving one image out leaves none to compare it with; give 2 or more.")
    _check_settings(ks, temperature)
    similarity, index = nearest_neighbours(features.cls, features.cls, max(ks) + 1, device)  # (N, K + 1), twice
    is_other = index != torch.arange(num_images)[:, None]  # (N, K + 1)
    # Of an image that has many copies, itself may be none of the K + 1; the last one is then one too many.
    is_other[:, -1] &= ~is_other.all(dim=1)
    similarity, index = (values[is_other].view(num_images, -1) for values in (similarity, index))  # (N, K), twice
    num_classes = int(features.labels.max()) + 1
    return _accuracies(similarity, features.labels[index], features.labels, num_classes, ks, temperature)


def _check_settings(ks: Sequence[int], temperature: float) -> None:
    if min(ks) < 1:
        raise ValueError(f"k {min(ks)} is not a number of neighbours; use 1 or more.")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive; 0.07 is usual.")


def _accuracies(
    similarity: Tensor, votes: Tensor, labels: Tensor, num_classes: int, ks: Sequence[int], temperature: float
) -> dict[int, dict[str, float]]:
    """Percentages by k from similarities (M, K) and classes (M, K) of the neighbours and the true classes (M,)."""
    rows = max(1, MAX_NUMBERS // (num_classes * len(ks)))

    hits = {k: torch.zeros(2, dtype=torch.int64) for k in ks}  # top 1, top 5
    parts = zip(similarity.split(rows), votes.split(rows), labels.split(rows), strict=True)
    for part_similarity, part_votes, part_labels in parts:
        scores = class_scores(part_similarity, part_votes, num_classes, ks, temperature)
        for k in ks:
            best = scores[k].topk(min(5, num_classes), dim=-1).indices == part_labels[:, None]  # (rows, 5)
            hits[k] += torch.stack([best[:, 0].sum(), best.any(dim=-1).sum()])
    return {k: {f"knn_top{n}": 100 * int(hits[k][i]) / len(labels) for i, n in enumerate((1, 5))} for k in ks}


def nearest_neighbours(
    train_cls: Tensor, test_cls: Tensor, k: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    r"""The k training images of largest cosine similarity to each test image, found by comparing with all of them.

    Features of a network that starts with LayerScale 1e-5 differ from image to image by that much, their cosines by
    1e-10: beside 1, float32 cannot hold the difference, and a search by plain dot products would return noise. So the
    unit vectors x and y are taken relative to their mean c over the training images, a = x - c and b = y - c, in

    $$ \cos(x, y) = a \cdot b + c \cdot b + (c \cdot a + c \cdot c), $$

    where the bracket is the same for all neighbours of an image. It is the same number as ever, rounded later.

    Args:
        train_cls: features (N, D) of any length.
        test_cls: features (M, D) of any length.
        k: number of neighbours; beyond N it counts as N.
        device: where the search runs; everything else runs on the CPU.

    Returns:
        Cosine similarities, float64 (M, min(k, N)), most similar first, and the rows of the neighbours in `train_cls`,
        int64 (M, min(k, N)); both on the CPU.
    """
    rows = max(1, MAX_NUMBERS // max(train_cls.shape))
    total = torch.stack([_unit(part).sum(dim=0) for part in train_cls.split(rows)]).sum(dim=0)  # (D,)
    centre = total / len(train_cls)  # (D,)
    offset, neighbours = [], []
    for part in train_cls.split(rows):
        b = _unit(part) - centre  # (rows, D)
        offset.append((b @ centre).float().to(device))
        neighbours.append(b.float().to(device))
    all_offset, all_neighbours = torch.cat(offset), torch.cat(neighbours)  # (N,), (N, D)

    similarity, index = [], []
    for part in test_cls.split(rows):
        a = _unit(part) - centre  # (rows, D)
        products = torch.addmm(all_offset, a.float().to(device), all_neighbours.T)  # (rows, N)
        best = products.topk(min(k, len(train_cls)), dim=-1)
        similarity.append(best.values.cpu().double() + (a @ centre + centre @ centre)[:, None])
        index.append(best.indices.cpu())
    return torch.cat(similarity), torch.cat(index)


def class_scores(
    similarity: Tensor, votes: Tensor, num_classes: int, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    r"""What the nearest training images vote for each test image.

    $$ \mathrm{score}_k(x, c) = \sum_{i \in \mathrm{NN}_k(x)} [y_i = c]\;
       \frac{\exp(\cos(x, x_i) / \tau)}{\sum_{j \in \mathrm{NN}_K(x)} \exp(\cos(x, x_j) / \tau)} $$

    The weights are a softmax over all K neighbours and are not renormalised for a smaller k, which changes its scores
    but not their order.

    Args:
        similarity: of the neighbours, (M, K), most similar first.
        votes: their classes, int64 (M, K).
        num_classes: C.
        ks: sizes of the neighbourhood; beyond K they count as K.
        temperature: $\tau$.

    Returns:
        For each k, scores (M, C).
    """
    weights = torch.softmax(similarity / temperature, dim=-1)  # (M, K)
    empty = similarity.new_zeros(len(similarity), num_classes)  # (M, C)
    return {k: empty.scatter_add(1, votes[:, :k], weights[:, :k]) for k in ks}


def _unit(cls: Tensor) -> Tensor:
    return normalize(cls.double(), dim=-1)
