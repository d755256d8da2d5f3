"""The collapse warning: its rule on made-up entropies, and real runs that collapse or do not."""

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from dinov3_hf.training.callbacks import CollapseWarningCallback
from tests.training.test_ssl_trainer import BACKBONE, HEAD, make_trainer


def warned_at(
    caplog, entropies: list[float], every: int = 10, max_steps: int = 10_000, head: str = "dino"
) -> list[int]:
    """The steps of the warnings, for one logged entropy every few steps."""
    caplog.clear()
    callback, control = CollapseWarningCallback(), TrainerControl()
    for i, entropy in enumerate(entropies, start=1):
        state = TrainerState(global_step=i * every, max_steps=max_steps)
        callback.on_log(None, state, control, logs={"loss": 1.0, f"prototypes/{head}_entropy": entropy})
        callback.on_log(None, state, control, logs={"eval_knn_top1": 50.0})
    return [record.args[0] for record in caplog.records]


@pytest.mark.parametrize("head", ["dino", "ibot"])
def test_a_collapse_is_warned_of_once_until_it_is_over(caplog, head):
    assert warned_at(caplog, [0.3] * 5 + [0.02] * 20, head=head) == [100]  # the values of steps 51 to 100 are low
    assert warned_at(caplog, [0.3] * 5 + [0.02] * 20 + [0.5] + [0.02] * 20, head=head) == [100, 310]
    assert warned_at(caplog, [0.3] * 5 + [0.02] * 20 + [0.12] + [0.02] * 20, head=head) == [100]  # hardly recovered
    assert warned_at(caplog, [0.3] + [0.02, 0.02, 0.02, 0.02, 0.15] * 20, head=head) == []  # never for long
    assert warned_at(caplog, [0.3, 0.02], every=100, head=head) == [200]


def test_a_network_that_has_not_begun_is_given_time(caplog):
    assert warned_at(caplog, [0.0] * 40) == []
    assert warned_at(caplog, [0.0] * 49 + [0.15]) == []
    assert warned_at(caplog, [0.0] * 60, max_steps=1000) == [500]
    assert warned_at(caplog, [0.0] * 200, max_steps=10_000) == [1000]


def run(tmp_path, caplog, *callbacks, **fields) -> list[str]:
    """The collapse warnings of a run with batches of 32 and 128 prototypes."""
    heads = {**HEAD, "num_prototypes": 128}
    batch = {"global_batch_size": 32, "koleo_group_size": 32, "logging_steps": 10}
    make_trainer(tmp_path, list(callbacks), dino_head=heads, ibot_head=heads, **batch, **fields).train()
    return [record.getMessage() for record in caplog.records if record.name == "dinov3_hf.training.callbacks"]


def test_no_warning_in_a_short_run_with_the_published_layer_scale(tmp_path, caplog):
    assert run(tmp_path, caplog, max_steps=30) == []


@pytest.mark.slow
def test_no_warning_while_a_small_layer_scale_grows(tmp_path, caplog):
    assert run(tmp_path, caplog, max_steps=300) == []


class WithoutWhatPreventsCollapse(TrainerCallback):
    """Turns centring and KoLeo off after 40 steps."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 40:
            kwargs["model"].config.sinkhorn_iterations = 0
            kwargs["model"].config.koleo_weight = 0.0


@pytest.mark.slow
def test_a_network_that_collapses_is_warned_of(tmp_path, caplog):
    backbone = {**BACKBONE, "layerscale_value": 1.0, "pos_embed_rescale": None, "drop_path_rate": 0.0}
    found = run(tmp_path, caplog, WithoutWhatPreventsCollapse(), max_steps=130, backbone=backbone)
    assert [message.split(",")[0].split(": ")[1] for message in found] == [
        "the dino head has collapsed",
        "the ibot head has collapsed",
    ]
