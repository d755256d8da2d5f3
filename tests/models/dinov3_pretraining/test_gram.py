"""Gram anchoring in the step: every option against a few lines of its own. The golden steps are in `tests.reference`.

The networks' tokens are taken from the networks, what happens to them afterwards is written down again here.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_hf.models.dinov3_pretraining.backbones import build_backbone, patch_grid, patch_side
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.gram_anchor import gram_anchor_loss, resize_patches
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.ema import update_ema
from tests.models.dinov3_pretraining.test_modeling import BACKBONE, BATCH, HEAD, PATCHES, make_batch, make_config

PLAIN = BACKBONE | {"pos_embed_rescale": None}  # a step without random numbers
PER_BATCH = {"gram_per_image": False}
CONVNEXT = {
    "model_type": "dinov3_convnext",
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_scale_init_value": 1.0,
}


def make_model(seed: int = 0, **fields) -> DINOv3ForPreTraining:
    """A model in which every network has other weights, none of them symmetric."""
    torch.manual_seed(seed)
    model = DINOv3ForPreTraining(make_config(**{"backbone_config": PLAIN, **fields})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def step(model: DINOv3ForPreTraining, batch: dict[str, Tensor], **arguments):
    return model(**batch, teacher_temperature=0.05, **{"gram_weight": 2.0, **arguments})


def gram_crops(side: int = 32, batch: int = BATCH) -> Tensor:
    return torch.randn(2 * batch, 3, side, side, generator=torch.Generator().manual_seed(7))


def patches_of(backbone: nn.Module, crops: Tensor, mask: Tensor | None = None) -> Tensor:
    side = BACKBONE["patch_size"]
    with torch.no_grad():
        tokens = backbone([crops], bool_masked_pos=[mask])[0].last_hidden_state
    return tokens[:, -((crops.shape[-1] // side) ** 2) :]  # (I, N, D)


def difference(student: Tensor, teacher: Tensor) -> Tensor:
    """L_Gram of two sets of tokens (T, D), with every default."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (student @ student.T - teacher @ teacher.T).square().mean()


