"""kNN follows its definition, whatever the scale of the differences between features."""

import math

import numpy as np
import pytest
import torch

from dinov3_hf.evals import knn
from dinov3_hf.evals.features import Features
from dinov3_hf.evals.knn import (
    class_scores,
    knn_accuracies,
    knn_accuracy,
    leave_one_out_accuracies,
    nearest_neighbours,
)
from tests.testing_utils import require_gpu, require_package


def clusters(num_images: int, seed: int, spread: float = 1.0, num_classes: int = 7, dim: int = 16) -> Features:
    """Features around one random centre a class."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(num_images, dim, generator=generator), labels)


def accuracies_by_definition(train: Features, test: Features, ks, temperature: float, top: int) -> dict[int, float]:
    """One test image at a time, in float64, with Python's own sorting."""
    hits = dict.fromkeys(ks, 0)
    train_cls, test_cls = train.cls.double().numpy(), test.cls.double().numpy()
    for row, label in zip(test_cls, test.labels.tolist(), strict=True):
        cosines = train_cls @ row / np.linalg.norm(train_cls, axis=1) / np.linalg.norm(row)
        order = sorted(range(len(cosines)), key=lambda i: -cosines[i])[: max(ks)]
        largest_sum = sum(math.exp(cosines[i] / temperature) for i in order)
        for k in ks:
            votes: dict[int, float] = {}
            for i in order[:k]:
                weight = math.exp(cosines[i] / temperature) / largest_sum
                votes[int(train.labels[i])] = votes.get(int(train.labels[i]), 0.0) + weight
            hits[k] += label in sorted(votes, key=lambda c: -votes[c])[:top]
    return {k: 100 * count / len(test_cls) for k, count in hits.items()}


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_accuracy_is_that_of_the_definition(temperature):
    train, test = clusters(200, seed=1, spread=2), clusters(90, seed=2, spread=2)
    ours = knn_accuracies(train, test, [1, 10, 200, 500], temperature)
    expected = accuracies_by_definition(train, test, [1, 10, 200, 500], temperature, top=1)
    assert {k: accuracy["knn_top1"] for k, accuracy in ours.items()} == expected
    assert ours[500] == ours[200]  # all of them
    # With enough neighbours five classes have votes, so that no others fill up the five.
    top5 = accuracies_by_definition(train, test, [200], temperature, top=5)
    assert ours[200]["knn_top5"] == top5[200]
    assert len({accuracy["knn_top1"] for accuracy in ours.values()}) > 1  # k matters on these features
    assert knn_accuracy(train, test, 10, temperature) == knn_accuracies(train, test, [10], temperature)[10]


@require_package("sklearn")
@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_those_of_scikit_learn(k):
    from sklearn.neighbors import KNeighborsClassifier

    train, test = clusters(300, seed=1, spread=2), clusters(100, seed=2, spread=2)
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    peer.fit(train.cls.double().numpy(), train.labels.numpy())
    similarity, index = nearest_neighbours(train.cls, test.cls, k)
    scores = class_scores(similarity, train.labels[index], 7, [k])[k]
    np.testing.assert_allclose(scores.numpy(), peer.predict_proba(test.cls.double().numpy()), atol=1e-5)


def test_weights_are_a_softmax_over_the_largest_neighbourhood():
    similarity = torch.tensor([[0.9, 0.8, 0.1]], dtype=torch.float64)
    scores = class_scores(similarity, torch.tensor([[1, 0, 1]]), num_classes=3, ks=[1, 2, 3], temperature=0.5)
    weights = [math.exp(value / 0.5) for value in (0.9, 0.8, 0.1)]
    total = sum(weights)
    expected = {1: [0, weights[0], 0], 2: [weights[1], weights[0], 0], 3: [weights[1], weights[0] + weights[2], 0]}
    for k, row in expected.items():
        torch.testing.assert_close(scores[k], torch.tensor([row], dtype=torch.float64) / total)


