"""`dinov3-hf plan`: what it says, and how it refuses."""

import json

import pytest

from dinov3_hf.cli import errors
from dinov3_hf.cli.main import parse_and_run


def planned(capsys, *words):
    parse_and_run(["plan", *words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_published_runs(capsys):
    """At the utilization that our count of operations implies for them, the published hours come out."""
    large = planned(capsys, "vitl16_im1k", "--gpus", "32", "--mfu", "0.18")
    assert large["run"]["hours"] == pytest.approx(14, rel=0.05)
    assert large["engine"] == "ddp" and large["fits"]
    assert large["resolutions"][0]["micro_batch"] == 64  # as published, 64 on each of 32 GPUs

    # 61,440 GPU hours, with blocks in float8: a share of the peak in bfloat16, for stage 1 and for all three.
    stages = ("vit7b16_pretrain", "vit7b16_gram_anchor", "vit7b16_high_res")
    plans = [planned(capsys, stage, "--gpus", "256") for stage in stages]
    flop = [plan["run"]["steps"] * plan["run"]["global_batch_size"] * plan["model"]["flop_of_image"] for plan in plans]
    peak = 61_440 * 3600 * 989e12
    assert flop[0] / peak == pytest.approx(0.55, abs=0.01)
    assert sum(flop) / peak == pytest.approx(0.86, abs=0.01)


def test_energy_is_that_of_the_published_run(capsys):
    run = planned(capsys, "vit7b16_pretrain", "--gpus", "256")["run"]
    assert 61_440 * run["kilowatt_hours"] / run["gpu_hours"] == pytest.approx(47_000, rel=0.01)


def test_micro_batch_and_accumulation_follow_from_memory(capsys):
    small = planned(capsys, "vitl16_im1k", "--gpus", "32", "--gpu", "a100-40gb")["resolutions"][0]
    large = planned(capsys, "vitl16_im1k", "--gpus", "32", "--gpu", "h200-141gb")["resolutions"][0]
    assert small["micro_batch"] < large["micro_batch"]
    assert (
        small["micro_batch"] * small["forwards_of_a_step"] == large["micro_batch"] * large["forwards_of_a_step"] == 64
    )


def test_sharded_parts_fall_with_the_number_of_gpus(capsys):
    parts = [
        planned(capsys, "vit7b16_pretrain", "--gpus", count, "--engine", "zero3")["resolutions"][0]["bytes"]
        for count in ("64", "128")
    ]
    for part in ("parameters", "gradients", "optimizer", "ema_teacher"):
        assert parts[0][part] == pytest.approx(2 * parts[1][part])


def test_a_slow_network_limits(capsys):
    assert planned(capsys, "vitl16_im1k", "--gpus", "64", "--network", "0.1")["limit"] == "network"


def test_a_model_that_does_not_fit(capsys):
    parse_and_run(["plan", "vit7b16_pretrain", "--gpus", "8", "--engine", "ddp"])
    assert "does not fit" in capsys.readouterr().out


def test_sweep_and_budget(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "sweep.png"
    facts = planned(
        capsys, "vitl16_im1k", "--gpus", "32", "--sweep", str(picture), "--images", "1.28e6", "--budget", "100",
        "--price", "2",
    )  # fmt: skip
    assert picture.stat().st_size > 10_000
    # 2048 images in groups of 8 of stochastic depth: not on more than 256 GPUs.
    assert [row["gpus"] for row in facts["sweep"]] == [8, 16, 32, 64, 128, 256]
    assert facts["run"]["passes_over_the_data"] == pytest.approx(200)
    assert facts["run"]["cost"] == pytest.approx(2 * facts["run"]["gpu_hours"])
    assert facts["run"]["share_of_the_run_in_budget"] == pytest.approx(100 / facts["run"]["gpu_hours"])


def test_tables(capsys):
    parse_and_run(["plan", "vit7b16_high_res", "--gpus", "256"])
    out = capsys.readouterr().out
    assert "--engine fsdp2" in out and "768 / 336" in out and "gram teacher" in out and "energy" in out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["vitl16_im1k", "--gpus", "4096"], 1, "use 2048 GPUs at most"),
        (["vitl16_im1k", "--gpus", "24"], 1, "the next smaller number that can is 16"),
        (["vitl16_im1k", "--gpus", "16", "--per_device_train_batch_size", "7"], 1, "use one of 8, 16, 32, 64, 128"),
        (["vitl16_im1k", "--gpu", "h100"], 2, "did you mean h100-80gb?"),
        (["vitl16_im1k", "--engine", "zero1"], 2, "--engine 'zero1' is unknown"),
        (["vitl16_im1k", "--engine", "zero3", "--gradient_checkpointing", "selective"], 2, "does not go with engine"),
        (["vitl16_im1k", "--engine", "zero3", "--torch_compile", "true"], 2, "torch_compile does not go with engine"),
        (["vitl16_im1k", "--mfu", "1.5"], 2, "more than the peak"),
        (["vitl16_im1k", "--price", "-1"], 2, "--price -1 is not positive"),
        (["vitl16_im1k", "--koleo_group_sizes", "3"], 2, "did you mean koleo_group_size?"),
        (["vitl16_im1k", "--sweep", "sweep.txt"], 2, "is no picture"),
        (["vitl17"], 2, "there is no recipe 'vitl17'"),
        (["--koleo_group_size", "8"], 2, "plan needs a recipe"),
    ],
)
def test_refusals(capsys, words, status, message):
    with pytest.raises(SystemExit) as ended:
        errors.run(parse_and_run, ["plan", *words])
    assert ended.value.code == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
