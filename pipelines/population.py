"""Population based training (Jaderberg et al. 2017, arXiv:1711.09846): members train side by side, and now and then the
worst of them go on from a state of one of the best, under values near to that one's.

All members train to the same step, then all are compared, so that what comes of it does not depend on which is faster.
What is drawn is a function of the seed, the generation and the member.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.lineage import NO_LINEAGE, Lineage, SavedState, Segment
from pipelines.search_space import Dimension, Value
from vqvae_core.errors import InputError

# What may change in the middle of a training: neither the model's tensors nor the order of samples depend on it.
MAY_CHANGE = (
    "train.learning_rate",
    "train.beta2",
    "train.max_gradient_norm",
    "vqvae.commitment_cost",
    "vqvae.quantizer.decay",
    "train_prior.learning_rate",
    "train_prior.beta2",
    "train_prior.max_gradient_norm",
    "prior.dropout",
)
_SHARE = 4  # a quarter goes on from a quarter
_SHIFT, _ANEW, _TRIES = 0.1, 0.25, 100  # of a range; how often a value is drawn anew; tries for values that fit


@dataclass(frozen=True)
class Member:
    """One of a population: what it trains with next, and what its training goes on from. parent: the member whose state
    that is."""

    number: int
    values: Mapping[str, Value]
    before: Lineage = NO_LINEAGE
    parent: int | None = None


@dataclass(frozen=True)
class Reached:
    """What a member came to in a generation: its figure, None where its numbers were not finite, and its state."""

    value: float | None
    state: SavedState | None


def ends(steps: int, generations: int) -> list[int]:
    """The step at which each generation ends."""
    return [steps * number // generations for number in range(1, generations + 1)]


def next_generation(
    members: Sequence[Member],
    reached: Mapping[int, Reached],
    until: int,
    *,
    mode: str,
    dimensions: Sequence[Dimension],
    refusal: Callable[[dict[str, Value]], str | None],
    seed: int,
) -> list[Member]:
    """Members after they were compared at a step, no two of which go on from the same state under the same values.
    At least one has a figure. refusal(values): why the config does not take them, else None.

    Raises `InputError` where a member whose numbers are not finite finds no values that are left.
    """

    def badness(member: Member) -> tuple[bool, float]:
        value = reached[member.number].value
        return value is None, 0.0 if value is None else -value if mode == "max" else value

    ranked = sorted(members, key=badness)  # stable: of equals the first
    count = max(1, len(ranked) // _SHARE)
    best = [member for member in ranked[:count] if reached[member.number].value is not None]
    assert best, "nobody has a figure"
    lost = {member.number for member in ranked if reached[member.number].value is None}
    worst = ({member.number for member in ranked[len(ranked) - count :]} | lost) - {member.number for member in best}
    taken = {member.number: [dict(member.values)] for member in best}
    found = []
    for member in members:
        parent, values = member, dict(member.values)
        if member.number in worst:
            draw = random.Random(f"{seed}-{until}-{member.number}")  # noqa: S311
            one = draw.choice(best)
            new = near(
                one.values, dimensions, lambda found, one=one: found in taken[one.number] or refusal(found), draw
            )
            if new is not None:
                parent, values = one, new
                taken[one.number].append(new)
            elif member.number in lost:
                raise InputError(
                    f"expected values for trial {member.number}, whose numbers were not finite by step {until}, that "
                    f"differ from those of trial {one.number}, found none; widen --search or lower --trials"
                )
        before = Lineage((*parent.before.segments, Segment(until, parent.values)), reached[parent.number].state)
        found.append(replace(member, values=values, before=before, parent=parent.number))
    return found


def near(
    values: Mapping[str, Value],
    dimensions: Sequence[Dimension],
    refusal: Callable[[dict[str, Value]], object],
    draw: random.Random,
) -> dict[str, Value] | None:
    """Values that differ a little, or now and then anew; None where all that were tried are refused."""
    for _ in range(_TRIES):
        found = {one.field: _moved(values[one.field], one, draw) for one in dimensions}
        if found != dict(values) and not refusal(found):
            return found
    return None


def _moved(value: Any, dimension: Dimension, draw: random.Random) -> Value:
    """The next of a choice, or a tenth of the range up or down, in logarithms where values are drawn so."""
    if draw.random() < _ANEW:
        return dimension.draw(draw)
    up = draw.choice((-1, 1))
    if dimension.kind == "choice":
        options = list(dimension.values)
        return options[min(max(options.index(value) + up, 0), len(options) - 1)]
    low, high = dimension.low, dimension.high
    if dimension.kind == "log":
        return min(max(value * (high / low) ** (up * _SHIFT), low), high)
    return min(max(value + up * _SHIFT * (high - low), low), high)