def test_nearly_equal_features_are_told_apart():
    """As those of a network that starts with LayerScale 1e-5: beside 1 their cosines differ by about 1e-11."""
    common = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    train, test = (Features(common + 1e-5 * part.cls, part.labels) for part in (clusters(300, 1), clusters(100, 2)))
    expected = accuracies_by_definition(train, test, [10], 0.07, top=1)[10]
    assert expected > 60
    assert knn_accuracy(train, test, 10)["knn_top1"] == pytest.approx(expected, abs=1.01)  # one image of the hundred
    unit = torch.nn.functional.normalize
    plain = (unit(test.cls, dim=-1) @ unit(train.cls, dim=-1).T).topk(10).indices  # noise
    precise = (unit(test.cls.double(), dim=-1) @ unit(train.cls.double(), dim=-1).T).topk(10).indices
    ours = nearest_neighbours(train.cls, test.cls, 10)[1]

    def agreement(rows):
        return (rows[:, :, None] == precise[:, None, :]).any(dim=-1).double().mean()

    assert agreement(ours) > 0.99
    assert agreement(plain) < 0.5


def test_similarities_are_cosines_in_falling_order():
    train, test = clusters(50, seed=1), clusters(20, seed=2)
    similarity, index = nearest_neighbours(train.cls, test.cls, 60)
    assert similarity.shape == index.shape == (20, 50)
    cosines = torch.nn.functional.cosine_similarity(test.cls[:, None], train.cls[index], dim=-1)
    torch.testing.assert_close(similarity, cosines.double(), rtol=0, atol=1e-6)
    assert (similarity.diff(dim=-1) <= 0).all()
    assert all(sorted(row) == list(range(50)) for row in index.tolist())


def test_a_feature_without_direction_has_similarity_zero():
    similarity, _ = nearest_neighbours(clusters(5, seed=1).cls, torch.zeros(1, 16), 5)
    torch.testing.assert_close(similarity, torch.zeros(1, 5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_size_of_the_pieces_changes_nothing(monkeypatch):
    train, test = clusters(64, seed=1), clusters(30, seed=2)
    expected = knn_accuracies(train, test, [3, 10])
    whole = nearest_neighbours(train.cls, test.cls, 10)
    monkeypatch.setattr(knn, "MAX_NUMBERS", 200)  # 3 rows at a time
    assert knn_accuracies(train, test, [3, 10]) == expected
    for ours, all_at_once in zip(nearest_neighbours(train.cls, test.cls, 10), whole, strict=True):
        torch.testing.assert_close(ours, all_at_once)


@require_gpu
def test_the_device_changes_nothing():
    train, test = clusters(300, seed=1), clusters(100, seed=2)
    assert knn_accuracies(train, test, [1, 20], device="cuda") == knn_accuracies(train, test, [1, 20])


def test_bad_arguments():
    features = clusters(5, seed=1)
    with pytest.raises(ValueError, match="k 0 is not a number of neighbours; use 1 or more"):
        knn_accuracies(features, features, [10, 0])
    with pytest.raises(ValueError, match=r"temperature 0 is not positive; 0\.07 is usual"):
        knn_accuracy(features, features, temperature=0)
    with pytest.raises(ValueError, match="needs labels of both"):
        knn_accuracy(Features(features.cls), features)


def test_leaving_one_out_is_a_search_among_all_the_others():
    images = clusters(60, seed=3, spread=2)
    ours = leave_one_out_accuracies(images, [1, 10, 500], temperature=0.5)
    hits = dict.fromkeys(ours, 0)
    for i in range(60):
        others = torch.arange(60) != i
        train = Features(images.cls[others], images.labels[others])
        one = Features(images.cls[i : i + 1], images.labels[i : i + 1])
        for k, accuracy in knn_accuracies(train, one, [1, 10, 500], temperature=0.5).items():
            hits[k] += accuracy["knn_top1"] / 60
    assert {k: accuracy["knn_top1"] for k, accuracy in ours.items()} == pytest.approx(hits)
    assert ours[1] != ours[500]


def test_leaving_one_out_among_copies():
    images = Features(torch.ones(40, 8), torch.arange(40) % 2)
    accuracy = leave_one_out_accuracies(images, [3])[3]["knn_top1"]
    assert 0 <= accuracy <= 100  # every image keeps 3 neighbours, also where itself is not among the first 4
    distinct = Features(torch.cat([torch.ones(20, 8), -torch.ones(20, 8)]), torch.arange(40) // 20)
    assert leave_one_out_accuracies(distinct, [3])[3]["knn_top1"] == 100


@pytest.mark.parametrize(
    ("features", "says"),
    [(Features(torch.ones(3, 2)), "needs labels"), (Features(torch.ones(1, 2), torch.zeros(1).long()), "2 or more")],
)
def test_leaving_one_out_needs_labels_of_several_images(features, says):
    with pytest.raises(ValueError, match=says):
        leave_one_out_accuracies(features, [1])
