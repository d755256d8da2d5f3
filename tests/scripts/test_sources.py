"""`training_scripts/pretrain.py` on packed images, as users run it."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.data.sources.writing import write_folder, write_parquet, write_tar
from tests.scripts.test_pretrain import RECIPE, logged, succeed
from tests.testing_utils import require_package

pytestmark = [require_package("datasets"), require_package("pyarrow")]


@pytest.mark.slow
def test_data_recipe_with_a_stream_and_labelled_parquet(tmp_path: Path):
    write_folder(tmp_path / "photos", range(10))
    write_tar(tmp_path / "shards" / "0.tar", range(20, 30))
    write_parquet(tmp_path / "labelled_train.parquet", range(30))
    write_parquet(tmp_path / "labelled_val.parquet", range(30, 36))
    (tmp_path / "data.yaml").write_text(
        "sources:\n"
        "  - {data: photos, weight: 0.5}\n"
        "  - {data: shards/*.tar, weight: 0.25, alone: true}\n"
        "  - {data: 'stream:labelled_train.parquet', weight: 0.25}\n"
    )
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE + "eval_strategy: steps\neval_steps: 4\ndataloader_num_workers: 1\n")
    data = ("--train_data", tmp_path / "data.yaml", "--eval_data", f"{tmp_path}/labelled_*.parquet")
    printed = succeed(recipe, *data, "--output_dir", tmp_path / "run")
    assert "kNN top-1 accuracy of the teacher at step" in printed
    assert "Generating" not in printed  # no progress bars of the libraries
    assert len(logged(tmp_path / "run" / "checkpoint-4")) == 4


@pytest.mark.slow
def test_a_stream_on_two_processes_and_resumed_on_one(tmp_path: Path):
    for shard in range(4):
        write_tar(tmp_path / "shards" / f"{shard}.tar", range(20 * shard, 20 * shard + 20))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("global_batch_size: 8", "global_batch_size: 16") + "dataloader_num_workers: 1\n")
    data = ("--train_data", f"stream:{tmp_path}/shards/*.tar")
    succeed(recipe, *data, "--output_dir", tmp_path / "one")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    succeed(recipe, *data, "--output_dir", tmp_path / "two", launcher=torchrun)
    assert len(list((tmp_path / "two" / "checkpoint-2" / "streams").iterdir())) == 2
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    succeed(recipe, *data, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "last")
    one, two, resumed = (
        [entry["loss"] for entry in logged(tmp_path / run / "checkpoint-4")] for run in ("one", "two", "resumed")
    )
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)
    assert resumed == pytest.approx(one, rel=1e-5)
