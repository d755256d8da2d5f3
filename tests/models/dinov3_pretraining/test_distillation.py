"""`DINOv3ForDistillation` and the targets of a fixed teacher. The golden steps are checked by `tests.reference`."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig
from dinov3_hf.models.dinov3_pretraining.distillation_targets import (
    TeacherAnswer,
    distillation_targets,
    teacher_answer,
)
from dinov3_hf.models.dinov3_pretraining.gram_anchor import resize_patches
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.dinov3_pretraining.student_step import DINOv3PreTrainingOutput
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherLogits, TeacherTargets
from dinov3_hf.objectives.gram import gram_loss
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.forward_draws import StudentDraws
from tests.models.dinov3_pretraining.test_modeling import BACKBONE, HEAD, make_config

BATCH, LOCALS, WIDTH, GRID = 3, 2, 20, (8, 8)
PATCHES = GRID[0] * GRID[1]
CONVNEXT = {"model_type": "dinov3_convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
VIT_STUDENT = {"backbone_config": {**BACKBONE, "untie_global_and_local_cls_norm": False}, "patch_size": 4}
CONVNEXT_STUDENT = {"backbone_config": CONVNEXT, "patch_size": 8}
# Fields, pixels of a global and of a local crop. Global crops of both have the patches of GRID.
STUDENTS = {"vit": (VIT_STUDENT, 32, 16), "convnext": (CONVNEXT_STUDENT, 64, 32)}
OBJECTIVES = ("prototypes", "features")


class Tokens(NamedTuple):
    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


class Heads(NamedTuple):
    """Of the teacher: other hidden and bottleneck widths than the student's, equal prototypes."""

    dino_head: PrototypeHead
    ibot_head: PrototypeHead


@pytest.fixture
def heads() -> Heads:
    torch.manual_seed(1)
    return Heads(*(PrototypeHead(WIDTH, HEAD["num_prototypes"], 6, 12) for _ in range(2)))


def config(student: str = "vit", **fields: Any) -> DINOv3DistillationConfig:
    given = {"dino_head": HEAD, "ibot_head": HEAD, "teacher_width": WIDTH, **STUDENTS[student][0], **fields}
    return DINOv3DistillationConfig(**given)


def make_model(student: str = "vit", **fields: Any) -> DINOv3ForDistillation:
    torch.manual_seed(0)
    return DINOv3ForDistillation(config(student, **fields)).train()


def make_tokens(batch: int = BATCH, grid: tuple[int, int] = GRID) -> Tokens:
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(2 * batch, grid[0] * grid[1], WIDTH, generator=generator)
    return Tokens(torch.randn(2 * batch, WIDTH, generator=generator), patches, grid)


def make_mask(batch: int = BATCH) -> Tensor:
    mask = torch.rand(2 * batch, PATCHES, generator=torch.Generator().manual_seed(3)) < 0.3
    mask[1] = False  # a crop without masked patches
    return mask


