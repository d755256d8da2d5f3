"""Let a released DINOv3 backbone go on learning from images of your own, without labels and without ruining it.

    accelerate launch training_scripts/continue_pretraining.py --model facebook/dinov3-vitb16-pretrain-lvd1689m \\
        --train_data xrays/ --num_channels 1 --eval_data labelled_xrays/

The recipe is continue_pretraining unless another one comes first; `--field value` changes one of its fields, `--help`
lists them. Fresh heads learn first, then the backbone joins in; the labelled images, if there are any, and the health
of dense features are watched all along, and a run that does harm stops. The trained teacher is an ordinary model
folder in OUTPUT_DIR/teacher.
"""

import sys

from dinov3_hf.cli.errors import run

RECIPE = "continue_pretraining"


def main(argv: list[str]) -> None:
    from dinov3_hf.recipes.pages import read_recipe
    from dinov3_hf.training.arguments import parse_arguments
    from dinov3_hf.training.continued_config import ContinuedConfig

    args = parse_arguments(
        ContinuedConfig,
        argv,
        prog="continue_pretraining.py",
        description=__doc__,
        default_recipe=lambda given: (RECIPE, read_recipe(RECIPE)),
    )

    from dinov3_hf.cli.ssl_run import continue_pretraining

    continue_pretraining(args)


if __name__ == "__main__":
    run(main, sys.argv[1:])
