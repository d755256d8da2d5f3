"""`dinov3-hf visualize similarity` of runs and several models, and `visualize health`: what runs left behind."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.cli.pictures import picture_features
from dinov3_hf.cli.runs import Teacher, read_curves, spread, teachers_of_run
from dinov3_hf.evals.dense_health import dense_health
from dinov3_hf.evals.features import load_model
from dinov3_hf.training.checkpoints import write_manifest
from tests.testing_utils import require_package, run_in_process, save_tiny_vit


def state_of(step: int, bias: float = 0.0) -> dict:
    """A trainer's state after `step` steps, evaluated every 2."""
    log = []
    for at in range(0, step + 1, 2):
        log += [
            {"step": at, "loss": 9.0},
            {"step": at, "eval_knn_top1": 50.0 + at + bias, "eval_patch_cls_cosine": 0.5},
        ]
    return {"global_step": step, "log_history": log, "best_metric": None}


def save_run(folder, steps=(2, 4, 6), finished=False, bias=0.0):
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        save_tiny_vit(checkpoint / "teacher")
        (checkpoint / "trainer_state.json").write_text(json.dumps(state_of(step, bias)))
        write_manifest(checkpoint, step)
    if finished:
        (folder / "trainer_state.json").write_text(json.dumps(state_of(steps[-1] + 2, bias)))
        save_tiny_vit(folder / "teacher")
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_checkpoints_of_a_run_become_panels(photo, tmp_path, capsys):
    run = save_run(tmp_path / "run", steps=(2, 4, 6, 8), finished=True)
    (run / "checkpoint-4" / "manifest.json").unlink()
    weights = run / "checkpoint-6" / "teacher" / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)  # the manifest cannot tell
    output = tmp_path / "out" / "series.png"
    arguments = ("visualize", "similarity", run, photo, "-o", output, "--size", "32", "--patch", "1,2")
    status, page, error = run_in_process(capsys, *arguments)
    assert status == 0
    lines = page.splitlines()
    assert lines[0].startswith(str(output))
    assert lines[1] == "patch 1,2 of 4 rows and 6 columns"
    assert [line.split("  ")[0] for line in lines[2:]] == ["step 2", "step 8", "step 10"]
    model, processor = load_model(str(run / "teacher"))
    health = dense_health(picture_features(model, processor, [Image.open(photo)], 32)[0])
    cosine, entropy = (f"{health[name]:.3f}" for name in ("patch_cls_cosine", "patch_similarity_entropy"))
    assert lines[-1] == f"step 10  patch-CLS cosine {cosine}  patch-similarity entropy {entropy}"
    left_out = error.splitlines()
    assert left_out[0] == f"{run}/checkpoint-4 is left out: manifest.json is missing"
    assert left_out[1].startswith(f"{run}/checkpoint-6/teacher is left out: the weights of")
    assert len(left_out) == 2
    assert Image.open(output).width > 500

    status, page, _ = run_in_process(capsys, *arguments, "--max_panels", "2")
    assert [line.split("  ")[0] for line in page.splitlines()[2:]] == ["step 2", "step 10"]


def test_several_models_and_several_runs(photo, tmp_path, capsys):
    for name, patch_size in (("coarse", 16), ("fine", 8)):
        save_tiny_vit(tmp_path / name / "teacher", patch_size=patch_size)
    arguments = ("--models", tmp_path / "fine" / "teacher", photo, "-o", tmp_path / "a.png", "--size", "32")
    status, page, error = run_in_process(
        capsys, "visualize", "similarity", tmp_path / "coarse" / "teacher", *arguments
    )
    assert (status, error) == (0, "")
    assert [line.split("  ")[0] for line in page.splitlines()[1:]] == [
        "patch 1,1 of 2 rows and 3 columns",
        str(tmp_path / "coarse"),
        str(tmp_path / "fine"),
    ]
    runs = [save_run(tmp_path / name, steps=(2, 4)) for name in ("one", "two")]
    status, page, _ = run_in_process(capsys, "visualize", "similarity", runs[0], "--models", runs[1], *arguments[2:])
    assert status == 0
    assert [line.split("  ")[:2] for line in page.splitlines()[2:]] == [
        [str(run), f"step {step}"] for run in runs for step in (2, 4)
    ]


def test_which_checkpoints_are_shown(tmp_path):
    teachers = [Teacher(step, tmp_path) for step in range(1, 11)]
    assert [teacher.step for teacher in spread(teachers, 4)] == [1, 4, 7, 10]
    assert [teacher.step for teacher in spread(teachers, 1)] == [10]
    assert spread(teachers, 99) == teachers
    run = save_run(tmp_path / "run", steps=(2, 4), finished=True)
    assert [teacher.step for teacher in teachers_of_run(run)[0]] == [2, 4, 6]
    # A run that has done harm leaves the teacher of its best checkpoint as its result.
    shutil.rmtree(run / "teacher")
    shutil.copytree(run / "checkpoint-2" / "teacher", run / "teacher")
    assert [teacher.step for teacher in teachers_of_run(run)[0]] == [2, 4]


