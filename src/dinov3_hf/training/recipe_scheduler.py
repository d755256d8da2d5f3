"""Applies the schedules to an optimizer: learning rate and weight decay of every parameter group at every step."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov3_hf.training.schedules import TrainingSchedules


class RecipeScheduler(LRScheduler):
    """Sets `lr` and `weight_decay` of each group from the schedules and the group's multipliers.

    The values of step 0 are set at construction; each `step()` moves on by one optimizer step. The state is the step
    number alone, so it loads with `torch.load(..., weights_only=True)`; loading it sets the values of that step.

    Args:
        optimizer: its groups come from [`~training.param_groups.parameter_groups`].
        schedules: what to set at which step.
    """

    def __init__(self, optimizer: Optimizer, schedules: TrainingSchedules) -> None:
        self.schedules = schedules
        # Remembered: the groups of an optimizer state that is loaded may be of a version that did not name them.
        self._rates = [group["rate"] for group in optimizer.param_groups]
        super().__init__(optimizer)  # calls step(), which moves last_epoch from -1 to 0

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the current step, one for each group."""
        values = self.schedules.at(self.last_epoch)
        groups = zip(self._rates, self.optimizer.param_groups, strict=True)
        return [values[rate] * group["lr_multiplier"] for rate, group in groups]

    def step(self, epoch: int | None = None) -> None:
        """Moves on by one optimizer step."""
        super().step(epoch)
        self._set_weight_decay()

    def state_dict(self) -> dict[str, Any]:
        """The number of optimizer steps taken."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the step of `state_dict` and sets that step's values."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
        self._set_weight_decay()

    def _set_weight_decay(self) -> None:
        weight_decay = self.schedules.at(self.last_epoch)["weight_decay"]
        for group in self.optimizer.param_groups:
            group["weight_decay"] = weight_decay * group["weight_decay_multiplier"]
