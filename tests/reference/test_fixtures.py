"""The package reproduces the recorded cases in tests/fixtures, and the runner notices when it does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_hf.distributed.reductions import rank
from tests.reference.__main__ import main
from tests.reference.compare import Comparison, Declined
from tests.reference.io import find_cases
from tests.reference.processes import run_in_processes
from tests.reference.topics import check_case

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = list(find_cases(FIXTURES))


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(case.relative_to(FIXTURES).parts))
def test_case(case):
    try:
        compare = check_case(case)
    except Declined as reason:
        assert "batch norm" in str(reason)
        return
    assert compare.errors
    assert compare.misses == []


@pytest.fixture
def copied(tmp_path) -> Path:
    """A writable copy of a small case."""
    return Path(shutil.copytree(FIXTURES / "d_losses" / "koleo", tmp_path / "topic" / "koleo"))


def edit(case: Path, change) -> None:
    spec = json.loads((case / "case.json").read_text())
    change(spec)
    (case / "case.json").write_text(json.dumps(spec))


def test_a_passing_case(copied, capsys):
    assert main([str(copied)]) == 0
    output = capsys.readouterr().out
    assert "koleo: ok, 16 tensors, largest error" in output
    assert output.endswith("1 cases, 0 misses\n")


def test_one_perturbed_number_fails(copied, capsys):
    outputs = load_file(copied / "outputs.safetensors")
    outputs["koleo/x/grad"][3, 5] += 1e-4
    save_file(outputs, copied / "outputs.safetensors")
    assert main([str(copied.parent)]) == 1
    assert "koleo/x/grad: error" in capsys.readouterr().out


def test_an_output_that_is_not_compared_fails(copied, capsys):
    outputs = load_file(copied / "outputs.safetensors")
    save_file({**outputs, "koleo/x/something_else": torch.zeros(1)}, copied / "outputs.safetensors")
    assert main([str(copied)]) == 1
    assert "koleo/x/something_else: not compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "d_losses/koleo",
            lambda spec: spec["config"].update(group_size=4),
            "config: this program does not know group",
        ),
        (
            "c_dino_head/one_layer",
            lambda spec: spec["config"]["constructor"].update(dropout=0.1),
            "constructor: this program does not know dropout",
        ),
        (
            "a_vit/rope_aug_all",
            lambda spec: spec["config"]["constructor"].update(interleaved=True),
            "constructor: this program does not know interleaved",
        ),
        (
            "e_ssl_step/gram_off",
            lambda spec: spec["config"]["config_overrides"]["dino"].update(sharpening=2),
            "config_overrides.dino: this program does not know sharpening",
        ),
        (
            "e_ssl_step/distillation_fixed_teacher",
            lambda spec: spec["config"]["teacher_config_overrides"]["ibot"].update(sharpening=2),
            "teacher_config_overrides.ibot: this program does not know sharpening",
        ),
    ],
)
def test_a_setting_that_nothing_reads_fails(tmp_path, case, change, message, capsys):
    copied = Path(shutil.copytree(FIXTURES / case, tmp_path / "topic" / "case"))
    edit(copied, change)
    assert main([str(copied)]) == 1
    assert message in capsys.readouterr().out


def test_settings_of_gram_anchoring_are_read(tmp_path, capsys):
    copied = Path(shutil.copytree(FIXTURES / "e_ssl_step" / "gram_on_2x", tmp_path / "topic" / "case"))
    original = (copied / "case.json").read_text()
    for setting, value, message in (
        ("normalized", False, "metrics/gram_loss: error"),
        ("remove_neg", True, "metrics/gram_loss: error"),
        ("global_teacher_resize_antialias", True, "intermediate/gram_global/teacher_patches: error"),
        ("ema_teacher", True, "this program does not know gram_teacher"),
        ("loss_weight_schedule", {"start": 1, "peak": 1, "end": 0.5, "warmup_epochs": 0}, "gram_loss_weight: error"),
        ("global_teacher_resize_method", "bilinear", "declined: gram.global_teacher_resize_method: bilinear"),
        ("update_frequency", 5, "declined: gram.update_frequency: 5"),
    ):
        edit(
            copied, lambda spec, setting=setting, value=value: spec["resolved_config"]["gram"].update({setting: value})
        )
        main([str(copied)])
        assert message in capsys.readouterr().out, setting
        (copied / "case.json").write_text(original)
    edit(copied, lambda spec: spec["resolved_config"]["crops"].update(gram_teacher_crops_size=48))
    assert main([str(copied)]) == 1
    assert "gram_teacher_crops_size 48 is not the size" in capsys.readouterr().out


def test_a_setting_that_is_off_is_no_setting(copied):
    edit(copied, lambda spec: spec["config"].update(group_size=None, detach=False))
    assert main([str(copied)]) == 0


def test_a_declined_value_is_no_miss(tmp_path, capsys):
    copied = Path(shutil.copytree(FIXTURES / "e_ssl_step" / "gram_off", tmp_path / "topic" / "case"))
    edit(copied, lambda spec: spec["resolved_config"]["train"].update(centering="softmax"))
    assert main([str(copied)]) == 0
    assert "declined: train.centering: softmax" in capsys.readouterr().out


def test_targets_of_a_distillation_are_its_teachers(tmp_path, capsys):
    copied = Path(shutil.copytree(FIXTURES / "e_ssl_step" / "distillation_fixed_teacher", tmp_path / "topic" / "case"))
    weights = load_file(copied / "weights.safetensors")
    weights["teacher.backbone.norm.weight"][0] += 0.1
    save_file(weights, copied / "weights.safetensors")
    assert main([str(copied)]) == 1
    assert "intermediate/teacher_global/cls_after_head: error" in capsys.readouterr().out


def test_files_that_contradict_the_list_fail(copied, capsys):
    outputs = load_file(copied / "outputs.safetensors")
    loss = outputs.pop("koleo/x/loss")
    save_file(outputs, copied / "outputs.safetensors")
    assert main([str(copied)]) == 1
    assert "outputs.safetensors has no koleo/x/loss" in capsys.readouterr().out
    save_file({**outputs, "koleo/x/loss": loss.half()}, copied / "outputs.safetensors")
    assert main([str(copied)]) == 1
    assert "koleo/x/loss in outputs.safetensors is {'shape': [], 'dtype': 'float16'}" in capsys.readouterr().out


def test_an_entry_that_is_missing_is_named(copied, capsys):
    edit(copied, lambda spec: spec.pop("tolerance"))
    assert main([str(copied)]) == 1
    assert "MISS: KeyError: there is no 'tolerance'" in capsys.readouterr().out


def test_an_unknown_kind_fails_wherever_it_is(copied, capsys):
    edit(copied, lambda spec: spec.update(kind="telepathy"))
    assert main([str(copied.parent)]) == 1
    assert "unknown kind: telepathy" in capsys.readouterr().out


def test_what_is_not_in_the_package_yet_fails_only_when_it_is_named(copied, capsys):
    edit(copied, lambda spec: spec.update(kind="detector"))
    assert main([str(copied.parent)]) == 0
    assert main([str(copied)]) == 1
    assert capsys.readouterr().out.count("not in the package yet: detector") == 2


def test_a_declined_option_is_no_miss(capsys):
    assert main([str(FIXTURES / "c_dino_head" / "batchnorm_train")]) == 0
    assert "declined: batch norm" in capsys.readouterr().out


def test_a_case_that_cannot_be_run_fails_and_the_others_go_on(copied, capsys):
    second = shutil.copytree(copied, copied.parent / "second")
    edit(copied, lambda spec: spec["config"].update(topk=[100]))
    assert main([str(copied.parent)]) == 1
    output = capsys.readouterr().out
    assert "koleo: MISS: ValueError: KoLeo topk 100" in output
    assert f"{second.name}: ok" in output


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_path_without_cases_is_refused(tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / name)])
    assert stopped.value.code == 2
    assert name in capsys.readouterr().err


def compare_one(actual, expected, rtol=0.0, atol=0.0) -> Comparison:
    compare = Comparison({"x": expected}, rtol, atol)
    compare.check("x", actual)
    compare.finish()
    return compare


def test_tolerance_is_absolute_plus_relative():
    expected = torch.tensor([1.0, -100.0])
    assert not compare_one(expected + torch.tensor([0.01, 0.9]), expected, rtol=0.01, atol=0.01).misses
    assert compare_one(expected + torch.tensor([0.03, 0.0]), expected, rtol=0.01, atol=0.01).misses


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([float("nan")]), torch.tensor([1.0])),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")])),
        (torch.tensor([float("inf")]), torch.tensor([1.0])),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(()), torch.zeros(1)),
        (torch.tensor([1]), torch.tensor([2])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([1]), torch.tensor([1.0])),
        (torch.tensor([1.0]), torch.tensor([True])),
    ],
)
def test_differences_that_no_tolerance_allows(actual, expected):
    tolerance = 10.0 if expected.is_floating_point() else 0.0
    assert compare_one(actual, expected, atol=tolerance).misses


def test_equal_tensors_pass_at_no_tolerance():
    assert not compare_one(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])).misses
    assert not compare_one(torch.zeros(2, 0), torch.zeros(2, 0)).misses
    assert not compare_one(torch.tensor([-torch.inf]), torch.tensor([-torch.inf])).misses


def test_slack_is_for_its_own_element():
    compare = Comparison({"x": torch.zeros(2)}, rtol=0.0, atol=0.0)
    compare.check("x", torch.tensor([0.1, 0.0]), slack=torch.tensor([0.2, 0.0]))
    assert not compare.misses
    compare.check("x", torch.tensor([0.0, 0.1]), slack=torch.tensor([0.2, 0.0]))
    assert compare.misses


def fail_on_the_second() -> dict[str, torch.Tensor]:
    if rank() == 1:
        raise ValueError("no such luck")
    return {}


def test_a_process_that_fails_is_named():
    with pytest.raises(RuntimeError, match="rank 1: ValueError: no such luck"):
        run_in_processes(fail_on_the_second, 2)
