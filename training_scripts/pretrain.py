"""Pre-train a DINOv3 backbone on images, without labels.

    accelerate launch training_scripts/pretrain.py quickstart_digits --output_dir runs/quickstart
    accelerate launch training_scripts/pretrain.py vitl16_im1k --train_data photos/ --output_dir runs/vitl16

A recipe's name or a path to a YAML file comes first, `--field value` changes one of its fields, `--help` lists them.
The trained teacher is an ordinary model folder in OUTPUT_DIR/teacher.
"""

import sys
from pathlib import Path

from dinov3_hf.cli.errors import run


def main(argv: list[str]) -> None:
    from dinov3_hf.errors import ArgumentError
    from dinov3_hf.training.arguments import parse_arguments
    from dinov3_hf.training.ssl_config import SSLConfig

    args = parse_arguments(SSLConfig, argv, prog="pretrain.py", description=__doc__)
    if args.train_data is None:
        raise ArgumentError("train_data is not set; name the images to learn from, for example --train_data photos/.")

    from transformers import IntervalStrategy, set_seed
    from transformers.utils import logging

    from dinov3_hf.cli.splits import labelled_splits
    from dinov3_hf.data.sources.spec import load_images
    from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
    from dinov3_hf.training.evaluation import described
    from dinov3_hf.training.ssl_trainer import SSLTrainer

    logging.disable_progress_bar()  # of reading and writing model files; training keeps its own
    num_channels = args.backbone_config().num_channels
    train_images = load_images(args.train_data, split="train", num_channels=num_channels)
    eval_images = None
    if args.eval_data is not None:
        eval_images = labelled_splits(args.eval_data, num_channels, args.global_crop_size)

    set_seed(args.seed)
    model = DINOv3ForPreTraining(args.pretraining_config())
    trainer = SSLTrainer(model, args, train_images, eval_images)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    evaluated = {entry["step"] for entry in trainer.state.log_history if described(entry)}
    evaluates = eval_images is not None or args.eval_strategy != IntervalStrategy.NO
    if evaluates and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_state()  # the whole log, trainer_state.json
    if trainer.is_world_process_zero():
        teacher = Path(args.output_dir) / "teacher"
        trainer.save_teacher(teacher)
        print(summary(trainer.state.log_history, teacher))
        if args.push_to_hub:
            print(f"and at {trainer.push_teacher(teacher)}")


def summary(log_history: list[dict[str, float]], teacher: Path) -> str:
    accuracies = [(entry["step"], entry["eval_knn_top1"]) for entry in log_history if "eval_knn_top1" in entry]
    lines = [f"kNN top-1 accuracy of the teacher at step {step:>6,}: {value:5.1f} %" for step, value in accuracies]
    return "\n".join([*lines, f"The trained teacher is in {teacher}"])


if __name__ == "__main__":
    run(main, sys.argv[1:])
