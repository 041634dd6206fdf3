import copy
import dataclasses

import numpy as np
import pytest
import torch

from vqvae_core import nearest
from vqvae_core.errors import InputError
from vqvae_core.nearest import kmeans_plus_plus, nearest_codes
from vqvae_core.quantizer import (
    FiniteScalarQuantizer,
    GroupedQuantizer,
    Quantizer,
    QuantizerConfig,
    VectorQuantizer,
    make_quantizer,
    rotated,
    sums_by_code,
    sums_by_gradient,
)


def test_nearest_code_against_numpy() -> None:
    latents, table = torch.randn(300, 7), torch.randn(40, 7)
    distance = ((latents.double().numpy()[:, None] - table.double().numpy()[None]) ** 2).sum(-1)
    assert np.array_equal(nearest_codes(latents, table).numpy(), distance.argmin(1))


@pytest.mark.parametrize("num_codes", [1, 63, 64, 128, 192, 200, 512])
def test_blocks_of_codes_find_the_same(num_codes: int) -> None:
    latents, table = torch.randn(500, 5, dtype=torch.float64), torch.randn(num_codes, 5, dtype=torch.float64)
    assert torch.equal(nearest_codes(latents, table), torch.cdist(latents, table).argmin(1))


@pytest.mark.parametrize("num_codes", [64, 256])
def test_ties_go_to_the_lowest_index(num_codes: int) -> None:
    table = torch.randn(num_codes, 3)
    table[num_codes // 2 :] = table[: num_codes // 2]
    assert int(nearest_codes(torch.randn(1000, 3), table).max()) < num_codes // 2


def test_codes_that_lie_close_together_and_far_from_zero() -> None:
    """Where |e|^2 - 2 z.e is nothing but rounding in fp32: distances are taken from the codes' mean."""
    table = torch.randn(128, 16, dtype=torch.float64) * 1e-3
    latents = torch.randn(2000, 16, dtype=torch.float64) * 1e-3
    far = torch.full((16,), 7.0, dtype=torch.float64)
    single = (table + far).float(), (latents + far).float()
    exact = torch.cdist(single[1].double(), single[0].double()).argmin(1)
    assert (nearest_codes(single[1], single[0]) == exact).float().mean() > 0.998


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, table = torch.randn(257, 8), torch.randn(16, 8)
    whole = nearest_codes(latents, table)
    monkeypatch.setattr(nearest, "_CHUNK_ELEMENTS", 16 * 10)
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
    module.learn([counts, sums])
    torch.testing.assert_close(module.table[1:], before[1:], rtol=1e-4, atol=1e-6)
    expected = (0.99 * before[0] + 0.01 * 4.0) / (0.99 + 0.08)
    torch.testing.assert_close(module.table[0], expected, rtol=1e-4, atol=1e-6)


def test_smoothing_is_never_stored() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=8, code_dim=4, learn_by="moving_average"))
    for _ in range(200):
        module.learn([torch.zeros(8), torch.zeros(8, 4)])
    torch.testing.assert_close(module.counts, torch.full((8,), 0.99**200))


def test_eval_freezes_the_table() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=8, code_dim=4, learn_by="moving_average", init="uniform")).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    latents = torch.randn(2, 4, 3, 3)
    module.learn(module.statistics(module(latents)))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_state_of_moving_averages_is_in_the_state_dict() -> None:
    names = set(VectorQuantizer(QuantizerConfig()).state_dict())
    assert names == {"table", "counts", "sums", "hits", "epoch_hits", "last_epoch_hits", "placed"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_by_code_are_those_of_numpy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tokens, rows = torch.randint(5, 12, (5000,)), torch.randn(5000, 3, dtype=torch.float64)
    expected = np.zeros((14, 3))
    np.add.at(expected, tokens.numpy(), rows.numpy())
    where = rows.to(device), tokens.to(device), 14
    for found in (sums_by_code(*where), sums_by_gradient(*where)):
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=1e-11)
    single = where[0].float()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True)
    try:
        again = [sums_by_code(single, *where[1:]) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found, again[0]) for found in again)


def test_a_revived_code_loses_its_statistics() -> None:
    module = VectorQuantizer(QuantizerConfig(num_codes=4, code_dim=2, learn_by="moving_average", init="uniform"))
    for _ in range(50):
        module.learn([torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.ones(4, 2)])
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


ALL = {
    "paper": QuantizerConfig(num_codes=16, code_dim=4),
    "moving average": QuantizerConfig(num_codes=16, code_dim=4, learn_by="moving_average"),
    "rotation": QuantizerConfig(num_codes=16, code_dim=4, gradient="rotation"),
    "sphere": QuantizerConfig(num_codes=16, code_dim=4, normalize=True),
    "sphere, moving average": QuantizerConfig(num_codes=16, code_dim=4, normalize=True, learn_by="moving_average"),
    "fsq": QuantizerConfig(levels=(4, 3, 5)),
}


