"""A distillation, from its recipe to the folders of the students."""

from pathlib import Path

from transformers import set_seed

from dinov3_hf.cli.ssl_run import check_images_are_named, open_images, train_to_the_end
from dinov3_hf.distributed.student_ranks import idle_share
from dinov3_hf.training.distillation_config import DistillationConfig
from dinov3_hf.training.distillation_teacher import load_teacher
from dinov3_hf.training.distillation_trainer import DistillationTrainer, of_student
from dinov3_hf.training.evaluation import accuracies


def distil(args: DistillationConfig) -> None:
    """
    Train the students of the recipe, and say what came of it.

    Args:
        args: the recipe, with `teacher` and `train_data`.

    Raises:
        ArgumentError: there are no images to learn from.
        OSError: a folder is missing or cannot be written.
        ValueError: images, teacher or checkpoint are not what the recipe needs.
    """
    check_images_are_named(args)
    train_images, eval_images = open_images(args, args.description.num_channels)
    set_seed(args.seed)
    teacher = load_teacher(
        args.description, bf16=args.bf16, attn_implementation=args.attn_implementation, compiled=args.torch_compile
    )
    trainer = DistillationTrainer(teacher, args, train_images, eval_images)
    if trainer.is_world_process_zero():
        print(describe(trainer), flush=True)
    train_to_the_end(trainer)
    outcome = trainer.save_students(Path(args.output_dir or "."))
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        lines = [line for name in args.students for line in accuracies(of_student(name, history), name)]
        print("\n".join([*lines, outcome]))


def describe(trainer: DistillationTrainer) -> str:
    """In a few lines who learns what from whom, and where."""
    args, ranks = trainer.args, trainer.args.split
    lines = [f"Teacher {args.description.source}: {args.description.summary}; objective {args.objective}."]
    for name, student in args.student_args.items():
        backbone = student.backbone_config()
        width = backbone.hidden_size
        where = "" if ranks is None else f", on {ranks[name]} of {args.world_size} ranks"
        start = "" if student.start_from is None else f", from {student.start_from}"
        lines.append(f"  {name}: {backbone.model_type}, width {width}{start}{where}")
    if ranks is None and len(args.students) > 1:
        lines.append("The students take turns on the teacher's answers.")
    if trainer.student_seconds is not None and ranks is not None:
        share = idle_share(trainer.student_seconds, ranks)
        times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in trainer.student_seconds.items())
        lines.append(f"Measured for a step on one rank: {times}; {share:.0%} of the ranks' time is idle.")
    return "\n".join(lines)
