"""Distil a trained model into one or more smaller ones, which learn from the same answers of the teacher.

    accelerate launch training_scripts/distill.py distill_small_cpu --teacher runs/quickstart/teacher
    accelerate launch training_scripts/distill.py distill_family --teacher runs/c/teacher --train_data photos/

A recipe's name or a path to a YAML file comes first, `--field value` changes one of its fields, `--help` lists them;
`--students.vits16.lr_schedule.peak 1e-4` reaches into the block of one student. The teacher is any model folder or
OWNER/NAME on the Hub. Each student is an ordinary model folder in OUTPUT_DIR/NAME.
"""

import sys

from dinov3_hf.cli.errors import run


def main(argv: list[str]) -> None:
    from dinov3_hf.training.arguments import parse_arguments
    from dinov3_hf.training.distillation_config import DistillationConfig

    args = parse_arguments(DistillationConfig, argv, prog="distill.py", description=__doc__)

    from dinov3_hf.cli.distillation_run import distil

    distil(args)


if __name__ == "__main__":
    run(main, sys.argv[1:])
