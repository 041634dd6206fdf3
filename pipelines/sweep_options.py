"""What a sweep varies and how: its options, checked before any work, and the values that its trials are given."""

import importlib.util
import random
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.config import PipelineConfig
from pipelines.objective import OBJECTIVES
from pipelines.population import MAY_CHANGE
from pipelines.program import resolve
from pipelines.search_space import Dimension, Value, parse_all, with_values
from vqvae_core.errors import InputError
from vqvae_core.train_config import TrainConfig

OPTIONS = (
    "--search", "--objective", "--trials", "--scheduler", "--generations", "--searcher", "--seed", "--concurrent",
)  # fmt: skip
_CHOICES = {"--scheduler": ("asha", "pbt", "none"), "--searcher": ("random", "optuna")}
_DRAWS = 100  # tries for each trial


@dataclass(frozen=True)
class Sweep:
    """What a sweep varies and how. generations: of population based training, else 1. concurrent: None for as many
    trials as there is room for; never part of its recipe."""

    dimensions: list[Dimension]
    objective: str
    trials: int
    scheduler: str
    generations: int
    searcher: str
    seed: int
    concurrent: int | None

    def draws(self, config: PipelineConfig) -> list[dict[str, Value]]:
        """The values of each trial, drawn at random: no two trials have the same, and the config takes all of them.
        Raises `InputError` where there are not so many."""
        generator, found = random.Random(self.seed), []  # noqa: S311
        reason = "each draw was there before"
        for _ in range(_DRAWS * self.trials):
            draw = {one.field: one.draw(generator) for one in self.dimensions}
            refusal = None if draw in found else self.refusal(config, draw)
            if draw not in found and refusal is None:
                found.append(draw)
            reason = refusal or reason
            if len(found) == self.trials:
                return found
        raise InputError(
            f"expected {self.trials} different trials in this search space, found {len(found)} ({reason}); lower "
            "--trials or widen --search"
        )

    def refusal(self, config: PipelineConfig, values: dict[str, Value]) -> str | None:
        """Why no trial can have these values."""
        try:
            found = resolve(with_values(config, values))
            found.augment.size(found.shard.image_size)
        except InputError as error:
            return str(error)
        if self.objective == "bits_per_dim" and found.vqvae.likelihood.kind == "density":
            return "a density has no bits"
        return None


def read_options(given: Mapping[str, str], config: PipelineConfig) -> Sweep:
    """Raises `InputError` for anything that does not fit."""
    if "--search" not in given:
        raise InputError(
            'expected fields to search over, found none; give --search "train.learning-rate=log:1e-4..1e-2"'
        )
    name = given.get("--objective", "psnr")
    if name not in OBJECTIVES:
        raise InputError(f"expected --objective to be one of {', '.join(OBJECTIVES)}, found {name!r}")
    objective = OBJECTIVES[name]
    dimensions = parse_all(given["--search"].split(), config)
    for one in dimensions:
        if one.field.split(".")[0] not in objective.parts:
            parts = ", ".join(part.replace("_", "-") for part in objective.parts)
            raise InputError(
                f"expected fields of {parts}, which {name} depends on, found {one.field.replace('_', '-')}"
            )
        if one.field.partition(".")[2] in ("steps", "patience", "validate_every", "validation_images"):
            raise InputError(
                f"expected the same budget and the same measure for all trials, found {one.field.replace('_', '-')} "
                "to search over; give it once, as an option"
            )
    if name == "bits_per_dim" and config.vqvae.likelihood.kind == "density":  # of the preset, which is compared
        raise InputError(
            "expected a likelihood with bits for the objective bits_per_dim, found a density; give "
            "--vqvae.likelihood.kind logistic, gaussian or categorical, or --objective psnr"
        )
    for option, choices in _CHOICES.items():
        if given.get(option, choices[0]) not in choices:
            raise InputError(f"expected {option} to be one of {', '.join(choices)}, found {given[option]!r}")
    searcher = given.get("--searcher", "random")
    if searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        raise InputError(
            "expected the package optuna for --searcher optuna, found none; leave it out, or in the checkout: "
            "python -m pip install -c constraints.txt -e '.[tune]'"
        )
    scheduler, generations = given.get("--scheduler", "asha"), 1
    if scheduler == "pbt":
        generations = _whole(given, "--generations", 4, 2)
        _check_population(dimensions, searcher, generations, getattr(config, objective.schedule))
    elif "--generations" in given:
        raise InputError(f"expected --generations with --scheduler pbt only, found the scheduler {scheduler}")
    sweep = Sweep(
        dimensions=dimensions,
        objective=name,
        trials=_whole(given, "--trials", 12, 2 if scheduler == "pbt" else 1),
        scheduler=scheduler,
        generations=generations,
        searcher=searcher,
        seed=_whole(given, "--seed", 0, 0),
        concurrent=_whole(given, "--concurrent", 1, 1) if "--concurrent" in given else None,
    )
    sweep.draws(config)
    return sweep


def _check_population(dimensions: list[Dimension], searcher: str, generations: int, schedule: TrainConfig) -> None:
    if searcher != "random":
        raise InputError(f"expected --searcher random with --scheduler pbt, found {searcher}")
    for one in dimensions:
        if one.field not in MAY_CHANGE:
            fields = ", ".join(name.replace("_", "-") for name in MAY_CHANGE)
            raise InputError(
                f"expected fields that may change in the middle of a training ({fields}) for --scheduler pbt, found "
                f"{one.field.replace('_', '-')}; search over it with asha or none"
            )
    if generations > schedule.steps:
        raise InputError(f"expected at most {schedule.steps} generations, one a step, found {generations}")
    if schedule.patience is not None:
        raise InputError(
            f"expected no patience with --scheduler pbt, which has all train for as long, found {schedule.patience}; "
            "give --train.patience None (or --train-prior.patience None)"
        )


def _whole(given: Mapping[str, str], option: str, default: int, least: int) -> int:
    text = given.get(option, str(default))
    if not text.isdigit() or int(text) < least:
        raise InputError(f"expected {option} to be a whole number of at least {least}, found {text!r}")
    return int(text)