def mean_over_crops(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack([difference(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


# ---- what the student is compared with ---------------------------------------------------------------------------


def test_a_separate_gram_teacher_sees_its_crops_and_is_resized_before_it_is_normalised():
    model, batch, crops = make_model(gram_teacher="separate"), make_batch(), gram_crops()
    output = step(model, batch, gram_crops=crops)
    student = patches_of(model.student.backbone, batch["global_crops"], batch["mask"])
    anchor = patches_of(model.gram_teacher, crops)  # (8, 64, D)
    maps = anchor.reshape(-1, 8, 8, anchor.shape[-1]).permute(0, 3, 1, 2)
    anchor = F.interpolate(maps, size=4, mode="bicubic").permute(0, 2, 3, 1).reshape(-1, PATCHES, anchor.shape[-1])
    torch.testing.assert_close(output.losses["gram"], mean_over_crops(student, anchor))


def test_without_crops_of_its_own_it_sees_the_global_crops():
    model, batch = make_model(gram_teacher="separate"), make_batch()
    student = patches_of(model.student.backbone, batch["global_crops"], batch["mask"])
    anchor = patches_of(model.gram_teacher, batch["global_crops"])
    torch.testing.assert_close(step(model, batch).losses["gram"], mean_over_crops(student, anchor))


def test_the_term_enters_the_loss_with_its_weight():
    model, batch = make_model(gram_teacher="separate"), make_batch()
    off, on = step(model, batch, gram_weight=0.0), step(model, batch, gram_weight=1.5)
    assert "gram" not in off.losses
    torch.testing.assert_close(on.loss, off.loss + 1.5 * on.losses["gram"])


@pytest.mark.parametrize(
    ("negatives", "student_keeps", "teacher_keeps"),
    [("keep", True, True), ("remove", False, False), ("remove_teacher", True, False)],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_normalisation_and_negatives(normalize, negatives, student_keeps, teacher_keeps):
    model = make_model(gram_teacher="separate", gram_normalize=normalize, gram_negatives=negatives)
    batch = make_batch()
    student = patches_of(model.student.backbone, batch["global_crops"], batch["mask"])
    anchor = patches_of(model.gram_teacher, batch["global_crops"])
    if normalize:
        student, anchor = student / student.norm(dim=-1, keepdim=True), anchor / anchor.norm(dim=-1, keepdim=True)
    s, t = torch.einsum("ipd,iqd->ipq", student, student), torch.einsum("ipd,iqd->ipq", anchor, anchor)
    assert (s < 0).any() and (t < 0).any()
    s, t = s if student_keeps else s.clamp(min=0), t if teacher_keeps else t.clamp(min=0)
    torch.testing.assert_close(step(model, batch).losses["gram"], ((s - t) ** 2).mean())


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
@pytest.mark.parametrize("group_size", [None, 1, 2])
def test_groups_of_images_and_choice_of_tokens(group_size, tokens):
    model = make_model(gram_teacher="separate", **PER_BATCH, gram_group_size=group_size, gram_tokens=tokens)
    batch = make_batch()
    student = patches_of(model.student.backbone, batch["global_crops"], batch["mask"])
    anchor = patches_of(model.gram_teacher, batch["global_crops"])
    terms = []
    for first in range(0, BATCH, group_size or BATCH):
        images = range(first, first + (group_size or BATCH))
        rows = [(crop * BATCH + image, patch) for crop in range(2) for image in images for patch in range(PATCHES)]
        if tokens != "all":
            rows = [row for row in rows if bool(batch["mask"][row]) == (tokens == "masked")]
        # make_batch masks every second crop, so that a group of one image may have no masked patch: it counts as 0
        picked = [torch.stack([x[row] for row in rows]) if rows else None for x in (student, anchor)]
        terms.append(difference(*picked) if rows else torch.zeros(()))
    torch.testing.assert_close(step(model, batch).losses["gram"], torch.stack(terms).mean())


@pytest.mark.parametrize("antialias", [False, True])
def test_antialias_is_for_coarser_grids(antialias):
    model = make_model(gram_teacher="separate", gram_antialias=antialias)
    batch, crops = make_batch(), gram_crops(48)
    anchor = patches_of(model.gram_teacher, crops)  # (8, 144, D)
    maps = anchor.transpose(1, 2).unflatten(2, (12, 12))
    expected = F.interpolate(maps, (4, 4), mode="bicubic", align_corners=False, antialias=antialias)
    targets = model.gram_targets(None, batch["global_crops"], crops)
    torch.testing.assert_close(targets, expected.flatten(2).transpose(1, 2))
    other = resize_patches(anchor, (12, 12), (4, 4), not antialias)
    assert not torch.allclose(targets, other, atol=1e-3)


def test_resizing_keeps_rows_and_columns_apart():
    ramp = torch.arange(8.0)[:, None] + 100 * torch.arange(4.0)  # (8, 4): rows count by 1, columns by 100
    patches = ramp.reshape(1, 32, 1)
    coarse = resize_patches(patches, (8, 4), (4, 2), antialias=False).reshape(4, 2)
    middle = coarse[1:3]  # away from the border a ramp stays a ramp
    torch.testing.assert_close(middle[1] - middle[0], torch.tensor([2.0, 2.0]), rtol=0.15, atol=0)
    assert (coarse[:, 1] - coarse[:, 0] > 150).all()
    assert resize_patches(patches, (8, 4), (8, 4), antialias=False) is patches


# ---- the EMA teacher as Gram teacher -----------------------------------------------------------------------------


def test_the_ema_teacher_needs_no_third_network():
    def size(model):
        return sum(parameter.numel() for parameter in model.parameters())

    plain, ema, separate = (make_model(gram_teacher=kind) for kind in (None, "ema", "separate"))
    assert ema.gram_teacher is None
    assert ema.state_dict().keys() == plain.state_dict().keys()
    assert size(ema) == size(plain)
    assert size(separate) == size(plain) + size(plain.teacher.backbone)


def test_the_ema_teacher_runs_once_and_says_what_a_copy_of_it_would_say():
    batch = make_batch()
    ema, separate = make_model(gram_teacher="ema"), make_model(gram_teacher="separate")
    separate.load_state_dict(ema.state_dict(), strict=False)
    separate.refresh_gram_teacher()
    calls = []
    ema.teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    output = step(ema, batch)
    assert len(calls) == 1
    assert torch.equal(output.losses["gram"], step(separate, batch).losses["gram"])


@pytest.mark.parametrize("kind", ["ema", "separate"])
@pytest.mark.parametrize("options", [{}, {**PER_BATCH, "gram_group_size": 2}, {**PER_BATCH, "gram_group_size": 1}])
def test_micro_batches_equal_one_batch(kind, options):
    model = make_model(gram_teacher=kind, **options, koleo_group_size=2)
    whole = make_batch()
    crops = whole["global_crops"].unflatten(0, (2, BATCH))
    local = whole["local_crops"].unflatten(0, (-1, BATCH))
    masks = whole["mask"].unflatten(0, (2, BATCH))
    parts = []
    for images in (slice(0, 2), slice(2, 4)):
        mask = masks[:, images].flatten(0, 1)
        parts.append(
            {
                "global_crops": crops[:, images].flatten(0, 1),
                "local_crops": local[:, images].flatten(0, 1),
                "mask": mask,
                "mask_indices": mask.flatten().nonzero().flatten(),
                "mask_weight": whole["mask_weight"].new_full((int(mask.sum()),), 1 / 5),
            }
        )

    def gradient(losses) -> list[Tensor]:
        model.zero_grad()
        torch.stack(losses).mean().backward()
        return [parameter.grad.clone() for parameter in model.student.parameters()]

    logits = [model.teacher_logits(part["global_crops"], part["mask_indices"]) for part in parts]
    targets = model.teacher_targets_of_step(logits, 0.05)
    outputs = [step(model, part, target=target) for part, target in zip(parts, targets, strict=True)]
    expected = step(model, whole)
    torch.testing.assert_close(
        torch.stack([output.losses["gram"] for output in outputs]).mean(), expected.losses["gram"]
    )
    for ours, one_batch in zip(gradient([output.loss for output in outputs]), gradient([expected.loss]), strict=True):
        torch.testing.assert_close(ours, one_batch, rtol=1e-3, atol=1e-5)


# ---- the Gram teacher as a network -------------------------------------------------------------------------------


def test_gradient_reaches_every_weight_of_the_student_and_no_teacher():
    model, batch = make_model(gram_teacher="separate"), make_batch()
    weights = [parameter.clone() for parameter in model.gram_teacher.parameters()]
    step(model, batch, gram_crops=gram_crops()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.student.parameters())
    for network in (model.teacher, model.gram_teacher):
        assert all(parameter.grad is None for parameter in network.parameters())
    update_ema(model.teacher, model.student, 0.5)
    assert all(torch.equal(*pair) for pair in zip(weights, model.gram_teacher.parameters(), strict=True))


def test_training_pulls_the_student_towards_the_anchor():
    batch, last = make_batch(), {}
    for weight in (0.0, 10.0):
        model = make_model(gram_teacher="separate")
        optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
        for _ in range(12):
            step(model, batch, gram_weight=weight).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        last[weight] = step(model, batch).losses["gram"]
    first = step(make_model(gram_teacher="separate"), batch).losses["gram"]
    assert last[10.0] < 0.8 * first < 0.8 * last[0.0]


def test_it_is_frozen_and_in_eval_mode_whatever_is_asked_of_the_model():
    model = DINOv3ForPreTraining(make_config(gram_teacher="separate"))
    for fresh in (model, model.train(), model.eval(), model.train()):
        assert not any(module.training for module in fresh.gram_teacher.modules())
        assert not any(parameter.requires_grad for parameter in fresh.gram_teacher.parameters())


def test_it_starts_as_the_teacher_and_a_refresh_copies_it():
    model = DINOv3ForPreTraining(make_config(gram_teacher="separate"))

    def equals_the_teacher() -> bool:
        pairs = zip(model.gram_teacher.parameters(), model.teacher.backbone.parameters(), strict=True)
        return all(torch.equal(ours.float(), teachers.to(ours.dtype).float()) for ours, teachers in pairs)

    assert equals_the_teacher()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not equals_the_teacher()
    model.gram_teacher.to(torch.bfloat16)
    model.refresh_gram_teacher()
    assert equals_the_teacher()
    assert {parameter.dtype for parameter in model.gram_teacher.parameters()} == {torch.bfloat16}


def test_a_gram_teacher_in_bfloat16():
    """Alone in it, and in a step under autocast: the same patches, since autocast leaves it alone."""
    model, batch, crops = make_model(gram_teacher="separate"), make_batch(), gram_crops()
    exact = model.gram_targets(None, batch["global_crops"], crops)
    model.gram_teacher.to(torch.bfloat16)
    seen = []
    model.gram_teacher.layer[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    rounded = model.gram_targets(None, batch["global_crops"], crops)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model.gram_targets(None, batch["global_crops"], crops)
    assert seen == [torch.bfloat16] * 2
    assert torch.equal(rounded, under_autocast)
    assert rounded.dtype == torch.float32  # resized
    cosine = F.cosine_similarity(rounded, exact, dim=-1)
    assert 0.99 < cosine.min() < cosine.max() < 1.0
    with torch.autocast("cpu", torch.bfloat16):
        output = step(model, batch, gram_crops=crops)
    output.loss.backward()
    assert output.losses["gram"].dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.student.parameters())


@pytest.mark.parametrize("masked", [0, 5])
def test_without_its_weight_the_step_is_that_of_a_model_without_it(masked):
    batch = make_batch(masked=masked)
    results = []
    for kind in (None, "separate", "ema"):
        model = DINOv3ForPreTraining(make_config(gram_teacher=kind)).train()
        model.load_state_dict(make_model().state_dict(), strict=False)
        if model.gram_teacher is not None:
            model.gram_teacher.register_forward_hook(lambda *_: pytest.fail("the Gram teacher was run"))
        torch.manual_seed(1)  # RoPE augmentation
        output = step(model, batch, gram_weight=0.0)
        output.loss.backward()
        results.append([output.loss, *(parameter.grad for parameter in model.student.parameters())])
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


# ---- files -------------------------------------------------------------------------------------------------------


def test_save_and_load_keeps_it(tmp_path):
    model, batch = make_model(gram_teacher="separate", gram_negatives="remove"), make_batch()
    model.save_pretrained(tmp_path)
    loaded, info = DINOv3ForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.gram_teacher == "separate" and loaded.config.gram_negatives == "remove"
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.gram_teacher.parameters())
    assert not any(module.training for module in loaded.train().gram_teacher.modules())
    losses = [step(each, batch, gram_crops=gram_crops()).losses["gram"] for each in (model, loaded)]
    assert torch.equal(*losses)


def test_one_of_bfloat16_comes_back_with_its_values(tmp_path):
    model = make_model(gram_teacher="separate")
    model.gram_teacher.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = DINOv3ForPreTraining.from_pretrained(tmp_path)
    assert loaded.student.backbone.norm.weight.dtype == torch.float32
    pairs = zip(loaded.gram_teacher.parameters(), model.gram_teacher.parameters(), strict=True)
    assert all(torch.equal(ours.float(), theirs.float()) for ours, theirs in pairs)


def test_a_folder_without_one_gives_a_copy_of_its_teacher(tmp_path):
    stage_1 = make_model()
    stage_1.save_pretrained(tmp_path)
    config = make_config(gram_teacher="separate")
    model, info = DINOv3ForPreTraining.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all(name.startswith("gram_teacher.") for name in info["missing_keys"])
    pairs = zip(model.gram_teacher.parameters(), stage_1.teacher.backbone.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_every_number_is_initialised():
    """Filled with NaN, then initialised: nothing stays NaN, in no network."""
    model = DINOv3ForPreTraining(make_config(gram_teacher="separate"))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    for module in model.modules():
        module._is_hf_initialized = False
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = False
    model.initialize_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name
    assert step(model, make_batch()).loss.isfinite()


# ---- without L_iBOT ----------------------------------------------------------------------------------------------


def test_without_a_weight_for_ibot_there_is_no_head_and_no_mask():
    model = make_model(ibot_weight=0, gram_teacher="ema")
    assert model.student.ibot_head is None and model.teacher.ibot_head is None
    assert [name for name, _ in model.student.named_children()] == ["backbone", "dino_head"]
    batch = make_batch() | {"mask": None, "mask_indices": None, "mask_weight": None}
    output = step(model, batch)
    assert output.losses.keys() == {"dino_global", "dino_local", "koleo", "gram"}
    assert output.prototype_entropy.keys() == {"dino"}
    weights = model.loss_weights(num_local_crops=3, local_loss_weight=1.0, gram_weight=2.0)
    torch.testing.assert_close(output.loss, sum(weights[name] * value for name, value in output.losses.items()))
    # half of the patches hidden, as a recipe with masks would: the student still sees what it is given
    hidden = step(model, batch | {"mask": make_batch()["mask"]})
    assert not torch.equal(hidden.losses["dino_global"], output.losses["dino_global"])


def test_micro_batches_without_ibot():
    model, batch = make_model(ibot_weight=0), make_batch()
    crops = batch["global_crops"].unflatten(0, (2, BATCH))
    logits = [model.teacher_logits(crops[:, images].flatten(0, 1), None) for images in (slice(0, 1), slice(1, 4))]
    targets = model.teacher_targets_of_step(logits, 0.05)
    whole = model.teacher_targets(model.teacher_logits(batch["global_crops"], None), 0.05)
    torch.testing.assert_close(torch.cat([target.cls_probs for target in targets], dim=1), whole.cls_probs)
    assert all(target.masked_probs is None and target.patches is None for target in targets)


@pytest.mark.parametrize("kind", ["separate", "ema"])
def test_a_convnext_trains_on_its_own_grid(kind):
    model = make_model(backbone_config=CONVNEXT, ibot_weight=0, gram_teacher=kind, koleo_weight=0)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "global_crops": torch.randn(2 * BATCH, 3, 64, 96, generator=generator),
        "local_crops": torch.randn(BATCH, 3, 32, 32, generator=generator),
        **dict.fromkeys(("mask", "mask_indices", "mask_weight")),
    }
    assert patch_side(model.config.backbone_config) == 32
    assert patch_grid(batch["global_crops"], model.config.backbone_config) == (2, 3)
    crops = torch.randn(2 * BATCH, 3, 128, 192, generator=generator) if kind == "separate" else None
    output = step(model, batch, gram_crops=crops)
    with torch.no_grad():
        student = model.student.backbone(batch["global_crops"]).last_hidden_state[:, 1:]  # (8, 6, D)
        if kind == "ema":
            anchor = model.teacher.backbone(batch["global_crops"]).last_hidden_state[:, 1:]
        else:
            maps = model.gram_teacher(crops).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
            anchor = F.interpolate(maps, (2, 3), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.losses["gram"], mean_over_crops(student, anchor))
    output.loss.backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_side_of_a_patch_is_that_of_the_tokens():
    """Whatever patch grid the feature maps of a ConvNeXt are resized to, its tokens have their own."""
    for config, side in ((make_config().backbone_config, 4), (_convnext(), 32), (_convnext(patch_size=16), 32)):
        assert patch_side(config) == side
        tokens = build_backbone(config)(torch.zeros(1, 3, 64, 96)).last_hidden_state
        rows, columns = patch_grid(torch.zeros(1, 3, 64, 96), config)
        assert tokens.shape[1] - rows * columns == (2 if side == 4 else 1)


def _convnext(**fields):
    return make_config(backbone_config=CONVNEXT | fields, ibot_weight=0).backbone_config


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gram_teacher": "copy"}, r"gram_teacher 'copy' is unknown; choose one of null, separate, ema"),
        ({"gram_negatives": "clamp"}, "gram_negatives 'clamp' is unknown"),
        ({"gram_tokens": "visible", **PER_BATCH}, "gram_tokens 'visible' is unknown"),
        ({"gram_tokens": "masked"}, "set gram_per_image: false"),
        ({"gram_group_size": 2}, "set gram_per_image: false"),
        ({"gram_group_size": 0, **PER_BATCH}, "gram_group_size 0 is no number of images"),
        ({"backbone_config": CONVNEXT}, "no mask token, which L_iBOT hides"),
        (
            {"backbone_config": CONVNEXT, "ibot_weight": 0, "gram_tokens": "masked", **PER_BATCH},
            "gram_tokens 'masked' tells masked patches",
        ),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_steps_that_cannot_be():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"gram_weight is 2, but there is no Gram teacher; set gram_teacher"):
        step(make_model(), batch)
    with pytest.raises(ValueError, match="there is no mask"):
        step(make_model(), batch | {"mask": None}, gram_weight=0.0)
    model = make_model(ibot_weight=0, gram_teacher="ema", gram_tokens="masked", **PER_BATCH)
    with pytest.raises(ValueError, match="there is no mask"):
        step(model, batch | {"mask": None})
    model = make_model(gram_teacher="ema", gram_group_size=3, **PER_BATCH)
    with pytest.raises(ValueError, match="gram_group_size 3 does not divide the 4 images of a forward"):
        step(model, batch)


def test_no_patch_to_compare_is_no_difference():
    config = DINOv3PreTrainingConfig(
        backbone_config=BACKBONE, dino_head=HEAD, ibot_head=HEAD, gram_teacher="ema", gram_tokens="masked", **PER_BATCH
    )
    student = torch.randn(2 * BATCH, PATCHES, 32, requires_grad=True)
    loss = gram_anchor_loss(
        student, torch.randn(2 * BATCH, PATCHES, 32), torch.zeros(2 * BATCH, PATCHES).bool(), config
    )
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()
