"""From a checkpoint of the original implementation to a folder that `transformers` opens.

    python conversion/convert_native_to_hf.py dinov3_vits16_pretrain_lvd1689m.pth dinov3-vits16

Takes the options of `dinov3-hf convert`: `--arch`, `--branch` of a training checkpoint, `--max_shard_size`, `--json`.
"""

from dinov3_hf.cli.errors import run
from dinov3_hf.cli.main import parse_and_run

if __name__ == "__main__":
    run(lambda arguments: parse_and_run(["convert", "--to", "hf", *arguments]))
