"""Gram anchoring: go on with a pre-training run, and keep its patch features as good as they were.

    accelerate launch training_scripts/gram_anchor.py --from runs/a
    accelerate launch training_scripts/gram_anchor.py vitl16_gram_anchor --from runs/vitl16_im1k --train_data photos/

RUN, given as --from, is the output folder of a finished or running run, or one of its checkpoint-N: student, teacher,
heads and AdamW's moments are taken from there, nothing is written into it. Without a RECIPE the stage follows the
recipe of the run, with the changes of the published stage 2; OUTPUT_DIR is then RUN-gram. A recipe's name or a path to
a YAML file may come first, `--field value` changes one of its fields, `--help` lists them. The same command with
`--resume_from_checkpoint last` goes on with the stage itself.
"""

import sys

from dinov3_hf.cli.errors import run


def main(argv: list[str]) -> None:
    from dinov3_hf.errors import ArgumentError
    from dinov3_hf.training.arguments import parse_arguments
    from dinov3_hf.training.ssl_config import SSLConfig
    from dinov3_hf.training.stages import from_run, gram_anchoring

    args = parse_arguments(
        SSLConfig, argv, prog="gram_anchor.py", description=__doc__, default_recipe=from_run(gram_anchoring)
    )
    if args.start_from is None:
        raise ArgumentError("there is nothing to start from; name an earlier run, for example --from runs/a.")
    if args.gram_teacher is None:
        raise ArgumentError("gram_teacher is not set; set it, for example --gram_teacher copy.")

    from dinov3_hf.cli.ssl_run import run_recipe

    run_recipe(args)


if __name__ == "__main__":
    run(main, sys.argv[1:])
