"""The Gram teacher over a run: copied, loaded, refreshed, in the arithmetic's dtype, and the same after a resume."""

import pytest
import torch

from dinov3_hf.distributed.engine import Engine
from dinov3_hf.training.gram_teacher import GramTeacherCallback
from tests.training.test_resume import log_of
from tests.training.test_ssl_trainer import BACKBONE, make_args, make_trainer

WITHOUT_NOISE = {**BACKBONE, "drop_path_rate": 0.0, "pos_embed_rescale": None}


def refreshes(tmp_path, num_steps: int = 60, **fields) -> list[int]:
    args = make_args(tmp_path, max_steps=num_steps, gram_teacher="copy", **fields)
    callback = GramTeacherCallback(args, Engine())
    return [step for step in range(1, num_steps + 1) if callback.refreshes_after(step)]


def test_when_it_is_refreshed(tmp_path):
    assert refreshes(tmp_path) == []
    assert refreshes(tmp_path, gram_refresh_steps=20) == [20, 40, 60]
    assert refreshes(tmp_path, gram_refresh_steps=10, gram_first_refresh_step=20, gram_max_refreshes=3) == [20, 30, 40]
    assert refreshes(tmp_path, gram_refresh_steps=10, gram_first_refresh_step=21, gram_max_refreshes=2) == [30, 40]
    assert refreshes(tmp_path, gram_refresh_steps=10, gram_max_refreshes=0) == []
    # Not before there is something to refresh, and the share of a run means its steps.
    assert refreshes(tmp_path, gram_refresh_steps=0.25, gram_start_step=15, gram_max_refreshes=2) == [30, 45]


def backbone_weights(trainer, which: str) -> list[torch.Tensor]:
    backbone = {"teacher": trainer.model.teacher.backbone, "gram": trainer.model.gram_teacher}[which]
    return [parameter.detach().float().clone() for parameter in backbone.parameters()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_copied_at_its_step_and_refreshed(tmp_path):
    trainer = make_trainer(tmp_path, gram_teacher="copy", gram_start_step=2, gram_refresh_steps=4, gram_crop_size=32)
    seen: list[tuple[bool, bool]] = []

    class Watch(GramTeacherCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gram, teacher = (backbone_weights(trainer, which) for which in ("gram", "teacher"))
            seen.append((equal(gram, teacher), not seen or equal(gram, self.last)))
            self.last = gram

        def on_step_begin(self, *args, **kwargs):
            pass

        def on_optimizer_step(self, *args, **kwargs):
            pass

    trainer.add_callback(Watch(trainer.args, trainer.engine))
    trainer.train()
    is_teacher, is_unchanged = (list(column) for column in zip(*seen, strict=True))
    # Copied before step 2 (the third), whose own update makes the teacher another one; refreshed after four steps.
    assert is_teacher == [False, False, False, True, False, False]
    assert is_unchanged == [True, True, False, False, True, True]
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert "loss/gram" not in logged[2]
    assert [logged[step]["schedule/gram_weight"] for step in (2, 3)] == [0.0, 2.0]
    assert logged[3]["loss/gram"] >= 0


@pytest.mark.parametrize("source", ["run", "teacher", "checkpoint-3"])
def test_loaded_from_an_earlier_run(tmp_path, source):
    earlier = make_trainer(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=3)
    earlier.train()
    earlier.save_teacher(tmp_path / "run" / "teacher")
    folder = {"run": tmp_path / "run"}.get(source, tmp_path / "run" / source)
    later = make_trainer(tmp_path / "later", seed=7, max_steps=2, gram_teacher=str(folder))
    later.train()
    assert equal(backbone_weights(later, "gram"), backbone_weights(earlier, "teacher"))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"hidden_size": 48, "num_attention_heads": 3}, "has hidden_size 48, the backbone that is trained 32"),
        ({"patch_size": 8}, "has patch_size 8, the backbone that is trained 4"),
        (
            {"model_type": "dinov3_convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]},
            "has model_type dinov3_convnext, the backbone that is trained dinov3_vit",
        ),
    ],
)
def test_another_network_is_refused(tmp_path, backbone, message):
    convnext = "model_type" in backbone
    other = make_trainer(
        tmp_path / "other",
        backbone=backbone if convnext else {**BACKBONE, **backbone},
        **({"ibot_weight": 0, "global_crop_size": 32, "local_crop_size": 16} if convnext else {}),
    )
    other.save_teacher(tmp_path / "other" / "teacher")
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(tmp_path / "run", gram_teacher=str(tmp_path / "other")).train()
    assert "\n" not in str(error.value)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_trainer(tmp_path / "run", gram_teacher=str(tmp_path / "nowhere")).train()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_in_the_dtype_of_the_arithmetic(tmp_path, precision):
    trainer = make_trainer(tmp_path, gram_teacher="copy", precision=precision, max_steps=2)
    trainer.train()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {parameter.dtype for parameter in trainer.model.gram_teacher.parameters()} == {dtype}
    assert {parameter.dtype for parameter in trainer.model.teacher.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_goes_on_bitwise(tmp_path, precision):
    options = {
        "gram_teacher": "copy", "gram_start_step": 1, "gram_refresh_steps": 2, "gram_max_refreshes": 2,
        "gram_crop_size": 32, "save_strategy": "steps", "save_steps": 3, "precision": precision,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "run", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert log_of(resumed) == log_of(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("fields", [{"gram_teacher": "ema"}, {"gram_teacher": "copy", "gram_crop_size": 32}])
def test_accumulation_changes_nothing_but_rounding(tmp_path, fields):
    options = {"backbone": {**WITHOUT_NOISE, "layerscale_value": 1.0}, **fields}
    groups = {"gram_per_image": False, "gram_group_size": 4, "gram_tokens": "masked"}
    whole = make_trainer(tmp_path / "whole", **options, **groups)
    parts = make_trainer(tmp_path / "parts", per_device_train_batch_size=4, **options, **groups)
    whole.train()
    parts.train()
    for one, other in zip(log_of(parts), log_of(whole), strict=True):
        assert one["loss/gram"] == pytest.approx(other["loss/gram"], rel=2e-3, abs=1e-6)
    for name, tensor in parts.model.named_parameters():
        torch.testing.assert_close(tensor, whole.model.get_parameter(name), rtol=1e-2, atol=2e-4, msg=name)
