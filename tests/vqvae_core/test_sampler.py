"""The cached sampler against the plain one, the distribution that it draws from, and what it may be told."""

import copy
import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

from benchmarks.sampling import live_bytes
from tests.vqvae_core.naive_sampler import sample_naively
from vqvae_core.errors import InputError
from vqvae_core.noise import gumbel_noise
from vqvae_core.pixelcnn import NOTHING, Condition, PixelCNN, PixelCNNConfig
from vqvae_core.sampler import Draw, Given, Sampler, chosen, sample
from vqvae_core.token_shards import TokenShape

CONFIGS = {
    "3 and 7": PixelCNNConfig(channels=12, num_layers=4, kernel_size=3, first_kernel_size=7, head_channels=16),
    "3": PixelCNNConfig(channels=12, num_layers=3, kernel_size=3, first_kernel_size=3, head_channels=16),
    "5": PixelCNNConfig(channels=8, num_layers=2, kernel_size=5, first_kernel_size=5, head_channels=8),
    "one layer": PixelCNNConfig(channels=8, num_layers=1, kernel_size=3, first_kernel_size=3, head_channels=8),
}
KINDS = ("nothing", "labels", "vector", "map", "all")


def prior(
    config: PixelCNNConfig, height: int, width: int, *, num_codes: int = 7, groups: int = 1, kind: str = "nothing"
) -> PixelCNN:
    torch.manual_seed(0)
    shape = TokenShape(height=height, width=width, num_groups=groups, num_codes=num_codes)
    model = PixelCNN(
        config, shape, 3 if kind in ("labels", "all") else 0,
        vector_features=5 if kind in ("vector", "all") else 0, map_features=4 if kind in ("map", "all") else 0,
    )  # fmt: skip
    for parameter in model.parameters():  # logits about as wide as the noise: both decide what is drawn
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def condition(kind: str, batch: int, height: int, width: int) -> Condition:
    generator = torch.Generator().manual_seed(1)
    return Condition(
        labels=torch.arange(batch) % 4 - 1 if kind in ("labels", "all") else None,  # one without a label
        vector=torch.randn(batch, 5, generator=generator) if kind in ("vector", "all") else None,
        spatial=torch.randn(batch, 4, height, width, generator=generator) if kind in ("map", "all") else None,
    )


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_are_those_of_the_whole_network(name: str, kind: str, groups: int, batch: int) -> None:
    """At every site, H unlike W: in float64, so that nothing but rounding may differ."""
    height, width = 4, 6
    model = prior(CONFIGS[name], height, width, groups=groups, kind=kind).double()
    told = condition(kind, batch, height, width)
    told = Condition(
        labels=told.labels,
        vector=None if told.vector is None else told.vector.double(),
        spatial=None if told.spatial is None else told.spatial.double(),
    )
    sampler = Sampler(model, batch)
    rows: list[torch.Tensor] = []
    whole = sampler._run_row

    def watched(*, last: bool) -> None:
        whole(last=last)
        rows.append(sampler._logits.clone())

    sampler._run_row = watched  # type: ignore[method-assign]
    drawn = sampler.sample(list(range(batch)), told)
    cached = torch.stack(rows, dim=1)  # (B, H, W, G, K)
    with torch.no_grad():
        logits = model(drawn.tokens.view(batch, height, width, groups), told).permute(0, 2, 3, 4, 1)
    furthest = float((cached - logits).abs().max())
    print(f"{name}, {kind}, {groups} groups: {furthest:.1e}")
    assert furthest < 2e-6  # kept as float32


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_plain_sampler(kind: str, groups: int) -> None:
    model, told = prior(CONFIGS["3 and 7"], 5, 4, groups=groups, kind=kind), condition(kind, 6, 5, 4)
    draw = Draw(temperature=0.8, top_k=5, top_p=0.9)
    for how in (Draw(), draw):
        ours, theirs = sample(model, range(6), told, how), sample_naively(model, range(6), told, how)
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.nll_nats, theirs.nll_nats, atol=1e-4, rtol=1e-4)


def test_guidance_goes_past_the_label() -> None:
    """At each scale as the plain sampler; 0 is the prior without labels, 1 the one with them, and more is more."""
    config = PixelCNNConfig(channels=12, num_layers=2, first_kernel_size=3, head_channels=16, label_dropout=0.1)
    model, told = prior(config, 4, 3, kind="labels"), Condition(labels=torch.tensor([0, 1, 2]))
    without, found = Condition(labels=torch.full((3,), -1)), {}
    for scale in (0.0, 1.0, 1.5, 2.5):
        draw = Draw(guidance=scale)
        ours = sample(model, [1, 2, 3], told, draw)
        theirs = sample_naively(model, [1, 2, 3], told, draw, without=without)
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.nll_nats, theirs.nll_nats, atol=1e-4, rtol=1e-4)
        found[scale] = ours.tokens
    assert len({str(tokens.tolist()) for tokens in found.values()}) == 4
    assert torch.equal(found[0.0], sample(model, [1, 2, 3], without).tokens)
    assert torch.equal(found[1.0], sample(model, [1, 2, 3], told).tokens)


