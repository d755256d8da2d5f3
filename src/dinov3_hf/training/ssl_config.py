"""Configuration of self-supervised pre-training: everything that a recipe can say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from transformers import PreTrainedConfig

from dinov3_hf.data.crop_sizes import CropSizeMix, CropSizes, parse_crop_sizes, sizes_of_entries
from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews, check_crop_size
from dinov3_hf.data.photometric import Distortions
from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.field_types import fit_mapping
from dinov3_hf.training.batch_arithmetic import check_drop_path_groups, check_koleo_groups, check_part
from dinov3_hf.training.gram_config import EMA, GramConfig
from dinov3_hf.training.recipe_config import changes_the_result, orchestration, plain
from dinov3_hf.training.schedules import Schedule, TrainingSchedules, resolve_steps

if TYPE_CHECKING:
    from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
    from dinov3_hf.training.forward_draws import StudentDraws

Configured = TypeVar("Configured", bound="DINOv3PreTrainingConfig")


# Schedule -> smallest and largest value.
_RANGES = {
    "lr_schedule": (0.0, float("inf")),
    "weight_decay_schedule": (0.0, float("inf")),
    "teacher_momentum_schedule": (0.0, 1.0),
    "teacher_temperature_schedule": (1e-6, float("inf")),
    "local_loss_weight_schedule": (0.0, float("inf")),
}


@dataclass
class SSLConfig(GramConfig):
    r"""
    Arguments of [`SSLTrainer`]: the self-supervised objective, its views, its schedules, and the machine.

    The defaults are the published ViT-L/16 ImageNet-1k recipe with a ViT-S/16, its durations given as shares of the
    run.

    Inherited defaults that are changed, beside those of [`RecipeConfig`]: `output_dir="runs/pretrain"`.
    """

    # --- changes the result: model ---
    backbone: dict[str, Any] = field(
        default_factory=lambda: {"preset": "vits16"},
        metadata=changes_the_result(
            "Mapping: a preset and changes to it ({preset: vits16, drop_path_rate: 0.1}), or fields of the "
            "backbone's config."
        ),
    )
    drop_path_group_size: int = field(
        default=8,
        metadata=changes_the_result(
            "Images of which the backbone's drop_path_rate leaves out an exact share: consecutive groups of the "
            "global batch, all crops of a kind together. A published per-GPU batch becomes a group size. A ConvNeXt, "
            "which draws for each image, does not read it."
        ),
    )
    dino_head: dict[str, Any] = field(
        default_factory=dict,
        metadata=changes_the_result(
            "Prototype head on the CLS token: num_prototypes 65536, bottleneck_dim 256, hidden_dim 2048, "
            "num_layers 3, mlp_bias true, unless given."
        ),
    )
    ibot_head: dict[str, Any] = field(
        default_factory=dict,
        metadata=changes_the_result("Prototype head on masked patches; entries as in dino_head."),
    )

    # --- changes the result: start ---
    start_from: str | None = field(
        default=None,
        metadata=changes_the_result(
            "Where the weights come from: the output folder of a run, one of its checkpoint-N, or a teacher/ with its "
            "heads; null is random weights. Steps count from 0. A resumed run does not read it again."
        ),
    )
    start_with: Literal["state", "teacher"] = field(
        default="state",
        metadata=changes_the_result(
            "What start_from gives: state is student, teacher, heads and AdamW's moments of a checkpoint; teacher is "
            "the teacher and its heads for both networks, with a fresh optimizer."
        ),
    )

    # --- changes the result: objective ---
    dino_weight: float = field(
        default=1.0,
        metadata=changes_the_result("Weight of L_DINO, over global and local crops."),
    )
    dino_global_ignore_diagonal: bool = field(
        default=True,
        metadata=changes_the_result(
            "Leave out the pairs of a global crop with itself in the DINO term between global crops."
        ),
    )
    ibot_weight: float = field(
        default=1.0,
        metadata=changes_the_result(
            "Weight of L_iBOT on masked patches; 0 leaves out the term, its head and the masks (a ConvNeXt has no "
            "mask token)."
        ),
    )
    koleo_weight: float = field(
        default=0.1,
        metadata=changes_the_result("Weight of L_DKoleo in L_Pre, for each of the two global crops."),
    )
    koleo_group_size: int | None = field(
        default=None,
        metadata=changes_the_result(
            "Images among which KoLeo seeks nearest neighbours: consecutive groups of the global batch; null "
            "is all of it. A published per-GPU batch becomes a group size."
        ),
    )
    koleo_topk: int = field(
        default=1,
        metadata=changes_the_result("Nearest neighbours that KoLeo pushes away."),
    )
    student_temperature: float = field(
        default=0.1,
        metadata=changes_the_result("Temperature of the student's softmax."),
    )
    sinkhorn_iterations: int = field(
        default=3,
        metadata=changes_the_result("Iterations of Sinkhorn-Knopp on the teacher's logits; 0 is a plain softmax."),
    )
    mask_probability: float = field(
        default=0.5,
        metadata=changes_the_result("Share of the global crops that are masked."),
    )
    mask_ratio: list[float] = field(
        default_factory=lambda: [0.1, 0.5],
        metadata=changes_the_result("Smallest and largest share of masked patches, spread evenly."),
    )
    mask_circular_shift: bool = field(
        default=False,
        metadata=changes_the_result("Roll each mask by a random offset, so that no position is preferred."),
    )

    # --- changes the result: data and views ---
    train_data: str | None = field(
        default=None,
        metadata=changes_the_result(
            "Images to learn from: a folder (nested, no labels needed), parquet or tar files ('shards/*.tar'), "
            "OWNER/NAME on the Hub, a data recipe (data.yaml), or digits; stream: before it reads on instead of at "
            "random."
        ),
    )
    image_mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406],
        metadata=changes_the_result("Mean of each channel, pixel values in [0, 1]."),
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225],
        metadata=changes_the_result("Standard deviation of each channel."),
    )
    global_crop_size: int = field(
        default=224,
        metadata=changes_the_result("Side of the two global crops in pixels."),
    )
    local_crop_size: int = field(
        default=96,
        metadata=changes_the_result("Side of the local crops in pixels."),
    )
    crop_sizes: list[dict[str, Any]] | None = field(
        default=None,
        metadata=changes_the_result(
            "Sizes to mix, in the place of global_crop_size, local_crop_size and gram_crop_size: a list of {global, "
            "local, gram, probability}, one of which is drawn for each step. An entry's "
            "per_device_train_batch_size bounds the images of one forward pass at its sizes."
        ),
    )
    num_local_crops: int = field(
        default=8,
        metadata=changes_the_result("Local crops of an image."),
    )
    global_crop_scale: list[float] = field(
        default_factory=lambda: [0.32, 1.0],
        metadata=changes_the_result("Smallest and largest share of the area in a global crop."),
    )
    local_crop_scale: list[float] = field(
        default_factory=lambda: [0.05, 0.32],
        metadata=changes_the_result("Smallest and largest share of the area in a local crop."),
    )
    horizontal_flip: bool = field(
        default=True,
        metadata=changes_the_result("Mirror half of the crops."),
    )
    color_jitter: list[float] = field(
        default_factory=lambda: [0.4, 0.4, 0.2, 0.1],
        metadata=changes_the_result("Strength of the jitter of brightness, contrast, saturation and hue."),
    )
    color_jitter_probability: float = field(
        default=0.8,
        metadata=changes_the_result("Share of the crops whose colours are jittered."),
    )
    greyscale_probability: float = field(
        default=0.2,
        metadata=changes_the_result("Share of the crops turned grey."),
    )
    blur_probabilities: list[float] = field(
        default_factory=lambda: [0.0, 0.9, 0.5],
        metadata=changes_the_result("Share of blurred crops: first global, second global, local."),
    )
    solarize_probability: float = field(
        default=0.2,
        metadata=changes_the_result("Share of the second global crops that are solarized."),
    )

    # --- changes the result: optimization ---
    freeze_last_layer_steps: float = field(
        default=0.01,
        metadata=changes_the_result(
            "First steps (or share of the run) in which the heads' last layers stay as they are."
        ),
    )
    layerwise_lr_decay: float = field(
        default=0.9,
        metadata=changes_the_result("Factor of the learning rate from each block to the one before it."),
    )
    patch_embed_lr_mult: float = field(
        default=0.2,
        metadata=changes_the_result("Additional factor of the learning rate of the patch embedding."),
    )
    teacher_momentum_schedule: Schedule = field(
        default_factory=lambda: Schedule(0.992, 0.992, 1.0),
        metadata=changes_the_result("Momentum of the teacher's moving average, a schedule."),
    )
    teacher_temperature_schedule: Schedule = field(
        default_factory=lambda: Schedule(0.04, 0.07, 0.07, warmup_steps=0.3),
        metadata=changes_the_result("Temperature of the teacher's assignment, a schedule."),
    )
    local_loss_weight_schedule: Schedule = field(
        default_factory=lambda: Schedule.constant(1.0),
        metadata=changes_the_result("Factor of the DINO term between local and global crops, a schedule."),
    )

    # --- orchestration ---
    output_dir: str | None = field(
        default="runs/pretrain",
        metadata=orchestration("Folder for checkpoints, logs and the trained teacher."),
    )
    eval_data: str | None = field(
        default="auto",
        metadata=orchestration(
            "Labelled images for kNN accuracy during the run, named as in train_data (a folder of class folders, "
            "parquet files with labels, ...); null for none; auto takes the labels that come with the training images "
            "(digits), else none."
        ),
    )
    eval_leave_one_out: bool = field(
        default=False,
        metadata=orchestration(
            "Classify each image of eval_data by all the others, training and test images together: for small sets."
        ),
    )
    max_unreadable_share: float = field(
        default=0.05,
        metadata=orchestration(
            "Share of the images that may be unreadable: they are left out and listed; a larger share ends the run."
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose_evaluation()
        self._check_numbers()
        self._check_networks()

    def _check_networks(self) -> None:
        """Refuse what does not fit together of network, views, objective and batch."""
        self._complete_heads()
        backbone_config = self.backbone_config()
        self._check_views(backbone_config)
        self.check_gram()
        if self.gram_tokens == "masked" and self.mask_free:
            raise ArgumentError("gram_tokens masked needs masks, but ibot_weight is 0; use gram_tokens: all.")
        self.pretraining_config()  # its own checks
        check_koleo_groups(
            self.koleo_group_size,
            self.koleo_topk,
            self.train_batch_size * self.world_size,
            self.gradient_accumulation_steps,
        )
        self._check_crop_sizes(backbone_config)
        self._check_drop_path(backbone_config)

    def _choose_evaluation(self) -> None:
        if self.eval_data == "auto":
            self.eval_data = "digits" if self.train_data == "digits" else None

    def _check_numbers(self) -> None:
        if self.sinkhorn_iterations < 0:
            raise ValueError(f"sinkhorn_iterations {self.sinkhorn_iterations} is negative; use 0 for a plain softmax.")
        for name in ("student_temperature", "layerwise_lr_decay", "patch_embed_lr_mult"):
            if self.__dict__[name] <= 0:
                raise ValueError(f"{name} {self.__dict__[name]} is not positive; use a number above 0.")
        for name in ("dino_weight", "ibot_weight", "koleo_weight"):
            if self.__dict__[name] < 0:
                raise ValueError(f"{name} {self.__dict__[name]:g} is negative; use 0 to leave the term out.")
        for name, (least, most) in _RANGES.items():
            schedule: Schedule = self.__dict__[name]
            if not all(least <= value <= most for value in (schedule.start, schedule.peak, schedule.end)):
                allowed = f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
                raise ValueError(f"{name} {schedule.to_plain()} has a value out of range; use {allowed}.")
        for name in ("num_local_crops", "freeze_last_layer_steps"):
            if self.__dict__[name] < 0:
                raise ValueError(f"{name} {self.__dict__[name]} is negative; use 0 for none.")
        for name in ("mask_probability", "color_jitter_probability", "greyscale_probability", "solarize_probability"):
            if not 0 <= self.__dict__[name] <= 1:
                raise ValueError(f"{name} {self.__dict__[name]} is no probability; use a number from 0 to 1.")
        if not 0 <= self.max_unreadable_share <= 1:
            raise ValueError(
                f"max_unreadable_share {self.max_unreadable_share} is no share; use a number from 0 to 1."
            )
        for name, example in (("color_jitter", [0.4, 0.4, 0.2, 0.1]), ("blur_probabilities", [0.0, 0.9, 0.5])):
            values = self.__dict__[name]
            if len(values) != len(example) or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{name} {values} must be {len(example)} numbers from 0 to 1, such as {example}.")
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std {self.image_std} has a value that is not positive; pixels are divided by it.")
        for name in ("mask_ratio", "global_crop_scale", "local_crop_scale"):
            pair = self.__dict__[name]
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= 1:
                raise ValueError(f"{name} {pair} must be a smaller and a larger share between 0 and 1.")

    def _complete_heads(self) -> None:
        from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import PROTOTYPE_HEAD_DEFAULTS

        types = {name: type(default) for name, default in PROTOTYPE_HEAD_DEFAULTS.items()}
        for name in ("dino_head", "ibot_head"):
            setattr(self, name, {**PROTOTYPE_HEAD_DEFAULTS, **fit_mapping(name, self.__dict__[name], types)})
            for entry in ("num_prototypes", "bottleneck_dim", "hidden_dim", "num_layers"):
                if self.__dict__[name][entry] < 1:
                    raise ValueError(f"{name}.{entry} is {self.__dict__[name][entry]}; use 1 or more.")

    @property
    def mask_free(self) -> bool:
        """Whether no patch is masked in this run."""
        return self.ibot_weight == 0

    def _check_views(self, backbone: PreTrainedConfig) -> None:
        from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN, patch_side

        side, num_channels = patch_side(backbone), backbone.num_channels
        check_crop_size("global_crop_size", self.global_crop_size, side)
        if self.num_local_crops and backbone.model_type not in WITHOUT_MASK_TOKEN:  # a ConvNet pads where a ViT cuts
            check_crop_size("local_crop_size", self.local_crop_size, side)
        if self.gram_crop_size is not None:
            check_crop_size("gram_crop_size", self.gram_crop_size, side)
        for name in ("image_mean", "image_std"):
            num_values = len(self.__dict__[name])
            if num_values != num_channels:
                raise ValueError(
                    f"{name} has {num_values} values, but the backbone's num_channels is {num_channels}; give one "
                    "value for each channel."
                )

    def _check_drop_path(self, backbone: PreTrainedConfig) -> None:
        from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig

        if not isinstance(backbone, DINOv3ViTConfig) or backbone.drop_path_rate == 0:
            return
        check_drop_path_groups(self.drop_path_group_size, self.train_batch_size)
        for i, sizes in enumerate(self.crop_size_mix().sizes):
            if sizes.per_device_train_batch_size is not None:
                name = f"crop_sizes.{i}.per_device_train_batch_size"
                check_drop_path_groups(self.drop_path_group_size, sizes.per_device_train_batch_size, name)

    def _check_crop_sizes(self, backbone: PreTrainedConfig) -> None:
        from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN, patch_side

        if self.crop_sizes is None:
            return
        side, mixed = patch_side(backbone), self.crop_size_mix().sizes
        wants_gram = self.gram_crop_size is not None or any(sizes.gram_crop_size for sizes in mixed)
        for i, sizes in enumerate(mixed):
            entry = f"crop_sizes.{i}"
            check_crop_size(f"{entry}.global", sizes.global_crop_size, side)
            if self.num_local_crops and backbone.model_type not in WITHOUT_MASK_TOKEN:
                check_crop_size(f"{entry}.local", sizes.local_crop_size, side)
            if sizes.gram_crop_size is not None:
                if self.gram_teacher in (None, EMA):
                    raise ArgumentError(
                        f"{entry}.gram {sizes.gram_crop_size} needs a Gram teacher of its own, but gram_teacher is "
                        f"{self.gram_teacher or 'null'}; set gram_teacher: copy, or leave gram out of crop_sizes."
                    )
                check_crop_size(f"{entry}.gram", sizes.gram_crop_size, side)
            elif wants_gram:
                raise ArgumentError(
                    f"{entry} has no gram, but the Gram teacher has crops of its own (gram_crop_size, or another "
                    "entry); give gram in every entry, or nowhere."
                )
            part = sizes.per_device_train_batch_size
            if part is not None:
                name = f"{entry}.per_device_train_batch_size"
                check_part(name, part, self.train_batch_size, self.koleo_group_size)
                self.check_gram_batch(part)

    @classmethod
    def result_fields(cls, recipe: Mapping[str, Any]) -> dict[str, Any]:
        from dinov3_hf.models.dinov3_pretraining.backbones import own_annotations
        from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import PROTOTYPE_HEAD_DEFAULTS

        values = super().result_fields(recipe)
        for head in ("dino_head", "ibot_head"):
            values[head] = {**PROTOTYPE_HEAD_DEFAULTS, **values[head]}
        if values["crop_sizes"] is not None:
            values["crop_sizes"] = sizes_of_entries(values["crop_sizes"])
        backbone = cls.backbone_of(values)
        fields = {name: plain(backbone.__dict__[name]) for name in own_annotations(type(backbone))}
        values["backbone"] = {"model_type": backbone.model_type, **fields}
        return values

    def model_width(self) -> int:
        width: int = self.backbone_config().hidden_size
        return width

    def schedules(self) -> TrainingSchedules:
        """What each optimizer step reads, with the learning rate scaled to the global batch."""
        return TrainingSchedules(
            max_steps=self.max_steps,
            lr=self.scaled_lr_schedule(),
            weight_decay=self.weight_decay_schedule,
            teacher_momentum=self.teacher_momentum_schedule,
            teacher_temperature=self.teacher_temperature_schedule,
            local_loss_weight=self.local_loss_weight_schedule,
            freeze_last_layer_steps=resolve_steps(self.freeze_last_layer_steps, self.max_steps),
            gram_weight=None if self.gram_teacher is None else self.gram_weight_schedule,
            gram_start_step=resolve_steps(self.gram_start_step, self.max_steps),
        )

    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's configuration: the preset with the recipe's changes, for images of the global crops' size.

        Raises:
            ArgumentError: no such preset or field, or a value of the wrong type.
            ValueError: the backbone's own checks.
        """
        return self.backbone_of(self.__dict__)

    @classmethod
    def backbone_of(cls, recipe: Mapping[str, Any]) -> PreTrainedConfig:
        """What `backbone_config` returns, from the fields of a whole recipe."""
        return _backbone_config({"image_size": recipe["global_crop_size"], **recipe["backbone"]})

    def pretraining_config(self) -> "DINOv3PreTrainingConfig":
        """The configuration of [`DINOv3ForPreTraining`]: backbone, heads and objective."""
        from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig

        return self._with_attention(DINOv3PreTrainingConfig(**self._objective_fields()))

    def _objective_fields(self) -> dict[str, Any]:
        return {
            "backbone_config": self.backbone_config(),
            "dino_head": self.dino_head,
            "ibot_head": self.ibot_head,
            "dino_weight": self.dino_weight,
            "dino_global_ignore_diagonal": self.dino_global_ignore_diagonal,
            "ibot_weight": self.ibot_weight,
            "koleo_weight": self.koleo_weight,
            "koleo_group_size": self.koleo_group_size,
            "koleo_topk": self.koleo_topk,
            "student_temperature": self.student_temperature,
            "sinkhorn_iterations": self.sinkhorn_iterations,
            "gram_teacher": None if self.gram_teacher is None else ("ema" if self.gram_teacher == EMA else "separate"),
            "gram_normalize": self.gram_normalize,
            "gram_per_image": self.gram_per_image,
            "gram_group_size": self.gram_group_size,
            "gram_negatives": self.gram_negatives,
            "gram_tokens": self.gram_tokens,
            "gram_antialias": self.gram_antialias,
        }

    def _with_attention(self, config: "Configured") -> "Configured":
        from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig

        if isinstance(config.backbone_config, DINOv3ViTConfig):  # a ConvNeXt has no attention
            config._attn_implementation = self.attn_implementation  # and the backbone's
        return config

    def crop_size_mix(self) -> CropSizeMix:
        """Which sizes of crops each step has."""
        if self.crop_sizes is None:
            sizes: tuple[CropSizes, ...] = (
                CropSizes(self.global_crop_size, self.local_crop_size, self.gram_crop_size),
            )
        else:
            sizes = parse_crop_sizes("crop_sizes", self.crop_sizes)
        return CropSizeMix(sizes, self.seed)

    def student_draws(self) -> "StudentDraws":
        """What draws the random numbers of the student's forward passes."""
        from dinov3_hf.training.forward_draws import StudentDraws

        num_crops = (2, self.num_local_crops) if self.num_local_crops else (2,)
        return StudentDraws(self.backbone_config(), num_crops, self.drop_path_group_size, self.seed)

    def views(self, sizes: CropSizes) -> MultiCropViews:
        """What the data workers cut from each image in a step with crops of `sizes`."""
        brightness, contrast, saturation, hue = self.color_jitter
        first_global, second_global, local = self.blur_probabilities
        return MultiCropViews(
            global_crop_size=sizes.global_crop_size,
            local_crop_size=sizes.local_crop_size,
            num_local_crops=self.num_local_crops,
            gram_crop_size=sizes.gram_crop_size,
            global_crop_scale=(self.global_crop_scale[0], self.global_crop_scale[1]),
            local_crop_scale=(self.local_crop_scale[0], self.local_crop_scale[1]),
            horizontal_flip=self.horizontal_flip,
            distortions=Distortions(
                jitter=(brightness, contrast, saturation, hue),
                jitter_probability=self.color_jitter_probability,
                greyscale_probability=self.greyscale_probability,
                blur_probabilities=(first_global, second_global, local),
                solarize_probability=self.solarize_probability,
            ),
        )

    def mask_grid(self, sizes: CropSizes) -> int:
        """Patches along each side of a global crop in a step with crops of `sizes`."""
        from dinov3_hf.models.dinov3_pretraining.backbones import patch_side

        return sizes.global_crop_size // patch_side(self.backbone_config())

    def masks(self, sizes: CropSizes) -> MaskSampler:
        """What draws the masks of the global crops in a step with crops of `sizes`."""
        return MaskSampler(
            self.mask_grid(sizes),
            probability=0.0 if self.mask_free else self.mask_probability,
            ratio_range=(self.mask_ratio[0], self.mask_ratio[1]),
            circular_shift=self.mask_circular_shift,
            batch_size=self.global_batch_size,
            seed=self.seed,
        )


def _backbone_config(backbone: dict[str, Any]) -> PreTrainedConfig:
    from dinov3_hf.models.dinov3_convnext.presets import PRESETS as CONVNEXT_PRESETS
    from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES, backbone_config_from_dict, own_annotations
    from dinov3_hf.models.dinov3_vit.presets import PRESETS as VIT_PRESETS

    presets = {
        **{name: {"model_type": "dinov3_vit", **values} for name, values in VIT_PRESETS.items()},
        **{name: {"model_type": "dinov3_convnext", **values} for name, values in CONVNEXT_PRESETS.items()},
    }
    entries = dict(backbone)
    preset = entries.pop("preset", None)
    if preset is not None and preset not in presets:
        raise ArgumentError(f"backbone.preset {preset!r} is unknown; {did_you_mean(preset, presets)}")
    preset_fields = presets.get(preset, {})
    model_type = entries.get("model_type", preset_fields.get("model_type", "dinov3_vit"))
    if model_type in BACKBONES:
        config_class, _ = BACKBONES[model_type]
        types = own_annotations(config_class)
        entries = fit_mapping("backbone", entries, {"model_type": str, **types})
    return backbone_config_from_dict({**preset_fields, **entries})
