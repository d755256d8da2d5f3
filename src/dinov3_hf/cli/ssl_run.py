"""A self-supervised run, from its recipe to the folder of the trained teacher: what its training scripts share."""

from pathlib import Path

from transformers import IntervalStrategy, set_seed
from transformers.utils import logging

from dinov3_hf.cli.splits import EvaluationImages, evaluation_images
from dinov3_hf.data.sources.base import ImageSource
from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.continued import ContinuedTrainer, continued_model
from dinov3_hf.training.continued_config import ContinuedConfig
from dinov3_hf.training.evaluation import accuracies, is_evaluation
from dinov3_hf.training.resume import starts_afresh
from dinov3_hf.training.run_trainer import RunTrainer
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.ssl_trainer import SSLTrainer
from dinov3_hf.training.starting_point import find_start


def run_recipe(args: SSLConfig) -> None:
    """
    Train as the recipe says, and say what came of it.

    Args:
        args: the recipe, with `train_data`.

    Raises:
        ArgumentError: there are no images to learn from.
        OSError: a folder is missing or cannot be written.
        ValueError: images, start or checkpoint are not what the recipe needs.
    """
    check_images_are_named(args)
    start = None
    if (
        args.start_from is not None
        and starts_afresh(args.resume_from_checkpoint, Path(args.output_dir or "."))
        and args.process_index == 0
    ):
        start = find_start(args)
        print(start.describe(), flush=True)
    train_images, eval_images = open_images(args, args.backbone_config().num_channels)
    set_seed(args.seed)
    model = DINOv3ForPreTraining(args.pretraining_config())
    trainer = SSLTrainer(model, args, train_images, eval_images, start=start)
    train_to_the_end(trainer)
    teacher = Path(args.output_dir or ".") / "teacher"
    outcome = trainer.save_outcome(teacher)
    if trainer.is_world_process_zero():
        print("\n".join([*accuracies(trainer.state.log_history), outcome]))
        if args.push_to_hub:
            print(f"and at {trainer.push_teacher(teacher)}")


def continue_pretraining(args: ContinuedConfig) -> None:
    """
    Let the model of the recipe go on learning, and say how it was before, during and after.

    Args:
        args: the recipe, with `train_data`.

    Raises:
        ArgumentError: there are no images to learn from.
        OSError: a folder is missing or cannot be written.
        RuntimeError: training has done harm, and nothing on the way was as good as the model.
        ValueError: images, model or checkpoint are not what the recipe needs.
    """
    check_images_are_named(args)
    train_images, eval_images = open_images(args, args.backbone_config().num_channels)
    set_seed(args.seed)
    trainer = ContinuedTrainer(continued_model(args), args, train_images, eval_images)
    if trainer.is_world_process_zero():
        print(trainer.describe_start(), flush=True)
    train_to_the_end(trainer)
    teacher = Path(args.output_dir or ".") / "teacher"
    if trainer.is_world_process_zero():
        trainer.show_course()
    outcome = trainer.save_outcome(teacher)
    if trainer.is_world_process_zero():
        print(outcome)
        if args.push_to_hub:
            print(f"and at {trainer.push_teacher(teacher)}")


def check_images_are_named(args: SSLConfig) -> None:
    """Raise ArgumentError for a recipe without `train_data`."""
    if args.train_data is None:
        raise ArgumentError("train_data is not set; name the images to learn from, for example --train_data photos/.")


def open_images(args: SSLConfig, num_channels: int) -> tuple[ImageSource, EvaluationImages | None]:
    """The images of a recipe: to learn from, and to measure with."""
    logging.disable_progress_bar()  # of reading and writing model files; training keeps its own
    train_images = load_images(args.train_data or "", split="train", num_channels=num_channels)
    if args.eval_data is None:
        return train_images, None
    return train_images, evaluation_images(
        args.eval_data, num_channels, args.global_crop_size, args.eval_leave_one_out
    )


def train_to_the_end(trainer: RunTrainer) -> None:
    """Train to the end of the run, look at what has come of it, and write down the whole log."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    evaluated = {entry["step"] for entry in trainer.state.log_history if is_evaluation(entry)}
    evaluates = args.eval_data is not None or args.eval_strategy != IntervalStrategy.NO
    if evaluates and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_state()  # trainer_state.json
