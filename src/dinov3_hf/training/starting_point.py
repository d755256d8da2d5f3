"""Where a stage starts: the networks, and AdamW's moments, that an earlier run left behind.

| `start_with` | what is taken | from |
|---|---|---|
| state | student, teacher, heads, AdamW's moments | a checkpoint-N; of a run the newest complete one |
| teacher | the teacher's backbone and heads, for student and teacher both | teacher/ of a run or of a checkpoint-N |

A stage is a run of its own: steps count from 0, and every number is the new recipe's, those of the optimizer too. The
published Gram anchoring, which goes on counting at a million steps, is `state` with a million taken off each number;
the published high-resolution stage is `teacher`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from dinov3_hf.distributed.engine import PARAMETER, Engine
from dinov3_hf.distributed.pieces import StateReader
from dinov3_hf.hub.architecture import WEIGHTS, open_safetensors, read_architecture, read_json
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES, backbone_config_from_dict
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining, SSLNetwork
from dinov3_hf.models.same_network import network_differences
from dinov3_hf.training.checkpoint_writer import STATE
from dinov3_hf.training.checkpoints import MANIFEST, checkpoints
from dinov3_hf.training.resume import complete_checkpoint, newest_checkpoint
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.teacher_folder import HEADS_FILE, read_head_shapes

StartWith = Literal["state", "teacher"]
NETWORKS = ("student", "teacher")
HEADS = {"dino_head": "DINO", "ibot_head": "iBOT"}
_TEACHER = "teacher"
_NAME_ONE = "name the output folder of a run, one of its checkpoint-N, or a teacher/"


@dataclass(frozen=True)
class StartingPoint:
    """
    What a stage starts from, looked at and found to fit; no weights are read yet.

    Args:
        folder: a checkpoint-N, or with `start_with` teacher the model folder with `heads.safetensors`.
        start_with: what is taken from it.
        step: optimizer steps behind it, where the folder tells.
        num_prototypes: of each head that is taken.
        fresh_heads: heads of the recipe that the folder lacks.
        left_out_heads: heads in the folder that the recipe has no term for.
    """

    folder: Path
    start_with: StartWith
    step: int | None
    num_prototypes: dict[str, int]
    fresh_heads: list[str] = field(default_factory=list)
    left_out_heads: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """What was found, in a few lines."""
        of_state = self.start_with == "state"
        behind = "" if self.step is None else f", after {self.step:,} steps"
        network = read_architecture(self.folder / _TEACHER if of_state else self.folder).summary
        heads = [f"{HEADS[head]} with {count:,} prototypes" for head, count in self.num_prototypes.items()]
        heads += [f"{HEADS[head]} starts fresh, there is none" for head in self.fresh_heads]
        heads += [f"{HEADS[head]} is left out, its weight is 0" for head in self.left_out_heads]
        lines = {
            "student": network if of_state else "begins as the teacher",
            "teacher": "the student's moving average" if of_state else network,
            "heads": ", ".join(heads),
            "optimizer": f"AdamW's moments of {STATE}/" if of_state else "starts fresh",
            "steps": "count from 0",
        }
        listed = [f"  {name:<9}  {text}" for name, text in lines.items()]
        return "\n".join([f"Starts from {self.folder}{behind}:", *listed])

    @torch.no_grad()
    def load_teacher(self, model: DINOv3ForPreTraining) -> None:
        """Put the teacher's weights into student and teacher of a whole model; a Gram teacher stays as it is."""
        weights = model.state_dict()
        for path, prefix in _teacher_files(self.folder):
            with open_safetensors(path) as file:
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    for network in NETWORKS:
                        if (name := f"{network}.{prefix}{key}") in weights:
                            weights[name].copy_(file.get_tensor(key))

    def load_state(self, engine: Engine, model: DINOv3ForPreTraining, optimizer: Optimizer) -> None:
        """
        Put the weights of student and teacher into a model that the engine has sharded, and give AdamW the moments and
        the step count of the checkpoint; a Gram teacher stays as it is, and so do fresh heads, learning rates and all
        other settings. There is one step count: behind a long run AdamW takes the moments of a fresh head, all zero,
        for settled ones, and its first updates are up to three times as large.
        """
        reader = StateReader(self.folder / STATE)

        def is_there(name: str) -> bool:
            return name.partition(".")[0] in NETWORKS and reader.has(f"{PARAMETER}/{name}")

        engine.load(model, optimizer, reader, is_there)


