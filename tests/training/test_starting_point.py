"""A stage that starts from an earlier run: what is found, what is refused, and that it goes on as the run would."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.distributed.pieces import Piece, write_pieces
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.training.ssl_trainer import SSLTrainer
from dinov3_hf.training.starting_point import find_start
from tests.testing_utils import saved_state, saved_weights
from tests.training.test_ssl_trainer import BACKBONE, HEAD, make_args

STATE = "state/rank-00000-of-00001.safetensors"  # of a run of one process
# Stochastic depth and RoPE augmentation draw from torch's generator, of which a stage knows nothing.
WITHOUT_DRAWS = {**BACKBONE, "drop_path_rate": 0.0, "pos_embed_rescale": None, "layerscale_value": 0.1}
CONSTANT = {"backbone": WITHOUT_DRAWS, "weight_decay_schedule": 0.04, "logging_steps": 6}


class RecordingTrainer(SSLTrainer):
    """Keeps the batches of each step."""

    batches: list

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.batches.append(copy.deepcopy(batches))  # the step finishes them in place
        return batches, num_items


class ReplayingTrainer(RecordingTrainer):
    """Learns from recorded batches."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return self.batches.pop(0), None


def make(trainer_class, output_dir: Path, **overrides):
    args = make_args(output_dir, **{**CONSTANT, **overrides})
    torch.manual_seed(args.seed)
    model = DINOv3ForPreTraining(args.pretraining_config())
    trainer = trainer_class(model, args, load_images("digits", split="train"))
    trainer.batches = []
    return trainer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1") / "run"
    trainer = make(RecordingTrainer, folder, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_teacher(folder / "teacher")
    trainer.save_state()
    return folder, trainer.batches


@pytest.fixture
def run(recorded, tmp_path) -> Path:
    """Output folder of a finished run: teacher/, checkpoint-3, checkpoint-6."""
    return Path(shutil.copytree(recorded[0], tmp_path / "run"))


def found(run: Path, tmp_path: Path, **overrides):
    return find_start(make_args(tmp_path / "stage", **{**CONSTANT, "start_from": str(run), **overrides}))


def moments(trainer: SSLTrainer) -> dict[str, dict[str, torch.Tensor]]:
    names = {parameter: name for name, parameter in trainer.model.student.named_parameters()}
    return {names[parameter]: state for parameter, state in trainer.adamw.state.items()}


def test_a_stage_takes_the_very_steps_that_the_run_takes(recorded, tmp_path):
    folder, batches = recorded
    stage = make(ReplayingTrainer, tmp_path, max_steps=3, start_from=str(folder / "checkpoint-3"))
    stage.batches = copy.deepcopy(batches[3:])
    stage.train()

    end = saved_weights(folder / "checkpoint-6")
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(tensor, end[name]), name
    saved = saved_state(folder / "checkpoint-6")
    ours = moments(stage)
    for kind in ("exp_avg", "exp_avg_sq"):
        assert {f"{kind}/student.{name}" for name in ours} == {name for name in saved if name.startswith(f"{kind}/")}
        for name, state in ours.items():
            assert torch.equal(state[kind], saved[f"{kind}/student.{name}"]), name
    assert {state["step"].item() for state in ours.values()} == {6} == {saved["num_steps"].item()}


def test_moments_find_their_parameters_in_other_groups(recorded, tmp_path):
    folder, _ = recorded
    same = make(SSLTrainer, tmp_path, start_from=str(folder))
    other = make(SSLTrainer, tmp_path, start_from=str(folder), layerwise_lr_decay=1.0, adam_beta2=0.95)
    for trainer in (same, other):
        start = find_start(trainer.args)
        start.load_state(trainer.engine, trainer.model, trainer.create_optimizer())
    assert len(other.optimizer.param_groups) < len(same.optimizer.param_groups)
    assert {group["betas"] for group in other.optimizer.param_groups} == {(0.9, 0.95)}
    ours, theirs = moments(other), moments(same)
    assert ours.keys() == theirs.keys() == dict(same.model.student.named_parameters()).keys()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_teacher_becomes_both_networks(run, tmp_path):
    stage = make(SSLTrainer, tmp_path, start_from=str(run), start_with="teacher", gram_teacher="copy")
    start = find_start(stage.args)
    start.load_teacher(stage.model)
    backbone = DINOv3ViTModel.from_pretrained(run / "teacher").state_dict()
    heads = load_file(run / "teacher" / "heads.safetensors")
    assert "local_cls_norm.weight" in backbone
    for network in (stage.model.student, stage.model.teacher):
        whole = network.state_dict()
        assert len(whole) == len(backbone) + len(heads)
        assert all(torch.equal(whole[f"backbone.{name}"], tensor) for name, tensor in backbone.items())
        assert all(torch.equal(whole[name], tensor) for name, tensor in heads.items())


def test_the_gram_teacher_is_the_teacher_of_the_start(recorded, tmp_path):
    folder, _ = recorded
    options = {"start_from": str(folder), "gram_teacher": "copy", "max_steps": 1, "logging_steps": 1}
    stage = make(SSLTrainer, tmp_path, **options)
    stage.train()
    teacher = load_file(folder / "checkpoint-6" / "teacher" / "model.safetensors")
    gram = stage.model.gram_teacher.state_dict()
    assert all(torch.equal(gram[name], tensor) for name, tensor in teacher.items())


def test_what_is_found(run, tmp_path):
    start = found(run, tmp_path)
    assert (start.folder, start.step) == (run / "checkpoint-6", 6)
    said = start.describe()
    assert said.splitlines()[0] == f"Starts from {run / 'checkpoint-6'}, after 6 steps:"
    for word in ("student", "teacher", "DINO with 32 prototypes, iBOT with 32 prototypes", "moments", "count from 0"):
        assert word in said
    assert found(run / "checkpoint-3", tmp_path).step == 3
    for source, folder in (
        (run, run / "teacher"),
        (run / "teacher", run / "teacher"),
        (run / "checkpoint-3", run / "checkpoint-3" / "teacher"),
        (run / "checkpoint-3" / "teacher", run / "checkpoint-3" / "teacher"),
    ):
        start = found(source, tmp_path, start_with="teacher")
        assert (start.folder, start.step) == (folder, 3 if "checkpoint-3" in str(source) else 6)
    assert "starts fresh" in start.describe()


def test_a_running_run_gives_its_newest_complete_checkpoint(run, tmp_path, caplog):
    shutil.rmtree(run / "teacher")
    (run / "checkpoint-6" / STATE).unlink()
    (run / ".checkpoint-9.saving" / "checkpoint-9").mkdir(parents=True)
    assert found(run, tmp_path).folder == run / "checkpoint-3"
    assert f"Ignored as incomplete: checkpoint-6 ({STATE} is missing); going on from checkpoint-3" in caplog.text
    assert found(run, tmp_path, start_with="teacher").folder == run / "checkpoint-3" / "teacher"
    (run / "checkpoint-3" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint: checkpoint-6 .*name another run"):
        found(run, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-3 is no complete checkpoint: manifest\.json is missing"):
        found(run / "checkpoint-3", tmp_path)


def test_heads_that_are_on_one_side_only(run, tmp_path):
    without = make(SSLTrainer, tmp_path / "without", start_from=str(run), ibot_weight=0, max_steps=1, save_steps=1)
    without.args.save_strategy = "steps"
    assert "iBOT is left out, its weight is 0" in find_start(without.args).describe()
    without.train()
    assert {name.partition(".")[0] for name in moments(without)} == {"backbone", "dino_head"}

    fresh = make(SSLTrainer, tmp_path / "fresh", start_from=str(tmp_path / "without"), max_steps=1)
    assert "iBOT starts fresh, there is none" in find_start(fresh.args).describe()
    fresh.train()
    steps = {name: state["step"].item() for name, state in moments(fresh).items()}
    # One count for all, which is what ZeRO and a checkpoint keep.
    assert set(steps.values()) == {8}


def test_a_teacher_without_ibot_head(run, tmp_path):
    path = run / "teacher" / "heads.safetensors"
    heads = {name: tensor for name, tensor in load_file(path).items() if name.startswith("dino_head.")}
    save_file(heads, path, metadata={"dino_head": json.dumps({**HEAD, "mlp_bias": True})})
    start = found(run, tmp_path, start_with="teacher")
    assert "iBOT starts fresh, there is none" in start.describe()
    model = make(SSLTrainer, tmp_path).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".ibot_head." in name}
    start.load_teacher(model)
    after = model.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(after[f"student.{name}"], tensor) for name, tensor in heads.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backbone": {**WITHOUT_DRAWS, "hidden_size": 48}}, "backbone.hidden_size is 32 there and 48 here"),
        (
            {"backbone": {**WITHOUT_DRAWS, "patch_size": 8, "num_hidden_layers": 3}},
            "backbone.num_hidden_layers is 2 there and 3 here, backbone.patch_size is 4 there and 8 here",
        ),
        ({"backbone": {**WITHOUT_DRAWS, "num_register_tokens": 0}}, "backbone.num_register_tokens is 1 there and 0"),
        (
            {"backbone": {**WITHOUT_DRAWS, "num_channels": 1}, "image_mean": [0.5], "image_std": [0.5]},
            "backbone.num_channels is 3 there and 1 here",
        ),
        ({"ibot_head": {**HEAD, "num_prototypes": 64}}, "ibot_head.num_prototypes is 32 there and 64 here"),
        (
            {"backbone": {**WITHOUT_DRAWS, "untie_global_and_local_cls_norm": False}},
            "has besides the recipe's network student.backbone.local_cls_norm.bias and 3 more",
        ),
        (
            {
                "backbone": {"model_type": "dinov3_convnext", "hidden_sizes": [8, 32], "depths": [1, 1]},
                "ibot_weight": 0,
            },
            "backbone.model_type is 'dinov3_vit' there and 'dinov3_convnext' here",
        ),
    ],
)
def test_another_network_is_refused(recorded, tmp_path, changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        found(recorded[0], tmp_path, **changes)
    assert "checkpoint-6" in str(refused.value) and "give the stage's recipe the backbone" in str(refused.value)
    with pytest.raises(ValueError, match=re.escape(says)):
        found(recorded[0], tmp_path, start_with="teacher", **changes)


def change_config(folder: Path, **fields: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_folders_with_nothing_to_start_from(run, tmp_path):
    for source, start_with, says in (
        (tmp_path / "nowhere", "state", "nowhere: there is no such folder; name the output folder of a run"),
        (tmp_path, "state", "holds no checkpoint-N and no teacher/; name the output folder of a run"),
        (tmp_path, "teacher", "holds no checkpoint-N and no teacher/; name the output folder of a run"),
        (run / "teacher", "state", "holds a teacher but no checkpoint-N with student and optimizer; set start_with"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(says)):
            found(source, tmp_path, start_with=start_with)

    for step in (3, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    with pytest.raises(FileNotFoundError, match="run holds a teacher but no checkpoint-N"):
        found(run, tmp_path)
    (run / "teacher" / "heads.safetensors").unlink()
    for source, start_with in ((run, "teacher"), (run / "teacher", "teacher"), (run / "teacher", "state")):
        with pytest.raises(FileNotFoundError, match=r"heads\.safetensors.*continue_pretraining\.py"):
            found(source, tmp_path, start_with=start_with)


def test_damaged_files_and_other_models_are_refused(run, tmp_path):
    heads = run / "teacher" / "heads.safetensors"
    whole = heads.read_bytes()
    heads.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"heads\.safetensors is no whole safetensors file"):
        found(run, tmp_path, start_with="teacher")
    save_file(load_file(run / "checkpoint-6" / "teacher" / "heads.safetensors"), heads)  # without metadata
    with pytest.raises(ValueError, match="holds no DINO head"):
        found(run, tmp_path, start_with="teacher")
    heads.write_bytes(whole)
    change_config(run / "teacher", model_type="resnet")
    with pytest.raises(ValueError, match="holds a 'resnet' model, not a DINOv3 backbone"):
        found(run, tmp_path, start_with="teacher")

    weights = run / "checkpoint-6" / STATE
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # as long as it was
    with pytest.raises(ValueError, match=f"no complete checkpoint: {STATE} has other contents"):
        found(run / "checkpoint-6", tmp_path)
    (run / "checkpoint-3" / "manifest.json").write_text(json.dumps({"step": 3, "files": {}}))
    change_config(run / "checkpoint-3", model_type="dinov3_distillation")
    with pytest.raises(ValueError, match="is a checkpoint of a 'dinov3_distillation' model"):
        found(run / "checkpoint-3", tmp_path)


def test_moments_of_another_network_are_refused(run, tmp_path):
    checkpoint = run / "checkpoint-6"
    name = "exp_avg/student.backbone.norm.weight"
    saved = {**saved_state(checkpoint), name: torch.zeros(3)}
    write_pieces(checkpoint / STATE, [Piece(key, tuple(t.shape), 0, t.view(-1)) for key, t in saved.items()])
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 6, "files": {}}))
    stage = make(SSLTrainer, tmp_path, start_from=str(checkpoint))
    with pytest.raises(ValueError, match=rf"{name} is \(3,\) in .*checkpoint-6/state and \(32,\) here; resume with"):
        stage.train()


