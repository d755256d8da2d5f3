"""Ablations: a recipe with parts off over several seeds, and what its scores allow to say."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

from dinov3_hf.errors import ArgumentError
from dinov3_hf.field_types import fit_mapping
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.yaml_text import dump_yaml, parse_yaml, read_yaml_mapping

FULL = "full"
METRIC = "eval_knn_top1"
RESULT = "result.json"  # in the folder of a finished run
CONFIDENCE = 0.95
# What a plan may change again: short runs need no checkpoints, and their logs go to a file.
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": "true"}
ENTRIES = {"recipe": str, "output_dir": str, "seeds": list[int], "base": dict, "variants": dict}


@dataclass(frozen=True)
class Scores:
    """kNN top-1 of a run's teacher in percent, before and after the training."""

    untrained: float
    trained: float


@dataclass(frozen=True)
class Run:
    """One setting with one seed.

    Attributes:
        variant: name of the setting.
        seed: of the run.
        recipe: name or path.
        fields: its changes to the recipe, field -> value as on a command line.
        folder: where it writes.
    """

    variant: str
    seed: int
    recipe: str
    fields: dict[str, str]
    folder: Path

    @property
    def words(self) -> list[str]:
        """Arguments of the training script."""
        fields = {**self.fields, "output_dir": str(self.folder)}
        return [self.recipe, *(word for name, text in fields.items() for word in (f"--{name}", text))]


@dataclass(frozen=True)
class Plan:
    """An ablation.

    Attributes:
        recipe: name or path of the recipe.
        output_dir: where runs and table go.
        seeds: at least one.
        base: changes to the recipe in all runs, field -> value as on a command line.
        variants: name -> changes to the base; the first is `full`, which has none.
    """

    recipe: str
    output_dir: Path
    seeds: list[int]
    base: dict[str, str]
    variants: dict[str, dict[str, str]]

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an unfinished ablation can be compared already."""
        return [
            Run(
                variant,
                seed,
                self.recipe,
                {**QUIET, **self.base, **changes, "seed": str(seed), "eval_on_start": "true"},
                self.output_dir / variant / f"seed-{seed}",
            )
            for seed in self.seeds
            for variant, changes in self.variants.items()
        ]


def read_plan(path: str, changes: Mapping[str, str]) -> Plan:
    """The ablation that a file describes.

    Args:
        path: YAML with the entries `recipe`, `output_dir`, `seeds`, `base` and `variants`.
        changes: field -> value as on a command line; `output_dir` and `seeds` change the plan, others its base.

    Raises:
        ArgumentError: no such file, an entry that is missing, unknown or of the wrong type, or a setting with a field
            that cannot be parsed.
        ValueError: a setting with a value that its configuration refuses, or without labelled images.
    """
    entries = _read_entries(path)
    changes = dict(changes)
    if "output_dir" in changes:
        entries["output_dir"] = changes.pop("output_dir")
    if "seeds" in changes:
        entries |= fit_mapping("plan", {"seeds": parse_yaml(changes.pop("seeds"), "--seeds")}, ENTRIES)
    if not entries["seeds"] or len(set(entries["seeds"])) < len(entries["seeds"]):
        raise ArgumentError(f"seeds {entries['seeds']} must be one or several different integers.")
    variants = {FULL: {}, **entries["variants"]}
    if entries["variants"].get(FULL):
        raise ArgumentError(f"plan {path} changes fields in {FULL}, which is the base itself; name the variant else.")
    for name, fields in variants.items():
        if not re.fullmatch(r"[\w-]+", str(name)) or not isinstance(fields, dict):
            raise ArgumentError(f"variant {name!r} of plan {path} must be one word with a mapping of fields.")
    plan = Plan(
        recipe=entries["recipe"],
        output_dir=Path(entries["output_dir"]),
        seeds=entries["seeds"],
        base={**_texts(entries["base"]), **changes},
        variants={name: _texts(fields) for name, fields in variants.items()},
    )
    for run in plan.runs()[: len(variants)]:  # of the first seed
        _check(run)
    return plan


def _read_entries(path: str) -> dict[str, Any]:
    entries = read_yaml_mapping(
        Path(path), f"plan {path}", otherwise="give a YAML file", form=f"its entries are {', '.join(ENTRIES)}"
    )
    entries = {"base": {}, **fit_mapping(f"plan {path}", entries, ENTRIES)}
    missing = [name for name in ENTRIES if name not in entries]
    if missing:
        raise ArgumentError(f"plan {path} has no entry {missing[0]}; its entries are {', '.join(ENTRIES)}.")
    return entries


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """Values as they are typed on a command line."""
    return {name: value if isinstance(value, str) else dump_yaml(value, inline=True) for name, value in fields.items()}


def _check(run: Run) -> None:
    try:
        args = parse_arguments(SSLConfig, run.words)
        if args.eval_data is None:
            raise ValueError("there is nothing to compare by; set eval_data to labelled images.")
    except ValueError as error:
        raise type(error)(f"variant {run.variant}: {error}") from None


def keep_scores(run: Run) -> Scores:
    """The scores of a run that has just ended, written to its `result.json`, which says that it is finished.

    Raises:
        FileNotFoundError: the run has not written its `trainer_state.json`.
        ValueError: it was not evaluated at its start and end.
    """
    state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
    accuracies = {entry["step"]: entry[METRIC] for entry in state["log_history"] if METRIC in entry}
    if not {0, state["max_steps"]} <= accuracies.keys():
        raise ValueError(f"{run.folder} was not evaluated before the first and after the last step.")
    scores = Scores(accuracies[0], accuracies[state["max_steps"]])
    result = {"recipe": run.recipe, "fields": run.fields, **asdict(scores)}
    (run.folder / RESULT).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return scores


def kept_scores(run: Run) -> Scores | None:
    """The scores of a run that was finished earlier; None if it was not.

    Raises:
        ValueError: it was made with other fields.
    """
    path = run.folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    there = {"recipe": result["recipe"], **result["fields"]}
    here = {"recipe": run.recipe, **run.fields}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{run.folder} was made with {name} {there.get(name, 'not set')}, and now it is "
                f"{here.get(name, 'not set')}; delete it, or give another output_dir."
            )
    return Scores(result["untrained"], result["trained"])


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % confidence interval, `mean` +- `half_width`; none (nan) of a single value."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if math.isnan(self.half_width) else f"{self.mean:.1f} ± {self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    r"""Student's interval of the mean of S independent values,
    $\bar x \pm t_{0.975, S - 1} \, s / \sqrt S$ with their standard deviation s.

    It supposes values that scatter about their mean as a normal distribution does.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("there are no values to take the mean of.")
    count = len(values)
    if count == 1:
        return Estimate(values[0], math.nan)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(fmean(values), quantile * stdev(values) / math.sqrt(count))


