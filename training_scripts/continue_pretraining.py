"""Let a released DINOv3 backbone go on learning from images of your own, without labels and without ruining it.

    accelerate launch training_scripts/continue_pretraining.py --model facebook/dinov3-vitb16-pretrain-lvd1689m \\
        --train_data xrays/ --num_channels 1 --eval_data labelled_xrays/

The recipe is continue_pretraining unless another one comes first; `--field value` changes one of its fields, `--help`
lists them. Fresh heads learn first, then the backbone joins in; the labelled images, if there are any, and the health
of dense features are watched all along, and a run that does harm stops. The trained teacher is an ordinary model
folder in OUTPUT_DIR/teacher.
"""

import sys
from pathlib import Path

from dinov3_hf.cli.errors import run

RECIPE = "continue_pretraining"


def main(argv: list[str]) -> None:
    from dinov3_hf.errors import ArgumentError
    from dinov3_hf.training.arguments import parse_arguments, split_words
    from dinov3_hf.training.continued_config import ContinuedConfig

    asks_for_help = "--help" in argv or "-h" in argv
    words = argv if asks_for_help or split_words(argv)[0] is not None else [RECIPE, *argv]
    args = parse_arguments(ContinuedConfig, words, prog="continue_pretraining.py", description=__doc__)
    if args.train_data is None:
        raise ArgumentError("train_data is not set; name the images to learn from, for example --train_data photos/.")

    from transformers import set_seed
    from transformers.utils import logging

    from dinov3_hf.cli.splits import evaluation_images
    from dinov3_hf.data.sources.spec import load_images
    from dinov3_hf.training.continued import ContinuedTrainer, continued_model
    from dinov3_hf.training.evaluation import described

    logging.disable_progress_bar()  # of reading and writing model files; training keeps its own
    num_channels = args.backbone_config().num_channels
    train_images = load_images(args.train_data, split="train", num_channels=num_channels)
    eval_images = None
    if args.eval_data is not None:
        eval_images = evaluation_images(args.eval_data, num_channels, args.global_crop_size, args.eval_leave_one_out)

    set_seed(args.seed)
    trainer = ContinuedTrainer(continued_model(args), args, train_images, eval_images)
    if trainer.is_world_process_zero():
        print(trainer.describe_start(), flush=True)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    evaluated = {entry["step"] for entry in trainer.state.log_history if described(entry)}
    if trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_state()  # the whole log, trainer_state.json
    if trainer.is_world_process_zero():
        teacher = Path(args.output_dir) / "teacher"
        trainer.show_course()
        print(trainer.save_outcome(teacher))
        if args.push_to_hub:
            print(f"and at {trainer.push_teacher(teacher)}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
