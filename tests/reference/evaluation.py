"""Kind knn: accuracies of k-nearest-neighbour classification, and the votes behind them."""

from torch import Tensor

from dinov3_hf.evals.features import Features
from dinov3_hf.evals.knn import class_scores, knn_accuracies, nearest_neighbours

from .compare import Comparison
from .io import Case


def check_knn(case: Case, compare: Comparison) -> None:
    """Percentages for every temperature and k, with and without each image's nearest neighbour, and class scores."""
    train = Features(case.inputs["train_features"], case.inputs["train_labels"])
    test = Features(case.inputs["test_features"], case.inputs["test_labels"])
    ks, num_classes = case.config["ks"], case.config["num_classes"]
    similarity, index = nearest_neighbours(train.cls, test.cls, max(ks) + 1)
    votes = train.labels[index]
    for temperature in case.config["temperatures"]:
        prefix = f"temperature_{temperature}/skip_first"
        for k, accuracy in knn_accuracies(train, test, ks, temperature).items():
            name = f"k_{min(k, len(train.cls))}"
            compare.check(f"{prefix}_False/{name}/top-1", accuracy["knn_top1"])
            compare.check(f"{prefix}_False/{name}/top-5", accuracy["knn_top5"])
        # Leave-one-out, which the package has no name for, from the pieces that it has.
        scores = class_scores(similarity[:, 1:], votes[:, 1:], num_classes, ks, temperature)
        for k in ks:
            name = f"k_{min(k, len(train.cls))}"
            compare.check(f"{prefix}_True/{name}/top-1", top_accuracy(scores[k], test.labels, 1))
            compare.check(f"{prefix}_True/{name}/top-5", top_accuracy(scores[k], test.labels, 5))
    largest = max(ks)
    scores = class_scores(similarity[:, :largest], votes[:, :largest], num_classes, ks, case.config["temperatures"][0])
    for k in ks:
        compare.check(f"class_scores/k_{min(k, len(train.cls))}", scores[k])


def top_accuracy(scores: Tensor, labels: Tensor, n: int) -> float:
    return 100 * (scores.topk(n).indices == labels[:, None]).any(dim=-1).double().mean().item()