@pytest.mark.parametrize("name", ALL)
def test_the_interface(name: str) -> None:
    """Tokens lead back to the codes, counts are those of the tokens, and eval learns nothing."""
    module = make_quantizer(ALL[name])
    latents = torch.randn(3, ALL[name].code_dim, 4, 5, requires_grad=True)
    out = module(latents)
    assert isinstance(module, Quantizer)
    assert out.codes.shape == latents.shape
    torch.testing.assert_close(module.lookup(out.tokens), out.codes.detach(), rtol=1e-5, atol=1e-6)
    statistics = module.statistics(out)
    assert torch.equal(statistics[0], torch.bincount(out.tokens.flatten(), minlength=ALL[name].num_codes).float())
    module.learn(statistics)
    module.learn(statistics)
    assert torch.equal(module.epoch_hits, 2 * statistics[0].long())
    module.end_epoch()
    assert torch.equal(module.last_epoch_hits, 2 * statistics[0].long())
    assert not module.epoch_hits.any()
    before = {key: value.clone() for key, value in module.eval().state_dict().items()}
    module.learn(statistics)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    out.codes.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    with pytest.raises(InputError, match="expected tokens from 0 to"):
        module.lookup(torch.tensor([[[ALL[name].num_codes]]]))


def test_counts_of_an_epoch_are_whole_numbers() -> None:
    """In fp32 a count would stand still at 2**24."""
    module = make_quantizer(QuantizerConfig(num_codes=2, code_dim=1))
    module.epoch_hits[0] = 2**24
    module.learn([torch.tensor([1.0, 0.0])])
    assert module.epoch_hits[0] == 2**24 + 1


def test_a_rotated_latent_is_its_code() -> None:
    rows, codes = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(rotated(rows, codes), codes)


def test_the_rotated_gradient_keeps_its_angle_to_the_code() -> None:
    """What the encoder gets is turned and scaled as the latent was: its angle to the latent is that of the decoder's
    gradient to the code, its length that times |q| / |z| (section 4 of the paper)."""
    rows = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    codes, gradient = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    rotated(rows, codes).backward(gradient)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(rows.grad, rows.detach()), cosine(gradient, codes))
    scale = codes.norm(dim=1) / rows.detach().norm(dim=1)
    torch.testing.assert_close(rows.grad.norm(dim=1), gradient.norm(dim=1) * scale)


@pytest.mark.parametrize("case", ["zero latent", "zero code", "opposite"])
def test_a_rotation_without_direction_copies_the_gradient(case: str) -> None:
    z, q = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    z = torch.zeros(1, 2) if case == "zero latent" else z
    q = {"zero code": torch.zeros(1, 2), "opposite": -z}.get(case, q)
    z.requires_grad_()
    rotated(z, q).backward(torch.tensor([[5.0, 7.0]]))
    assert z.grad.tolist() == [[5.0, 7.0]]


def test_on_the_sphere_only_directions_count() -> None:
    module = make_quantizer(ALL["sphere"])
    latents = torch.randn(2, 4, 3, 3)
    assert torch.equal(module(latents).tokens, module(latents * 37).tokens)
    torch.testing.assert_close(module(latents).codes.norm(dim=1), torch.ones(2, 3, 3))
    distance = (latents / latents.norm(dim=1, keepdim=True) - module(latents).codes).square().sum(1).mean()
    torch.testing.assert_close(module(latents).commitment, distance)