def test_a_checkpoint_without_pieces_is_refused_in_one_line(run, tmp_path):
    """As earlier versions wrote them."""
    checkpoint = run / "checkpoint-6"
    shutil.rmtree(checkpoint / "state")
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 6, "files": {}}))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6/state holds no training state .*another") as refused:
        found(checkpoint, tmp_path)
    assert "\n" not in str(refused.value)


def test_the_optimizer_starts_fresh_with_the_teacher(recorded, tmp_path):
    stage = make(SSLTrainer, tmp_path, start_from=str(recorded[0]), start_with="teacher", max_steps=1)
    stage.train()
    assert {state["step"].item() for state in moments(stage).values()} == {1}


@pytest.mark.parametrize("output_dir", ["run", "run/gram", "run/checkpoint-6"])
@pytest.mark.parametrize("source", ["run", "run/checkpoint-6", "run/teacher"])
def test_a_run_is_never_written_over(run, tmp_path, source, output_dir):
    start_with = "teacher" if source.endswith("teacher") else "state"
    args = make_args(tmp_path / output_dir, **CONSTANT, start_from=str(tmp_path / source), start_with=start_with)
    with pytest.raises(ValueError, match="is the run that is started from, or lies in it"):
        find_start(args)


def test_a_stage_resumes_without_the_run_that_it_started_from(run, tmp_path):
    options = {
        "start_from": str(run),
        "gram_teacher": "copy",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    stage = make(SSLTrainer, tmp_path / "stage", **options)
    stage.train()
    end = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    shutil.rmtree(tmp_path / "stage" / "checkpoint-4")
    shutil.rmtree(run)
    for changed in ({}, {"start_from": None}, {"start_with": "teacher"}):
        resumed = make(SSLTrainer, tmp_path / "stage", **{**options, **changed})
        resumed.train(resume_from_checkpoint="last")
        assert all(torch.equal(tensor, end[name]) for name, tensor in resumed.model.state_dict().items())
        shutil.rmtree(tmp_path / "stage" / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        make(SSLTrainer, tmp_path / "again", **options).train()
