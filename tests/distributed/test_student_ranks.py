"""The split that is chosen is the best of all."""

import itertools
import random

import pytest

from dinov3_hf.distributed.student_ranks import choose_student_ranks, idle_share


def splits(num_students, num_ranks, batch_size):
    counts = [count for count in range(1, num_ranks + 1) if batch_size % count == 0]
    return [split for split in itertools.product(counts, repeat=num_students) if sum(split) == num_ranks]


def random_case(seed):
    draw = random.Random(seed)
    num_students = draw.randint(1, 4)
    # Few distinct times, so that there are ties.
    seconds = {f"student{i}": draw.choice([1.0, 2.0, 3.0, 6.0, draw.uniform(0.1, 20)]) for i in range(num_students)}
    return seconds, draw.randint(num_students, 14), draw.choice([4, 6, 8, 12, 16, 24, 30, 36, 48, 60, 96])


def test_brute_force_on_small_cases():
    solved = 0
    for seed in range(400):
        seconds, num_ranks, batch_size = random_case(seed)
        possible = splits(len(seconds), num_ranks, batch_size)
        if not possible:
            with pytest.raises(ValueError, match="cannot be split among"):
                choose_student_ranks(seconds, num_ranks, batch_size)
            continue
        chosen = choose_student_ranks(seconds, num_ranks, batch_size)
        assert list(chosen) == list(seconds)

        def order(split, seconds=seconds):
            return sorted((s / r for s, r in zip(seconds.values(), split, strict=True)), reverse=True), split

        best = min(possible, key=order)
        assert tuple(chosen.values()) == best, seed
        shares = [idle_share(seconds, dict(zip(seconds, split, strict=True))) for split in possible]
        assert idle_share(seconds, chosen) == pytest.approx(min(shares))
        assert 0 <= idle_share(seconds, chosen) < 1
        solved += 1
    assert solved >= 200


def test_numbers_that_a_student_cannot_have():
    seconds = {"a": 1.0, "b": 1.0, "c": 4.0}
    assert choose_student_ranks(seconds, 6, 24) == {"a": 1, "b": 1, "c": 4}
    assert choose_student_ranks(seconds, 6, 24, lambda name, count: count == 2 or name != "a") == {
        "a": 2, "b": 1, "c": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match="in the groups of images that the recipe asks for; use another number of"):
        choose_student_ranks(seconds, 6, 24, lambda name, count: count < 2)


def test_idle_share():
    assert idle_share({"a": 2.0, "b": 6.0}, {"a": 1, "b": 3}) == 0
    assert idle_share({"a": 1.0, "b": 3.0}, {"a": 1, "b": 1}) == pytest.approx(1 / 3)  # a waits for 2 of 6 seconds


def test_the_published_split():
    """It is the one that is chosen for students that take times in its proportion."""
    published = {"vits16": 48, "vits16plus": 48, "vitb16": 80, "vitl16": 120}
    seconds = {name: 0.01 * count for name, count in published.items()}
    assert choose_student_ranks(seconds, 296, 1920) == published
    assert idle_share(seconds, published) == pytest.approx(0)


def test_thousands_of_ranks():
    seconds = {f"student{i}": 1.0 + i**2 for i in range(8)}
    chosen = choose_student_ranks(seconds, 2048, 8192)
    assert sum(chosen.values()) == 2048


@pytest.mark.parametrize(
    ("num_ranks", "batch_size", "message"),
    [
        (1, 8, "2 students cannot be spread over 1 ranks; use 2 at least, or let them take turns"),
        (7, 8, r"7 ranks cannot be split .* a batch of 8; the nearest batch for which they can is 42\."),
    ],
)
def test_refusals(num_ranks, batch_size, message):
    with pytest.raises(ValueError, match=message) as refused:
        choose_student_ranks({"a": 1.0, "b": 2.0}, num_ranks, batch_size)
    assert "\n" not in str(refused.value)
