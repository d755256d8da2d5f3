"""What is measured on the teacher during a run: callbacks that are asked whenever the trainer evaluates."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, TrainerCallback

from dinov3_hf.data.sources.base import Images
from dinov3_hf.evals.dense_health import dense_health
from dinov3_hf.evals.drift import drift
from dinov3_hf.evals.features import Features, ImageList, Picture, center_crop, extract_features
from dinov3_hf.evals.knn import knn_accuracy, leave_one_out_accuracies
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.teacher_folder import image_processor

logger = logging.getLogger(__name__)

# Metric -> what people call it, and how it is written. Others are shown under their own name.
LABELS = {
    "eval_knn_top1": ("kNN top-1", "{:.1f} %"),
    "eval_knn_top5": ("kNN top-5", "{:.1f} %"),
    "eval_patch_cls_cosine": ("patch-CLS cosine", "{:.3f}"),
    "eval_patch_similarity_entropy": ("patch-similarity entropy", "{:.3f}"),
    "eval_cls_drift": ("CLS drift", "{:.3f}"),
    "eval_patch_drift": ("patch drift", "{:.3f}"),
}
NUM_NEIGHBOURS = 20  # as published


class LabelledImages(Images, Protocol):
    """Images with their classes, int64 (N,)."""

    @property
    def labels(self) -> np.ndarray | None: ...


class Evaluator(TrainerCallback):
    """
    A callback that measures the teacher whenever [`SSLTrainer`] evaluates, and each student whenever
    [`DistillationTrainer`] does (`eval_strategy`, `eval_steps`, `eval_on_start`, the end of the run). Pass one of your
    own in `callbacks=[...]`:

    ```python
    class FeatureNorm(Evaluator):
        def evaluate(self, backbone, args):
            features = extract_features(backbone, images, image_processor(args), bf16=args.bf16)
            return {"cls_norm": float(features.cls.norm(dim=-1).mean())}
    ```
    """

    def evaluate(self, backbone: PreTrainedModel, args: SSLConfig) -> dict[str, float]:
        """
        Named numbers; they are logged as `eval_NAME`.

        Args:
            backbone: of the EMA teacher, or of the moving average of a student, without heads, as it is at this step.
                Leave its weights alone.
            args: of the run, or of the student.
        """
        raise NotImplementedError


class KnnCallback(Evaluator):
    """
    Accuracy of the 20 nearest neighbours by CLS tokens, in percent: `eval_knn_top1`, `eval_knn_top5`.

    Args:
        reference: labelled images that vote.
        query: labelled images whose class is asked for; None asks for that of each reference image, of all the others.
    """

    def __init__(self, reference: LabelledImages, query: LabelledImages | None) -> None:
        self.reference = reference
        self.query = query
        self._has_warned = False

    def evaluate(self, backbone: PreTrainedModel, args: SSLConfig) -> dict[str, float]:
        settings: dict[str, Any] = {
            "batch_size": 256,
            "bf16": args.bf16,
            "max_unreadable_share": args.max_unreadable_share,
        }
        parts = [images for images in (self.reference, self.query) if images is not None]
        features = [
            extract_features(backbone, images, image_processor(args), images.labels, **settings) for images in parts
        ]
        unreadable = [message for found in features for message in found.unreadable]
        if unreadable and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d of %d images could not be read, the evaluation leaves them out; the first: %s",
                *(len(unreadable), sum(map(len, parts)), unreadable[0]),
            )
        if self.query is None:
            return leave_one_out_accuracies(features[0], [NUM_NEIGHBOURS], device=args.device)[NUM_NEIGHBOURS]
        reference, query = features
        return knn_accuracy(reference, query, k=NUM_NEIGHBOURS, device=args.device)


class DenseHealthCallback(Evaluator):
    """
    Health of the dense features of a fixed sample: `eval_patch_cls_cosine`, `eval_patch_similarity_entropy`, as
    `dinov3_hf.evals.dense_health` defines them. Needs no labels.

    Args:
        images: any images; of each the central square is used. Those that cannot be read are left out.
        num_images: how many of them, spread evenly over all.
    """

    def __init__(self, images: Images, num_images: int = 128) -> None:
        self.images = images
        self.num_images = num_images
        self._sample: list[Picture] = []

    def evaluate(self, backbone: PreTrainedModel, args: SSLConfig) -> dict[str, float]:
        return dense_health(self.features(backbone, args), args.device)

    def features(self, backbone: PreTrainedModel, args: SSLConfig) -> Features:
        """What a backbone says about the sample."""
        if not self._sample:
            self._sample = self._read(args.global_crop_size)
        return extract_features(
            backbone, ImageList(self._sample), image_processor(args), with_patches=True, bf16=args.bf16
        )

    def _read(self, size: int) -> list[Picture]:
        count = min(self.num_images, len(self.images))
        sample: list[Picture] = []
        for i in np.linspace(0, len(self.images), count, endpoint=False, dtype=np.int64).tolist():
            try:
                sample.append(center_crop(self.images.image(i), size))
            except ValueError:  # the data set reports it when its turn comes
                continue
        if not sample:
            raise ValueError(f"none of {count} training images can be read; look at their files.")
        return sample


class DriftCallback(DenseHealthCallback):
    """
    Health of the dense features, and how far CLS and patches have moved from a model that training started from:
    `eval_cls_drift`, `eval_patch_drift`, as `dinov3_hf.evals.drift` defines them.

    Args:
        images, num_images: as of [`DenseHealthCallback`].
        start: that model, before its first step. It is asked here and now, so that a resumed run compares with the
            same features.
        args: of the run.
    """

    def __init__(self, images: Images, start: PreTrainedModel, args: SSLConfig, num_images: int = 128) -> None:
        super().__init__(images, num_images)
        self._start = self.features(start, args)

    def evaluate(self, backbone: PreTrainedModel, args: SSLConfig) -> dict[str, float]:
        features = self.features(backbone, args)
        return {**dense_health(features, args.device), **drift(self._start, features)}


def ask(callbacks: Iterable[TrainerCallback], backbone: PreTrainedModel, args: SSLConfig) -> dict[str, float]:
    """What the evaluators among `callbacks` say of the teacher's backbone.

    Raises:
        ValueError: two of them give the same name to a number.
    """
    metrics: dict[str, float] = {}
    for callback in callbacks:
        if isinstance(callback, Evaluator):
            found = callback.evaluate(backbone, args)
            for name in found.keys() & metrics.keys():
                raise ValueError(f"two evaluators call a number {name}; rename one.")
            metrics |= found
    return metrics


def described(logs: Mapping[str, float]) -> dict[str, str]:
    """
    The numbers of an evaluation as people read them, from a log entry, in the order of LABELS:
    `{"kNN top-1": "63.1 %"}`.
    """
    names = [name for name in logs if name.startswith("eval_")]
    # A log that was read back from a checkpoint is in the order of the alphabet.
    names = [name for name in LABELS if name in names] + [name for name in names if name not in LABELS]
    shown = {}
    for name in names:
        label, template = LABELS.get(name, (name.removeprefix("eval_"), "{:.4g}"))
        shown[label] = template.format(logs[name])
    return shown


def is_evaluation(logs: Mapping[str, float]) -> bool:
    """Whether a log entry has the numbers of an evaluation, of a run's teacher or of one of its students."""
    return any(name.rpartition("/")[2].startswith("eval_") for name in logs)


def accuracies(log_history: list[dict[str, float]], of_what: str = "the teacher") -> list[str]:
    """A line for each kNN accuracy of a run."""
    return [
        f"kNN top-1 accuracy of {of_what} at step {int(entry['step']):>6,}: {entry['eval_knn_top1']:5.1f} %"
        for entry in log_history
        if "eval_knn_top1" in entry
    ]