def make_crops(student: str = "vit", num_locals: int = LOCALS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    _, size, local_size = STUDENTS[student]
    return {
        "global_crops": torch.randn(2 * BATCH, 3, size, size, generator=generator),
        "local_crops": torch.randn(num_locals * BATCH, 3, local_size, local_size, generator=generator),
    }


def at(mask: Tensor) -> dict[str, Tensor]:
    weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
    return {"mask_indices": mask.flatten().nonzero().flatten(), "mask_weight": weight}


def make_target(
    heads: Heads, objective: str, tokens: Tokens | None = None, mask: Tensor | None = None, **options: Any
):
    mask = make_mask() if mask is None else mask
    answer = teacher_answer(
        make_tokens() if tokens is None else tokens,
        *heads,
        mask,
        GRID,
        objective=objective,
        with_patches=options.get("with_patches", True),
    )
    (target,) = distillation_targets([answer], [mask], *heads, 0.05, 3, objective)
    return target


def step(model: DINOv3ForDistillation, heads: Heads, student: str = "vit", **options: Any) -> DINOv3PreTrainingOutput:
    target = make_target(heads, model.config.objective)
    crops = make_crops(student, options.pop("num_locals", LOCALS))
    return model(**crops, target=target, **at(make_mask()), **options)


# ---- the student -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_parameter_gets_a_gradient_and_nothing_else_does(heads, student, objective):
    model = make_model(student, objective=objective, gram_teacher="separate")
    tokens = make_tokens()
    tokens.cls.requires_grad_(), tokens.patches.requires_grad_()
    target = make_target(heads, objective, tokens)
    output = model(**make_crops(student), target=target, **at(make_mask()), gram_weight=1.0)
    output.loss.backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert not any(parameter.requires_grad for parameter in model.ema.parameters())
    assert all(parameter.grad is None for network in (model.ema, *heads) for parameter in network.parameters())
    assert tokens.cls.grad is None and tokens.patches.grad is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_patches_of_a_convnext_teach_its_stem_through_the_resized_grid(heads, objective):
    alone = {"cls_weight": 0.0} if objective == "features" else {"dino_weight": 0.0}
    model = make_model("convnext", objective=objective, koleo_weight=0.0, **alone)
    crops = make_crops("convnext")
    tokens = model.student_tokens(**crops, mask=None, draws=None)[0]
    # a map of 2 x 2 positions becomes 8 x 8 patches beside the pooled feature
    assert tokens.last_hidden_state.shape == (2 * BATCH, 1 + PATCHES, 16)
    step(model, heads, "convnext").loss.backward()
    stem = model.student.backbone.stages[0].downsample_layers[0].weight
    assert stem.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_average_starts_as_the_student_and_follows_it(objective, tmp_path):
    model = make_model(objective=objective)
    heads_of = {"prototypes": ["dino_head", "ibot_head"], "features": ["cls_projection", "patch_projection"]}
    parts = ["backbone", *heads_of[objective]]
    for network in (model.student, model.ema):
        assert [name for name, _ in network.named_children()] == parts
    for (name, ema), student in zip(model.ema.named_parameters(), model.student.parameters(), strict=True):
        assert torch.equal(ema, student), name
    assert model.student.training and not any(module.training for module in model.ema.modules())
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in model.ema.parameters()]
    update_ema(model.ema, model.student, 0.9)
    for was, parameter in zip(before, model.ema.parameters(), strict=True):
        torch.testing.assert_close(parameter, was + 0.1)
    model.save_pretrained(tmp_path)
    loaded, info = DINOv3ForDistillation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.ema.parameters())


def test_prototypes_without_masks_are_the_step_of_pretraining(heads):
    """With the same weights and the same targets, bit for bit."""
    fields = {"backbone_config": VIT_STUDENT["backbone_config"], "ibot_weight": 0.0}
    distilled, pretrained = make_model(ibot_weight=0.0), DINOv3ForPreTraining(make_config(**fields)).train()
    pretrained.student.load_state_dict(distilled.student.state_dict())
    target, crops = make_target(heads, "prototypes"), make_crops()
    torch.manual_seed(0)  # RoPE augmentation
    ours = distilled(**crops, target=target)
    torch.manual_seed(0)
    theirs = pretrained(
        **crops, mask=None, mask_indices=None, mask_weight=None, teacher_temperature=0.05, target=target
    )
    assert ours.losses.keys() == theirs.losses.keys() == {"dino_global", "dino_local", "koleo"}
    assert torch.equal(ours.loss, theirs.loss)


def test_loss_is_the_weighted_sum_of_its_terms(heads):
    output = step(make_model(gram_teacher="separate"), heads, local_loss_weight=0.5, gram_weight=3.0)
    losses = output.losses
    # two global crops without the diagonal are 2 pairs, 2 local crops against 2 teacher crops are 4
    expected = losses["dino_global"] / 3 + 0.5 * 2 / 3 * losses["dino_local"] + losses["ibot"]
    torch.testing.assert_close(output.loss, expected + 0.2 * losses["koleo"] + 3 * losses["gram"])
    assert output.prototype_entropy.keys() == {"dino", "ibot"}

    fields = {"cls_weight": 2.0, "patch_weight": 0.7, "koleo_weight": 0.0, "gram_teacher": "separate"}
    output = step(make_model(objective="features", **fields), heads, local_loss_weight=0.5, gram_weight=3.0)
    losses = output.losses
    # two equal pairs of global crops, 2 local crops against 2 teacher crops are 4
    expected = 2 * (losses["cls"] / 3 + 0.5 * 2 / 3 * losses["cls_local"]) + 0.7 * losses["patches"]
    torch.testing.assert_close(output.loss, expected + 3 * losses["gram"])
    assert output.prototype_entropy == {}


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_features_that_are_the_teachers_cost_nothing(heads, distance):
    """Targets made of the student's own predictions: the same crop with the same crop, in order."""
    backbone = {**VIT_STUDENT["backbone_config"], "layerscale_value": 1.0}  # of 1e-5, all images would look the same
    model = make_model(objective="features", feature_loss=distance, backbone_config=backbone).eval()
    crops = make_crops(num_locals=0)
    with torch.no_grad():
        own = model.feature_predictions(**crops)
        norm = torch.nn.LayerNorm(WIDTH, elementwise_affine=False)
        if distance == "smooth_l1":  # a norm of what is normalised changes nothing
            model.student.cls_projection.register_forward_hook(lambda module, inputs, output: norm(output))
            model.student.patch_projection.register_forward_hook(lambda module, inputs, output: norm(output))
        target = TeacherTargets(None, None, own.patch_features, cls=own.global_features)
        output = model(**crops, target=target)
        assert output.losses["cls"] < 1e-5 and output.losses["patches"] < 1e-5
        swapped = TeacherTargets(None, None, own.patch_features.roll(1, 0), cls=own.global_features.flip(0))
        output = model(**crops, target=swapped)
        assert output.losses["cls"] > 1e-5 and output.losses["patches"] > 1e-5


