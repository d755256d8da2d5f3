"""Pre-train a DINOv3 backbone on images, without labels.

    accelerate launch training_scripts/pretrain.py quickstart_digits --output_dir runs/quickstart
    accelerate launch training_scripts/pretrain.py vitl16_im1k --train_data photos/ --output_dir runs/vitl16

A recipe's name or a path to a YAML file comes first, `--field value` changes one of its fields, `--help` lists them.
The trained teacher is an ordinary model folder in OUTPUT_DIR/teacher.
"""

import sys

from dinov3_hf.cli.errors import run


def main(argv: list[str]) -> None:
    from dinov3_hf.errors import ArgumentError
    from dinov3_hf.training.arguments import parse_arguments
    from dinov3_hf.training.gram_config import COPY
    from dinov3_hf.training.ssl_config import SSLConfig

    args = parse_arguments(SSLConfig, argv, prog="pretrain.py", description=__doc__)
    if args.gram_teacher == COPY and args.gram_start_step == 0 and args.start_from is None:
        raise ArgumentError(
            "gram_teacher copy would copy random weights at step 0; start from an earlier run, for example "
            "gram_anchor.py --from runs/a, or set gram_start_step."
        )

    from dinov3_hf.cli.ssl_run import run_recipe

    run_recipe(args)


if __name__ == "__main__":
    run(main, sys.argv[1:])
