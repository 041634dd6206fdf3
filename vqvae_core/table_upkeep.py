"""What a quantizer's tables need in training beside the step itself: a start, revivals, and counts by epoch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqvae_core.metrics import mean_perplexity, usage
from vqvae_core.order import mix
from vqvae_core.quantizer import Quantizer

_START_POINTS_PER_CODE = 16


@dataclass(frozen=True)
class TableUpkeep:
    """The upkeep of one quantizer. steps: of the whole run, and of an epoch. seed: of the run.

    The candidates for a revival are the last of a step's statistics: a sum over ranks, so that all see the same.
    """

    quantizer: Quantizer
    steps: int
    steps_per_epoch: int
    seed: int

    @property
    def num_start_points(self) -> int:
        """Latents that a start is chosen from."""
        return _START_POINTS_PER_CODE * self.quantizer.config.num_codes

    def start(self, points: Tensor, all_reduce: Callable[[Tensor], None]) -> None:
        """Put the codes of each table at its part of points (N, G*D). Each rank has some of the points, and zeros for
        those of others."""
        all_reduce(points)
        tables = self.quantizer.tables()
        for number, (table, part) in enumerate(zip(tables, points.chunk(len(tables), dim=1), strict=True)):
            seed = mix(self.seed, 4, number) & (2**63 - 1) if number else self.seed
            table.start(part, torch.Generator().manual_seed(seed))

    def revives(self, step: int) -> bool:
        """Whether codes are revived after a step."""
        config = self.quantizer.config
        every = config.revive_every
        return bool(every) and (step + 1) % every == 0 and step + 1 <= config.revive_until * self.steps

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Learn from statistics that are summed over all ranks, and revive the codes that nothing chose, with a clean
        state of the optimizer."""
        revives = self.revives(step)
        self.quantizer.learn(statistics[:-1] if revives else statistics)
        if revives:
            tables = self.quantizer.tables()
            for table, candidates in zip(tables, statistics[-1].chunk(len(tables), dim=1), strict=True):
                revived = table.revive(candidates)
                for value in optimizer.state.get(table.table, {}).values():
                    if value.shape == table.table.shape:
                        value[revived] = 0
        if (step + 1) % self.steps_per_epoch == 0:
            self.quantizer.end_epoch()

    def figures(self, since: int, done: int) -> dict[str, float]:
        """Usage and perplexity of the codes over the whole of the last epoch, in the first point after its end."""
        if done // self.steps_per_epoch == since // self.steps_per_epoch:
            return {}
        counts = self.quantizer.epoch_counts().cpu()
        return {"epoch_usage": usage(counts), "epoch_perplexity": mean_perplexity(counts)}
