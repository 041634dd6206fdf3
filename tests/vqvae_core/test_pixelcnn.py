import itertools

import pytest
import torch

from vqvae_core.errors import InputError
from vqvae_core.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae_core.token_shards import TokenShape

CONFIGS = {
    "one layer": PixelCNNConfig(channels=6, num_layers=1, kernel_size=3, first_kernel_size=3, head_channels=8),
    "three layers": PixelCNNConfig(channels=6, num_layers=3, kernel_size=3, first_kernel_size=3, head_channels=8),
    "wide first": PixelCNNConfig(channels=6, num_layers=2, kernel_size=3, first_kernel_size=7, head_channels=8),
    "wide": PixelCNNConfig(channels=6, num_layers=2, kernel_size=5, first_kernel_size=5, head_channels=8),
}


def prior(config: PixelCNNConfig, height: int, width: int, num_codes: int = 5, num_classes: int = 0) -> PixelCNN:
    torch.manual_seed(0)
    shape = TokenShape(height=height, width=width, num_groups=1, num_codes=num_codes)
    model = PixelCNN(config, shape, num_classes).double()
    for parameter in model.parameters():  # no weight may hide a connection by being near zero
        torch.nn.init.normal_(parameter, std=0.5)
    model.head[0] = model.head[2] = torch.nn.Softplus()  # nor may a dead ReLU; 1x1 layers connect no sites
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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_jacobian(name: str, num_classes: int) -> None:
    """Zero for every site from itself on, nonzero for every earlier one in reach, for height unlike width."""
    config, height, width = CONFIGS[name], 6, 8
    model = prior(config, height, width, num_classes=num_classes)
    labels = torch.tensor([1]) if num_classes else None
    embedded = torch.randn(1, config.channels, height, width, dtype=torch.float64, requires_grad=True)
    logits = model.logits(embedded, labels)
    for i, j in itertools.product(range(height), range(width)):
        (gradient,) = torch.autograd.grad(logits[0, :, i, j].sum(), embedded, retain_graph=True)
        seen = gradient.abs().sum(dim=(0, 1)) > 0
        for a, b in itertools.product(range(height), range(width)):
            earlier = (a, b) < (i, j)
            assert bool(seen[a, b]) == (earlier and sees(config, i - a, j - b)), f"({a}, {b}) seen from ({i}, {j})"


def test_there_is_no_blind_spot() -> None:
    """With enough layers every earlier site is seen: a single masked stack would miss some on the right above."""
    config = PixelCNNConfig(channels=4, num_layers=6, kernel_size=3, first_kernel_size=3, head_channels=4)
    model = prior(config, 4, 6)
    embedded = torch.randn(1, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.logits(embedded, None)[0, :, 3, 2].sum(), embedded)
    seen = gradient.abs().sum(dim=(0, 1)).flatten() > 0
    assert seen.tolist() == [position < 3 * 6 + 2 for position in range(24)]


@pytest.mark.parametrize("num_classes", [0, 2])
def test_probabilities_of_a_small_grid_sum_to_one(num_classes: int) -> None:
    model = prior(CONFIGS["three layers"], 2, 2, num_codes=3, num_classes=num_classes)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    labels = torch.ones(len(grids), dtype=torch.int64) if num_classes else None
    with torch.no_grad():
        logits = model(grids, labels)
    nll = torch.nn.functional.cross_entropy(logits, grids, reduction="none")
    torch.testing.assert_close((-nll.sum(dim=(1, 2))).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_the_label_matters() -> None:
    model = prior(CONFIGS["one layer"], 3, 4, num_classes=2)
    tokens = torch.zeros(1, 3, 4, dtype=torch.int64)
    assert not torch.allclose(model(tokens, torch.tensor([0])), model(tokens, torch.tensor([1])))


def test_labels_are_asked_for() -> None:
    with pytest.raises(ValueError, match="has 2 classes: labels"):
        prior(CONFIGS["one layer"], 3, 4, num_classes=2)(torch.zeros(1, 3, 4, dtype=torch.int64))


def test_groups_are_refused() -> None:
    with pytest.raises(InputError, match="one code a site"):
        PixelCNN(PixelCNNConfig(), TokenShape(height=2, width=2, num_groups=3, num_codes=4))
