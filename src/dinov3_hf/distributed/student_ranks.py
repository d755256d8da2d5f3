"""How ranks are split among students that are trained at the same time, so that the fewest wait."""

from collections.abc import Callable, Mapping
from typing import NamedTuple


class _Split(NamedTuple):
    """Of some ranks among some students; a smaller one is better."""

    seconds: tuple[float, ...]  # of a step of each student, longest first
    counts: tuple[int, ...]  # ranks of each student


def choose_student_ranks(
    seconds: Mapping[str, float],
    num_ranks: int,
    batch_size: int,
    is_possible: Callable[[str, int], bool] = lambda name, count: True,
) -> dict[str, int]:
    """
    The split with the shortest step, which is as long as that of the student that all others wait for.

    Each student sees the whole batch, so that its step on r ranks takes 1 / r of the time. Of splits with equal
    steps, the one in which the next student is done earlier is taken, and so on; then the one with fewer ranks for
    the student that is named first.

    Args:
        seconds: student -> time of a step with the whole batch on one rank, in any unit.
        num_ranks: to be split; every one is given to a student.
        batch_size: images of the batch; each student's ranks divide it.
        is_possible: of a student and a number of ranks that divides the batch, whether it can have them: its recipe
            may ask for images in whole groups.

    Returns:
        Student -> its ranks, in the order of `seconds`.

    Raises:
        ValueError: there are fewer ranks than students, or the batch cannot be divided so.
    """
    if num_ranks < len(seconds):
        raise ValueError(
            f"{len(seconds)} students cannot be spread over {num_ranks} ranks; use {len(seconds)} at least, or let "
            "them take turns."
        )
    divisors = {
        name: [count for count in _divisors(batch_size, num_ranks) if is_possible(name, count)] for name in seconds
    }
    best = {0: _Split((), ())}  # by the ranks that the students so far have
    for name, own in seconds.items():
        further: dict[int, _Split] = {}
        for used, split in best.items():
            for count in divisors[name]:
                if used + count <= num_ranks:
                    longest_first = tuple(sorted((*split.seconds, own / count), reverse=True))
                    candidate = _Split(longest_first, (*split.counts, count))
                    further[used + count] = min(candidate, further.get(used + count, candidate))
        best = further
    if num_ranks not in best:
        nearest = _nearest_batch(len(seconds), num_ranks, batch_size)
        raise ValueError(
            f"{num_ranks} ranks cannot be split among {len(seconds)} students so that each group divides a batch of "
            f"{batch_size}"
            + (
                " in the groups of images that the recipe asks for; use another number of ranks."
                if nearest == batch_size
                else f"; the nearest batch for which they can is {nearest}."
            )
        )
    return dict(zip(seconds, best[num_ranks].counts, strict=True))


def idle_share(seconds: Mapping[str, float], ranks: Mapping[str, int]) -> float:
    """
    Share of the time of all ranks that is spent waiting for the slowest student, from 0 to 1.

    Args:
        seconds: student -> time of a step with the whole batch on one rank.
        ranks: student -> its ranks.
    """
    slowest = max(seconds[name] / count for name, count in ranks.items())
    return 1 - sum(seconds.values()) / (sum(ranks.values()) * slowest)


def _divisors(batch_size: int, largest: int) -> list[int]:
    return [count for count in range(1, largest + 1) if batch_size % count == 0]


def _nearest_batch(num_students: int, num_ranks: int, batch_size: int) -> int:
    """The batch nearest to `batch_size`, a multiple of the ranks, for which there is a split."""
    surely = num_ranks * (num_ranks - num_students + 1)  # as many ranks as that for one student, one for each other
    candidates = range(num_ranks, batch_size + surely + 1, num_ranks)
    for candidate in sorted(candidates, key=lambda size: abs(size - batch_size)):
        divisors, sums = _divisors(candidate, num_ranks), {0}
        for _ in range(num_students):
            sums = {used + count for used in sums for count in divisors if used + count <= num_ranks}
        if num_ranks in sums:
            return candidate
    raise AssertionError("a multiple of surely can be split")
