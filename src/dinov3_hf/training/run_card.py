"""What a run says of itself in the model card of its teacher, or of a student of a distillation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from dinov3_hf.data.crop_sizes import CropSizes
from dinov3_hf.data.sources.arrow import HUB_ID
from dinov3_hf.hub.model_card import table, write_model_card
from dinov3_hf.training.continued_config import ContinuedConfig
from dinov3_hf.training.course import LogHistory, course, markdown
from dinov3_hf.training.distillation_teacher import read_teacher
from dinov3_hf.training.evaluation import described
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.student_config import StudentConfig
from dinov3_hf.yaml_text import dump_yaml

PROVENANCE = "Trained without labels, by the objective of DINOv3, with `dinov3_hf`."
_STOPPED = (
    "This student was given up at step {:,}: its loss was not finite three times in a row. These are the weights of "
    "the last step before, which may be spoilt already; distil it again with a lower learning rate."
)
CARD_ROWS = 5  # of the course of a continued run
# Fields that may name a folder of this machine.
_PLACES = ("start_from", "gram_teacher", "model", "teacher")
# Objective of a distillation -> what a student predicts.
_OBJECTIVES = {"prototypes": "the prototypes of its heads", "features": "its features"}
# Metric of a run -> what the Hub calls it, as a share of 1.
_ACCURACIES = {"eval_knn_top1": "kNN top-1 accuracy", "eval_knn_top5": "kNN top-5 accuracy"}


def write_run_card(
    folder: Path, args: SSLConfig, step: int, log_history: LogHistory, stopped_at: int | None = None
) -> None:
    """
    Write the model card of a run's teacher, or of a student of a distillation.

    Args:
        folder: the model's, otherwise complete.
        args: the recipe, or what it says of the student.
        step: optimizer steps taken.
        log_history: of the run; the card shows the newest losses and the newest evaluation in it.
        stopped_at: of a student, the step in which it was given up.
    """
    write_model_card(
        folder,
        title=args.run_name or Path(args.output_dir or folder).name,
        license=args.license,
        provenance=_provenance(args),
        sections=({} if stopped_at is None else {"Stopped": _STOPPED.format(stopped_at)})
        | card_sections(args, step, log_history),
        results=card_results(args, log_history),
        datasets=card_datasets(args),
    )


def _provenance(args: SSLConfig) -> str:
    if not isinstance(args, StudentConfig):
        return PROVENANCE
    return f"Distilled without labels from {model_name(args.teacher)}, with `dinov3_hf`."


def card_sections(args: SSLConfig, step: int, log_history: LogHistory) -> dict[str, str]:
    """What the card says of training and evaluation, heading -> Markdown; arguments as in `write_run_card`."""
    facts: dict[str, object] = {
        "images": data_name(args.train_data),
        "images seen": f"{step * args.global_batch_size:,}",
        "optimizer steps": f"{step:,}",
        "global batch": args.global_batch_size,
        "crops": "; ".join(_crops(sizes, args.num_local_crops) for sizes in args.crop_size_mix().sizes),
    }
    if isinstance(args, StudentConfig):
        facts = {**_lesson(args), **facts}
    elif args.start_from is not None:
        facts = {"started from": f"{data_name(args.start_from)} ({args.start_with})", **facts}
    if isinstance(args, ContinuedConfig):
        facts = {"started from": data_name(args.model), **facts}
    losses = _newest(log_history, "loss")
    facts |= {_spelled(name): f"{losses[name]:.4f}" for name in sorted(losses) if name.partition("/")[0] == "loss"}
    fields = args.recipe_alone() if isinstance(args, StudentConfig) else args.result_fields(args.recipe())
    recipe = dump_yaml({**_without_folders(fields), "train_data": data_name(args.train_data)})
    details = f"<details><summary>Recipe</summary>\n\n```yaml\n{recipe.rstrip()}\n```\n\n</details>"
    sections = {"Training": f"{table(facts)}\n\n{details}"}
    evaluations = [shown for shown in map(described, log_history) if shown]
    if evaluations:
        images = {"images": data_name(args.eval_data)} if args.eval_data is not None else {}
        sections["Evaluation"] = table({**images, **evaluations[-1]})
        if isinstance(args, ContinuedConfig):
            sections["Before, during and after"] = markdown(*course(log_history, CARD_ROWS))
    return sections


def _without_folders(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_folders(value)
        if isinstance(value, Mapping)
        else data_name(value)
        if name in _PLACES and value is not None
        else value
        for name, value in fields.items()
    }


def _lesson(args: StudentConfig) -> dict[str, object]:
    """From whom a student has learned, and what."""
    teacher, scale = read_teacher(args.teacher), args.teacher_to_student_scale
    facts: dict[str, object] = {
        "distilled from": f"{model_name(args.teacher)} ({teacher.summary})",
        "predicts": _OBJECTIVES[args.objective],
    }
    if scale != 1:
        facts["crops of the teacher"] = f"2 x {int(args.global_crop_size * scale)} px"
    return facts if args.start_from is None else {"started from": data_name(args.start_from), **facts}


def _crops(sizes: CropSizes, num_local_crops: int) -> str:
    share = "" if sizes.probability == 1 else f" in {sizes.probability:.0%} of the steps"
    return f"2 x {sizes.global_crop_size} px, {num_local_crops} x {sizes.local_crop_size} px{share}"


def card_results(args: SSLConfig, log_history: LogHistory) -> list[EvalResult]:
    """The accuracies of the newest evaluation, for the front matter; none where nobody said on which images."""
    if args.eval_data is None:
        return []
    newest = _newest(log_history, "eval_knn_top1")
    name = data_name(args.eval_data)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(newest[metric] / 100, 4),
        )
        for metric, label in _ACCURACIES.items()
        if metric in newest
    ]


def card_datasets(args: SSLConfig) -> list[str]:
    """Data sets of the Hub that the run learns from."""
    name = data_name(args.train_data)
    return [name] if "/" in name else []


def model_name(model: str | None) -> str:
    """What to call a model in public: as `data_name`, and the teacher of a run by the name of the run."""
    path = Path(model or "")
    return (
        f"the teacher of run {path.parent.name}" if path.name == "teacher" and path.parent.name else data_name(model)
    )


def data_name(data: str | None) -> str:
    """
    What to call images in public: a data set of the Hub by its id, a local one without the folders that it lies in.

    Args:
        data: as `train_data` names it.
    """
    if data is None:
        return "not named"
    path = Path(data.removeprefix("stream:")).expanduser()
    hub_id = HUB_ID.fullmatch(str(path))
    if hub_id and not path.exists() and not path.parent.is_dir():
        return hub_id["repository"]
    return path.name


def _newest(log_history: LogHistory, name: str) -> Mapping[str, Any]:
    return next((entry for entry in reversed(log_history) if name in entry), {})


def _spelled(name: str) -> str:
    term = name.partition("/")[2]
    return f"last loss, {term}" if term else "last loss"
