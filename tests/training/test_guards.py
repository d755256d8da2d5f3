"""Steps that are not finite, starvation of data, memory: real runs of `SSLTrainer` that are made to go wrong."""

import math
import os
import socket

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from dinov3_hf.distributed.reductions import rank
from dinov3_hf.training.guards import DataWait, NonFiniteGuard, StarvationWarningCallback, peak_memory
from tests.reference.processes import run_in_processes
from tests.testing_utils import saved_state, saved_weights
from tests.training.test_ssl_trainer import make_trainer


class AtSteps(TrainerCallback):
    """Calls `spoil(model)` before some steps and `mend(model)` after them, and keeps the weights seen around each."""

    def __init__(self, steps, spoil=lambda model: None, mend=lambda model: None):
        self.steps, self.spoil, self.mend = steps, spoil, mend
        self.before, self.after, self.moments = {}, {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        self.before[step] = weights(kwargs["model"])
        if step in self.steps:
            self.spoil(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.mend(kwargs["model"])
        self.after[state.global_step] = weights(kwargs["model"])
        states = kwargs["optimizer"].state_dict()["state"]
        self.moments[state.global_step] = [tensor.clone() for entry in states.values() for tensor in entry.values()]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b) -> bool:
    pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def logs(trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "guard/skipped_steps" in entry]


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dinov3_hf.training.guards"]


class Spoiler:
    """Puts an infinity into the iBOT head's first bias, and takes it out again."""

    def spoil(self, model):
        self.bias = model.student.ibot_head.mlp[0].bias
        self.kept = self.bias.detach().clone()
        self.bias.data[0] = torch.inf

    def mend(self, model):
        self.bias.data.copy_(self.kept)


@pytest.mark.parametrize("micro_batch", [None, 4], ids=["whole", "accumulated"])
def test_a_loss_that_is_not_finite_leaves_optimizer_and_teacher_alone(tmp_path, caplog, micro_batch):
    spoiler = Spoiler()
    seen = AtSteps({3, 5}, spoiler.spoil, spoiler.mend)
    trainer = make_trainer(
        tmp_path, [seen], per_device_train_batch_size=micro_batch, save_strategy="steps", save_steps=3
    )
    result = trainer.train()

    for step in range(1, 7):
        assert same(seen.before[step], seen.after[step]) == (step in seen.steps), step
    assert same(seen.moments[3], seen.moments[2]) and not same(seen.moments[4], seen.moments[3])
    assert warnings(caplog) == [
        f"step {step}: loss/ibot is not finite; optimizer and teacher were left as they are, 1 of 3 in a row."
        for step in (3, 5)
    ]
    assert [entry["guard/skipped_steps"] for entry in logs(trainer)] == [0, 0, 1, 1, 2, 2]
    assert ["loss" in entry for entry in logs(trainer)] == [True, True, False, True, False, True]
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert math.isfinite(result.training_loss)
    # The schedule is a function of the step and goes on.
    assert trainer.lr_scheduler.last_epoch == 6
    checkpoint = tmp_path / "checkpoint-3"
    assert same(
        load_file(checkpoint / "teacher" / "model.safetensors"),
        {
            name: seen.after[2]["teacher.backbone." + name]
            for name in load_file(checkpoint / "teacher" / "model.safetensors")
        },
    )
    saved = saved_state(checkpoint)
    assert any(name.startswith("exp_avg_sq/") for name in saved)
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_log_has_the_mean_over_good_steps(tmp_path):
    spoiler = Spoiler()
    spoiled = make_trainer(tmp_path, [AtSteps({2}, spoiler.spoil, spoiler.mend)], max_steps=2, logging_steps=2)
    spoiled.train()
    plain = make_trainer(tmp_path, max_steps=1)
    plain.train()
    for name in ("loss", "loss/ibot", "grad_norm", "grad_norm/backbone", "prototypes/ibot_entropy"):
        assert logs(spoiled)[0][name] == logs(plain)[0][name], name


@pytest.mark.parametrize("max_grad_norm", [3.0, 0.0])
def test_a_gradient_that_is_not_finite_is_named(tmp_path, caplog, max_grad_norm):
    trainer = make_trainer(tmp_path, [seen := AtSteps({2})], max_steps=3, max_grad_norm=max_grad_norm)
    weight = trainer.model.student.dino_head.last_layer.weight
    weight.register_hook(lambda grad: grad * torch.inf if trainer.state.global_step == 1 else grad)
    trainer.train()
    assert [same(seen.before[step], seen.after[step]) for step in (1, 2, 3)] == [False, True, False]
    assert "grad_norm/dino_head" in logs(trainer)[0]
    assert "step 2: grad_norm/dino_head is not finite" in warnings(caplog)[0]


def test_three_in_a_row_end_the_run_and_the_checkpoint_stays_good(tmp_path, caplog):
    spoiler = Spoiler()
    trainer = make_trainer(
        tmp_path, [seen := AtSteps({3, 4, 5}, spoiler.spoil, spoiler.mend)], save_strategy="steps", save_steps=2
    )
    with pytest.raises(RuntimeError, match=r"^step 5: loss/ibot is not finite, the third step in a row. .*last"):
        trainer.train()
    assert "1 of 3" in warnings(caplog)[0] and "2 of 3" in warnings(caplog)[1]
    for step in (2, 4):  # saved before and in the middle of the bad steps
        saved = saved_weights(tmp_path / f"checkpoint-{step}")
        assert all(torch.equal(tensor, seen.after[2][name]) for name, tensor in saved.items())
    assert not (tmp_path / "teacher").exists()


def test_skipped_steps_push_no_checkpoint_out(tmp_path):
    spoiler = Spoiler()
    callbacks = [AtSteps({3, 4, 5}, spoiler.spoil, spoiler.mend)]
    trainer = make_trainer(tmp_path, callbacks, save_strategy="steps", save_steps=1, save_total_limit=1)
    with pytest.raises(RuntimeError, match="the third step in a row"):
        trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (2, 3, 4)]


