"""Bytes that each rank holds of a run: what an engine shards, and everything else that lives between two steps.

    python benchmarks/sharding.py [--engines ddp fsdp2 zero3] [--ranks 1 2 4] [--preset vits16]

Each run takes two real optimizer steps with a Gram teacher and the published heads on CPU processes. *Sharded* are the
parameters of student, EMA teacher and Gram teacher and AdamW's moments, counted on the rank that holds most. *All
tensors* are the storages of every tensor that Python knows of behind the second step: master weights and buffers of
DeepSpeed too, and the batch.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile

import torch
from harness import append_results

MIB = 2**20


def worker(engine: str, preset: str, output_dir: str) -> None:
    from transformers import TrainerCallback

    from dinov3_hf.data.sources.spec import load_images
    from dinov3_hf.distributed.reductions import all_reduce_max, rank
    from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
    from dinov3_hf.recipes.pages import read_recipe
    from dinov3_hf.training.ssl_config import SSLConfig
    from dinov3_hf.training.ssl_trainer import SSLTrainer

    small = {
        "backbone": {"preset": preset, "num_register_tokens": 4},
        "global_crop_size": 32,
        "local_crop_size": 16,
        "global_batch_size": 4,
        "koleo_group_size": 2,
        "max_steps": 2,
        "lr_schedule": 1e-4,
        "teacher_temperature_schedule": 0.07,
        "freeze_last_layer_steps": 0,
        "gram_teacher": "copy",
        "precision": "fp32",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    args = SSLConfig(**{**read_recipe("vits16_im1k"), **small, "engine": engine, "output_dir": output_dir})
    trainer = SSLTrainer(DINOv3ForPreTraining(args.pretraining_config()), args, load_images("digits", split="train"))

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < 2:
                return
            gc.collect()
            parameters = list(trainer.model.parameters())
            shards = [trainer.engine.parameter_shard(p) for p in parameters]
            shards += [s for p in parameters for s in trainer.engine.moment_shards(p, trainer.adamw).values()]
            storages = {}
            for tensor in gc.get_objects():
                if isinstance(tensor, torch.Tensor) and type(tensor).__name__ != "DTensor" and not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    if storage.nbytes():
                        storages[storage.data_ptr()] = storage.nbytes()
            sharded = sum(shard.values.nbytes for shard in shards)
            counts = all_reduce_max(torch.tensor([sharded, sum(storages.values())], dtype=torch.float64))
            if rank() == 0:
                print("bytes", *counts.tolist())

    trainer.add_callback(Count())
    trainer.train()


def measure(engine: str, ranks: int, preset: str) -> tuple[float, float]:
    """MiB of the rank that holds most: sharded, all tensors."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words = [__file__, "--worker", engine, "--preset", preset, "--folder", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *launcher, *words], env=environment, capture_output=True, text=True, check=False
        )
    for line in done.stdout.splitlines():
        if line.startswith("bytes"):
            sharded, everything = map(float, line.split()[1:])
            return sharded / MIB, everything / MIB
    raise RuntimeError(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2", "zero3"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--preset", default="vits16")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.preset, options.folder)
        return
    rows = []
    for engine in options.engines:
        alone = None
        for ranks in options.ranks:
            sharded, everything = measure(engine, ranks, options.preset)
            alone = alone or sharded
            rows.append([engine, str(ranks), f"{sharded:,.0f}", f"{sharded / alone:.3f}", f"{everything:,.0f}"])
    title = f"Bytes that a rank holds of a run, {options.preset} with the heads of vits16_im1k"
    header = ["engine", "ranks", "sharded MiB", "/ 1 rank", "all tensors MiB"]
    append_results(title, header, rows, ["deepspeed", "accelerate"])


if __name__ == "__main__":
    main()
