"""What the configurations of all trainers share: batch, learning rate, precision, and recipes as YAML."""

import copy
import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from dinov3_hf._compat import HAS_ACTIVATION_CHECKPOINTING, UnseenByTrainer
from dinov3_hf.errors import ArgumentError
from dinov3_hf.hub.model_card import license_fields
from dinov3_hf.training.batch_arithmetic import micro_batch_size
from dinov3_hf.training.engines import EngineName, choose_engine
from dinov3_hf.training.precision import Precision, Recomputation, check_fp8, resolve_precision
from dinov3_hf.training.schedules import LRScaling, Schedule, lr_scale_factor
from dinov3_hf.yaml_text import dump_yaml

CHANGES_THE_RESULT = "changes the result"
ORCHESTRATION = "orchestration"
EFFICIENCY = "efficiency"


def changes_the_result(help: str) -> dict[str, str]:
    """Metadata of a field on which the trained weights depend, whatever the machine."""
    return {"group": CHANGES_THE_RESULT, "help": help}


def orchestration(help: str) -> dict[str, str]:
    """Metadata of a field that says where and how often to write, log and evaluate."""
    return {"group": ORCHESTRATION, "help": help}


def efficiency(help: str) -> dict[str, str]:
    """Metadata of a field of speed and memory only."""
    return {"group": EFFICIENCY, "help": help}


def default_report_to() -> str:
    """TensorBoard where it is installed, else nothing."""
    return "tensorboard" if importlib.util.find_spec("tensorboard") is not None else "none"


# Inherited fields that this trainer does not read, with what to use instead.
UNUSED_FIELDS = {
    "num_train_epochs": "a run is counted in optimizer steps: set max_steps",
    "warmup_steps": "set lr_schedule.warmup_steps",
    "warmup_ratio": "set lr_schedule.warmup_steps to a share of the run such as 0.1",
    "lr_scheduler_type": "set lr_schedule",
    "lr_scheduler_kwargs": "set lr_schedule",
    "weight_decay": "set weight_decay_schedule (a number is constant)",
    "optim": "the optimizer is AdamW, fused where it can be",
    "optim_args": "set adam_beta1, adam_beta2 and adam_epsilon",
    "optim_target_modules": "the optimizer is AdamW on all parameters",
    "gradient_accumulation_steps": "it follows from global_batch_size: set per_device_train_batch_size",
    "auto_find_batch_size": "set per_device_train_batch_size",
    "average_tokens_across_devices": "there are no tokens to count",
    "include_num_input_tokens_seen": "there are no tokens to count",
    "label_smoothing_factor": "there are no labels; the teacher's sharpness is teacher_temperature_schedule",
    "label_names": "there are no labels",
    "neftune_noise_alpha": "there are no token embeddings",
    "use_liger_kernel": "set torch_compile",
    "liger_kernel_config": "set torch_compile",
    "bf16": "set precision: auto, bf16 or fp32",
    "fp16": "set precision: auto, bf16 or fp32; float16 overflows in this objective",
    "bf16_full_eval": "set precision: auto, bf16 or fp32",
    "fp16_full_eval": "set precision: auto, bf16 or fp32",
    "activation_checkpointing": "set gradient_checkpointing",
    "activation_checkpointing_kwargs": "set gradient_checkpointing",
    "gradient_checkpointing_kwargs": "set gradient_checkpointing: none, selective or full",
    "torch_compile_backend": "set torch_compile",
    "torch_compile_mode": "set torch_compile",
    "train_sampling_strategy": "the order of the images is a function of seed",
    "length_column_name": "the order of the images is a function of seed",
    "data_seed": "the order of the images is a function of seed",
    "ignore_data_skip": "a resumed run goes on with the next image",
    "dataloader_drop_last": "the stream of images is endless, every batch is full",
    "remove_unused_columns": "the step reads every entry of a batch",
    "save_only_model": "teacher/ in a checkpoint is the model alone; without the rest a run cannot go on",
    "save_on_each_node": "output_dir must be on a disk that all nodes share",
    "enable_jit_checkpoint": "it saves in the middle of a step: set save_steps",
    "load_best_model_at_end": "the result is the teacher of the last step; those of earlier ones are in checkpoint-N",
    "metric_for_best_model": "set save_total_limit and keep_every_steps",
    "greater_is_better": "set save_total_limit and keep_every_steps",
    "hub_always_push": "the teacher is uploaded once, when the run has ended",
    "fsdp": "set engine: fsdp2",
    "fsdp_config": "set engine: fsdp2; how to shard follows from the model",
    "debug": "--debug shows the traceback of an error",
}


