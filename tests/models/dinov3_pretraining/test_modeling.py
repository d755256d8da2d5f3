"""`DINOv3ForPreTraining`: the step's invariants. The golden steps are checked by `tests.reference`."""

import pytest
import torch

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_pretraining.backbones import backbone_config_from_dict, build_backbone
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.forward_draws import StudentDraws

BATCH, LOCALS, PATCHES = 4, 3, 16

BACKBONE = {
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_register_tokens": 1,
    "layerscale_value": 1e-5,
    "untie_global_and_local_cls_norm": True,
}
HEAD = {"num_prototypes": 24, "bottleneck_dim": 8, "hidden_dim": 16, "num_layers": 3}


def make_config(**overrides) -> DINOv3PreTrainingConfig:
    return DINOv3PreTrainingConfig(**{"backbone_config": BACKBONE, "dino_head": HEAD, "ibot_head": HEAD, **overrides})


def make_batch(batch: int = BATCH, num_locals: int = LOCALS, masked: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2 * batch, PATCHES, dtype=torch.bool)
    mask[::2, :masked] = True
    weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
    return {
        "global_crops": torch.randn(2 * batch, 3, 16, 16, generator=generator),
        "local_crops": torch.randn(num_locals * batch, 3, 8, 8, generator=generator),
        "mask": mask,
        "mask_indices": mask.flatten().nonzero().flatten(),
        "mask_weight": weight,
    }


@pytest.fixture
def model() -> DINOv3ForPreTraining:
    torch.manual_seed(0)
    return DINOv3ForPreTraining(make_config()).train()


def test_teacher_starts_as_the_student_and_stays_in_eval_mode(model):
    for (name, teacher), student in zip(model.teacher.named_parameters(), model.student.parameters(), strict=True):
        assert torch.equal(teacher, student), name
        assert not teacher.requires_grad
    assert model.student.training
    for fresh in (model, DINOv3ForPreTraining(make_config())):  # also before the first train()
        assert not any(module.training for module in fresh.teacher.modules())


def test_every_student_parameter_gets_a_gradient_and_no_teacher_parameter(model):
    model(**make_batch(), teacher_temperature=0.05).loss.backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_loss_is_the_weighted_sum_of_its_terms(model):
    output = model(**make_batch(), teacher_temperature=0.05, local_loss_weight=0.5)
    # two global crops without the diagonal are 2 pairs, 3 local crops against 2 teacher crops are 6
    expected = (
        2 / 8 * output.losses["dino_global"]
        + 0.5 * 6 / 8 * output.losses["dino_local"]
        + output.losses["ibot"]
        + 0.2 * output.losses["koleo"]
    )
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(("num_locals", "masked"), [(0, 5), (3, 0), (0, 0)])
def test_no_local_crops_and_no_masks(model, num_locals, masked):
    output = model(**make_batch(num_locals=num_locals, masked=masked), teacher_temperature=0.05)
    assert torch.isfinite(output.loss)
    assert ("dino_local" in output.losses) == (num_locals > 0)
    output.loss.backward()
    # a head that saw no patch still takes part, or data-parallel training would wait for its gradient
    assert all(parameter.grad is not None for parameter in model.student.ibot_head.parameters())


def test_targets_of_micro_batches_are_those_of_the_whole_batch(model):
    whole = make_batch(batch=4)
    crops = whole["global_crops"].unflatten(0, (2, 4))
    mask = whole["mask"].unflatten(0, (2, 4))
    logits = []
    for images in (slice(0, 1), slice(1, 4)):
        part_mask = mask[:, images].flatten(0, 1)
        logits.append(model.teacher_logits(crops[:, images].flatten(0, 1), part_mask.flatten().nonzero().flatten()))
    parts = model.teacher_targets_of_step(logits, 0.05)
    expected = model.teacher_targets(model.teacher_logits(whole["global_crops"], whole["mask_indices"]), 0.05)
    torch.testing.assert_close(torch.cat([part.cls_probs for part in parts], dim=1), expected.cls_probs)


@pytest.mark.invariant
def test_given_draws_are_the_students_and_the_only_ones():
    fields = {"drop_path_rate": 0.5, "pos_embed_rescale": 2.0, "layerscale_value": 1.0}
    torch.manual_seed(0)
    model = DINOv3ForPreTraining(make_config(backbone_config={**BACKBONE, **fields})).train()
    given = StudentDraws(model.config.backbone_config, (2, LOCALS), BATCH, seed=0)
    draws = given.at(0, range(BATCH), torch.device("cpu"))

    def loss(draws) -> torch.Tensor:
        return model(**make_batch(), teacher_temperature=0.07, draws=draws).loss.detach()

    assert torch.equal(loss(draws), loss(draws))
    assert not torch.equal(loss(None), loss(None))
    assert not torch.equal(loss(given.at(1, range(BATCH), torch.device("cpu"))), loss(draws))


def test_save_and_load_is_bitwise(model, tmp_path):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded, info = DINOv3ForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved = model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    loaded.train()
    batch = make_batch()
    model.config.backbone_config.pos_embed_rescale = loaded.config.backbone_config.pos_embed_rescale
    torch.manual_seed(1)
    expected = model(**batch, teacher_temperature=0.05).loss
    torch.manual_seed(1)
    assert torch.equal(loaded(**batch, teacher_temperature=0.05).loss, expected)


def test_a_thousand_ema_updates_equal_float64(model):
    student, teacher = model.student.ibot_head, model.teacher.ibot_head
    exact = [parameter.double() for parameter in teacher.parameters()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
        update_ema(teacher, student, 0.999)
        exact = [0.999 * e + 0.001 * p.double() for e, p in zip(exact, student.parameters(), strict=True)]
    for ours, wanted in zip(teacher.parameters(), exact, strict=True):
        assert (ours - wanted).norm() / wanted.norm() < 1e-5


def test_ema_refuses_bfloat16(model):
    with pytest.raises(ValueError, match="float32"):
        update_ema(model.teacher.to(torch.bfloat16), model.student.to(torch.bfloat16), 0.999)


def test_gradient_checkpointing_changes_nothing(model):
    batch = make_batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(2)  # RoPE augmentation
        model(**batch, teacher_temperature=0.05).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.student.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_unknown_head_field_and_backbone_type_are_named():
    with pytest.raises(ValueError, match="num_prototype"):
        make_config(dino_head={"num_prototype": 3})
    with pytest.raises(ValueError, match="resnet"):
        make_config(backbone_config={"model_type": "resnet"})


@pytest.mark.parametrize("fields", [{}, {"patch_size": 16}])
def test_a_backbone_without_a_mask_token_is_refused(fields):
    """Before anything is built: L_iBOT would otherwise ask for patches that the student sees."""
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], **fields)
    for given in (config, config.to_dict()):
        with pytest.raises(ValueError, match=r"a dinov3_convnext.* backbone has no mask token, which L_iBOT hides"):
            make_config(backbone_config=given)
    assert type(build_backbone(config)) is DINOv3ConvNextModel
    assert backbone_config_from_dict(config.to_dict()).to_dict() == config.to_dict()
