"""Learning rate and weight decay of every group at every step, and resumption."""

import io
import warnings

import pytest
import torch
from torch import nn

from dinov3_hf.training.param_groups import parameter_groups
from dinov3_hf.training.recipe_scheduler import RecipeScheduler
from dinov3_hf.training.schedules import Schedule, TrainingSchedules

SCHEDULES = TrainingSchedules(
    max_steps=10,
    lr=Schedule(0.0, 1.0, 0.1, warmup_steps=4),
    weight_decay=Schedule(0.1, 0.1, 0.5),
    teacher_momentum=Schedule.constant(0.9),
    teacher_temperature=Schedule.constant(0.07),
    local_loss_weight=Schedule.constant(1.0),
    freeze_last_layer_steps=2,
)


def make() -> tuple[torch.optim.Optimizer, RecipeScheduler]:
    backbone = nn.Sequential()
    backbone.add_module("patch_embeddings", nn.Linear(2, 2))
    backbone.add_module("layer", nn.Sequential(nn.Linear(2, 2)))
    head = nn.ModuleDict({"last_layer": nn.Linear(2, 2, bias=False)})
    groups = parameter_groups({"backbone": backbone, "head": head}, layerwise_lr_decay=0.5, patch_embed_lr_mult=0.2)
    optimizer = torch.optim.AdamW(groups)
    return optimizer, RecipeScheduler(optimizer, SCHEDULES)


def state_of(optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def expected_state(optimizer: torch.optim.Optimizer, step: int) -> list[tuple[float, float]]:
    values = SCHEDULES.at(step)
    return [
        (
            values[group["rate"]] * group["lr_multiplier"],
            values["weight_decay"] * group["weight_decay_multiplier"],
        )
        for group in optimizer.param_groups
    ]


def test_each_group_has_the_values_of_the_step_it_takes():
    optimizer, scheduler = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):  # two beyond the end: the Trainer steps once after the last optimizer step
            assert state_of(optimizer) == expected_state(optimizer, step)
            assert scheduler.get_last_lr() == [lr for lr, _ in state_of(optimizer)]
            optimizer.step()
            scheduler.step()


def test_the_state_is_the_step_and_loads_without_pickle():
    optimizer, scheduler = make()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    fresh_optimizer, fresh = make()
    fresh.load_state_dict(state)
    assert state_of(fresh_optimizer) == state_of(optimizer) == expected_state(optimizer, 5)
    assert fresh.get_last_lr() == scheduler.get_last_lr()
    for scheduler_, optimizer_ in ((scheduler, optimizer), (fresh, fresh_optimizer)):
        optimizer_.step()
        scheduler_.step()
    assert state_of(fresh_optimizer) == state_of(optimizer) == expected_state(optimizer, 6)


def test_a_loaded_optimizer_does_not_keep_the_saved_rates():
    optimizer, scheduler = make()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["lr"] = 123.0
    optimizer.load_state_dict(saved)
    scheduler.load_state_dict({"last_epoch": 3})
    assert state_of(optimizer) == expected_state(optimizer, 3)


@pytest.mark.invariant
def test_frozen_last_layers_do_not_move_and_do_not_decay():
    optimizer, scheduler = make()
    [last_layer] = [group["params"][0] for group in optimizer.param_groups if group["rate"] == "last_layer_lr"]
    before = last_layer.detach().clone()
    for step in range(3):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        assert torch.equal(last_layer, before) == (step < 2)
    assert optimizer.state[last_layer]["step"] == 3  # the moments went on all along


def test_goes_on_from_groups_that_do_not_name_their_rate():
    optimizer, scheduler = make()
    rates = [group["rate"] for group in optimizer.param_groups]
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["rate"]
    optimizer.load_state_dict(state)
    scheduler.load_state_dict({"last_epoch": 5})
    values = SCHEDULES.at(5)
    assert [group["lr"] for group in optimizer.param_groups] == [
        values[rate] * group["lr_multiplier"] for rate, group in zip(rates, optimizer.param_groups, strict=True)
    ]
