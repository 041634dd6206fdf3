"""Population based training (Jaderberg et al. 2017, arXiv:1711.09846): members train side by side, and now and then the
worst of them go on from a state of one of the best, under values near to that one's.

All members train to the same step, then all are compared, so that what comes of it does not depend on which is faster.
What is drawn is a function of the seed, the generation and the member.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.lineage import NO_LINEAGE, Lineage, SavedState, Segment
from pipelines.search_space import Dimension, Value

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
_FACTORS, _ANEW, _TRIES = (0.8, 1.25), 0.25, 100  # of values; how often one is drawn anew; tries for values that fit


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
    """Members after they were compared at a step. refusal(values): why the config does not take them, else None."""

    def badness(member: Member) -> tuple[bool, float]:
        value = reached[member.number].value
        return value is None, 0.0 if value is None else -value if mode == "max" else value

    ranked = sorted(members, key=badness)  # stable: of equals the first
    count = max(1, len(ranked) // _SHARE) if len(ranked) > 1 else 0
    best = [member for member in ranked[: max(1, count)] if reached[member.number].value is not None]
    lost = {member.number for member in ranked if reached[member.number].value is None}
    worst = {member.number for member in ranked[len(ranked) - count :]} | lost
    found = []
    for member in members:
        parent, values = member, dict(member.values)
        if member.number in worst and best:
            draw = random.Random(f"{seed}-{until}-{member.number}")  # noqa: S311
            parent = draw.choice(best)
            values = near(parent.values, dimensions, refusal, draw)
        before = Lineage((*parent.before.segments, Segment(until, parent.values)), reached[parent.number].state)
        found.append(replace(member, values=values, before=before, parent=parent.number))
    return found


def near(
    values: Mapping[str, Value],
    dimensions: Sequence[Dimension],
    refusal: Callable[[dict[str, Value]], str | None],
    draw: random.Random,
) -> dict[str, Value]:
    """Values that differ a little, or now and then anew; the same ones where the config takes no others."""
    for _ in range(_TRIES):
        found = {one.field: _moved(values[one.field], one, draw) for one in dimensions}
        if found != dict(values) and refusal(found) is None:
            return found
    return dict(values)


def _moved(value: Value, dimension: Dimension, draw: random.Random) -> Value:
    if draw.random() < _ANEW or value is None or isinstance(value, str):
        return dimension.draw(draw)
    if dimension.kind == "choice":
        options = list(dimension.values)
        place = options.index(value) + draw.choice((-1, 1))
        return options[min(max(place, 0), len(options) - 1)]
    moved = min(max(value * draw.choice(_FACTORS), dimension.low), dimension.high)
    return round(moved) if dimension.whole else moved