def test_guidance_with_a_beginning_and_groups() -> None:
    config = PixelCNNConfig(channels=12, num_layers=2, first_kernel_size=3, head_channels=16, label_dropout=0.1)
    model, told = prior(config, 4, 3, kind="labels", groups=2), Condition(labels=torch.tensor([0, 1, 2]))
    tokens, draw = torch.randint(7, (3, 4, 3, 2)), Draw(guidance=2.0)
    without = Condition(labels=torch.full((3,), -1))
    ours, theirs = (
        sample(model, range(3), told, draw, Given.rows(tokens.clone(), 2)),
        sample_naively(model, range(3), told, draw, Given.rows(tokens.clone(), 2), without),
    )
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.tokens[:, :2], tokens[:, :2])


@pytest.mark.slow
def test_a_sample_depends_on_its_own_seed_only() -> None:
    model = prior(CONFIGS["3 and 7"], 6, 5, num_codes=30)
    together = sample(model, range(64)).tokens
    for size in (1, 7):
        parts = [sample(model, range(first, min(first + size, 64))).tokens for first in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), together)
    assert len({tuple(tokens.flatten().tolist()) for tokens in together}) == 64


def test_a_sampler_can_be_used_again() -> None:
    model = prior(CONFIGS["5"], 5, 4, kind="labels")
    sampler = Sampler(model, 2)
    labels = [Condition(labels=torch.tensor(pair)) for pair in ([0, 1], [2, -1])]
    first = [sampler.sample([1, 2], labels[0]).tokens, sampler.sample([3, 4], labels[1]).tokens]
    assert torch.equal(sampler.sample([1, 2], labels[0]).tokens, first[0])
    assert torch.equal(sample(model, [3, 4], labels[1]).tokens, first[1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_what_is_given_is_kept(count: int, groups: int) -> None:
    """The first rows; the rest is drawn as the plain sampler draws it."""
    model = prior(CONFIGS["3 and 7"], 4, 5, groups=groups)
    tokens = torch.randint(7, (3, 4, 5, groups)[: 3 + (groups > 1)])
    ours = sample(model, [1, 2, 3], given=Given.rows(tokens.clone(), count))
    theirs = sample_naively(model, [1, 2, 3], given=Given.rows(tokens.clone(), count))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.tokens[:, :count], tokens[:, :count])
    assert (ours.nll_nats[:, :count] == 0).all()
    torch.testing.assert_close(ours.nll_nats, theirs.nll_nats, atol=1e-4, rtol=1e-4)


def test_each_sample_may_have_its_own_beginning() -> None:
    model = prior(CONFIGS["3 and 7"], 4, 5)
    tokens = torch.randint(7, (3, 4, 5))
    where = torch.arange(20).view(1, 4, 5) < torch.tensor([0, 7, 20]).view(3, 1, 1)
    drawn = sample(model, [1, 2, 3], given=Given(tokens.clone(), where))
    theirs = sample_naively(model, [1, 2, 3], given=Given(tokens.clone(), where))
    assert torch.equal(drawn.tokens, theirs.tokens)
    torch.testing.assert_close(drawn.nll_nats, theirs.nll_nats, atol=1e-4, rtol=1e-4)
    assert torch.equal(drawn.tokens[where], tokens[where])
    assert torch.equal(drawn.tokens[0], sample(model, [1]).tokens[0])


def test_what_is_given_and_what_was_drawn_stay_as_they_are() -> None:
    model, tokens = prior(CONFIGS["3"], 4, 5), torch.randint(7, (2, 4, 5))
    sampler, given = Sampler(model, 2), Given.rows(tokens.clone(), 2)
    first = sampler.sample([1, 2], given=given)
    kept = first.tokens.clone(), first.nll_nats.clone()
    assert torch.equal(sampler.sample([1, 2], given=Given.rows(tokens.to(torch.uint16), 2)).tokens, first.tokens)
    sampler.sample([3, 4], given=given)
    assert torch.equal(given.tokens, tokens)
    assert torch.equal(first.tokens, kept[0]) and torch.equal(first.nll_nats, kept[1])


def test_a_sampler_keeps_the_weights_that_it_was_made_with() -> None:
    model, told = prior(CONFIGS["3"], 4, 5, groups=2, kind="all"), condition("all", 2, 4, 5)
    sampler, before = Sampler(model, 2), sample(model, [1, 2], told)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = sampler.sample([1, 2], told)
    assert torch.equal(found.tokens, before.tokens) and torch.equal(found.nll_nats, before.nll_nats)
    with pytest.raises(TypeError, match="cannot be copied; make another one from its prior"):
        copy.deepcopy(sampler)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        'torch.set_float32_matmul_precision("medium")',
        'torch.backends.fp32_precision = "tf32"',
        'torch.backends.cuda.matmul.fp32_precision = "tf32"',
        "torch.backends.cudnn.allow_tf32 = True",
    ],
)
def test_settings_of_precision_are_kept(how: str) -> None:
    """However they were set; in between, products are whole. A process of its own: torch keeps both ways apart."""
    program = f"""
import torch
from vqvae_core.fp32 import whole_fp32
b = torch.backends
places = [b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv]
{how}
before = [place.fp32_precision for place in places]
with whole_fp32():
    assert [place.fp32_precision for place in places] == ["ieee"] * 4
assert [place.fp32_precision for place in places] == before
print(before, {"torch.get_float32_matmul_precision()" if "set_" in how else ""})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "tf32" in result.stdout


def test_frequencies_follow_the_distribution() -> None:
    """Chi-squared of 6,000 draws on 1x2 sites of 2 groups of 2 codes: 15 degrees of freedom, of which 37.7 is the
    99.9 % point. A sampler that is blind to the codes before its own fails by far."""
    model = prior(CONFIGS["one layer"], 1, 2, num_codes=2, groups=2).double()
    assert model.head.earlier is not None
    torch.manual_seed(24)  # with which a code says much of the next one, and each of the 16 grids is drawn
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.embed.weight.data *= 2
    model.head.earlier.weight.data *= 4
    grids = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 1, 2, 2)
    probability = (-model.nll_nats(grids).sum(dim=(1, 2, 3))).exp().detach()
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0, dtype=torch.float64))

    def chi_squared(sampled: PixelCNN) -> float:
        tokens = sample(sampled, range(6000)).tokens.flatten(1)
        found = torch.bincount((tokens * torch.tensor([8, 4, 2, 1])).sum(dim=1), minlength=16)
        expected = probability * 6000
        return float(((found - expected).square() / expected).sum())

    assert chi_squared(model) < 37.7
    of_sites, of_groups = copy.deepcopy(model), copy.deepcopy(model)
    of_sites.embed.weight.data[:] = of_sites.embed.weight.data.mean(dim=0)
    assert of_groups.head.earlier is not None
    of_groups.head.earlier.weight.data[:] = of_groups.head.earlier.weight.data.mean(dim=0)
    blind = chi_squared(of_sites), chi_squared(of_groups)
    print(f"blind to earlier sites {blind[0]:.0f}, to earlier groups {blind[1]:.0f}")
    assert min(blind) > 100


def test_the_log_likelihood_is_the_priors() -> None:
    """At temperature 1, whatever it was drawn at."""
    model = prior(CONFIGS["3"], 3, 5, num_codes=4, kind="labels")
    told = Condition(labels=torch.tensor([0, 1]))
    drawn = sample(model, [1, 2], told, Draw(temperature=0.7, top_k=2))
    torch.testing.assert_close(drawn.nll_nats, model.nll_nats(drawn.tokens, told), atol=1e-4, rtol=1e-4)


def test_top_k_and_top_p_against_their_definitions() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.0, -1.0, 1.5]])
    ranked = [1, 4, 2, 0, 3]
    probability = logits.softmax(dim=1)[0]
    noise = gumbel_noise(torch.arange(3000), 0, 1, 5)[:, 0]
    many = logits.expand(3000, -1)
    for k in (1, 2, 5, 9):
        assert set(chosen(many, noise, Draw(top_k=k)).tolist()) == set(ranked[:k])
    for p in (0.3, 0.6, 0.9, 1.0):
        needed = next(n for n in range(1, 6) if probability[ranked[:n]].sum() >= p - 1e-6)
        assert set(chosen(many, noise, Draw(top_p=p)).tolist()) == set(ranked[:needed])
    assert set(chosen(many, noise, Draw(temperature=0.01)).tolist()) == {1}


def test_top_p_of_1_leaves_no_code_out() -> None:
    """Not the last ones of many either, whose probabilities are lost beside 1 in fp32."""
    logits, noise = torch.full((1, 3), -40.0), torch.zeros(1, 3)
    logits[0, 0], noise[0, 2] = 0.0, 100.0
    assert chosen(logits, noise, Draw(top_p=1.0)).item() == chosen(logits, noise, Draw(top_p=1.0, top_k=3)).item() == 2
    assert chosen(logits, noise, Draw(top_p=0.999)).item() == 0


def test_bf16_weights_are_near() -> None:
    """Given the same codes before, logits differ by little; a network without weights is far from them."""
    model = prior(CONFIGS["3"], 4, 4)
    sampler, rows = Sampler(model, 8, dtype=torch.bfloat16), []
    whole = sampler._run_row

    def watched(*, last: bool) -> None:
        whole(last=last)
        rows.append(sampler._logits.clone())

    sampler._run_row = watched  # type: ignore[method-assign]
    drawn = sampler.sample(range(8))
    near = torch.stack(rows, dim=1)[..., 0, :]  # (B, H, W, K)
    with torch.no_grad():
        exact = model(drawn.tokens).permute(0, 2, 3, 1)
    assert drawn.nll_nats.dtype == torch.float32
    assert 0 < (near - exact).abs().mean() < 0.02 * exact.std()


@pytest.mark.slow
def test_nothing_grows_with_the_rows() -> None:
    """What lives while the last row is drawn is what lived in the second one, conditions of each site included."""
    model = prior(CONFIGS["3"], 12, 6, kind="all")
    sampler, alive = Sampler(model, 2), []
    whole = sampler._run_row

    def watched(*, last: bool) -> None:
        whole(last=last)
        alive.append(live_bytes())

    sampler._run_row = watched  # type: ignore[method-assign]
    sampler.sample([1, 2], condition("all", 2, 12, 6))
    assert alive[-1] == alive[1]
    shorter = Sampler(prior(CONFIGS["3"], 4, 6, kind="all"), 2)
    assert shorter.cache_bytes == sampler.cache_bytes > sum(layer.ahead.nbytes for layer in sampler._layers)


GPU_CASES = {
    "nothing": (1, Draw(), None, None),
    "groups": (3, Draw(), None, None),
    "restricted": (1, Draw(temperature=0.8, top_k=5, top_p=0.9), None, None),
    "guided": (1, Draw(guidance=1.5), None, None),
    "begun": (1, Draw(), 2, None),
    "bf16": (1, Draw(), None, torch.bfloat16),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GPU_CASES)
def test_a_recorded_row_draws_what_the_plain_sampler_draws(case: str, kind: str) -> None:
    """Recorded, and played again for other seeds, conditions and beginnings."""
    groups, draw, begun, dtype = GPU_CASES[case]
    if draw.guidance != 1 and kind not in ("labels", "all"):
        pytest.skip("guidance is for priors with labels")
    model = prior(CONFIGS["3 and 7"], 5, 4, kind=kind, groups=groups).cuda()
    recorded, eager = Sampler(model, 6, draw, dtype), Sampler(model, 6, draw, dtype, graphs=False)
    for number in range(3):
        seeds, told = range(6 * number, 6 * number + 6), condition(kind, 6, 5, 4)
        parts = {name: None if part is None else part.roll(number, 0).cuda() for name, part in vars(told).items()}
        told, tokens = Condition(**parts), torch.randint(7, (6, 5, 4, groups))
        given = None if begun is None else Given.rows(tokens, begun if number < 2 else 0)
        found = recorded.sample(seeds, told, given).tokens
        assert torch.equal(found, eager.sample(seeds, told, given).tokens)
        if dtype is None:
            without = NOTHING
            if draw.guidance != 1:
                assert told.labels is not None
                without = dataclasses.replace(told, labels=torch.full_like(told.labels, -1))
            assert torch.equal(found, sample_naively(model, seeds, told, draw, given, without).tokens)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: sample(model, [1], Condition(labels=torch.tensor([0]))), "expected no condition of kind labels"),
        (lambda model: Sampler(model, 2).sample([1]), "expected 2 seeds, found 1"),
        (lambda model: sample(model, [1], draw=Draw(guidance=2.0)), "expected a prior with classes for guidance"),
        (lambda model: sample(model, [2**63]), "expected seeds of 64 bits, found 9223372036854775808"),
        (lambda model: Given.rows(torch.zeros(1, 3, 3), -1), "expected to keep 0 to 3 rows, found -1"),
        (
            lambda model: sample(model, [1], given=Given(torch.zeros(1, 3, 3).long(), torch.eye(3).bool()[None])),
            "expected the given sites to be the first ones in raster order",
        ),
        (
            lambda model: sample(model, [1], given=Given.rows(torch.full((1, 3, 3), 7), 1)),
            "expected given tokens from 0 to 6, found 7 to 7",
        ),
        (
            lambda model: sample(model, [1], given=Given.rows(torch.zeros(1, 2, 3).long(), 1)),
            "expected given tokens of",
        ),
    ],
)
def test_messages(change, words: str) -> None:
    with pytest.raises(InputError, match=words):
        change(prior(CONFIGS["one layer"], 3, 3))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0, was 0.0"),
        ({"top_k": 0}, "top_k must be at least 1, or None for all codes, was 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, or None for all codes, was 1.5"),
        ({"guidance": -1.0}, "guidance must be a number, 0 or more, was -1.0"),
    ],
)
def test_bad_values(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Draw(**values)
