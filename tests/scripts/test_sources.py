"""`training_scripts/pretrain.py` on packed images, as users run it."""

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
