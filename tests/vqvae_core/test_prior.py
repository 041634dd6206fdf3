"""A trained prior as a small API: its labels, its likelihoods, and what it refuses."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.vqvae_core.test_sampler import prior as network
from vqvae_core.artifacts import ArtifactError, FileEntry, commit
from vqvae_core.errors import InputError
from vqvae_core.pixelcnn import Condition, PixelCNNConfig
from vqvae_core.prior import KIND, Prior
from vqvae_core.sampler import Draw, Given
from vqvae_core.storage import Folder

CONFIG = PixelCNNConfig(channels=8, num_layers=2, first_kernel_size=3, head_channels=8)
NAMES = {"day": 0, "dusk": 1, "night": 2}


def prior(*, labels: bool = True, groups: int = 1, codes: int = 3) -> Prior:
    model = network(CONFIG, 2, 3, num_codes=codes, groups=groups, kind="labels" if labels else "nothing")
    return Prior(model, NAMES if labels else None, "ab" * 32)


def put(folder: Folder, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        folder.write(name, data)
    entries = [FileEntry.of(name, data) for name, data in files.items()]
    commit(folder, kind=KIND, stage="s", stage_version=1, fingerprint="cd" * 32, recipe={}, inputs={}, files=entries,
           facts={}, provenance={})  # fmt: skip


def without_labels(found: Prior) -> Prior:
    for layer in found.network.layers:
        layer.bias.label.weight.data[-1] = 0  # type: ignore[union-attr]
    return found


def test_what_is_loaded_is_what_was_kept(tmp_path: Path) -> None:
    kept, tokens = prior(), torch.randint(3, (5, 2, 3))
    put(Folder.of(tmp_path), kept.files(dataclasses.asdict(CONFIG)))
    found = Prior.load(str(tmp_path))
    assert (found.label_map, found.vqvae, found.shape) == (NAMES, "ab" * 32, kept.shape)
    assert torch.equal(found.log_prob(tokens, labels="dusk"), kept.log_prob(tokens, labels=1))
    assert torch.equal(found.sample(3, labels="day", seed=5).tokens, kept.sample(3, labels="day", seed=5).tokens)


def test_a_prior_of_an_earlier_version(tmp_path: Path) -> None:
    files = prior().files(dataclasses.asdict(CONFIG))
    facts = json.loads(files["config.json"])
    del facts["label_map"]
    put(Folder.of(tmp_path), {**files, "config.json": json.dumps(facts).encode()})
    with pytest.raises(ArtifactError, match="found one of an earlier version; train it again"):
        Prior.load(str(tmp_path))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_likelihoods_of_all_grids_sum_to_one(groups: int) -> None:
    found = prior(groups=groups, codes=3 if groups == 1 else 2)
    num_codes = found.shape.num_codes
    sites = (2, 3, groups) if groups > 1 else (2, 3)
    grids = torch.tensor(list(itertools.product(range(num_codes), repeat=6 * groups))).view(-1, *sites)
    for label in ("day", -1):
        assert found.log_prob(grids, labels=label, batch_size=500).exp().sum() == pytest.approx(1, abs=1e-4)


def test_log_prob_is_what_sampling_reports() -> None:
    found = prior()
    drawn = found.sample(7, labels=["day", 1, "2", -1, "night", 0, 2], draw=Draw(temperature=0.8), batch_size=3)
    log_prob = found.log_prob(drawn.tokens, labels=[0, 1, 2, -1, 2, 0, 2], batch_size=2)
    torch.testing.assert_close(drawn.nll_nats.flatten(1).sum(dim=1), -log_prob, atol=1e-4, rtol=1e-4)
    told = Condition(labels=torch.tensor([0, 1, 2, -1, 2, 0, 2]))
    torch.testing.assert_close(-log_prob, found.network.nll_nats(drawn.tokens, told).flatten(1).sum(dim=1))


def test_samples_do_not_depend_on_the_batch() -> None:
    found = prior(labels=False)
    whole = found.sample(10, seed=3)
    assert torch.equal(found.sample(10, seed=3, batch_size=4).tokens, whole.tokens)
    assert torch.equal(found.sample(1, seed=12).tokens[0], whole.tokens[9])


def test_labels_of_an_array() -> None:
    found, tokens = prior(), torch.randint(3, (4, 2, 3))
    for labels in (np.array([0, 1, 2, 0], np.int32), torch.tensor([0, 1, 2, 0])):
        assert torch.equal(found.log_prob(tokens, labels=labels), found.log_prob(tokens, labels=[0, 1, 2, 0]))
    assert torch.equal(found.log_prob(tokens, labels=np.int64(1)), found.log_prob(tokens, labels=1))


def test_tokens_as_files_have_them() -> None:
    found, tokens = prior(), torch.randint(3, (4, 2, 3))
    assert torch.equal(found.log_prob(tokens.to(torch.uint16), labels=0), found.log_prob(tokens, labels=0))


def test_an_empty_batch() -> None:
    assert prior().log_prob(torch.zeros(0, 2, 3, dtype=torch.int64), labels=0).shape == (0,)


TOKENS = torch.zeros(2, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.label("noon"), "a label out of day, dusk, night, or its number from 0 to 2, found 'noon'"),
        (lambda found: found.label("--5"), "found '--5'"),
        (lambda found: found.label("²"), "found '²'"),
        (lambda found: found.label(3), "from 0 to 2, found 3"),
        (lambda found: found.label(-1), "trained on images with labels only; name one"),
        (lambda found: found.sample(2), "trained on images with labels only; name one"),
        (lambda found: found.log_prob(TOKENS), "trained on images with labels only; name one"),
        (lambda found: found.sample(2, labels=["day"]), "expected 2 labels, found 1"),
        (lambda found: found.sample(0, labels=0), "expected at least 1 sample and batch, found 0"),
        (
            lambda found: found.sample(8, labels=0, given=Given.rows(TOKENS, 1)),
            "expected given codes for 8 samples, found them for 2",
        ),
        (lambda found: found.log_prob(TOKENS.transpose(1, 2), labels=0), r"shape \(B, 2, 3\), found \(2, 3, 2\)"),
        (lambda found: found.log_prob(TOKENS + 3, labels=0), "expected tokens from 0 to 2, found 3 to 3"),
        (lambda found: found.log_prob(TOKENS, labels=0, batch_size=0), "a batch of at least 1, found 0"),
        (
            lambda found: found.sample(2, labels=0, given=Given.rows(TOKENS + 0.5, 1)),
            "expected given tokens to be integers, found torch.float32",
        ),
    ],
)
def test_messages(change: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        change(without_labels(prior()))


def test_a_label_for_a_prior_without() -> None:
    with pytest.raises(InputError, match="expected no label for a prior without labels, found 'day'"):
        prior(labels=False).sample(2, labels="day")
