import torch

from dinov3_hf.training.metrics import RunningMeans


def test_means_are_over_the_values_of_each_name_and_reset():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
    means.add({"a": torch.tensor(3.0)})
    assert means.pop() == {"a": 2.0, "b": 10.0}
    assert means.pop() == {}
