"""The Gram teacher over a run: where it comes from, and when the EMA teacher's weights are copied into it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dinov3_hf.distributed.engine import Engine
from dinov3_hf.evals.features import load_model
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.same_network import network_differences
from dinov3_hf.training.checkpoints import checkpoints, problem
from dinov3_hf.training.gram_config import COPY, GramConfig
from dinov3_hf.training.schedules import resolve_steps


class GramTeacherCallback(TrainerCallback):
    """
    Copies the EMA teacher into the Gram teacher: with `gram_teacher: copy` just before step `gram_start_step`, and at
    the refreshes. All of it is a function of the step, so that a resumed run does the same.
    """

    def __init__(self, args: GramConfig, engine: Engine) -> None:
        self.engine = engine
        start = resolve_steps(args.gram_start_step, args.max_steps)
        self.copy_before = start if args.gram_teacher == COPY else None
        self.every = (
            # Of a short run a share may be less than a step.
            None if args.gram_refresh_steps is None else max(resolve_steps(args.gram_refresh_steps, args.max_steps), 1)
        )
        self.first = max(resolve_steps(args.gram_first_refresh_step, args.max_steps), start + 1)
        self.max_refreshes = args.gram_max_refreshes

    def refreshes_after(self, step: int) -> bool:
        """Whether the Gram teacher is refreshed when `step` steps have been taken."""
        if self.every is None or step < self.first or step % self.every:
            return False
        number = step // self.every - (self.first - 1) // self.every  # 1 for the first
        return self.max_refreshes is None or number <= self.max_refreshes

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.copy_before:
            self._copy_teacher(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.refreshes_after(state.global_step + 1):
            self._copy_teacher(kwargs["model"])

    @torch.no_grad()
    def _copy_teacher(self, model: DINOv3ForPreTraining) -> None:
        assert model.gram_teacher is not None
        self.engine.copy(model.gram_teacher, model.teacher.backbone)


def load_gram_teacher(gram_teacher: nn.Module, config: PreTrainedConfig, source: str) -> None:
    """
    Put the weights of a trained backbone into the Gram teacher.

    Args:
        gram_teacher: keeps its dtype and device.
        config: of the backbone that is trained.
        source: a run (its teacher, or that of its newest checkpoint), a checkpoint-N, a model folder, or OWNER/NAME on
            the Hub.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is another network than the one that is trained, so that its patches would not be comparable.
    """
    try:
        model, _ = load_model(str(_backbone_folder(source)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"gram_teacher {source}: {error}") from error
    differences = list(network_differences(config, model.config))
    if differences:
        name, here, there = differences[0]
        raise ValueError(
            f"the Gram teacher {source} has {name} {there}, the backbone that is trained {here}; give an earlier "
            "state of the same network."
        )
    found = model.state_dict()
    # The norm of local crops, of which patches know nothing, may be missing.
    weights = {name: found.get(name, own) for name, own in gram_teacher.state_dict().items()}
    gram_teacher.load_state_dict(weights)


def _backbone_folder(source: str) -> Path | str:
    folder = Path(source)
    if (folder / "teacher").is_dir():
        return folder / "teacher"
    complete = [checkpoint for checkpoint in checkpoints(folder) if problem(checkpoint) is None]
    return complete[-1] / "teacher" if complete else source