def test_a_local_crop_follows_both_global_crops_of_its_image(heads):
    model, crops, target = make_model(objective="features"), make_crops(), make_target(heads, "features")
    loss = model(**crops, target=target).losses["cls_local"]
    with torch.no_grad():
        local = model.feature_predictions(**crops).local_features
    pairs = [
        1 - torch.cosine_similarity(local[crop, image], target.cls[other, image], dim=0)
        for crop in range(LOCALS)
        for other in range(2)
        for image in range(BATCH)
    ]
    torch.testing.assert_close(loss, torch.stack(pairs).mean())


def test_the_gram_term_compares_with_the_teacher(heads):
    model = make_model(gram_teacher="separate")
    crops, target, mask = make_crops(), make_target(heads, "prototypes"), make_mask()
    loss = model(**crops, target=target, **at(mask), gram_weight=1.0).losses["gram"]
    student = model.student_predictions(**crops, mask=None, mask_indices=at(mask)["mask_indices"]).patches
    torch.testing.assert_close(loss, gram_loss(student, make_tokens().patches).detach())

    of_masked = make_model(gram_teacher="separate", gram_per_image=False, gram_tokens="masked")
    loss = of_masked(**crops, target=target, **at(mask), gram_weight=1.0).losses["gram"]
    torch.testing.assert_close(loss, gram_loss(student[mask][None], make_tokens().patches[mask][None]).detach())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_local_crops(heads, objective):
    output = step(make_model(objective=objective), heads, num_locals=0)
    assert torch.isfinite(output.loss) and not {"dino_local", "cls_local"} & output.losses.keys()
    weights = make_model(objective=objective).loss_weights(0, 1.0)
    assert weights.get("dino_global", weights.get("cls")) == 1.0


def test_terms_without_a_weight_have_no_parameters(heads):
    model = make_model(ibot_weight=0.0)
    assert [name for name, _ in model.student.named_children()] == ["backbone", "dino_head"]
    target = distillation_targets(
        [teacher_answer(make_tokens(), heads.dino_head, None, None, GRID, objective="prototypes", with_patches=False)],
        [None],
        heads.dino_head,
        None,
        0.05,
        3,
        "prototypes",
    )[0]
    assert target.masked_probs is None and target.patches is None
    assert torch.isfinite(model(**make_crops(), target=target).loss)

    model = make_model(objective="features", patch_weight=0.0)
    assert [name for name, _ in model.student.named_children()] == ["backbone", "cls_projection"]
    target = make_target(heads, "features", with_patches=False)
    assert model(**make_crops(), target=target).losses.keys() == {"cls", "cls_local", "koleo"}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("student", STUDENTS)
def test_a_bfloat16_teacher_and_autocast(heads, student, objective):
    model = make_model(student, objective=objective, gram_teacher="separate")
    crops, mask = make_crops(student), make_mask()
    exact = model(**crops, target=make_target(heads, objective), **at(mask), gram_weight=1.0).losses
    halves = Heads(*(head.bfloat16() for head in heads))
    tokens = Tokens(*(t.bfloat16() for t in make_tokens()[:2]), GRID)
    target = make_target(halves, objective, tokens)
    half_teacher = model(**crops, target=target, **at(mask), gram_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(**crops, target=target, **at(mask), gram_weight=1.0)
    for output in (half_teacher, autocast):
        assert output.loss.dtype == torch.float32
        for name, value in output.losses.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, exact[name], rtol=0.03, atol=0.03)
    autocast.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.student.parameters())


