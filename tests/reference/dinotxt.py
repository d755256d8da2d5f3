"""Kinds dinotxt, contrastive_two_processes; the tokenizer's JSON file."""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_hf.convert.dinotxt import config_from_native, state_dict_from_native, state_dict_to_native
from dinov3_hf.distributed.reductions import rank
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel
from dinov3_hf.models.dinotxt.tokenization_dinotxt import DinoTxtTokenizer
from dinov3_hf.objectives.contrastive import contrastive_loss
from dinov3_hf.objectives.gram import gram_loss
from tests.clip_vocabulary import VOCABULARY

from .compare import Comparison, refuse_unknown
from .io import Case
from .processes import run_in_processes

SETTINGS = ("vision_backbone", "text_backbone", "model", "gram_loss_weight")
TEXT_SETTINGS = (
    *("context_length", "vocab_size", "dim", "num_heads", "num_layers", "ffn_ratio", "is_causal"),
    *("ls_init_value", "dropout_prob"),
)
MODEL_SETTINGS = (
    *("embed_dim", "vision_model_freeze_backbone", "vision_model_train_img_size", "vision_model_use_class_token"),
    *("vision_model_use_patch_tokens", "vision_model_num_head_blocks", "vision_model_head_blocks_drop_path"),
    *("vision_model_use_linear_projection", "vision_model_patch_tokens_pooler_type", "vision_model_patch_token_layer"),
    *("text_model_num_head_blocks", "text_model_head_blocks_is_causal", "text_model_head_blocks_drop_prob"),
    *("text_model_tokens_pooler_type", "text_model_use_linear_projection"),
)


def check_dinotxt(case: Case, compare: Comparison) -> None:
    """Tokens and embeddings of both towers, both losses with their gradients, and the gradient of every parameter."""
    model = build_dinotxt(case.config, case.weights).eval()
    token_ids, images = case.inputs["token_ids"], case.inputs["images"]
    text = model.get_text_features(token_ids, output_hidden_states=True)
    image = model.get_image_features(images)
    compare.check("text/backbone_tokens", model.text_model.norm(text.hidden_states[-1]))
    compare.check("text/head_tokens", model.text_model.projection(text.last_hidden_state))
    head_patches = model.get_patch_features(images)
    backbone = image.backbone_tokens
    num_prefix_tokens = model.config.vision_config.num_prefix_tokens
    backbone_patches = model.vision_model.patch_tokens(backbone)
    compare.check("image/head_patch_tokens", head_patches)
    compare.check("image/backbone_patch_tokens", backbone_patches)
    compare.check("image/backbone_class_token", backbone[:, 0])
    compare.check("image/backbone_register_tokens", backbone[:, 1:num_prefix_tokens])
    for side, features in (("text", text.pooler_output), ("image", image.pooler_output)):
        compare.check(f"{side}/embedding/normalize_False", features)
        compare.check(f"{side}/embedding/normalize_True", F.normalize(features, dim=-1))

    weight = case.config["gram_loss_weight"]
    output = model(token_ids, images, return_loss=True, gram_weight=weight)
    compare.check("logits_per_image", output.logits_per_image)
    compare.check("logits_per_text", output.logits_per_text)
    compare.check("clip/loss", output.losses["contrastive"])
    compare.check("total_loss", output.loss)
    names = ("grad_image_embeddings", "grad_text_embeddings", "grad_logit_scale_exp")
    leaves = _leaves(output.image_embeds, output.text_embeds, model.logit_scale.exp())
    _check_gradients(compare, "clip", names, contrastive_loss(*leaves), leaves)
    for name, normalize in (("normalized", True), ("raw", False)):
        (leaf,) = _leaves(head_patches)
        loss = gram_loss(leaf, backbone_patches, normalize)
        compare.check(f"gram/{name}/loss", loss)
        _check_gradients(compare, f"gram/{name}", ["grad_head_patch_tokens"], loss, [leaf])

    output.loss.backward()
    # Zeros stand for the frozen backbone, so that the gradients have the names of a whole model.
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    for name, gradient in state_dict_to_native(gradients, model.config).items():
        compare.check(f"grad/{name}", gradient)


def build_dinotxt(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> DinoTxtModel:
    """Our model for native settings, with native weights loaded."""
    refuse_unknown("text_backbone", settings["text_backbone"], TEXT_SETTINGS)
    refuse_unknown("model", settings["model"], MODEL_SETTINGS)
    config = config_from_native(settings["vision_backbone"], settings["text_backbone"], settings["model"])
    model = DinoTxtModel(config)
    model.load_state_dict(state_dict_from_native(weights, config))
    return model


def check_contrastive_two_processes(case: Case, compare: Comparison) -> None:
    """Loss and gradients of every process, in as many gloo processes as the case has."""
    world_size = case.config["world_size"]
    results = run_in_processes(_loss_of_a_process, world_size, dict(case.inputs), world_size)
    for index, result in enumerate(results):
        for name, value in result.items():
            compare.check(f"rank{index}/{name}", value)


def _loss_of_a_process(inputs: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
    shares = (inputs[name].chunk(world_size)[rank()] for name in ("image", "text"))
    leaves = _leaves(*shares, inputs["logit_scale_exp"])
    loss = contrastive_loss(*leaves)
    gradients = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), **dict(zip(("grad_image", "grad_text", "grad_scale"), gradients, strict=True))}


def is_tokenizer(content: Any) -> bool:
    """Whether a JSON file holds texts with their ids."""
    return isinstance(content, dict) and {"context_length", "vocab_size", "rows"} <= set(content)


def check_tokenizer(content: dict[str, Any], compare: Comparison) -> None:
    """Ids of every text, from the vocabulary and again from the saved tokenizer, which is opened from its files."""
    built = DinoTxtTokenizer.from_vocabulary(VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        built(["two", "texts of another length"], padding=True)  # leaves nothing behind that is saved
        built.save_pretrained(folder)
        opened = DinoTxtTokenizer.from_pretrained(folder)
    for name, tokenizer in (("built", built), ("opened", opened)):
        found = (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id)
        expected = [content[name] for name in ("vocab_size", "context_length", "padding_id")]
        compare.check_pair(f"{name}/sizes", torch.tensor(found), torch.tensor(expected))
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        compare.check_pair(f"{name}/ends", torch.tensor(found), torch.tensor([content["start_id"], content["end_id"]]))
        for index, row in enumerate(content["rows"]):
            ids, whole = tokenizer(row["text"], truncation=True)["input_ids"], tokenizer(row["text"])["input_ids"]
            compare.check_pair(f"{name}/{index}/ids", torch.tensor(ids), torch.tensor(row["ids_without_padding"]))
            compare.check_pair(f"{name}/{index}/length", len(whole), row["length_untruncated"])
            if tokenizer.decode(whole[1:-1]) != row["decoded_body"]:
                compare.misses.append(f"{name}: {row['text']!r} is decoded to {tokenizer.decode(whole[1:-1])!r}")
        example = content["context_length_6_example"]
        ids = tokenizer(example["texts"], truncation=True, padding="max_length", max_length=6)["input_ids"]
        compare.check_pair(f"{name}/context_length_6", torch.tensor(ids), torch.tensor(example["ids"]))


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _check_gradients(compare: Comparison, prefix: str, names: Any, loss: Tensor, leaves: list[Tensor]) -> None:
    for name, gradient in zip(names, torch.autograd.grad(loss, leaves), strict=True):
        compare.check(f"{prefix}/{name}", gradient)