def test_moving_averages_stay_on_the_sphere() -> None:
    module = make_quantizer(ALL["sphere, moving average"])
    for _ in range(5):
        module.learn(module.statistics(module(torch.randn(2, 4, 3, 3) * 9)))
    torch.testing.assert_close(module.table.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("levels", [(2,), (3,), (4,), (8, 5), (8, 8, 8), (7, 5, 5, 5)])
def test_fsq_has_a_code_for_each_choice_of_levels(levels: tuple[int, ...]) -> None:
    module = make_quantizer(QuantizerConfig(levels=levels))
    count = module.config.num_codes
    assert (count, module.config.code_dim) == (int(np.prod(levels)), len(levels))
    codes = module.lookup(torch.arange(count).view(1, 1, -1))
    assert len(set(map(tuple, codes[0, :, 0].T.tolist()))) == count
    assert codes.abs().max() <= 1
    for channel, number in enumerate(levels):
        assert len(codes[0, channel, 0].unique()) == number


def test_fsq_reaches_every_code_and_rounds_to_the_nearest() -> None:
    module = make_quantizer(QuantizerConfig(levels=(4, 5)))
    latents = torch.randn(1, 2, 200, 200) * 3
    out = module(latents)
    assert len(out.tokens.unique()) == 20
    assert isinstance(module, FiniteScalarQuantizer)
    bounded = module._bounded(latents.permute(0, 2, 3, 1).reshape(-1, 2))
    assert ((bounded - bounded.round()).abs() <= 0.5).all()
    assert bounded.round().amin(0).tolist() == [-2, -2]
    assert bounded.round().amax(0).tolist() == [1, 2]
    assert float(out.commitment) == float(out.table_loss) == 0


def test_fsq_passes_the_gradient_of_its_bound() -> None:
    module = make_quantizer(QuantizerConfig(levels=(5, 5)))
    latents = torch.randn(1, 2, 3, 3, requires_grad=True)
    module(latents).codes.sum().backward()
    expected = (1 - latents.detach().tanh() ** 2) * (2 * 1.001) / 2
    torch.testing.assert_close(latents.grad, expected)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codes", 70_000, "num_codes must be 1 to 65536"),
        ("code_dim", 0, "code_dim must be at least 1"),
        ("decay", 1.0, "decay must lie between 0 and 1"),
        ("revive_every", -1, "revive_every must be 0"),
        ("revive_until", 2.0, "revive_until must be a share"),
        ("levels", (8, 1), "levels must be 2 or more in each channel, were 8 1"),
    ],
)
def test_bad_values_say_what_is_expected(field: str, value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**{field: value})


def test_levels_leave_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match=r"levels \(FSQ\) leave no table to learn: leave out learn_by"):
        QuantizerConfig(levels=(8, 8), learn_by="moving_average")


GROUPED = QuantizerConfig(num_codes=8, code_dim=3, num_groups=4, learn_by="moving_average", init="uniform")


def grouped(**changes) -> GroupedQuantizer:
    torch.manual_seed(0)
    module = make_quantizer(dataclasses.replace(GROUPED, **changes))
    assert isinstance(module, GroupedQuantizer)
    for table in module.tables():
        table.table.data.normal_()
    return module


def test_groups_are_quantizers_of_their_own_channels() -> None:
    module, latents = grouped(), torch.randn(2, 12, 5, 4)
    whole = module(latents)
    assert whole.codes.shape == (2, 12, 5, 4) and whole.tokens.shape == (2, 5, 4, 4) and whole.rows.shape == (40, 12)
    parts = [table(part) for table, part in zip(module.tables(), latents.chunk(4, dim=1), strict=True)]
    for number, part in enumerate(parts):
        assert torch.equal(whole.tokens[..., number], part.tokens)
        assert torch.equal(whole.codes[:, 3 * number : 3 * number + 3], part.codes)
    torch.testing.assert_close(whole.commitment, sum(part.commitment for part in parts) / 4)
    torch.testing.assert_close(whole.table_loss, sum(part.table_loss for part in parts) / 4)
    assert torch.equal(module.lookup(whole.tokens), whole.codes)


def test_each_group_learns_from_its_own_latents() -> None:
    module, latents = grouped(), torch.randn(2, 12, 5, 4)
    alone = [copy.deepcopy(table) for table in module.tables()]
    quantized = module(latents)
    module.learn(module.statistics(quantized))
    for number, (table, other) in enumerate(zip(module.tables(), alone, strict=True)):
        part = other(latents[:, 3 * number : 3 * number + 3])
        other.learn(other.statistics(part))
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in table.state_dict().items())
    module.end_epoch()
    assert module.epoch_counts().shape == (4, 8)
    assert module.epoch_counts().sum(dim=1).tolist() == [40] * 4
    assert torch.equal(module.epoch_counts()[1], torch.bincount(quantized.tokens[..., 1].flatten(), minlength=8))


def test_groups_refuse_a_token_outside_their_tables() -> None:
    with pytest.raises(InputError, match="expected tokens from 0 to 7, found 0 to 8"):
        grouped().lookup(torch.tensor([[[[0, 8, 1, 2]]]]))
    for shape in ((1, 2, 2), (1, 2, 2, 3)):
        with pytest.raises(InputError, match=r"expected 4 codes a site, tokens of shape \(B, H, W, 4\), found \(1, 2"):
            grouped().lookup(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(InputError, match=r"expected 1 codes a site, tokens of shape \(B, H, W\), found"):
        make_quantizer(QuantizerConfig(num_codes=8, code_dim=3)).lookup(torch.zeros(1, 2, 2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_groups must be 1, was 2"):
        QuantizerConfig(levels=(4, 4), num_groups=2)
    with pytest.raises(ValueError, match="num_groups must be at least 1, was 0"):
        QuantizerConfig(num_groups=0)
