"""k-nearest-neighbour classification of frozen features.

Letters: N training images, M test images, m of them at a time, D features, C classes, K = max(k) neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov3_hf.evals.features import Features

# Numbers held at once (similarities, class scores): 64 Mi floats, 256 MiB, whatever the sizes of the two sets.
MAX_NUMBERS = 2**26


def knn_class_scores(
    train_cls: Tensor,
    train_labels: Tensor,
    test_cls: Tensor,
    num_classes: int,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    r"""What the k nearest training images vote for each test image.

    $$ \mathrm{score}_k(x, c) = \sum_{i \in \mathrm{NN}_k(x)} [y_i = c]\;
       \frac{\exp(\cos(x, x_i) / \tau)}{\sum_{j \in \mathrm{NN}_K(x)} \exp(\cos(x, x_j) / \tau)} $$

    with K = max(ks): the weights are a softmax over the largest neighbourhood and are not renormalised for the smaller
    ones, which changes the scores of a smaller k but not their order. A k beyond N counts as N.

    Args:
        train_cls: features (N, D) of any length.
        train_labels: their classes, int64 (N,).
        test_cls: features (m, D).
        num_classes: C.
        ks: sizes of the neighbourhood, 1 or more each.
        temperature: $\tau$.

    Returns:
        For each k, scores (m, C).
    """
    similarity = normalize(test_cls, dim=-1) @ normalize(train_cls, dim=-1).T  # (m, N)
    nearest, index = similarity.topk(min(max(ks), len(train_cls)), dim=-1)  # (m, K), most similar first
    weights = torch.softmax(nearest / temperature, dim=-1)  # (m, K)
    votes = train_labels[index]  # (m, K)
    empty = similarity.new_zeros(len(test_cls), num_classes)  # (m, C)
    return {k: empty.scatter_add(1, votes[:, :k], weights[:, :k]) for k in ks}


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
        k: size of the neighbourhood.
        temperature: of the softmax over similarities.
        device: where similarities are computed.

    Returns:
        `{"knn_top1": 87.2, "knn_top5": 98.1}` in percent; top 5: the class is among the five with the most votes.

    Raises:
        ValueError: if labels are missing or k is below 1.
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
    if min(ks) < 1:
        raise ValueError(f"k {min(ks)} is not a number of neighbours; use 1 or more.")
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    train_cls, train_labels = train.cls.to(device), train.labels.to(device)  # (N, D), (N,)
    rows = max(1, MAX_NUMBERS // max(len(train_cls), num_classes * len(ks)))  # m

    hits = {k: torch.zeros(2, dtype=torch.int64) for k in ks}  # top 1, top 5
    for test_cls, labels in zip(test.cls.split(rows), test.labels.split(rows), strict=True):  # (m, D), (m,)
        scores = knn_class_scores(train_cls, train_labels, test_cls.to(device), num_classes, ks, temperature)
        for k in ks:
            best = scores[k].topk(min(5, num_classes), dim=-1).indices.cpu() == labels[:, None]  # (m, 5)
            hits[k] += torch.stack([best[:, 0].sum(), best.any(dim=-1).sum()])
    return {k: {f"knn_top{n}": 100 * int(hits[k][i]) / len(test.cls) for i, n in enumerate((1, 5))} for k in ks}
