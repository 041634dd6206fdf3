import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipelines.presets import PRESETS
from vqvae_core.errors import InputError
from vqvae_core.pixelcnn import NOTHING, Condition, PixelCNN, PixelCNNConfig
from vqvae_core.token_shards import TokenShape

CONFIGS = {
    "one layer": PixelCNNConfig(channels=6, num_layers=1, kernel_size=3, first_kernel_size=3, head_channels=8),
    "three layers": PixelCNNConfig(channels=6, num_layers=3, kernel_size=3, first_kernel_size=3, head_channels=8),
    "wide first": PixelCNNConfig(channels=6, num_layers=2, kernel_size=3, first_kernel_size=7, head_channels=8),
    "wide": PixelCNNConfig(channels=6, num_layers=2, kernel_size=5, first_kernel_size=5, head_channels=8),
}
KINDS = ("nothing", "labels", "vector", "map", "groups")


def prior(
    config: PixelCNNConfig,
    height: int,
    width: int,
    num_codes: int = 5,
    num_classes: int = 0,
    groups: int = 1,
    **features: int,
) -> PixelCNN:
    torch.manual_seed(0)
    shape = TokenShape(height=height, width=width, num_groups=groups, num_codes=num_codes)
    model = PixelCNN(config, shape, num_classes, **features).double()
    for parameter in model.parameters():  # no weight may hide a connection by being near zero
        torch.nn.init.normal_(parameter, std=0.5)
    model.head.activation = torch.nn.Softplus()  # type: ignore[assignment]  # nor may a dead ReLU; 1x1 layers connect no sites
    return model.eval()


def sees(config: PixelCNNConfig, down: int, across: int) -> bool:
    """Whether a site is seen from one `down` rows below and `across` columns right of it, by the kernels' reach.

    A path goes left along the row by horizontal kernels, or enters the vertical stack, which goes at least one row up
    and in every layer up to `reach` rows and, in any direction, `reach` columns.
    """
    reaches = [config.first_kernel_size // 2] + [config.kernel_size // 2] * (config.num_layers - 1)
    if down == 0:
        return 1 <= across <= sum(reaches)
    for used in range(1, len(reaches) + 1):  # vertical layers first, then horizontal ones
        vertical, horizontal = sum(reaches[:used]), sum(reaches[used:])
        # each vertical layer sees its own row too, and the shift adds one row
        if 1 <= down <= vertical + 1 and -vertical <= across <= vertical + horizontal:
            return True
    return False


def shipped() -> dict[str, PixelCNNConfig]:
    """The kernels of each preset's prior and decoder, with as many layers as the small grid needs and few channels."""
    configs = {name: preset.prior for name, (preset, _) in PRESETS.items()}
    configs |= {f"{name}, second stage": preset.second_stage.decoder for name, (preset, _) in PRESETS.items()}
    return {
        name: replace(config, channels=4, head_channels=4, num_layers=min(config.num_layers, 4))
        for name, config in configs.items()
    }


def jacobian(logits: Any, embedded: torch.Tensor, tokens: torch.Tensor, condition: Condition) -> torch.Tensor:
    """bool (H, W, H, W): whether any logit of a site depends on another site. One copy of the grid for each site."""
    _, _, height, width = embedded.shape
    copies = height * width
    repeated = embedded.expand(copies, -1, -1, -1).clone().requires_grad_()
    parts = vars(condition).items()
    told = Condition(**{name: part.expand(copies, *part.shape[1:]) for name, part in parts if part is not None})
    found = logits(repeated, tokens.expand(copies, -1, -1, -1), told)
    sites = torch.arange(copies)
    found[sites, :, sites // width, sites % width].sum().backward()
    assert repeated.grad is not None
    return (repeated.grad.abs().sum(dim=1) > 0).view(height, width, height, width)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *shipped().values()], ids=[*CONFIGS, *shipped()])
@pytest.mark.parametrize("kind", KINDS)
def test_jacobian(config: PixelCNNConfig, kind: str) -> None:
    """Zero for every site from itself on, nonzero for every earlier one in reach, for height unlike width, whatever it
    is conditioned on."""
    height, width = 6, 8
    features = {"vector_features": 2} if kind == "vector" else {"map_features": 2} if kind == "map" else {}
    groups = 2 if kind == "groups" else 1
    model = prior(config, height, width, num_classes=3 if kind == "labels" else 0, groups=groups, **features)
    condition = Condition(
        labels=torch.tensor([1]) if kind == "labels" else None,
        vector=torch.ones(1, 2, dtype=torch.float64) if kind == "vector" else None,
        spatial=torch.ones(1, 2, height, width, dtype=torch.float64) if kind == "map" else None,
    )
    embedded = torch.randn(1, config.channels, height, width, dtype=torch.float64)
    tokens = torch.zeros(1, height, width, groups, dtype=torch.int64)
    seen = jacobian(model.logits, embedded, tokens, condition)
    for (i, j), (a, b) in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        earlier = (a, b) < (i, j)
        expected = earlier and sees(config, i - a, j - b)
        assert bool(seen[i, j, a, b]) == expected, f"({a}, {b}) seen from ({i}, {j})"


