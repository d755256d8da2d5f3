"""High-resolution adaptation: a trained teacher learns to see larger images, in crops of several sizes.

    accelerate launch training_scripts/adapt_highres.py --from runs/a-gram
    accelerate launch training_scripts/adapt_highres.py vitl16_high_res --from runs/a-gram --train_data photos/

RUN, given as --from, is the output folder of a run, one of its checkpoint-N, or a teacher/ with its heads: that
teacher becomes student and teacher of the stage, with a fresh optimizer; nothing is written into it. Without a RECIPE
the stage follows the recipe of the run, with the changes of the published stage 3; OUTPUT_DIR is then RUN-highres. A
recipe's name or a path to a YAML file may come first, `--field value` changes one of its fields, `--help` lists them.
The same command with `--resume_from_checkpoint last` goes on with the stage itself.
"""

import sys

from dinov3_hf.cli.errors import run


def main(argv: list[str]) -> None:
    from dinov3_hf.errors import ArgumentError
    from dinov3_hf.training.arguments import parse_arguments
    from dinov3_hf.training.ssl_config import SSLConfig
    from dinov3_hf.training.stages import from_run, high_resolution

    args = parse_arguments(
        SSLConfig, argv, prog="adapt_highres.py", description=__doc__, default_recipe=from_run(high_resolution)
    )
    if args.start_from is None:
        raise ArgumentError("there is nothing to start from; name an earlier run, for example --from runs/a-gram.")

    from dinov3_hf.cli.ssl_run import run_recipe

    run_recipe(args)


if __name__ == "__main__":
    run(main, sys.argv[1:])
