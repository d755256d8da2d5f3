"""What is done to blocks to save memory and time: numbers stay, and so do names and copies."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.distributed.reductions import all_reduce_sum, world_size
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.layers import is_plain_linear
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.forward_draws import StudentDraws
from dinov3_hf.training.memory import blocks_of, prepare_blocks, products_of, set_forwards, use_float8
from tests.reference.processes import run_in_processes
from tests.testing_utils import require_package
from tests.training.test_ssl_trainer import losses, make_trainer

CPU = torch.device("cpu")
NUM_IMAGES = 4
BACKBONES = {
    "vit": DINOv3ViTConfig(
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=1,
        layerscale_value=0.1,
        drop_path_rate=0.3,
        pos_embed_rescale=2.0,
    ),
    "convnext": DINOv3ConvNextConfig(hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 2, 1], drop_path_rate=0.3),
}
HEAD = {"num_prototypes": 32, "bottleneck_dim": 16, "hidden_dim": 32, "num_layers": 2}
Grads = dict[str, Tensor]


def make_model(family: str, gram_teacher: str | None = "separate") -> DINOv3ForPreTraining:
    torch.manual_seed(0)
    config = DINOv3PreTrainingConfig(
        backbone_config=BACKBONES[family],
        dino_head=HEAD,
        ibot_head=HEAD,
        ibot_weight=1.0 if family == "vit" else 0.0,
        gram_teacher=gram_teacher,
        gram_tokens="all",
    )
    model = DINOv3ForPreTraining(config).train()
    for name, parameter in model.student.named_parameters():
        if name.endswith(("_token", "_tokens", "bias")):  # zeros: norms of equal values have gradients without a scale
            nn.init.normal_(parameter, std=0.2)
    return model


def take_step(
    model: DINOv3ForPreTraining, sizes: tuple[int, int] = (64, 32), bf16: bool = False
) -> tuple[Tensor, Grads]:
    """The loss of a step on random crops of these sizes, and its gradients."""
    torch.manual_seed(1)
    config = model.config.backbone_config
    inputs = {"mask": None, "mask_indices": None, "mask_weight": None}
    if isinstance(config, DINOv3ViTConfig):
        sampler = MaskSampler(sizes[0] // config.patch_size, batch_size=NUM_IMAGES, seed=0)
        mask = torch.stack([sampler(i) for i in range(NUM_IMAGES)]).transpose(0, 1).flatten(0, 1)
        weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
        inputs = {"mask": mask, "mask_indices": mask.flatten().nonzero().flatten(), "mask_weight": weight}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(
            global_crops=torch.randn(2 * NUM_IMAGES, 3, sizes[0], sizes[0]),
            local_crops=torch.randn(4 * NUM_IMAGES, 3, sizes[1], sizes[1]),
            **inputs,
            teacher_temperature=0.07,
            gram_weight=0.0 if model.config.gram_teacher is None else 1.0,
            draws=StudentDraws(config, (2, 4), group_size=2, seed=0).at(0, range(NUM_IMAGES), CPU),
        ).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(grads: Grads, expected: Grads) -> float:
    """Largest relative difference of a parameter's gradient."""
    return max(float((grads[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def recipe(recomputation: str = "none", compiled: bool = False, fp8: bool = False) -> SimpleNamespace:
    return SimpleNamespace(gradient_checkpointing=recomputation, torch_compile=compiled, fp8=fp8)


def float8_emulated(model: DINOv3ForPreTraining) -> DINOv3ForPreTraining:
    for network in (model.student, model.teacher):
        use_float8(network.backbone, emulate=True)
    return model


# --- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recomputation", ["selective", "full"])
@pytest.mark.parametrize("family", BACKBONES)
def test_recomputing_changes_nothing(family, recomputation, bf16):
    model = make_model(family)
    loss, grads = take_step(model, bf16=bf16)
    prepare_blocks(model, recipe(recomputation))
    assert all("forward" in block.__dict__ for block in blocks_of(model.student))
    assert not any("forward" in block.__dict__ for block in blocks_of(model.teacher))
    found_loss, found = take_step(model, bf16=bf16)
    assert found_loss == loss
    # A ConvNeXt's weights get their gradients from two crop sizes: see `set_forwards`.
    exact = family == "vit" or recomputation == "full" or not bf16
    assert distance(found, grads) == 0 if exact else distance(found, grads) < 0.02

    prepare_blocks(model, recipe())  # takes it away again
    assert not any("forward" in block.__dict__ for block in blocks_of(model))


def bytes_kept(backbone: nn.Module, sizes: tuple[int, int]) -> int:
    """Bytes that a forward pass under autocast leaves behind for the backward pass, its outputs included."""
    crops = [torch.randn(2 * NUM_IMAGES, 3, sizes[0], sizes[0]), torch.randn(4 * NUM_IMAGES, 3, sizes[1], sizes[1])]
    with torch.profiler.profile(profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = backbone(crops)
        outputs[0].last_hidden_state.device  # noqa: B018  # they are alive until here
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("family", BACKBONES)
def test_recomputing_keeps_less(family):
    backbone = make_model(family).student.backbone
    kept = {}
    for recomputation in ("none", "selective", "full"):
        set_forwards(backbone, recomputation, compiled=False)
        kept[recomputation] = bytes_kept(backbone, (64, 32))
    assert kept["full"] < 0.8 * kept["selective"] < 0.8 * 0.8 * kept["none"]


def test_a_run_is_the_same_whatever_it_recomputes(tmp_path):
    found = {}
    for recomputation in ("none", "selective", "full"):
        trainer = make_trainer(tmp_path / recomputation, gradient_checkpointing=recomputation, max_steps=3)
        trainer.train()
        found[recomputation] = losses(trainer)
    assert found["selective"] == found["none"] == found["full"]
    assert len(set(found["none"])) == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_calls_its_own_weights(compiled):
    model = make_model("vit")
    prepare_blocks(model, recipe("selective", compiled))
    twin = copy.deepcopy(model)
    for ours, theirs in zip(blocks_of(model), blocks_of(twin), strict=True):
        assert ("forward" in ours.__dict__) == ("forward" in theirs.__dict__)
        if "forward" in ours.__dict__:
            assert theirs.forward.__self__ is theirs and theirs.forward.__func__ is ours.forward.__func__


# --- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """Counts the graphs that are compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def quick_backend(monkeypatch):
    """Graphs are captured, differentiated and cut in two, but not turned into machine code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))


@pytest.mark.parametrize("recomputation", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_blocks_compile_once_for_a_set_of_sizes_and_once_for_all_others(graphs, quick_backend, recomputation):
    model = make_model("vit")
    sets = [(32, 16), (64, 32), (96, 32), (64, 48)]
    expected = [take_step(model, sizes) for sizes in sets]
    prepare_blocks(model, recipe(recomputation, compiled=True))
    counts = []
    for sizes, (loss, grads) in zip(sets, expected, strict=True):
        found_loss, found = take_step(model, sizes)
        torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
        assert distance(found, grads) < 1e-4
        counts.append(graphs())
    assert counts[0] == 2  # student, teachers
    assert counts[1] <= 2 + 2 * 2  # the first block's input is a view, for which a graph is made again
    assert set(counts[1:]) == {counts[1]}
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", BACKBONES)
def test_compiled_blocks_train(graphs, family):
    model = make_model(family, gram_teacher=None)
    loss, grads = take_step(model, (64, 32))
    prepare_blocks(model, recipe("selective", compiled=True))
    found_loss, found = take_step(model, (64, 32))
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert distance(found, grads) < 1e-3
    assert graphs() > 0 and not counters["graph_break"]


def test_a_run_compiles_blocks_and_not_the_model(graphs, quick_backend, tmp_path):
    plain, compiled = (make_trainer(tmp_path, torch_compile=value, max_steps=2) for value in (False, True))
    plain.train()
    assert graphs() == 0
    compiled.train()
    assert graphs() == 2  # student and teacher: no heads, no loss
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-5, atol=0)


# --- float8 ----------------------------------------------------------------------------------------------------------


@require_package("torchao")
def test_float8_layers_are_those_of_the_blocks_that_fit(tmp_path):
    from torchao.float8.float8_linear import Float8Linear

    model = make_model("vit")
    names = {name: value.dtype for name, value in model.state_dict().items()}
    model.student.backbone.layer[0].mlp.up_proj = nn.Linear(32, 40)
    float8_emulated(model)
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert converted == {
        f"{network}.backbone.layer.{block}.{layer}"
        for network in ("student", "teacher")
        for block in range(2)
        for layer in (*(f"attention.{x}_proj" for x in "qkvo"), "mlp.up_proj", "mlp.down_proj")
    } - {"student.backbone.layer.0.mlp.up_proj"}
    assert {name: value.dtype for name, value in model.state_dict().items()} == names
    assert not is_plain_linear(model.student.backbone.layer[0].attention.q_proj)

    model.teacher.backbone.save_pretrained(tmp_path / "float8")
    make_model("vit").teacher.backbone.save_pretrained(tmp_path / "plain")
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("float8", "plain"))
    torch.testing.assert_close(saved, plain, rtol=0, atol=0)
    assert not (set(json.loads((tmp_path / "float8" / "config.json").read_text())) & {"quantization_config"})


def course(model: DINOv3ForPreTraining, num_steps: int = 10) -> list[float]:
    """Losses of a few steps with a moving teacher."""
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-3)
    values = []
    for _ in range(num_steps):
        values.append(float(take_step(model, bf16=True)[0]))
        optimizer.step()
        before = {name: value.double() for name, value in model.teacher.named_parameters()}
        update_ema(model.teacher, model.student, 0.9)
        for (name, teacher), student in zip(model.teacher.named_parameters(), model.student.parameters(), strict=True):
            assert teacher.dtype == torch.float32
            expected = 0.9 * before[name] + 0.1 * student.double()
            torch.testing.assert_close(teacher.double(), expected, rtol=1e-6, atol=1e-8)
    return values


@require_package("torchao")
@pytest.mark.parametrize("family", BACKBONES)
def test_float8_trains_as_bfloat16_does(family):
    bfloat16, float8 = course(make_model(family)), course(float8_emulated(make_model(family)))
    assert float8 != bfloat16
    assert bfloat16[-1] < bfloat16[0] - 0.1
    assert float8 == pytest.approx(bfloat16, rel=0.01)


@require_package("torchao")
@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_float8_can_be_recomputed(recomputation):
    model = float8_emulated(make_model("vit"))
    loss, grads = take_step(model, bf16=True)
    prepare_blocks(model, recipe(recomputation))
    found_loss, found = take_step(model, bf16=True)
    assert found_loss == loss and distance(found, grads) == 0


# --- sharded ---------------------------------------------------------------------------------------------------------


def sharded_step(recomputation: str, float8: bool) -> dict[str, Tensor]:
    """How far a step is from that of the same model as it was, when blocks are prepared and sharded over the ranks."""
    model = make_model("vit", gram_teacher=None)
    if float8:
        float8_emulated(model)
    loss, grads = take_step(model, bf16=True)
    grads = {name: all_reduce_sum(grad) / world_size() for name, grad in grads.items()}

    prepare_blocks(model, recipe(recomputation))
    mesh, policy = init_device_mesh("cpu", (world_size(),)), MixedPrecisionPolicy(cast_forward_inputs=False)
    for network in (model.student, model.teacher):
        for block in blocks_of(network):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        for module in network.children():
            fully_shard(module, mesh=mesh, mp_policy=policy)
    found_loss, found = take_step(model, bf16=True)
    found = {name: grad.full_tensor() for name, grad in found.items()}
    return {"loss": found_loss - loss, "grads": torch.tensor(distance(found, grads))}


def test_nothing_inside_of_a_recomputed_block_is_hooked():
    model = make_model("vit")
    prepare_blocks(model, recipe("selective"))
    teacher = model.teacher.backbone
    assert products_of(model.student.backbone) == []
    assert products_of(teacher) == [part for block in teacher.layer for part in (block.attention, block.mlp)]


@pytest.mark.parametrize(
    ("recomputation", "float8"),
    [("selective", False), ("full", False), pytest.param("selective", True, marks=require_package("torchao"))],
)
def test_prepared_blocks_can_be_sharded(recomputation, float8):
    for found in run_in_processes(sharded_step, 2, recomputation, float8):
        assert abs(found["loss"]) < 1e-6
        assert found["grads"] < 1e-5