@pytest.mark.parametrize("groups", [2, 3])
def test_a_code_sees_earlier_groups_of_its_site_only(groups: int) -> None:
    model = prior(CONFIGS["one layer"], 2, 3, groups=groups)
    tokens = torch.zeros(1, 2, 3, groups, dtype=torch.int64)
    with torch.no_grad():
        before = model(tokens)
        for group in range(groups):
            changed = tokens.clone()
            changed[0, 1, 1, group] = 4
            moved = (model(changed) - before).abs().amax(dim=1)[0] > 1e-9
            assert moved[1, 1].tolist() == [other > group for other in range(groups)]
            assert not moved[0].any() and not moved[1, 0].any() and moved[1, 2].all()


def test_there_is_no_blind_spot() -> None:
    """With enough layers every earlier site is seen: a single masked stack would miss some on the right above."""
    config = PixelCNNConfig(channels=4, num_layers=6, kernel_size=3, first_kernel_size=3, head_channels=4)
    model = prior(config, 4, 6)
    embedded = torch.randn(1, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.zeros(1, 4, 6, 1, dtype=torch.int64)
    (gradient,) = torch.autograd.grad(model.logits(embedded, tokens)[0, :, 3, 2].sum(), embedded)
    seen = gradient.abs().sum(dim=(0, 1)).flatten() > 0
    assert seen.tolist() == [position < 3 * 6 + 2 for position in range(24)]


@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_probabilities_of_a_small_grid_sum_to_one(num_classes: int, groups: int) -> None:
    model = prior(CONFIGS["three layers"], 2, 2, num_codes=3, num_classes=num_classes, groups=groups)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4 * groups))).view(-1, 2, 2, groups)
    condition = Condition(labels=torch.ones(len(grids), dtype=torch.int64)) if num_classes else NOTHING
    with torch.no_grad():
        nll = model.nll_nats(grids if groups > 1 else grids[..., 0], condition)
    torch.testing.assert_close((-nll.flatten(1).sum(dim=1)).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["labels", "vector", "map"])
def test_each_condition_matters(kind: str) -> None:
    config, tokens = CONFIGS["one layer"], torch.zeros(1, 3, 4, dtype=torch.int64)
    features = {"vector_features": 2} if kind == "vector" else {"map_features": 2} if kind == "map" else {}
    model = prior(config, 3, 4, num_classes=2 if kind == "labels" else 0, **features)
    found = [
        model(tokens, condition)
        for condition in (
            {
                "labels": [Condition(labels=torch.tensor([label])) for label in (-1, 0, 1)],
                "vector": [Condition(vector=torch.full((1, 2), x, dtype=torch.float64)) for x in (0.0, 1.0)],
                "map": [Condition(spatial=torch.full((1, 2, 3, 4), x, dtype=torch.float64)) for x in (0.0, 1.0)],
            }[kind]
        )
    ]
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(found, 2))


def test_a_map_is_read_at_its_own_site() -> None:
    """Height unlike width: a feature of one site reaches it and what comes after it, and nothing before."""
    model, tokens = prior(CONFIGS["one layer"], 3, 5, map_features=2), torch.zeros(1, 3, 5, dtype=torch.int64)
    here = torch.zeros(1, 2, 3, 5, dtype=torch.float64)
    here[0, :, 1, 3] = 1
    plain = torch.zeros_like(here)
    moved = (model(tokens, Condition(spatial=here)) - model(tokens, Condition(spatial=plain))).abs().amax(dim=1)[
        0
    ] > 1e-9
    assert moved[1, 3] and not moved[0].any() and not moved[1, :3].any()


@pytest.mark.parametrize(
    ("features", "condition", "message"),
    [
        ({"num_classes": 2}, Condition(), "expected a condition of kind labels, found none"),
        ({}, Condition(labels=torch.zeros(1, dtype=torch.int64)), "expected no condition of kind labels, found some"),
        ({"vector_features": 3}, Condition(vector=torch.zeros(1, 2)), r"of shape \(1, 3\), found \(1, 2\)"),
        (
            {"map_features": 2},
            Condition(spatial=torch.zeros(1, 2, 4, 3)),
            r"of shape \(1, 2, 3, 4\), found \(1, 2, 4, 3\)",
        ),
        ({"num_classes": 2}, Condition(labels=torch.tensor([2])), "expected labels from -1 to 1, found 2"),
    ],
)
def test_conditions_that_do_not_fit(features: dict[str, int], condition: Condition, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prior(CONFIGS["one layer"], 3, 4, **features)(torch.zeros(1, 3, 4, dtype=torch.int64), condition)


def test_another_number_of_groups_is_refused() -> None:
    with pytest.raises(InputError, match="expected 2 codes a site, found 3"):
        prior(CONFIGS["one layer"], 2, 2, groups=2)(torch.zeros(1, 2, 2, 3, dtype=torch.int64))
