"""What tables need in training: when codes are revived, with what state, and counts by epoch."""

from dataclasses import replace

import pytest
import torch

from vqvae_core.quantizer import GroupedQuantizer, QuantizerConfig
from vqvae_core.table_upkeep import TableUpkeep

CONFIG = QuantizerConfig(num_codes=6, code_dim=2, num_groups=2, revive_every=4)


def upkeep(config: QuantizerConfig = CONFIG) -> TableUpkeep:
    torch.manual_seed(0)
    return TableUpkeep(GroupedQuantizer(config), steps=20, steps_per_epoch=3, seed=0)


def test_when_codes_are_revived() -> None:
    """After every 4th step of 20, up to 0.8 of them."""
    assert [step for step in range(20) if upkeep().revives(step)] == [3, 7, 11, 15]
    assert not any(upkeep(replace(CONFIG, revive_every=0)).revives(step) for step in range(20))


def test_a_revived_code_begins_with_a_clean_state_of_the_optimizer() -> None:
    """Codes 0 and 3 of each table were chosen; the others go to the candidates, the chosen ones stay."""
    found = upkeep()
    tables = found.quantizer.tables()
    optimizer = torch.optim.Adam(found.quantizer.parameters(), lr=0.1)
    sum(table.table.square().sum() for table in tables).backward()  # type: ignore[union-attr]
    optimizer.step()
    before = [table.table.detach().clone() for table in tables]
    states = [optimizer.state[table.table] for table in tables]
    assert all(bool(state["exp_avg"].all()) for state in states)
    counts, candidates = torch.tensor([5.0, 0, 0, 1, 0, 0]), torch.arange(24.0).view(6, 4) + 10
    found.after_step([counts, counts, candidates], 3, optimizer)
    for number, (table, state) in enumerate(zip(tables, states, strict=True)):
        mine = candidates[:, 2 * number : 2 * number + 2]
        assert torch.equal(table.table[[0, 3]], before[number][[0, 3]])
        assert torch.equal(table.table[[1, 2, 4, 5]], mine[:4])
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].any(dim=1).tolist() == [True, False, False, True, False, False]
        assert int(state["step"]) == 1


def test_points_of_all_ranks_make_the_start() -> None:
    """Each rank has some rows and zeros for the rest; what is summed is what the codes start at."""
    points = torch.randn(96, 4)
    part, rest = points.clone(), points.clone()
    part[40:], rest[:40] = 0, 0
    one, many = upkeep(), upkeep()
    assert one.num_start_points == 96
    one.start(points.clone(), lambda tensor: None)

    def all_reduce(tensor: torch.Tensor) -> None:
        tensor.add_(rest)

    many.start(part, all_reduce)
    for table, other in zip(one.quantizer.tables(), many.quantizer.tables(), strict=True):
        assert table.placed and torch.equal(table.table, other.table)


def test_figures_come_once_an_epoch() -> None:
    found = upkeep()
    counts = torch.tensor([2.0, 2, 0, 0, 0, 0])
    optimizer = torch.optim.Adam(found.quantizer.parameters())
    for step in range(3):
        found.after_step([counts, counts], step, optimizer)
    assert found.figures(0, 2) == {}
    assert found.figures(2, 3) == {"epoch_usage": pytest.approx(1 / 3), "epoch_perplexity": pytest.approx(2.0)}
    assert found.figures(3, 5) == {}
