"""dino.txt as a model: what it computes, what is trained, files, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig, DinoTxtTextConfig, DinoTxtVisionConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel, DinoTxtTextModel, DinoTxtVisionModel
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.objectives.contrastive import contrastive_loss
from tests.models.dinotxt.tiny import (
    CONTEXT,
    CONVNEXT,
    TEXT,
    VARIANT_TEXT,
    VARIANT_VISION,
    VOCAB_SIZE,
    WIDTH,
    texts,
    tiny_config,
    tiny_model,
)
from tests.models.dinov3_vit.tiny import TINY, images

BATCH = 4
NUM_PATCHES = 12
VARIANTS = {"released": ({}, {}), "other": (VARIANT_TEXT, VARIANT_VISION)}


@pytest.fixture(params=VARIANTS)
def model(request) -> DinoTxtModel:
    return tiny_model(*VARIANTS[request.param])


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": texts(BATCH), "pixel_values": images(BATCH)}


def short_text() -> torch.Tensor:
    """Start, three pieces, end, and padding up to the context: (1, T)."""
    ids = torch.zeros(1, CONTEXT, dtype=torch.long)
    ids[0, :5] = torch.tensor([VOCAB_SIZE - 2, 5, 6, 7, VOCAB_SIZE - 1])
    return ids


# ---- what it computes --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_cosines_of_the_features(model):
    output = model(**batch(), return_loss=True)
    text = model.get_text_features(texts(BATCH)).pooler_output
    image = model.get_image_features(images(BATCH)).pooler_output
    cosines = F.cosine_similarity(image[:, None], text[None], dim=-1)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(output.logits_per_image, cosines * scale, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    expected = contrastive_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)
    assert torch.equal(output.loss, expected) and list(output.losses) == ["contrastive"]


@torch.no_grad()
def test_texts_and_images_need_not_be_pairs(model):
    output = model(texts(3), images(2))
    assert output.logits_per_image.shape == (2, 3) and output.loss is None
    assert isinstance(model(texts(3), images(2), return_dict=False), tuple)


@torch.no_grad()
def test_an_image_is_its_class_token_and_the_mean_of_its_patches(model):
    output = model.get_image_features(images())
    width = model.config.vision_config.token_dim
    patches = model.get_patch_features(images())
    assert patches.shape == (2, NUM_PATCHES, width)
    torch.testing.assert_close(output.pooler_output[:, :width], output.last_hidden_state[:, 0])
    torch.testing.assert_close(output.pooler_output[:, width:], patches.mean(dim=1))
    text = model.get_text_features(texts()).pooler_output
    assert torch.equal(model.text_features_of_patches(text), text[:, width:])


@torch.no_grad()
def test_the_backbone_is_that_of_dinov3():
    model = tiny_model()
    backbone = DINOv3ViTModel(model.config.vision_config.backbone_config).eval()
    backbone.load_state_dict(model.vision_model.backbone.state_dict())
    output = model.get_image_features(images())
    assert torch.equal(output.backbone_tokens, backbone(images()).last_hidden_state)
    again = model.vision_model(backbone_tokens=output.backbone_tokens)
    assert torch.equal(again.pooler_output, output.pooler_output)


@torch.no_grad()
def test_a_text_is_what_stands_before_its_end():
    model = tiny_model()
    ids = short_text()
    expected = model.get_text_features(ids).pooler_output
    other_padding = ids.clone()
    other_padding[0, 5:] = torch.arange(7, 7 + CONTEXT - 5)
    torch.testing.assert_close(model.get_text_features(other_padding).pooler_output, expected)
    torch.testing.assert_close(model.get_text_features(ids[:, :5]).pooler_output, expected)
    ids[0, 2] += 1
    assert not torch.allclose(model.get_text_features(ids).pooler_output, expected)


@torch.no_grad()
def test_the_last_token_is_that_of_the_context():
    model = tiny_model(VARIANT_TEXT, VARIANT_VISION)
    ids = short_text()
    expected = model.get_text_features(ids).pooler_output
    assert torch.equal(model.get_text_features(ids[:, :5]).pooler_output, expected)


@torch.no_grad()
def test_a_convolutional_backbone():
    model = tiny_model({"projection_dim": 32}, {"backbone_config": CONVNEXT})
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert model.get_patch_features(pixels).shape == (2, 4, 16)
    assert model(texts(2), pixels).logits_per_image.isfinite().all()


@pytest.mark.parametrize("used", ["use_class_token", "use_patch_tokens"])
@torch.no_grad()
def test_one_half_alone(used):
    other = {"use_class_token", "use_patch_tokens"} - {used}
    model = tiny_model({"projection_dim": WIDTH}, {other.pop(): False})
    features = model.get_image_features(images())
    patches = model.get_patch_features(images())
    expected = features.last_hidden_state[:, 0] if used == "use_class_token" else patches.mean(dim=1)
    assert torch.equal(features.pooler_output, expected)
    if used == "use_class_token":
        with pytest.raises(ValueError, match="use_patch_tokens=False"):
            model.text_features_of_patches(features.pooler_output)


@torch.no_grad()
def test_implementations_of_attention_agree():
    model = tiny_model(VARIANT_TEXT, VARIANT_VISION)
    expected = model(**batch()).logits_per_image
    model.set_attn_implementation("eager")
    layers = (model.text_model.layer[0], model.vision_model.layer[0], model.vision_model.backbone.layer[0])
    assert {layer.attention.config._attn_implementation for layer in layers} == {"eager"}
    torch.testing.assert_close(model(**batch()).logits_per_image, expected, rtol=1e-4, atol=1e-4)


# ---- training ----------------------------------------------------------------------------------------------------


def test_all_but_the_backbone_learns(model):
    model.train()
    assert not model.vision_model.backbone.training and model.vision_model.layer[0].training
    loss = model(**batch(), return_loss=True, gram_weight=0.5).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("vision_model.backbone.")
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.isfinite().all(), name


def test_loss_falls():
    torch.manual_seed(0)
    model = DinoTxtModel(tiny_config()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch(), return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not any(torch.equal(*pair) for pair in zip(before, trained, strict=True))


def test_the_gram_term_compares_head_and_backbone(model):
    with torch.no_grad():
        output = model(**batch(), return_loss=True, gram_weight=0.5)
        image = model.get_image_features(images(BATCH))
        tokens = [model.vision_model.patch_tokens(t) for t in (image.last_hidden_state, image.backbone_tokens)]
        similarities = [F.normalize(each, dim=-1) @ F.normalize(each, dim=-1).mT for each in tokens]
    expected = (similarities[0] - similarities[1]).square().mean()
    torch.testing.assert_close(output.losses["gram"], expected)
    torch.testing.assert_close(output.loss, output.losses["contrastive"] + 0.5 * expected)


def test_stochastic_depth_is_drawn_or_given():
    model = tiny_model(vision={"drop_path_rate": 0.5}).train().vision_model
    torch.manual_seed(1)
    first, second = (model(images(BATCH)).pooler_output for _ in range(2))
    assert not torch.allclose(first, second)
    kept = torch.tensor([[[0, 2], [1, 3]], [[0, 1], [2, 3]]])
    given = [model(images(BATCH), kept_images=kept).pooler_output for _ in range(2)]
    assert torch.equal(*given)
    # The rule, written out: kept images pass the branch with twice its weight.
    tokens = model.get_backbone_tokens(images(BATCH))
    for layer, (attention, mlp) in zip(model.layer, kept, strict=True):
        for kept_of_branch, norm, branch, scale in (
            (attention, layer.norm1, layer.attention, layer.layer_scale1),
            (mlp, layer.norm2, layer.mlp, layer.layer_scale2),
        ):
            tokens = tokens.clone()
            tokens[kept_of_branch] += 2 * scale(branch(norm(tokens[kept_of_branch])))
    torch.testing.assert_close(model.norm(tokens)[:, 0], given[0][:, :WIDTH])
    assert torch.equal(model.eval()(images(), kept_images=kept).pooler_output, model(images()).pooler_output)


def test_recomputed_blocks_give_the_same_gradients(model):
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model.zero_grad()
        model(**batch(), return_loss=True, gram_weight=1.0).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


# ---- initialisation and files ------------------------------------------------------------------------------------


def test_initialisation_fills_everything():
    model = DinoTxtModel(tiny_config(VARIANT_TEXT, VARIANT_VISION))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    for module in model.modules():
        module._is_hf_initialized = False
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = False
    model.initialize_weights()
    assert [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()] == []
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    opened, loading = DinoTxtModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert not opened.vision_model.backbone.training
    assert not any(parameter.requires_grad for parameter in opened.vision_model.backbone.parameters())
    with torch.no_grad():
        assert torch.equal(opened(**batch()).logits_per_image, model(**batch()).logits_per_image)


@pytest.mark.parametrize(("tower_class", "part"), [(DinoTxtTextModel, "text"), (DinoTxtVisionModel, "vision")])
def test_a_tower_alone_from_the_whole_folder(model, tmp_path, tower_class, part):
    model.save_pretrained(tmp_path)
    tower, loading = tower_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    inputs = texts() if part == "text" else images()
    with torch.no_grad():
        expected = model.get_submodule(f"{part}_model")(inputs).pooler_output
        assert torch.equal(tower(inputs).pooler_output, expected)


# ---- configurations, and what is refused -------------------------------------------------------------------------


def test_defaults_are_the_released_model():
    config = DinoTxtConfig()
    assert (config.text_config.embed_dim, config.vision_config.embed_dim) == (2048, 2048)
    assert config.vision_config.intermediate_size == 2752 and config.vision_config.num_attention_heads == 16


def test_configurations_come_back(tmp_path):
    config = tiny_config(VARIANT_TEXT, VARIANT_VISION)
    config.save_pretrained(tmp_path)
    opened = DinoTxtConfig.from_pretrained(tmp_path)
    assert isinstance(opened.text_config, DinoTxtTextConfig) and isinstance(opened.vision_config, DinoTxtVisionConfig)
    fields, expected = ({k: v for k, v in c.to_dict().items() if k != "auto_map"} for c in (opened, config))
    assert fields == expected


@pytest.mark.parametrize(
    ("text", "vision", "message"),
    [
        ({"projection_dim": 10}, {}, "set the projection_dim of text_config to 64"),
        ({"pooling": "mean"}, {}, "pooling 'mean' is not known; use one of argmax, last"),
        ({"num_attention_heads": 5}, {}, "hidden_size 24 cannot be split into 5 heads; use hidden_size 25"),
        ({"num_hidden_layers": 0}, {}, "num_hidden_layers 0 is not an integer of at least 1"),
        ({}, {"num_attention_heads": 3}, "hidden_size 32 cannot be split into 3 heads"),
        ({}, {"drop_path_rate": 1.0}, "drop_path_rate 1.0 is not in"),
        ({}, {"use_class_token": False, "use_patch_tokens": False}, "nothing is left; switch one on"),
        ({}, {"backbone_config": {"model_type": "bert"}}, "backbone model_type 'bert'"),
    ],
)
def test_configurations_that_no_model_has(text, vision, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(text, vision)


def test_inputs_that_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="let the processor truncate"):
        model.get_text_features(torch.ones(1, CONTEXT + 1, dtype=torch.long))
    with pytest.raises(ValueError, match="either pixel_values or backbone_tokens"):
        model(texts())
    with pytest.raises(ValueError, match="give one text for each image"):
        model(texts(3), images(2), return_loss=True)
    assert TEXT["max_position_embeddings"] == CONTEXT and TINY["hidden_size"] == WIDTH
