"""The second stage: what its logits may see, where gradients go, its divergence, and a trained one as an API."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vqvae_core.artifacts import FileEntry, commit
from vqvae_core.errors import InputError
from vqvae_core.pixelcnn import Condition, PixelCNNConfig
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.second_stage import (
    KIND,
    KINDS,
    LatentKind,
    SecondStage,
    SecondStageConfig,
    SecondStageNetwork,
    TokenEncoder,
)
from vqvae_core.second_stage_training import derangement, evaluate
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape

SHAPE = TokenShape(height=3, width=5, num_groups=1, num_codes=7)
CONFIG = SecondStageConfig(
    channels=8,
    residual_channels=8,
    num_residual_blocks=1,
    quantizer=QuantizerConfig(num_codes=6, code_dim=4, num_groups=3, learn_by="moving_average"),
    decoder=PixelCNNConfig(channels=8, num_layers=3, first_kernel_size=3, head_channels=8),
)
UNUSED = {"decoder.layers.2.residual.weight", "decoder.layers.2.residual.bias"}  # nothing follows the last layer
LEARNED = replace(CONFIG, quantizer=replace(CONFIG.quantizer, learn_by="loss"))


def network(
    latents: LatentKind = "codes", config: SecondStageConfig = CONFIG, shape: TokenShape = SHAPE
) -> SecondStageNetwork:
    torch.manual_seed(0)
    return SecondStageNetwork(config.with_latents(latents), shape)


def grids(count: int = 6, shape: TokenShape = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(shape.num_codes, (count, shape.height, shape.width, shape.num_groups), generator=generator)


def noise(model: SecondStageNetwork, count: int = 6) -> torch.Tensor:
    return torch.randn(count, model.decoder.vector_features, generator=torch.Generator().manual_seed(4))


def moved(parameters) -> set[str]:
    return {name for name, parameter in parameters if parameter.grad is not None and bool(parameter.grad.any())}


@pytest.mark.parametrize("latents", KINDS)
def test_later_tokens_are_seen_through_z_only(latents: LatentKind) -> None:
    """With z fixed the logits of a site have no gradient from its own token or later ones, and one from an earlier
    one."""
    model, tokens = network(latents), grids(1)
    vector = model.latent(tokens, noise(model, 1)).vector.detach()
    sites = SHAPE.height * SHAPE.width
    for site in range(sites):
        embedded = model.decoder.embedded(tokens).detach().requires_grad_()
        logits = model.decoder.logits(embedded, tokens, Condition(vector=vector))
        logits[0, :, site // SHAPE.width, site % SHAPE.width].square().sum().backward()
        assert embedded.grad is not None
        seen = embedded.grad[0].abs().sum(dim=0).flatten() > 0
        assert not seen[site:].any()
        assert bool(seen[:site].any()) == (site > 0)


@pytest.mark.parametrize("latents", ["codes", "gaussian"])
def test_every_token_reaches_the_first_site_through_z(latents: LatentKind) -> None:
    model, tokens = network(latents).double(), grids(1)
    assert model.encoder is not None
    for site in range(SHAPE.height * SHAPE.width):
        other = tokens.clone()
        other.view(-1)[site] = (other.view(-1)[site] + 1) % SHAPE.num_codes
        assert not torch.equal(model.encoder(other), model.encoder(tokens))


def test_each_term_moves_what_it_should() -> None:
    model, tokens = network(config=LEARNED), grids()
    names = {part: {name for name, _ in model.named_parameters() if name.startswith(part)}
             for part in ("decoder", "encoder", "quantizer")}  # fmt: skip
    output = model(tokens)
    assert output.latent.quantized is not None
    output.nll_nats.backward(retain_graph=True)
    found = moved(model.named_parameters())
    assert found == names["encoder"] | names["decoder"] - UNUSED
    model.zero_grad()
    output.latent.quantized.commitment.backward(retain_graph=True)
    assert moved(model.named_parameters()) == names["encoder"]
    model.zero_grad()
    output.latent.quantized.table_loss.backward()
    assert moved(model.named_parameters()) == names["quantizer"]


def test_the_loss_is_that_of_eq_3() -> None:
    """With the scale that the docstring states, against sums by hand."""
    model, tokens = network(config=replace(LEARNED, commitment_cost=0.7)), grids()
    output = model(tokens)
    assert model.encoder is not None and output.latent.quantized is not None
    latents = model.encoder(tokens).unflatten(1, (3, 4))
    codes = output.latent.vector.unflatten(1, (3, 4))
    distance = (latents - codes).square().sum(dim=2).mean()
    logits = model.decoder(tokens, Condition(vector=output.latent.vector))
    nll = torch.nn.functional.cross_entropy(logits, tokens, reduction="sum") / len(tokens)
    torch.testing.assert_close(output.nll_nats, nll)
    torch.testing.assert_close(output.loss_nats, nll + 1.7 * distance)
    averaged = network(config=replace(CONFIG, commitment_cost=0.7))
    output = averaged(tokens)
    assert output.latent.quantized is not None
    torch.testing.assert_close(output.loss_nats, output.nll_nats + 0.7 * output.latent.quantized.commitment)


def test_the_divergence_is_that_of_torch() -> None:
    model, tokens = network("gaussian"), grids()
    assert model.encoder is not None
    mean, log_sigma = model.encoder(tokens).chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, log_sigma.exp()), Normal(0.0, 1.0)).sum(dim=1)
    drawn = noise(model)
    output = model(tokens, drawn)
    assert output.latent.kl_nats is not None
    torch.testing.assert_close(output.latent.kl_nats, expected)
    torch.testing.assert_close(output.latent.vector, mean + log_sigma.exp() * drawn)
    torch.testing.assert_close(output.loss_nats, output.nll_nats + expected.mean())
    output.loss_nats.backward()
    assert {name for name, _ in model.named_parameters()} - UNUSED == moved(model.named_parameters())


def test_none_is_the_decoder_with_zeros() -> None:
    """The same weights, and as many, as the decoder of the others, which are told something."""
    model, others, tokens = network("none"), [network("codes"), network("gaussian")], grids()
    assert model.encoder is None and model.quantizer is None
    for other in others:
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        assert sum(p.numel() for p in model.decoder.parameters()) == sum(p.numel() for p in other.decoder.parameters())
    zeros = torch.zeros(6, 12)
    torch.testing.assert_close(model(tokens).nll_nats, others[0].nll_nats(tokens, zeros).mean(), rtol=0, atol=0)
    assert model(tokens).loss_nats == model(tokens).nll_nats != others[0](tokens).nll_nats  # which is told something


def test_what_a_kind_does_not_depend_on_is_not_in_its_config() -> None:
    other = replace(CONFIG, channels=4, commitment_cost=3.0, quantizer=replace(CONFIG.quantizer, decay=0.5))
    assert other.with_latents("none") == CONFIG.with_latents("none")
    assert other.with_latents("gaussian") == replace(CONFIG, channels=4).with_latents("gaussian")
    assert other.with_latents("codes") == other
    sizes = [CONFIG.with_latents(kind).quantizer.channels for kind in KINDS]
    assert sizes == [12] * 3


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_shuffled_leaves_nothing_in_its_place(count: int) -> None:
    found = derangement(count, 0)
    assert found.sort().values.tolist() == list(range(count))
    assert not (found == torch.arange(count)).any()
    assert torch.equal(found, derangement(count, 0))
    assert count < 10 or not torch.equal(found, derangement(count, 1))


@pytest.mark.parametrize("latents", KINDS)
def test_evaluation_against_sums_by_hand(latents: LatentKind) -> None:
    """Over more images than fit one chunk."""
    model, tokens = network(latents).eval(), grids(70)
    found = evaluate(model, tokens, "fp32", seed=5)
    assert evaluate(model, tokens, "fp32", seed=5) == found
    assert found["bits_per_token"] == pytest.approx(found["nll_nats"] / 15 / math.log(2))
    if latents == "none":
        assert "shuffled_nll_nats" not in found
        assert found["total_nats"] == found["nll_nats"] == pytest.approx(model(tokens).nll_nats.item(), rel=1e-6)
        return
    assert found["shuffled_nll_nats"] != found["nll_nats"]
    if latents == "gaussian":
        assert found["total_nats"] == pytest.approx(found["nll_nats"] + found["kl_nats"])
        assert evaluate(model, tokens, "fp32", seed=6)["nll_nats"] != found["nll_nats"]
        return
    with torch.no_grad():
        output = model(tokens)
        assert output.latent.quantized is not None
        vectors, codes = output.latent.vector, output.latent.quantized.tokens.flatten(0, 2)
        other = vectors[derangement(70, 0)]
        expected = model.nll_nats(tokens, other).mean()
    assert found["nll_nats"] == pytest.approx(float(output.nll_nats), rel=1e-6)
    assert found["shuffled_nll_nats"] == pytest.approx(float(expected), rel=1e-6)
    assert found["total_nats"] == pytest.approx(found["nll_nats"] + 3 * math.log(6))
    for latent in range(3):
        counts = torch.bincount(codes[:, latent], minlength=6).double()
        share = counts[counts > 0] / 70
        assert found[f"perplexity_{latent + 1}"] == pytest.approx(2 ** float(-(share * share.log2()).sum()))
        assert found[f"usage_{latent + 1}"] == pytest.approx(float((counts > 0).double().mean()))


@pytest.mark.parametrize("pooling", ["mean", "flatten"])
@pytest.mark.parametrize("strided", [0, 1, 3])
def test_an_encoder_of_any_grid(pooling, strided: int) -> None:
    shape = TokenShape(height=5, width=2, num_groups=2, num_codes=4)
    config = replace(CONFIG, pooling=pooling, num_strided=strided)
    encoder = TokenEncoder(config, shape, 9)
    assert encoder(grids(4, shape)).shape == (4, 9)
    assert not torch.equal(encoder(grids(4, shape)), encoder(grids(4, shape).flip(3)))  # groups are told apart


def trained(latents: LatentKind = "codes", groups: int = 3) -> SecondStage:
    quantizer = replace(CONFIG.quantizer, num_groups=groups)
    model = network(latents, replace(CONFIG, quantizer=quantizer)).eval()
    for parameter in model.parameters():  # logits about as wide as the noise of a draw
        torch.nn.init.normal_(parameter, std=0.5)
    return SecondStage(model, "ab" * 32)


def test_what_is_loaded_is_what_was_kept(tmp_path: Path) -> None:
    kept, folder, tokens = trained(), Folder.of(tmp_path), grids()
    files = kept.files(dataclasses.asdict(kept.network.config))
    for name, data in files.items():
        folder.write(name, data)
    entries = [FileEntry.of(name, data) for name, data in files.items()]
    commit(folder, kind=KIND, stage="s", stage_version=1, fingerprint="cd" * 32, recipe={}, inputs={}, files=entries,
           facts={"precision": "fp32"}, provenance={})  # fmt: skip
    found = SecondStage.load(str(tmp_path))
    assert (found.vqvae, found.network.shape, found.network.config) == ("ab" * 32, SHAPE, kept.network.config)
    codes = found.encode(tokens)
    assert torch.equal(codes, kept.encode(tokens)) and codes.shape == (6, 3)
    assert torch.equal(found.sample(codes, range(6)).tokens, kept.sample(codes, range(6)).tokens)


@pytest.mark.parametrize("groups", [1, 3])
def test_codes_there_and_back(groups: int) -> None:
    found, tokens = trained(groups=groups), grids()
    codes = found.encode(tokens[..., 0].to(torch.uint16))
    assert codes.shape == (6, groups)
    torch.testing.assert_close(found.vectors(codes), found.network.latent(tokens).vector)


def test_a_sample_depends_on_its_codes_and_seed_only() -> None:
    found, codes = trained(), torch.randint(6, (7, 3), generator=torch.Generator().manual_seed(0))
    whole = found.sample(codes, range(7))
    for batch_size in (1, 3):
        assert torch.equal(found.sample(codes, range(7), batch_size=batch_size).tokens, whole.tokens)
    assert torch.equal(found.sample(codes[5:6], [5]).tokens[0], whole.tokens[5])
    assert not torch.equal(found.sample((codes + 1) % 6, range(7)).tokens, whole.tokens)
    assert not torch.equal(found.sample(codes, range(1, 8)).tokens, whole.tokens)
    vectors = found.vectors(codes)
    expected = found.network.nll_nats(whole.tokens[..., None], vectors)
    torch.testing.assert_close(whole.nll_nats.flatten(1).sum(dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.encode(grids()[:, :2]), r"tokens of shape \(B, 3, 5, 1\), found \(6, 2, 5, 1\)"),
        (lambda found: found.encode(grids() + 7), "expected tokens from 0 to 6, found 7 to"),
        (lambda found: found.vectors(torch.zeros(2, 4, dtype=torch.int64)), "expected 3 codes an image, found 4"),
        (lambda found: found.vectors(torch.full((2, 3), 6)), "expected tokens from 0 to 5, found 6 to 6"),
        (lambda found: found.sample(torch.zeros(2, 3, dtype=torch.int64), [0]), "a seed for each .* found 2, 1 seeds"),
        (lambda _: trained("gaussian").encode(grids()), "whose latents are codes, found gaussian; load the one of"),
        (lambda _: trained("none").encode(grids()), "whose latents are codes, found none"),
    ],
)
def test_messages(change, words: str) -> None:
    with pytest.raises(InputError, match=words):
        change(trained())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("channels", 0, "channels must be at least 1, was 0"),
        ("num_strided", -1, "num_strided must be 0 or more, was -1"),
        ("commitment_cost", math.inf, "commitment_cost must be a number, 0 or more, was inf"),
        ("decoder", PixelCNNConfig(label_dropout=0.1), "label_dropout must be 0 in a decoder that is told no label"),
    ],
)
def test_bad_values_say_what_is_expected(field: str, value, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SecondStageConfig(**{field: value})
