"""From a folder that `transformers` opens to a checkpoint of the original implementation.

    python conversion/convert_hf_to_native.py dinov3-vits16 dinov3_vits16.pth

Takes the options of `dinov3-hf convert`: `--arch`, `--json`.
"""

from dinov3_hf.cli.errors import run
from dinov3_hf.cli.main import parse_and_run

if __name__ == "__main__":
    run(lambda arguments: parse_and_run(["convert", "--to", "native", *arguments]))
