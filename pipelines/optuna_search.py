"""Optuna's TPE as Ray Tune's searcher: no values twice, none that the config refuses, and the same first trials again
for a sweep that goes on. (Ray's own wrapper of Optuna repeats values, and then two trials would train one model.)"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna import distributions
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipelines.search_space import Dimension, Value

_DRAWS = 100  # tries for a trial


class OptunaSearch(Searcher):
    """refusal: why no trial can have some values, None where one can. known: values of the trials of earlier runs,
    by number. is_exhausted: there were no other values any more."""

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        refusal: Callable[[dict[str, Value]], str | None],
        seed: int,
        known: Mapping[int, dict[str, Value]],
    ) -> None:
        super().__init__()
        self._dimensions, self._space = dimensions, {one.field: distribution(one) for one in dimensions}
        self._refusal, self._seed, self._generator = refusal, seed, random.Random(seed)  # noqa: S311
        self._known, self._seen, self.is_exhausted = dict(known), list[dict[str, Value]](), False
        self._study: Any = None
        self._asked: dict[str, Any] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        if self._study is None:
            self._metric, self._mode = metric, mode
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            sampler = optuna.samplers.TPESampler(seed=self._seed)
            self._study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)
        return True

    def suggest(self, trial_id: str) -> Any:
        known = self._known.pop(len(self._seen) + 1, None)
        if known is not None:
            self._study.enqueue_trial(known)
        for number in range(2 * _DRAWS):
            if number >= _DRAWS:  # the sampler only repeats itself: any others
                self._study.enqueue_trial({one.field: one.draw(self._generator) for one in self._dimensions})
            asked = self._study.ask(self._space)
            values = dict(asked.params)
            if values in self._seen or values in self._known.values() or self._refusal(values) is not None:
                self._study.tell(asked, state=TrialState.FAIL)
                continue
            self._seen.append(values)
            self._asked[trial_id] = asked
            return {"trial": {"number": len(self._seen), "values": values}}
        self.is_exhausted = True
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        asked = self._asked.pop(trial_id)
        if error or result is None:
            self._study.tell(asked, state=TrialState.FAIL)
        else:
            self._study.tell(asked, result[str(self._metric)])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: trials' records are what a sweep goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def distribution(dimension: Dimension) -> distributions.BaseDistribution:
    """A dimension as Optuna's."""
    if dimension.kind == "choice":
        return distributions.CategoricalDistribution(list(dimension.values))
    is_log = dimension.kind == "log"
    if dimension.whole:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=is_log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=is_log)
