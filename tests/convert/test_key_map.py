"""Tables of names."""

import pytest

from dinov3_hf.convert.key_map import KeyMap

TABLE = KeyMap([("tower.{i}.fc.{p}", "layer.{i}.up.{p}"), ("buffer", None), ("a.b", "c")])


@pytest.mark.parametrize(
    ("key", "renamed"), [("tower.12.fc.bias", "layer.12.up.bias"), ("buffer", None), ("a.b", "c")]
)
def test_rename(key, renamed):
    assert TABLE.rename(key) == renamed


@pytest.mark.parametrize("key", ["tower.x.fc.bias", "tower.1.fc.gamma", "tower.1.fc.bias.extra", "axb", ""])
def test_a_name_that_no_row_knows(key):
    with pytest.raises(ValueError, match="is not a parameter of this architecture"):
        TABLE.rename(key)


def test_inverse():
    state = {"tower.0.fc.weight": 1, "tower.3.fc.bias": 2, "a.b": 3, "buffer": 4}
    ours = TABLE.apply(state)
    assert ours == {"layer.0.up.weight": 1, "layer.3.up.bias": 2, "c": 3}
    assert TABLE.inverse().apply(ours) == {name: value for name, value in state.items() if name != "buffer"}
    with pytest.raises(ValueError, match="two rows of the table have the same target"):
        KeyMap([("a", "c"), ("b", "c")]).inverse()


def test_two_names_that_become_one():
    with pytest.raises(ValueError, match="b and another name both become c; remove one of them"):
        KeyMap([("a", "c"), ("b", "c")]).apply({"a": 1, "b": 2})