def find_start(args: SSLConfig) -> StartingPoint:
    """
    What `start_from` and `start_with` of a recipe name.

    Args:
        args: of the stage, with `start_from`.

    Returns:
        The starting point, whose network is the one that the recipe describes. Incomplete checkpoints that are passed
        over are named in a warning.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it to start from.
        ValueError: it is incomplete or damaged, another network, or the folder that the stage would write into.
    """
    source = Path(args.start_from or "")
    if not source.is_dir():
        raise FileNotFoundError(f"start_from {source}: there is no such folder; {_NAME_ONE}.")
    if args.start_with == "teacher":
        folder = _teacher_folder(source)
        config = _backbone_config(folder)
        heads = _heads_of_file(folder / HEADS_FILE)
    else:
        folder = checkpoint_folder(source)
        whole = _config_of_checkpoint(folder)
        config, heads = backbone_config_from_dict(whole.backbone_config), _heads_of_config(whole)
    _check_output_dir(source, args)
    return _fitting(args, folder, config, heads)


def run_folder(source: Path) -> Path:
    """The output folder of the run that `source`, a run, a checkpoint-N or a teacher/, belongs to."""
    folder = source.resolve()
    if folder.name == _TEACHER:
        folder = folder.parent
    return folder.parent if _is_checkpoint(folder) else folder


def checkpoint_folder(source: Path) -> Path:
    """
    The complete checkpoint that `source` is, or the newest one of the run that it is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is incomplete.
    """
    if _is_checkpoint(source):
        return complete_checkpoint(source)
    if checkpoints(source):
        return newest_checkpoint(source, "start from", remedy="name another run")
    if (source / _TEACHER / "config.json").is_file() or (source / HEADS_FILE).is_file():
        raise FileNotFoundError(
            f"{source} holds a teacher but no checkpoint-N with student and optimizer; set start_with: teacher, which "
            "begins with the teacher and a fresh optimizer, or name another run."
        )
    raise _nothing_there(source)


def _teacher_folder(source: Path) -> Path:
    if _is_checkpoint(source):
        return complete_checkpoint(source) / _TEACHER
    if (source / _TEACHER).is_dir():
        return source / _TEACHER
    if checkpoints(source):
        return newest_checkpoint(source, "start from", remedy="name another run") / _TEACHER
    if (source / HEADS_FILE).is_file():
        return source
    raise _nothing_there(source)


def _nothing_there(source: Path) -> FileNotFoundError:
    if (source / "config.json").is_file():
        return FileNotFoundError(
            f"{source} is a model without prototype heads ({HEADS_FILE}), with which a stage goes on; {_NAME_ONE}, "
            "or train fresh heads for it with continue_pretraining.py."
        )
    return FileNotFoundError(f"{source} holds no checkpoint-N and no teacher/; {_NAME_ONE}.")


def _is_checkpoint(source: Path) -> bool:
    return (source / MANIFEST).is_file() or source in checkpoints(source.parent)


def _check_output_dir(source: Path, args: SSLConfig) -> None:
    run, output_dir = run_folder(source), Path(args.output_dir or ".").resolve()
    if run in (output_dir, *output_dir.parents):
        raise ValueError(
            f"output_dir {args.output_dir} is the run that is started from, or lies in it, and would write over it; "
            "set another output_dir."
        )


def _config_of_checkpoint(folder: Path) -> DINOv3PreTrainingConfig:
    fields = read_json(folder / "config.json")
    model_type = fields.pop("model_type", None)
    if model_type != DINOv3PreTrainingConfig.model_type:
        raise ValueError(f"{folder} is a checkpoint of a {model_type!r} model, not of pre-training; {_NAME_ONE}.")
    return DINOv3PreTrainingConfig(**fields)


def _backbone_config(folder: Path) -> PreTrainedConfig:
    fields = read_json(folder / "config.json")
    if fields.get("model_type") not in BACKBONES:
        raise ValueError(f"{folder} holds a {fields.get('model_type')!r} model, not a DINOv3 backbone; {_NAME_ONE}.")
    return backbone_config_from_dict(fields)