@pytest.mark.parametrize("student", STUDENTS)
def test_gradient_checkpointing_changes_nothing(heads, student):
    model = make_model(student)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)  # RoPE augmentation
        step(model, heads, student).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.student.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.invariant
@pytest.mark.parametrize("student", STUDENTS)
def test_given_draws_are_the_students_and_the_only_ones(heads, student):
    fields = STUDENTS[student][0]
    model = make_model(student, **{**fields, "backbone_config": {**fields["backbone_config"], "drop_path_rate": 0.5}})
    for name, parameter in model.student.backbone.named_parameters():
        if "lambda1" in name or "gamma" in name:
            torch.nn.init.ones_(parameter)
    given = StudentDraws(model.config.backbone_config, (2, LOCALS), BATCH, seed=0)
    draws = given.at(0, range(BATCH), torch.device("cpu"))
    assert torch.equal(step(model, heads, student, draws=draws).loss, step(model, heads, student, draws=draws).loss)
    assert not torch.equal(step(model, heads, student).loss, step(model, heads, student).loss)


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "logits"}, "objective 'logits' is unknown; choose one of prototypes, features"),
        ({"feature_loss": "l2"}, "feature_loss 'l2' is unknown; choose one of cosine, smooth_l1"),
        ({"objective": "features", "teacher_width": None}, "teacher_width is None, but objective: features"),
        ({"objective": "features", "cls_weight": -1.0}, "cls_weight -1.0 is negative"),
        ({"objective": "features", "cls_weight": 0, "patch_weight": 0}, "cls_weight and patch_weight are both 0"),
        ({"gram_teacher": "ema"}, "gram_teacher 'ema' is for pre-training"),
        ({"gram_negatives": "some"}, "gram_negatives 'some' is unknown"),
        ({"patch_size": 8}, "the student's patch_size 4 is not the 8 pixels of the grid"),
        ({"patch_size": 0, "backbone_config": CONVNEXT}, "patch_size 0 is no number of pixels"),
        ({"dino_head": {"num_prototype": 3}}, "dino_head has no field 'num_prototype'"),
    ],
)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "change", "options", "message"),
    [
        ({}, {"cls_probs": None}, {}, "the target has no cls_probs, which objective 'prototypes'"),
        ({}, {"masked_probs": None}, {}, "the target has no masked_probs"),
        ({"objective": "features"}, {}, {}, "the target has no cls, which objective 'features'"),
        ({"gram_teacher": "separate"}, {"patches": None}, {"gram_weight": 1.0}, "the target has no patches"),
        ({}, {}, {"gram_weight": 1.0}, "gram_weight is 1, but gram_teacher is not set"),
        ({}, {}, {"mask_indices": None}, "there are no masked patches, but L_iBOT"),
        ({"dino_head": {**HEAD, "num_prototypes": 25}}, {}, {}, r"the same images and prototypes"),
        ({"ibot_head": {**HEAD, "num_prototypes": 25}}, {}, {}, r"must be \(masked patches, prototypes\)"),
        ({"gram_teacher": "separate"}, {"patches": torch.zeros(6, 9, 4)}, {"gram_weight": 1.0}, "resize the teacher"),
    ],
)
def test_targets_that_do_not_fit_are_refused(heads, fields, change, options, message):
    target = make_target(heads, "prototypes")
    for name, value in change.items():
        target.__dict__[name] = value
    with pytest.raises(ValueError, match=message) as error:
        make_model(**fields)(**{**make_crops(), **at(make_mask()), **options}, target=target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"cls": torch.zeros(2, BATCH, 21)}, {"patches": torch.zeros(6, 9, WIDTH)}])
def test_features_of_another_width_or_grid_are_refused(heads, change):
    target = make_target(heads, "features")
    target.__dict__.update(change)
    with pytest.raises(ValueError, match="must have the same shape; project the student's tokens"):
        make_model(objective="features")(**make_crops(), target=target)


# ---- the targets -------------------------------------------------------------------------------------------------


def test_targets_of_prototypes_are_those_of_pretraining(heads):
    """The way over bottlenecks in the order of images ends where logits in the order of crops do."""
    tokens, mask = make_tokens(), make_mask()
    target = make_target(heads, "prototypes", tokens, mask)
    model = DINOv3ForPreTraining(make_config())
    with torch.no_grad():
        logits = TeacherLogits(
            cls=heads.dino_head(tokens.cls).unflatten(0, (2, -1)),
            masked=heads.ibot_head(tokens.patches[mask]),
            patches=tokens.patches,
        )
    expected = model.teacher_targets(logits, 0.05)
    torch.testing.assert_close(target.cls_probs, expected.cls_probs)
    torch.testing.assert_close(target.masked_probs, expected.masked_probs)
    assert torch.equal(target.patches, tokens.patches)
    assert target.prototype_entropy == expected.prototype_entropy