@dataclass(frozen=True)
class Row:
    """What the runs of one setting say.

    Attributes:
        variant: name of the setting.
        changes: to the base.
        scores: seed -> kNN top-1 in percent.
        difference: of the trained scores to those of `full` with the same seeds, in points; None for
            `full` itself and where no seed has both.
    """

    variant: str
    changes: dict[str, str]
    scores: dict[int, Scores]
    difference: Estimate | None

    @property
    def untrained(self) -> Estimate:
        return estimate([scores.untrained for scores in self.scores.values()])

    @property
    def trained(self) -> Estimate:
        return estimate([scores.trained for scores in self.scores.values()])


def rows_of(plan: Plan, scores: Mapping[str, Mapping[int, Scores]]) -> list[Row]:
    """One row for each setting with a finished run.

    The difference to `full` is paired: the runs of one seed share images, crops and, where the architecture is the
    same, initial weights, so that their common luck cancels.

    Args:
        plan: the settings.
        scores: variant -> seed -> scores, of the finished runs.
    """
    rows = []
    full = scores.get(FULL, {})
    for variant, changes in plan.variants.items():
        own = {seed: scores[variant][seed] for seed in plan.seeds if seed in scores.get(variant, {})}
        if own:
            pairs = [own[seed].trained - full[seed].trained for seed in own if seed in full]
            difference = estimate(pairs) if pairs and variant != FULL else None
            rows.append(Row(variant, changes, own, difference))
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """The table that people read: kNN top-1 in percent, means over seeds with 95 % intervals."""
    lines = [
        "| setting | change | seeds | untrained | trained | difference to full |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        changes = ", ".join(f"`{name}: {text}`" for name, text in row.changes.items())
        difference = "" if row.difference is None else ("+" if row.difference.mean >= 0 else "") + str(row.difference)
        cells = (row.variant, changes, len(row.scores), f"{row.untrained.mean:.1f}", row.trained, difference)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def json_table(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The same for programs, with the score of every run; `half_width` is null of a single seed."""
    return {
        "metric": METRIC,
        "confidence": CONFIDENCE,
        "recipe": plan.recipe,
        "base": plan.base,
        "settings": [
            {
                "name": row.variant,
                "changes": row.changes,
                "runs": [{"seed": seed, **asdict(scores)} for seed, scores in row.scores.items()],
                "untrained": _plain(row.untrained),
                "trained": _plain(row.trained),
                "difference_to_full": None if row.difference is None else _plain(row.difference),
            }
            for row in rows
        ],
    }


def _plain(value: Estimate) -> dict[str, float | None]:
    return {"mean": value.mean, "half_width": None if math.isnan(value.half_width) else value.half_width}