def _heads_of_config(config: DINOv3PreTrainingConfig) -> dict[str, dict[str, Any]]:
    heads = {"dino_head": dict(config.dino_head or {}), "ibot_head": dict(config.ibot_head or {})}
    return heads if config.ibot_weight > 0 else {"dino_head": heads["dino_head"]}


def _heads_of_file(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}, the prototype heads with which a stage goes on; {_NAME_ONE}, or train "
            "fresh heads for it with continue_pretraining.py."
        )
    heads = read_head_shapes(path)
    if "dino_head" not in heads:
        raise ValueError(f"{path} holds no DINO head; {_NAME_ONE}.")
    return heads


def _fitting(
    args: SSLConfig, folder: Path, config: PreTrainedConfig, heads: dict[str, dict[str, Any]]
) -> StartingPoint:
    """The starting point, if what is there is the network of the recipe."""
    here = args.pretraining_config()
    wanted = _heads_of_config(here)
    differences = [
        (f"backbone.{name}", there, own) for name, own, there in network_differences(args.backbone_config(), config)
    ]
    differences += [
        (f"{head}.{name}", heads[head].get(name), own)
        for head in wanted.keys() & heads.keys()
        for name, own in wanted[head].items()
        if heads[head].get(name) != own
    ]
    remedy = "give the stage's recipe the backbone and the heads of that run, or start from another one"
    if differences:
        listed = ", ".join(f"{name} is {there!r} there and {own!r} here" for name, there, own in sorted(differences))
        raise ValueError(f"{folder} is another network than the recipe's: {listed}; {remedy}.")

    start = StartingPoint(
        folder,
        args.start_with,
        _step_of(folder),
        {head: heads[head]["num_prototypes"] for head in wanted if head in heads},
        fresh_heads=[head for head in wanted if head not in heads],
        left_out_heads=[head for head in heads if head not in wanted],
    )
    _check_tensors(start, here, remedy)
    return start


def _check_tensors(start: StartingPoint, here: DINOv3PreTrainingConfig, remedy: str) -> None:
    """Refuse a folder whose tensors are not those of the recipe's network, by the headers of its files."""
    with torch.device("meta"):
        network = SSLNetwork(here)
    wanted = {
        f"{owner}.{name}": tuple(tensor.shape)
        for owner in NETWORKS
        for name, tensor in network.state_dict().items()
        if name.partition(".")[0] not in start.fresh_heads and tensor.numel() > 0
    }
    found = {
        name: shape
        for name, shape in _shapes(start.folder, start.start_with)
        if not any(f".{head}." in name for head in start.left_out_heads)
    }
    for verb, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has besides the recipe's network", found.keys() - wanted.keys()),
        ("has in another shape", {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]}),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{start.folder} {verb} {min(names)}{more}; {remedy}.")


def _shapes(folder: Path, start_with: StartWith) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Which parameters of student and teacher the folder has."""
    if start_with == "state":
        reader = StateReader(folder / STATE)
        for name in reader.names():
            kind, _, parameter = name.partition("/")
            if kind == PARAMETER and parameter.partition(".")[0] in NETWORKS:
                yield parameter, reader.shape(name)
        return
    for path, prefix in _teacher_files(folder):
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                for network in NETWORKS:
                    if 0 not in (shape := file.get_slice(key).get_shape()):
                        yield f"{network}.{prefix}{key}", tuple(shape)


def _teacher_files(folder: Path) -> list[tuple[Path, str]]:
    """Files of weights, and what stands before the names in them: the backbone, or nothing."""
    backbone = [*sorted(folder.glob(WEIGHTS)), *folder.glob("extras.safetensors")]
    return [*((path, "backbone.") for path in backbone), (folder / HEADS_FILE, "")]


def _step_of(folder: Path) -> int | None:
    holder = folder.parent if folder.name == _TEACHER else folder
    for name, entry in ((MANIFEST, "step"), ("trainer_state.json", "global_step")):
        if (holder / name).is_file():
            step: int = read_json(holder / name)[entry]
            return step
    return None