@pytest.mark.invariant
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targets_of_parts_are_those_of_the_whole_batch(heads, objective):
    tokens, mask = make_tokens(), make_mask()
    by_image = [t.unflatten(0, (2, BATCH)) for t in (tokens.cls, tokens.patches, mask)]
    parts = [[t[:, images].flatten(0, 1) for t in by_image] for images in (slice(0, 1), slice(1, BATCH))]
    answers = [
        teacher_answer(Tokens(cls, patches, GRID), *heads, part_mask, GRID, objective=objective, with_patches=True)
        for cls, patches, part_mask in parts
    ]
    targets = distillation_targets(answers, [part_mask for *_, part_mask in parts], *heads, 0.05, 3, objective)
    whole = make_target(heads, objective, tokens, mask)
    per_patch = torch.full((2, BATCH, PATCHES, HEAD["num_prototypes"]), -1.0)
    for target, images in zip(targets, (slice(0, 1), slice(1, BATCH)), strict=True):
        torch.testing.assert_close(target.patches.unflatten(0, (2, -1)), by_image[1][:, images])
        if objective == "features":
            assert torch.equal(target.cls, whole.cls[:, images])
        else:
            torch.testing.assert_close(target.cls_probs, whole.cls_probs[:, images])
            part = per_patch[:, images].clone()
            part[by_image[2][:, images]] = target.masked_probs
            per_patch[:, images] = part
    if objective == "prototypes":
        torch.testing.assert_close(per_patch[by_image[2]], whole.masked_probs)


def test_patches_of_another_grid_are_resized_before_the_head(heads):
    tokens, mask = make_tokens(grid=(16, 16)), make_mask()
    answer = teacher_answer(tokens, *heads, mask, GRID, objective="prototypes", with_patches=True)
    resized = resize_patches(tokens.patches, (16, 16), GRID, antialias=False)
    assert torch.equal(answer.patches, resized.unflatten(0, (2, -1)).transpose(0, 1))
    in_crop_order = distillation_targets([answer], [mask], *heads, 0.05, 0, "prototypes")[0].masked_probs
    with torch.no_grad():
        expected = (heads.ibot_head(resized[mask]) / 0.05).softmax(dim=-1)
    torch.testing.assert_close(in_crop_order, expected)
    half = Tokens(tokens.cls.bfloat16(), tokens.patches.bfloat16(), tokens.grid)
    halves = Heads(*(head.bfloat16() for head in heads))
    answer = teacher_answer(half, *halves, mask, GRID, objective="prototypes", with_patches=True)
    assert answer.cls.dtype == answer.masked.dtype == answer.patches.dtype == torch.bfloat16


def test_an_answer_goes_image_by_image(heads):
    """Its rows are those of one image after the other: what makes an exchange of images possible."""
    tokens, mask = make_tokens(), make_mask()
    answer = teacher_answer(tokens, *heads, mask, GRID, objective="prototypes", with_patches=True)
    counts = mask.unflatten(0, (2, BATCH)).sum(dim=(0, 2)).tolist()
    for image, masked in enumerate(answer.masked.split(counts)):
        crops = [image, BATCH + image]
        alone = teacher_answer(
            Tokens(tokens.cls[crops], tokens.patches[crops], GRID),
            *heads,
            mask[crops],
            GRID,
            objective="prototypes",
            with_patches=True,
        )
        torch.testing.assert_close(
            TeacherAnswer(answer.cls[image][None], masked, answer.patches[image][None]).__dict__, alone.__dict__
        )


def test_answers_that_cannot_be_given(heads):
    tokens = make_tokens()
    with pytest.raises(ValueError, match="the teacher has no heads, so it assigns no prototypes; set objective: feat"):
        teacher_answer(tokens, None, None, None, GRID, objective="prototypes", with_patches=False)
    with pytest.raises(ValueError, match=r"there is no mask, but L_iBOT needs one of \(crops, patches\) \(6, 64\)"):
        teacher_answer(tokens, *heads, None, GRID, objective="prototypes", with_patches=False)
    with pytest.raises(ValueError, match=r"the mask is \(6, 16\), but L_iBOT needs"):
        mask = torch.zeros(6, 16, dtype=torch.bool)
        teacher_answer(tokens, *heads, mask, GRID, objective="prototypes", with_patches=False)