def test_series_that_cannot_be_shown(photo, tmp_path, capsys):
    run = save_run(tmp_path / "run", steps=(2,))
    save_tiny_vit(tmp_path / "model")
    hopeless = save_run(tmp_path / "hopeless", steps=(2,))
    shutil.rmtree(hopeless / "checkpoint-2" / "teacher")
    write_manifest(hopeless / "checkpoint-2", 2)
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoint-2").mkdir(parents=True)
    for arguments, says in (
        ((run, "--patch", "9,0"), "patch 9,0 is outside the grid; use rows 0 to 3 and columns 0 to 5."),
        ((run, "--size", "30"), "image size 30 is not a multiple of the patch size 8; use 24 or 32."),
        ((run, "--models", tmp_path / "model"), "model is no run with checkpoints, and"),
        ((tmp_path / "model", "--models", tmp_path / "nothing"), "there is no model folder"),
        ((hopeless,), "no checkpoint of"),
        ((unfinished,), "has no complete checkpoint"),
    ):
        size = () if "--size" in arguments else ("--size", "32")
        status, page, error = run_in_process(
            capsys, "visualize", "similarity", *arguments, photo, *size, "-o", tmp_path / "a.png"
        )
        assert (status, page) == (1, "")
        assert error.startswith("error: ") and error.count("\n") == 1
        assert says in error


def test_curves_come_from_the_newest_log(tmp_path):
    running = save_run(tmp_path / "running", steps=(2, 4))
    (tmp_path / "running" / "checkpoint-6").mkdir()  # incomplete
    finished = save_run(tmp_path / "finished", steps=(2,), finished=True, bias=10)
    first, second = read_curves([str(running), str(finished)], ["eval_knn_top1", "eval_cls_drift"])
    assert (first.name, second.name) == ("running", "finished")
    steps, values = first.numbers["eval_knn_top1"]
    assert (steps.tolist(), values.tolist()) == ([0, 2, 4], [[50, 52, 54]])
    assert second.numbers["eval_knn_top1"][1].tolist() == [[60, 62, 64]]
    assert first.numbers.keys() == {"eval_knn_top1"}
    (checkpoint,) = read_curves([str(running / "checkpoint-2")], ["eval_knn_top1"])
    assert checkpoint.numbers["eval_knn_top1"][0].tolist() == [0, 2]


def test_names_of_runs(tmp_path):
    runs = [save_run(tmp_path / place, steps=(2,)) for place in ("a/seed", "b/seed", "c")]
    metrics = ["eval_knn_top1"]
    assert [curves.name for curves in read_curves([*map(str, runs)], metrics)] == [
        "a/seed",
        "b/seed",
        f"{tmp_path.name}/c",
    ]
    longer = save_run(tmp_path / "d", steps=(2, 4), bias=2)
    named = read_curves([f"mine={runs[0]}", f"mine={longer}", str(runs[2])], metrics)
    assert [curves.name for curves in named] == ["mine", "c"]
    steps, values = named[0].numbers["eval_knn_top1"]
    assert (steps.tolist(), values.tolist()) == ([0, 2], [[50, 52], [52, 54]])  # where both were measured


@require_package("matplotlib")
def test_health_writes_a_picture_a_table_and_json(tmp_path, capsys):
    runs = [save_run(tmp_path / name, steps=(2, 4)) for name in ("one", "two")]
    for name in ("curve.png", "curve.svg"):
        status, page, error = run_in_process(capsys, "visualize", "health", *runs, "-o", tmp_path / "new" / name)
        assert (status, page, error) == (0, f"{tmp_path / 'new' / name}\n", "")
    with Image.open(tmp_path / "new" / "curve.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 50
    table = tmp_path / "curve.csv"
    status, page, _ = run_in_process(capsys, "visualize", "health", f"named={runs[0]}", "-o", table, "--json")
    assert table.read_text().splitlines()[:2] == [
        "name,run,metric,step,value",
        f"named,{runs[0]},eval_knn_top1,0,50.0",
    ]
    assert json.loads(page) == [
        {
            "name": "named",
            "runs": [str(runs[0])],
            "metrics": {
                "eval_knn_top1": {"steps": [0, 2, 4], "values": [[50.0, 52.0, 54.0]]},
                "eval_patch_cls_cosine": {"steps": [0, 2, 4], "values": [[0.5, 0.5, 0.5]]},
            },
        }
    ]


@require_package("matplotlib")
def test_curves_that_cannot_be_drawn(tmp_path, capsys):
    run = save_run(tmp_path / "run", steps=(2,))
    silent, damaged, early = (tmp_path / name for name in ("silent", "damaged", "early"))
    for folder, text in ((silent, '{"global_step": 2, "log_history": [{"step": 2, "loss": 1}]}'), (damaged, "{")):
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
    early.mkdir()
    late = tmp_path / "late"
    late.mkdir()
    entry = {"step": 7, "eval_knn_top1": 1.0}
    (late / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": [entry]}))
    output = ("-o", tmp_path / "a.png")
    for arguments, expected, says in (
        ((run,), 2, "there is nothing to write; give -o curve.png, or --json."),
        ((run, "-o", tmp_path / "a.xyz"), 2, "a.xyz does not end in the suffix of a picture that can be written"),
        ((f"name={''}", *output), 2, "name= lacks a name or a folder; write NAME=FOLDER."),
        ((tmp_path / "nowhere", *output), 1, "(there is no such folder); name the output folder of a run."),
        ((early, *output), 1, "has no trainer_state.json (it has no checkpoint yet)"),
        ((silent, *output), 1, "has no evaluations in its log yet; train it with eval_strategy: steps."),
        ((damaged, *output), 1, "trainer_state.json is damaged; name a checkpoint-N of the run instead."),
        ((f"x={run}", f"x={late}", *output), 1, "the runs called x were not evaluated at the same steps"),
    ):
        status, page, error = run_in_process(capsys, "visualize", "health", *arguments)
        assert (status, page) == (expected, "")
        assert error.startswith("error: ") and error.count("\n") == 1
        assert says in error
