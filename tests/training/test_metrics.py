import math

import torch

from dinov3_hf.distributed.reductions import rank
from dinov3_hf.training.metrics import RunningMeans, StepValues
from tests.reference.processes import run_in_processes


def test_values_of_a_step_are_means_over_its_micro_batches():
    values = StepValues()
    values.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
    values.add({"a": torch.tensor(3.0, dtype=torch.float64)})
    assert values.pop() == {"a": 2.0, "b": 10.0}
    assert values.pop() == {}
    values.add({"a": torch.tensor(1.0)})
    values.add({"a": torch.tensor(math.inf)})
    values.add({"a": torch.tensor(-math.inf)})
    assert not math.isfinite(values.pop()["a"])


def step_of_two() -> dict[str, torch.Tensor]:
    values = StepValues()
    for micro_batch in (1.0, 2.0):
        bad = math.nan if (rank(), micro_batch) == (1, 1.0) else 0.0
        values.add({"good": torch.tensor(micro_batch + 4 * rank()), "bad": torch.tensor(bad)})
    return {name: torch.tensor(value) for name, value in values.pop().items()}


def test_every_rank_reads_the_same_and_learns_of_a_value_that_is_not_finite():
    for result in run_in_processes(step_of_two, 2):
        assert result["good"] == 3.5 and result["bad"].isnan()


def test_means_are_over_the_steps_of_each_name_and_reset():
    means = RunningMeans()
    means.add({"a": 1.0, "b": 10.0})
    means.add({"a": 3.0})
    assert means.pop() == {"a": 2.0, "b": 10.0}
    assert means.pop() == {}
