"""Configuration of continued pre-training: a released backbone goes on learning from images of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig
from transformers.trainer_utils import IntervalStrategy

from dinov3_hf.errors import ArgumentError
from dinov3_hf.field_types import fit_mapping
from dinov3_hf.hub.model_card import license_of
from dinov3_hf.models.image_channels import ChannelStatistics, statistics_for
from dinov3_hf.models.same_network import network_differences
from dinov3_hf.training.gram_config import COPY
from dinov3_hf.training.lora import check_peft
from dinov3_hf.training.recipe_config import changes_the_result, orchestration, plain
from dinov3_hf.training.schedules import TrainingSchedules, resolve_steps
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.starting_model import StartingModel, read_starting_model

LOCAL_CROP_SHARE = 3 / 7  # published: local crops of 96 pixels beside global ones of 224


@dataclass
class ContinuedConfig(SSLConfig):
    r"""
    Arguments of [`ContinuedTrainer`]: those of [`SSLConfig`], the model that training starts from, how it is eased in,
    and when training stops because it does harm.

    Inherited defaults that are changed: `backbone={}` (changes to the model's own configuration), `ibot_weight=None`
    (1, or 0 for a ConvNeXt), `image_mean=None` and `image_std=None` (those of the model's image processor),
    `global_crop_size=None` (the model's image size), `local_crop_size=None` (3/7 of that), `gram_teacher="copy"` (of
    the model, before its first step), `output_dir="runs/continued"`.
    """

    # --- changes the result: start ---
    model: str | None = field(
        default=None,
        metadata=changes_the_result(
            "The model to start from, a DINOv3 ViT or ConvNeXt: a model folder, the output folder of a run, or "
            "OWNER/NAME on the Hub. Prototype heads start fresh."
        ),
    )
    num_channels: int | None = field(
        default=None,
        metadata=changes_the_result(
            "Channels of the images, for which the first layer is converted: 1 for grey, exactly; others repeat its "
            "kernels. Null: the model's."
        ),
    )
    backbone: dict[str, Any] = field(
        default_factory=dict,
        metadata=changes_the_result(
            "Mapping: changes to the model's config, of what acts in training only ({drop_path_rate: 0.1})."
        ),
    )
    head_steps: float = field(
        default=0.2,
        metadata=changes_the_result(
            "First steps (or share of the run) in which the backbone stays as it is, apart from its first layer, "
            "while fresh heads learn."
        ),
    )
    ramp_steps: float = field(
        default=0.1,
        metadata=changes_the_result(
            "Steps after those (or share of the run) in which the backbone's learning rate rises from 0."
        ),
    )
    backbone_lr_mult: float = field(
        default=0.1,
        metadata=changes_the_result(
            "Factor of the backbone's learning rate: fresh heads need that of a training from random weights, a "
            "trained backbone much less."
        ),
    )
    lora_rank: int | None = field(
        default=None,
        metadata=changes_the_result(
            "Train low-rank adapters of this rank, on q, v and the MLP of a ViT or the pointwise layers of a "
            "ConvNeXt, instead of the backbone's own weights; needs PEFT. Null: the weights."
        ),
    )
    lora_alpha: int | None = field(
        default=None,
        metadata=changes_the_result("Factor of the adapters, times their rank; null is the rank, a factor of 1."),
    )

    # --- changes the result: inherited, with another default ---
    ibot_weight: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata=changes_the_result(
            "Weight of L_iBOT on masked patches; null is 1, or 0 for a ConvNeXt, which has no mask token."
        ),
    )
    image_mean: list[float] | None = field(  # type: ignore[assignment]
        default=None,
        metadata=changes_the_result(
            "Mean of each channel, pixel values in [0, 1]; null is that of the model's image processor."
        ),
    )
    image_std: list[float] | None = field(  # type: ignore[assignment]
        default=None,
        metadata=changes_the_result("Standard deviation of each channel; null as in image_mean."),
    )
    global_crop_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata=changes_the_result("Side of the two global crops in pixels; null is the model's image size."),
    )
    local_crop_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata=changes_the_result("Side of the local crops in pixels; null is 3/7 of global_crop_size."),
    )
    gram_teacher: str | None = field(
        default=COPY,
        metadata=changes_the_result(
            "Whose patch similarities the student keeps: copy, of the model before its first step; null for no Gram "
            "anchoring; ema, the EMA teacher itself; or another model of the same network."
        ),
    )

    # --- orchestration ---
    max_knn_drop: float | None = field(
        default=3.0,
        metadata=orchestration(
            "Stop when kNN accuracy on eval_data is this many points below that of the start; null for no limit."
        ),
    )
    max_patch_drift: float | None = field(
        default=0.5,
        metadata=orchestration(
            "Stop when patch features have moved this far from the start (1 - mean cosine); null for no limit."
        ),
    )
    output_dir: str | None = field(
        default="runs/continued",
        metadata=orchestration("Folder for checkpoints, logs and the trained teacher."),
    )

    def __post_init__(self) -> None:
        start = read_starting_model(self.model)
        self._resolve(start)
        self._check_ease()
        super().__post_init__()
        for name in ("max_knn_drop", "max_patch_drift"):
            if self.__dict__[name] is not None and self.__dict__[name] < 0:
                raise ValueError(f"{name} {self.__dict__[name]:g} is negative; use null for no limit.")
        watches = self.max_patch_drift is not None or (self.max_knn_drop is not None and self.eval_data is not None)
        if watches and self.eval_strategy != IntervalStrategy.NO and not self.eval_on_start:
            raise ValueError(
                "max_knn_drop and max_patch_drift compare with the start; set eval_on_start: true, or both to null."
            )

    def _resolve(self, start: StartingModel) -> None:
        """Give what was left open its value, before it is written down in the recipe of the run."""
        self.num_channels = start.config.num_channels if self.num_channels is None else self.num_channels
        if self.start_from is not None:
            raise ArgumentError("start_from is for the stages of a run with heads; here name the backbone as model.")
        if self.license is None:
            self.license = license_of(self.model or "")
        if self.num_channels < 1:
            raise ValueError(f"num_channels {self.num_channels} is no number of channels; use 1 or more.")
        if self.ibot_weight is None:
            self.ibot_weight = 1.0 if start.has_mask_token else 0.0
        statistics = self.statistics_of(start)
        self.image_mean, self.image_std = (list(values) for values in statistics)
        side = start.patch_side
        if self.global_crop_size is None:
            self.global_crop_size = max(start.image_size // side, 1) * side
        if self.local_crop_size is None:
            self.local_crop_size = max(round(LOCAL_CROP_SHARE * self.global_crop_size / side), 1) * side

    def statistics_of(self, start: StartingModel) -> ChannelStatistics:
        """What the images are normalised with: as given, else the model's, else the rule for other channels."""
        num_channels = self.num_channels or start.config.num_channels
        known = start.statistics
        if num_channels != start.config.num_channels:
            known = statistics_for(num_channels, known)
        return ChannelStatistics(
            known.mean if self.image_mean is None else tuple(self.image_mean),
            known.std if self.image_std is None else tuple(self.image_std),
        )

    def _check_ease(self) -> None:
        for name in ("head_steps", "ramp_steps"):
            if self.__dict__[name] < 0:
                raise ValueError(f"{name} {self.__dict__[name]:g} is negative; use 0 for none.")
        total = sum(resolve_steps(self.__dict__[name], self.max_steps) for name in ("head_steps", "ramp_steps"))
        if total >= self.max_steps:
            raise ValueError(
                f"head_steps + ramp_steps are {total} steps, but the run has {self.max_steps} (max_steps), which "
                "leaves none for the whole network; use shares of the run such as 0.2 and 0.1."
            )
        if self.backbone_lr_mult <= 0:
            raise ValueError(f"backbone_lr_mult {self.backbone_lr_mult:g} is not positive; use a number such as 0.1.")
        if self.lora_rank is not None:
            if self.lora_rank < 1:
                raise ValueError(f"lora_rank {self.lora_rank} is not positive; use null for no adapters.")
            check_peft()
        if self.lora_alpha is not None and (self.lora_rank is None or self.lora_alpha < 1):
            why = "is without lora_rank, which makes the adapters" if self.lora_rank is None else "is not positive"
            raise ValueError(f"lora_alpha {self.lora_alpha} {why}; use null for lora_alpha, or set both above 0.")

    @property
    def alpha(self) -> int:
        """What the product of the adapters is multiplied with, times their rank."""
        return (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha

    def schedules(self) -> TrainingSchedules:
        return replace(
            super().schedules(),
            head_steps=resolve_steps(self.head_steps, self.max_steps),
            ramp_steps=resolve_steps(self.ramp_steps, self.max_steps),
            backbone_lr_mult=self.backbone_lr_mult,
        )

    @classmethod
    def backbone_of(cls, recipe: Mapping[str, Any]) -> PreTrainedConfig:
        from dinov3_hf.models.dinov3_pretraining.backbones import own_annotations

        start = read_starting_model(recipe["model"])
        changes = fit_mapping("backbone", recipe["backbone"], own_annotations(type(start.config)))
        fields = {name: plain(start.config.__dict__[name]) for name in own_annotations(type(start.config))}
        fields |= {"image_size": recipe["global_crop_size"], "num_channels": recipe["num_channels"], **changes}
        config = type(start.config)(**fields)
        for name, own, there in network_differences(config, start.config):
            if name != "num_channels":
                raise ValueError(
                    f"backbone: {name} {own!r} is that of another network, the model has {there!r}; change what acts "
                    "in training only, such as drop_path_rate."
                )
        return config
