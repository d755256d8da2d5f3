"""Streams in the Trainer: a resumed run goes on with the images that would have come, failing shards are listed."""

import json
import shutil

import pytest
import torch

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.ssl_trainer import SSLTrainer
from dinov3_hf.training.stream_progress import load_progress, save_progress
from dinov3_hf.training.unreadable_images import REPORT
from tests.data.sources.conftest import own_caches  # noqa: F401
from tests.data.sources.writing import write_parquet, write_tar
from tests.testing_utils import require_package
from tests.training.test_resume import log_of
from tests.training.test_ssl_trainer import make_args

pytestmark = [require_package("datasets"), require_package("pyarrow")]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_goes_on_in_the_middle_of_a_stream(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("dinov3_hf.data.sources.lanes.RETRY_WAITS", (0.01,))
    data = f"{tmp_path}/{{0..4}}.{kind}"
    for shard in range(5):
        write = write_tar if kind == "tar" else write_parquet
        write(tmp_path / f"{shard}.{kind}", range(12 * shard, 12 * shard + 12))

    def trainer() -> SSLTrainer:
        args = make_args(tmp_path / "run", save_strategy="steps", save_steps=3)
        torch.manual_seed(0)
        images = load_images(f"stream:{data}", "train")
        images.shuffle_buffer = 8
        (tmp_path / f"3.{kind}").unlink()
        return SSLTrainer(DINOv3ForPreTraining(args.pretraining_config()), args, images)

    whole = trainer()
    whole.train()
    report = (tmp_path / "run" / REPORT).read_text()
    assert json.loads(report)["name"] == f"{tmp_path}/3.{kind}"
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert [entry["lane"] for entry in load_progress(tmp_path / "run" / "checkpoint-3")] == [0, 1]
    (tmp_path / f"3.{kind}").touch()  # for the pattern
    resumed = trainer()
    resumed.train(resume_from_checkpoint="last")
    assert len(log_of(whole)) == 6
    assert log_of(resumed) == log_of(whole)
    assert len((tmp_path / "run" / REPORT).read_text().splitlines()) == 1


def test_what_ranks_have_read_is_kept_side_by_side(tmp_path):
    ours, theirs = ([{"source": 0, "lane": lane, "rows": [3, 0], "failed": [[1, "gone"]]}] for lane in (0, 1))
    save_progress(tmp_path, 1, theirs)
    save_progress(tmp_path, 0, ours)
    assert load_progress(tmp_path) == [*ours, *theirs]
    save_progress(tmp_path / "rows", 0, [])
    assert load_progress(tmp_path / "rows") == []
    assert not (tmp_path / "rows").exists()
