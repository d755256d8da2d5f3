"""`training_scripts/ablate.py` as users run it."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from dinov3_hf.cli.errors import run as run_program
from dinov3_hf.training.ablation import read_plan
from dinov3_hf.training.arguments import split_words
from tests.testing_utils import REPOSITORY, run_python

SCRIPT = REPOSITORY / "training_scripts" / "ablate.py"

PLAN = """
recipe: quickstart_digits
output_dir: OUTPUT
seeds: [0, 1]
base: {max_steps: 3, global_batch_size: 8, koleo_group_size: 8, dataloader_num_workers: 0, use_cpu: true}
variants:
  no_koleo: {koleo_weight: 0}
  broken: {train_data: nowhere/at/all, eval_data: digits}
"""


def scores(folder: Path) -> dict[str, list[dict[str, float]]]:
    table = json.loads((folder / "table.json").read_text())
    return {setting["name"]: setting["runs"] for setting in table["settings"]}


@pytest.mark.slow
def test_a_plan_is_run_and_taken_up_again(tmp_path):
    plan, runs = tmp_path / "plan.yaml", tmp_path / "runs"
    plan.write_text(PLAN.replace("OUTPUT", str(runs)))
    first = run_python(SCRIPT, plan, "--jobs", "2", timeout=600)
    # One setting fails; the others do not mind.
    assert first.returncode == 1
    assert first.stderr.strip().splitlines()[-1].startswith("error: 2 of 6 runs failed")
    assert "Traceback" not in first.stdout + first.stderr
    assert first.stdout.startswith("6 runs, 6 to do\n")
    assert "broken, seed 0: failed, error: " in first.stdout and "nowhere/at/all" in first.stdout
    found = scores(runs)
    assert list(found) == ["full", "no_koleo"]
    assert [run["seed"] for run in found["full"]] == [0, 1]
    for setting in ("full", "no_koleo"):
        for run in found[setting]:
            state = json.loads((runs / setting / f"seed-{run['seed']}" / "trainer_state.json").read_text())
            accuracies = [entry["eval_knn_top1"] for entry in state["log_history"] if "eval_knn_top1" in entry]
            assert (run["untrained"], run["trained"]) == (accuracies[0], accuracies[-1])
    # Seeds change the network; without KoLeo the same network begins.
    assert found["full"][0]["untrained"] != found["full"][1]["untrained"]
    assert [run["untrained"] for run in found["no_koleo"]] == [run["untrained"] for run in found["full"]]
    assert "| no_koleo | `koleo_weight: 0` | 2 |" in (runs / "table.md").read_text()

    plan.write_text(plan.read_text().replace("  broken: {train_data: nowhere/at/all, eval_data: digits}\n", ""))
    (runs / "full" / "seed-1" / "result.json").unlink()  # as if it had been interrupted
    second = run_python(SCRIPT, plan, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("4 runs, 1 to do\n[1/1] full, seed 1: ")
    assert scores(runs) == found


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("ablate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ablate(module):
    return lambda *words: run_program(module.main, list(map(str, words)))


def test_a_run_that_leaves_no_scores_has_failed(module, tmp_path, monkeypatch):
    script = tmp_path / "stops_at_once.py"
    script.write_text("")
    monkeypatch.setattr(module, "TRAINING_SCRIPT", script)
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.replace("OUTPUT", str(tmp_path / "runs")))
    run = read_plan(str(plan), {}).runs()[0]
    assert "trainer_state.json" in module.train(run)
    assert not (run.folder / "result.json").exists()


def test_without_words_it_says_what_a_plan_is(ablate, capsys):
    ablate()
    assert "variants" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("--jobs", "2"), 2, "needs a plan"),
        (("nowhere.yaml",), 2, "nowhere.yaml cannot be read"),
        (("PLAN", "--jobs", "none"), 2, "--jobs none"),
        (("PLAN", "--max_step", "3"), 2, "did you mean max_steps"),
        (("PLAN", "--koleo_group_size", "3"), 1, "variant full: koleo_group_size 3"),
    ],
)
def test_bad_input_gets_one_line_and_a_status(ablate, capsys, tmp_path, words, status, says):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.replace("OUTPUT", str(tmp_path / "runs")))
    words = [plan if word == "PLAN" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        ablate(*words)
    assert ended.value.code == status
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not (tmp_path / "runs").exists()


def test_the_commands_of_the_page_are_understood():
    page = (REPOSITORY / "docs" / "ablations.md").read_text()
    lines = [line.partition("ablate.py ")[2] for line in page.splitlines() if line.startswith("python ")]
    assert len(lines) >= 2
    for line in lines:
        path, overrides = split_words(shlex.split(line))
        changes = {".".join(override.path): override.text for override in overrides}
        changes.pop("jobs", None)
        assert len(read_plan(str(REPOSITORY / path), changes).runs()) >= 24
