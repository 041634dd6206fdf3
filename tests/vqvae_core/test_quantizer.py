import numpy as np
import pytest
import torch

from vqvae_core import quantizer
from vqvae_core.errors import InputError
from vqvae_core.quantizer import QuantizerConfig, VectorQuantizer, kmeans_plus_plus, nearest_codes


def test_nearest_code_against_numpy() -> None:
    latents, table = torch.randn(300, 7), torch.randn(40, 7)
    distance = ((latents.double().numpy()[:, None] - table.double().numpy()[None]) ** 2).sum(-1)
    assert np.array_equal(nearest_codes(latents, table).numpy(), distance.argmin(1))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, table = torch.randn(257, 8), torch.randn(16, 8)
    whole = nearest_codes(latents, table)
    monkeypatch.setattr(quantizer, "_CHUNK_ELEMENTS", 16 * 10)
    assert torch.equal(nearest_codes(latents, table), whole)


def test_codes_are_found_in_fp32_under_autocast() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=64, code_dim=8, init="uniform"))
    latents = torch.randn(2, 8, 5, 3)
    plain = module(latents).tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(latents).tokens, plain)


def test_the_two_distances_are_sums_over_dim_and_means_over_latents() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=4, code_dim=3, init="uniform"))
    latents = torch.randn(2, 3, 4, 5)
    out = module(latents)
    codes = module.table.detach()[out.tokens].permute(0, 3, 1, 2)
    expected = (latents - codes).square().sum(dim=1).mean()
    torch.testing.assert_close(out.commitment, expected)
    torch.testing.assert_close(out.table_loss.detach(), expected)


def test_the_gradient_passes_straight_through() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=4, code_dim=3, init="uniform"))
    latents = torch.randn(2, 3, 4, 5, requires_grad=True)
    weight = torch.randn(2, 3, 4, 5)
    (module(latents).codes * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)
    assert module.table.grad is None or not module.table.grad.any()


def test_moving_averages_start_without_a_jump() -> None:
    """Counts start at 1 and sums at the table: an unused code keeps its place after one step, none explodes."""
    module = VectorQuantizer(QuantizerConfig(num_codes=8, code_dim=4, learn_by="moving_average", init="uniform"))
    before = module.table.detach().clone()
    counts = torch.zeros(8)
    counts[0] = 8.0
    sums = torch.zeros(8, 4)
    sums[0] = 8 * 0.5
    module.learn(counts, sums)
    torch.testing.assert_close(module.table[1:], before[1:], rtol=1e-4, atol=1e-6)
    expected = (0.99 * before[0] + 0.01 * 4.0) / (0.99 + 0.08)
    torch.testing.assert_close(module.table[0], expected, rtol=1e-4, atol=1e-6)


def test_smoothing_is_never_stored() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=8, code_dim=4, learn_by="moving_average"))
    for _ in range(200):
        module.learn(torch.zeros(8), torch.zeros(8, 4))
    torch.testing.assert_close(module.counts, torch.full((8,), 0.99**200))


def test_eval_freezes_the_table() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=8, code_dim=4, learn_by="moving_average", init="uniform")).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    latents = torch.randn(2, 4, 3, 3)
    module.learn(*module.statistics(latents, module(latents).tokens))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_state_of_moving_averages_is_in_the_state_dict() -> None:
    names = set(VectorQuantizer(QuantizerConfig()).state_dict())
    assert names == {"table", "counts", "sums", "hits", "started"}


def test_a_revived_code_loses_its_statistics() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=4, code_dim=2, learn_by="moving_average", init="uniform"))
    for _ in range(50):
        module.learn(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.ones(4, 2))
    assert module.revive(torch.tensor([[4.0, 5.0], [6.0, 7.0]])).tolist() == [2]
    assert module.table[2].tolist() == module.sums[2].tolist() == [4.0, 5.0]
    assert module.counts[2] == 1.0
    assert not module.hits.any()


def test_two_codes_are_never_revived_at_one_place() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=4, code_dim=2, init="uniform"))
    assert module.revive(torch.tensor([[4.0, 5.0], [6.0, 7.0]])).tolist() == [0, 1]
    assert module.table.tolist()[:2] == [[4.0, 5.0], [6.0, 7.0]]


def test_kmeans_plus_plus_takes_points_and_spreads() -> None:
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    points = (centres[:, None] + torch.randn(3, 50, 2)).reshape(-1, 2)
    codes = kmeans_plus_plus(points, 3, torch.Generator().manual_seed(0))
    assert sorted(nearest_codes(codes, centres).tolist()) == [0, 1, 2]
    assert all((points == code).all(1).any() for code in codes)


def test_kmeans_plus_plus_with_fewer_places_than_codes() -> None:
    codes = kmeans_plus_plus(torch.ones(5, 2), 4, torch.Generator().manual_seed(0))
    assert torch.equal(codes, torch.ones(4, 2))


def test_a_token_outside_the_table_is_refused() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=4, code_dim=2))
    with pytest.raises(InputError, match=r"expected tokens from 0 to 3, found 0 to 4"):
        module.lookup(torch.tensor([[[0, 4]]]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codes", 70_000, "num_codes must be 1 to 65536"),
        ("code_dim", 0, "code_dim must be at least 1"),
        ("decay", 1.0, "decay must lie between 0 and 1"),
        ("revive_every", -1, "revive_every must be 0"),
        ("revive_until", 2.0, "revive_until must be a share"),
    ],
)
def test_bad_values_say_what_is_expected(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**{field: value})