@dataclass
class RecipeConfig(TrainingArguments):
    r"""
    Arguments of a training run, as a recipe says them. Base class; see [`SSLConfig`].

    Fields come in three groups. *Changes the result*: two runs that agree in these compute the same thing, whatever
    the machine. *Orchestration*: where and how often to write, log and evaluate. *Efficiency*: speed and memory only.

    Inherited defaults that are changed: `learning_rate=None` (shorthand for the peak of `lr_schedule`),
    `max_steps=125000`, `max_grad_norm=3.0` (for each sub-module separately), `output_dir="runs/train"`,
    `logging_steps=10`, `logging_nan_inf_filter=False`, `report_to` (TensorBoard where it is installed),
    `hub_strategy="end"`, `per_device_train_batch_size=None` (all of a rank's share), `gradient_checkpointing="none"`
    (transformers 5.23 calls it `activation_checkpointing`), `dataloader_drop_last=True`,
    `remove_unused_columns=False`, `ddp_find_unused_parameters=False`, `ddp_broadcast_buffers=False`.

    Inherited fields that the trainers do not read are refused when they are set: see `UNUSED_FIELDS`.
    """

    # --- changes the result: optimization ---
    global_batch_size: int = field(
        default=2048,
        metadata=changes_the_result("Images of one optimizer step, over all ranks and micro-batches."),
    )
    max_steps: int = field(
        default=125_000,
        metadata=changes_the_result("Optimizer steps of the run."),
    )
    lr_schedule: Schedule = field(
        default_factory=lambda: Schedule(0.0, 0.001, 1e-06, warmup_steps=0.1),
        metadata=changes_the_result(
            "Learning rate before scaling: a number, or {start, peak, end, warmup_steps, cosine_steps, style,"
            " truncation}."
        ),
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata=changes_the_result("Shorthand for lr_schedule.peak."),
    )
    lr_scaling: LRScaling = field(
        default="sqrt_wrt_1024",
        metadata=changes_the_result(
            "Scaling of the learning rate with the batch: sqrt_wrt_1024 is 4 sqrt(batch / 1024)."
        ),
    )
    weight_decay_schedule: Schedule = field(
        default_factory=lambda: Schedule(0.04, 0.04, 0.4),
        metadata=changes_the_result("Weight decay, a schedule like lr_schedule; not applied to biases and norms."),
    )
    max_grad_norm: float = field(
        default=3.0,
        metadata=changes_the_result(
            "Limit of the gradient norm, for each sub-module (backbone, heads) separately; 0 is none."
        ),
    )
    adam_beta1: float = field(
        default=0.9,
        metadata=changes_the_result("AdamW's beta1."),
    )
    adam_beta2: float = field(
        default=0.999,
        metadata=changes_the_result("AdamW's beta2."),
    )
    adam_epsilon: float = field(
        default=1e-8,
        metadata=changes_the_result("AdamW's epsilon."),
    )
    seed: int = field(
        default=42,
        metadata=changes_the_result("Seed of everything drawn at random: weights, order of the images, views, masks."),
    )

    # --- orchestration ---
    output_dir: str | None = field(
        default="runs/train",
        metadata=orchestration("Folder for checkpoints, logs and what was trained."),
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=orchestration(
            "Go on from a checkpoint: last (the newest in output_dir), auto (that, or a fresh start if there is none)"
            " or a checkpoint folder."
        ),
    )
    save_total_limit: int | None = field(
        default=None,
        metadata=orchestration("Number of the newest checkpoints to keep; null keeps all."),
    )
    keep_every_steps: int | None = field(
        default=None,
        metadata=orchestration("Keep the checkpoints of steps that are a multiple of this, however old they are."),
    )
    logging_steps: float = field(
        default=10,
        metadata=orchestration("Steps between two log lines (or share of the run)."),
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata=orchestration("Hide NaN losses in the log."),
    )
    report_to: str | list[str] | None = field(
        default_factory=default_report_to, metadata=orchestration("Where to log: tensorboard, wandb, ..., all, none.")
    )

    push_to_hub: bool = field(
        default=False,
        metadata=orchestration(
            "Upload the teacher to the Hub when the run has ended, into the repository hub_model_id."
        ),
    )
    hub_model_id: str | None = field(
        default=None,
        metadata=orchestration("Repository, OWNER/NAME or NAME for your own; null is called like output_dir."),
    )
    hub_strategy: str = field(
        default="end", metadata=orchestration("When to upload; only end: training states are not for publishing.")
    )
    license: str | None = field(
        default=None,
        metadata=orchestration(
            "Licence that the model card states: an identifier of the Hub such as apache-2.0; null states none."
        ),
    )

    # --- efficiency ---
    precision: Precision = field(
        default="auto",
        metadata=efficiency("auto, bf16 (autocast; weights, losses and moving averages stay float32) or fp32."),
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata=efficiency(
            "Images of one forward pass on one rank; null is all of the rank's share. The rest is accumulated."
        ),
    )
    engine: EngineName = field(
        default="auto",
        metadata=efficiency(
            "How the run is spread over its ranks: ddp (all of it on each), fsdp2, zero2, zero3 (sharded), or auto, as"
            " accelerate launch was told."
        ),
    )
    deepspeed: str | None = field(
        default=None,
        metadata=efficiency("DeepSpeed configuration of zero2 and zero3 to start from, a JSON file."),
    )
    offload_optimizer: bool = field(
        default=False,
        metadata=efficiency(
            "Keep the optimizer's state, and with fsdp2 the weights, in the memory of the host: fsdp2, zero3."
        ),
    )
    gradient_checkpointing: Recomputation | bool = field(  # type: ignore[assignment]
        default="none",
        metadata=efficiency(
            "What the backward pass computes anew instead of keeping it: none, selective (all but the results of"
            " matrix products and attention), full (whole blocks). true is full, false none."
        ),
    )
    torch_compile: bool = field(
        default=False,
        metadata=efficiency(
            "Compile the blocks of student and teachers, each by itself, when a step first meets them."
        ),
    )
    fp8: bool = field(
        default=False,
        metadata=efficiency(
            "Matrix products of the blocks' linear layers in float8, on GPUs of compute capability 8.9 or more; the"
            " weights stay float32. Needs torchao."
        ),
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata=efficiency("Attention kernel: sdpa, eager, flash_attention_2, flex_attention."),
    )

    # --- inherited, with another default ---
    dataloader_drop_last: bool = True
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    ddp_broadcast_buffers: bool | None = False

    UNUSED_FIELDS: ClassVar[dict[str, str]] = UNUSED_FIELDS
    # The field whose entries are mappings of other fields, which they change for a part of the run.
    BLOCKS: ClassVar[str | None] = None
    # Inherited fields with their inherited defaults that --help shows in a group.
    INHERITED_GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        ORCHESTRATION: (
            "save_strategy",
            "save_steps",
            "eval_strategy",
            "eval_steps",
            "eval_on_start",
            "run_name",
            "hub_private_repo",
            "hub_revision",
        ),
        EFFICIENCY: (
            "tf32",
            "dataloader_num_workers",
            "dataloader_prefetch_factor",
            "dataloader_pin_memory",
            "use_cpu",
        ),
    }

    def __post_init__(self) -> None:
        self._given = {f.name: copy.deepcopy(self.__dict__[f.name]) for f in dataclasses.fields(self) if f.init}
        self._refuse_unused_fields()
        for name in ("global_batch_size", "max_steps"):
            if self.__dict__[name] < 1:
                raise ValueError(f"{name} {self.__dict__[name]} is not positive; use 1 or more.")
        self._check_saving()
        if self.output_dir is not None and Path(self.output_dir).is_file():
            raise ValueError(f"output_dir {self.output_dir} is a file; name a folder, which need not exist.")
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm {self.max_grad_norm} is negative; use 0 for none.")
        self._check_publishing()
        self._parse_schedules()
        self._choose_arithmetic()
        self._post_init_unseen()
        # The recipe decides, not the launcher's environment.
        self.mixed_precision = "bf16" if self.bf16 else "no"
        # Without a launcher the Trainer would wrap the model in DataParallel on a machine with several GPUs, which
        # splits a batch behind the objective's back.
        self._n_gpu = min(self.n_gpu, 1)
        # With several processes the CPU is "cpu:0", onto which torch cannot load; transformers 5.8 resumes with it.
        if self.device.type == "cpu":
            self._setup_devices = torch.device("cpu")
        micro_batch = micro_batch_size(self.global_batch_size, self.world_size, self.per_device_train_batch_size)
        self.per_device_train_batch_size = micro_batch
        self.gradient_accumulation_steps = self.global_batch_size // (micro_batch * self.world_size)

    def _refuse_unused_fields(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, remedy in self.UNUSED_FIELDS.items():
            if name in defaults and self._given[name] != defaults[name]:
                raise ArgumentError(f"{name} is not read by this trainer; {remedy}.")

    def _check_publishing(self) -> None:
        license_fields(self.license)  # refuses one that the Hub does not know
        if self.hub_strategy != HubStrategy.END:
            raise ArgumentError(
                f"hub_strategy {self.hub_strategy} is not supported, training states are not for publishing; use end."
            )

    def _check_saving(self) -> None:
        if self.save_strategy == SaveStrategy.BEST:
            raise ArgumentError("save_strategy best is not supported; use steps with save_total_limit.")
        if self.save_strategy == SaveStrategy.STEPS and self.save_steps <= 0:
            raise ValueError(
                f"save_steps {self.save_steps:g} is not positive; for no checkpoints use save_strategy no."
            )
        every = self.keep_every_steps
        if every is None:
            return
        if every < 1:
            raise ValueError(f"keep_every_steps {every} is not positive; use null for none.")
        if self.save_strategy == SaveStrategy.STEPS and self.save_steps >= 1 and every % self.save_steps:
            raise ValueError(
                f"keep_every_steps {every} is not a multiple of save_steps {self.save_steps:g}, so that hardly any "
                f"checkpoint would be kept; use {int((every // self.save_steps + 1) * self.save_steps)}."
            )

    def _parse_schedules(self) -> None:
        for name in self.schedule_names():
            schedule = Schedule.parse(self.__dict__[name], name)
            schedule.check(self.max_steps, name)
            setattr(self, name, schedule)
        if self.learning_rate is not None:
            self.lr_schedule = with_peak(self.lr_schedule, self.learning_rate)
        self.learning_rate = self.lr_schedule.peak

    def _choose_arithmetic(self) -> None:
        # Unless the CPU is asked for by name, transformers refuses bf16 on it, and several processes would each
        # train on the whole batch.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.bf16 = resolve_precision(self.precision, self.model_width(), use_cpu=self.use_cpu) == "bf16"
        if self.fp8:
            check_fp8(self.bf16, use_cpu=self.use_cpu)
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "full" if self.gradient_checkpointing else "none"

    @property
    def place_model_on_device(self) -> bool:
        """A model that is sharded comes to the device in parts."""
        return self.launched.engine == "ddp"

    def _post_init_unseen(self) -> None:
        """
        Lets the Trainer see neither checkpointing nor compiling, which `prepare_blocks` does block by block, nor
        DeepSpeed, which is the engine's.
        """
        self.launched = choose_engine(self.engine, self.deepspeed, self.offload_optimizer)
        self._check_blocks()
        self.deepspeed = None
        recomputation, compiled = self.gradient_checkpointing, self.torch_compile
        self.gradient_checkpointing = self.torch_compile = False
        if HAS_ACTIVATION_CHECKPOINTING:
            self.activation_checkpointing = False
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.gradient_checkpointing = UnseenByTrainer(recomputation)  # type: ignore[assignment]
        self.torch_compile = compiled
        self.torch_compile_backend = "no"  # whatever the launcher's environment says

    def _check_blocks(self) -> None:
        if self.launched.engine != "zero3":
            return
        if self.gradient_checkpointing == "selective":
            raise ArgumentError(
                "gradient_checkpointing selective does not go with engine zero3, which gathers weights inside of "
                "blocks; set gradient_checkpointing: full, or engine: fsdp2."
            )
        if self.torch_compile:
            raise ArgumentError(
                "torch_compile does not go with engine zero3, which gathers weights inside of blocks; set "
                "torch_compile: false, or engine: fsdp2."
            )

    def model_width(self) -> int:
        """Width of the network that is trained, by which `precision: auto` decides on a CPU."""
        raise NotImplementedError

    @classmethod
    def schedule_names(cls) -> list[str]:
        """Names of the fields that hold a schedule."""
        return [f.name for f in dataclasses.fields(cls) if f.type is Schedule]

    def scaled_lr_schedule(self) -> Schedule:
        """The learning rate, scaled to the global batch."""
        return self.lr_schedule.scaled(lr_scale_factor(self.lr_scaling, self.global_batch_size))

    def recipe(self) -> dict[str, Any]:
        """The fields as they were given, in plain types: a YAML recipe that parses back to an equal configuration.

        What was left to the machine stays so (`precision: auto`, an unset micro-batch), so that the recipe of a run
        can be taken to another one. Inherited fields appear where they differ from their defaults; tokens never do.
        `learning_rate` has gone into `lr_schedule`; `resume_from_checkpoint` belongs to a process, not to a recipe.
        """
        recipe = {}
        for f in dataclasses.fields(self):
            if not f.init or f.name in ("learning_rate", "resume_from_checkpoint") or f.name.endswith("_token"):
                continue
            if f.name in self.UNUSED_FIELDS:  # a recipe that has them is refused, whatever their value
                continue
            value = plain(self.__dict__[f.name] if f.type is Schedule else self._given[f.name])
            default = f.default_factory() if callable(f.default_factory) else f.default
            if "group" in f.metadata or value != plain(default):
                recipe[f.name] = value
        return recipe

    @classmethod
    def result_fields(cls, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that change the result, in one spelling: two recipes that agree in these compute the same.

        Args:
            recipe: fields as `recipe` returns them, of this or an earlier version; what it lacks has its default.
        """
        values = {}
        for f in dataclasses.fields(cls):
            if f.metadata.get("group") == CHANGES_THE_RESULT and f.name != "learning_rate":
                default = f.default_factory() if callable(f.default_factory) else f.default
                value = recipe.get(f.name, default)
                values[f.name] = plain(Schedule.parse(value, f.name) if f.type is Schedule else value)
        return values

    def save_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe to a YAML file, which the scripts take as their recipe."""
        Path(path).write_text(dump_yaml(self.recipe()), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """All fields in plain types, for the Trainer's integrations."""
        inherited: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {**inherited, **{name: self.__dict__[name].to_plain() for name in self.schedule_names()}}


def with_peak(schedule: Schedule, peak: float) -> Schedule:
    """The shorthand `learning_rate`: moves the peak, and whatever else is at the peak's value."""
    if peak == schedule.peak:
        return schedule
    if schedule.end > schedule.peak:
        raise ArgumentError(
            f"learning_rate is the peak of lr_schedule, but that one rises to its end {schedule.end}; set "
            "lr_schedule.end instead."
        )
    start = peak if schedule.start == schedule.peak else schedule.start
    end = peak if schedule.end == schedule.peak else schedule.end
    return dataclasses.replace(schedule, start=start, peak=peak, end=end)


def plain(value: Any) -> Any:
    """A field's value in the types of YAML: schedules and mappings as dicts, tuples as lists, choices as texts."""
    if isinstance(value, Schedule):
        return value.to_plain()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