def two_ranks_of_which_one_goes_wrong(folder: str) -> dict[str, torch.Tensor]:
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    seen = AtSteps({2})
    trainer = make_trainer(folder, [seen], max_steps=3, per_device_train_batch_size=4)
    assert trainer.args.world_size == 2 and trainer.args.gradient_accumulation_steps == 2
    calls = []

    def spoil(module, inputs, output):
        calls.append(trainer.state.global_step)
        if rank() == 1 and calls.count(1) == 1 and calls[-1] == 1:  # the first micro-batch of step 2
            output.losses["koleo"] = output.losses["koleo"] * torch.inf  # reported only: every gradient stays finite

    trainer.model.register_forward_hook(spoil)
    trainer.train()
    skipped = [entry["guard/skipped_steps"] for entry in logs(trainer)]
    moved = [not same(seen.before[step], seen.after[step]) for step in (1, 2, 3)]
    return {"skipped": torch.tensor(skipped), "moved": torch.tensor(moved)} | weights(trainer.model)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_a_bad_loss_on_one_rank_skips_the_step_on_both(tmp_path):
    first, second = run_in_processes(two_ranks_of_which_one_goes_wrong, 2, str(tmp_path))
    assert first["skipped"].tolist() == second["skipped"].tolist() == [0, 1, 1]
    assert first["moved"].tolist() == second["moved"].tolist() == [True, False, True]
    assert same(first, second)


def test_culprit_is_the_term_nearest_to_the_cause(caplog):
    guard = NonFiniteGuard()
    fine = {"loss/ibot": 1.0, "loss/koleo": 2.0, "loss": 3.0, "grad_norm/backbone": 1.0, "grad_norm": 1.0}
    assert guard.passes(1, fine, True) and not guard.step_was_skipped
    assert not guard.passes(2, dict.fromkeys(fine, math.nan), True) and guard.step_was_skipped
    assert not guard.passes(3, fine | {"grad_norm/backbone": math.inf, "grad_norm": math.inf}, True)
    assert guard.passes(4, fine, True)
    assert not guard.passes(5, fine | {"loss": -math.inf}, True)
    assert not guard.passes(6, fine | {"loss": math.nan}, False)  # of another rank, which says nothing
    assert [message.split(";")[0] for message in warnings(caplog)] == [
        "step 2: loss/ibot, loss/koleo are not finite",
        "step 3: grad_norm/backbone is not finite",
        "step 5: loss is not finite",
    ]


def test_share_of_the_time_spent_waiting(monkeypatch):
    clock = iter([100.0, 101.0, 105.0, 106.5, 110.0, 110.0, 110.0, 120.0])
    monkeypatch.setattr("dinov3_hf.training.guards.time.perf_counter", lambda: next(clock))
    wait = DataWait()
    with wait.waiting():
        pass
    with wait.waiting():
        pass
    assert wait.pop() == 0.25  # 1 + 1.5 of 10 seconds since the first wait
    with wait.waiting():
        pass
    assert wait.pop() == 0.0


def starvation_warnings(monkeypatch, caplog, shares: list[float], seconds: float) -> list[str]:
    clock = iter(range(0, 10**6))
    monkeypatch.setattr("dinov3_hf.training.guards.time.perf_counter", lambda: next(clock) * seconds)
    callback = StarvationWarningCallback()
    caplog.clear()

    class Arguments:
        dataloader_num_workers = 3

    for step, share in enumerate(shares, start=1):
        callback.on_log(Arguments, TrainerState(global_step=step), TrainerControl(), logs={"data/wait_share": share})
        callback.on_log(Arguments, TrainerState(global_step=step), TrainerControl(), logs={"eval_knn_top1": 1.0})
    return warnings(caplog)


def test_starvation_is_warned_of_once_after_the_first_window(monkeypatch, caplog):
    assert starvation_warnings(monkeypatch, caplog, [0.9, 0.1, 0.15], seconds=60) == []
    (message,) = starvation_warnings(monkeypatch, caplog, [0.0, 0.1, 0.5, 0.9], seconds=60)
    assert message.startswith("step 3: 50 % of the time") and "dataloader_num_workers (now 3)" in message
    # Short windows are taken together: one slow batch in ten seconds is no starvation.
    assert starvation_warnings(monkeypatch, caplog, [0.0] + [1.0] + [0.0] * 20, seconds=1) == []
    assert len(starvation_warnings(monkeypatch, caplog, [0.0] + [0.3] * 30, seconds=1)) == 1


def test_peak_memory_in_gib():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(int((before + 0.5) * 2**28))  # by itself half a GiB more than this process ever held
    assert before + 0.5 < peak_memory(torch.device("cpu")) < 2 * before + 0.6
    del block
