"""The trainings of the likelihood table: resume, ranks, parts of a batch, and what is measured of each."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.vqvae_core.shards import InMemory
from tests.vqvae_core.test_train import ROWS, SCHEDULE, furthest, pictures, same, sums
from vqvae_core.checkpoint import StateFolder, TrainingState
from vqvae_core.contender import NAMES, figures, make_model, make_task
from vqvae_core.errors import InputError
from vqvae_core.images import pixels_to_images
from vqvae_core.likelihood import LikelihoodConfig, bits_per_dim
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.storage import Folder
from vqvae_core.train import Trainable, Worker, train
from vqvae_core.train_config import TrainConfig
from vqvae_core.vqvae import VQVAE, VQVAEConfig

CONFIG = VQVAEConfig(
    hidden_channels=8, residual_channels=4, num_residual_blocks=1, commitment_cost=10.0,
    likelihood=LikelihoodConfig(kind="logistic"),
    quantizer=QuantizerConfig(num_codes=16, code_dim=2, num_groups=3, learn_by="moving_average", revive_every=4),
)  # fmt: skip


FAST = {("vae", "fp32"), ("vqvae", "fp32")}


def a_task(
    name: str, schedule: TrainConfig, worker: Worker, dtype: torch.dtype = torch.float32, mebibytes: int = 64
) -> tuple[Trainable, InMemory]:
    data = pictures()
    torch.manual_seed(0)
    batches = InMemory([data], ROWS, schedule, rank=worker.rank, world_size=worker.world_size)
    task = make_task(
        name, make_model(name, CONFIG).to(dtype), steps=schedule.steps, steps_per_epoch=batches.order.steps_per_epoch,
        num_samples=3, seed=schedule.seed, precision=schedule.precision, worker=worker, validation=data[:8],
        mebibytes=mebibytes,
    )  # fmt: skip
    return task, batches


RESUMED = [
    pytest.param(name, precision, marks=() if (name, precision) in FAST else pytest.mark.slow)
    for name in NAMES
    for precision in ("fp32", "bf16")
]


@pytest.mark.parametrize(("name", "precision"), RESUMED)
def test_resume_equals_no_interruption(tmp_path: Path, name: str, precision) -> None:
    """Weights and curves, bit for bit; VIMCO computes a part of its decodings twice."""
    schedule = replace(SCHEDULE, precision=precision)
    states: dict[int, TrainingState] = {}
    worker = Worker(checkpoint_every=1, save=lambda state, best: states.update({state.step: state}))
    task, batches = a_task(name, schedule, worker, mebibytes=0)
    history = train(task, batches, schedule, worker, "run")
    folder = StateFolder(Folder.of(tmp_path), "run")
    for step in (1, 6, 7):
        folder.write(states[step])
        resumed, batches = a_task(name, schedule, Worker(), mebibytes=0)
        found = train(resumed, batches, schedule, Worker(checkpoint_every=99), "run", folder.load(step))
        assert same(task.model, resumed.model), f"weights differ after a resume at step {step}"
        assert found == history


def run_ranks(world_size: int, name: str, micro_batch: int | None = None) -> torch.nn.Module:
    schedule = replace(SCHEDULE, deterministic=False)
    tasks = []
    for rank, all_reduce in enumerate(sums(world_size)):
        worker = Worker(rank=rank, world_size=world_size, micro_batch=micro_batch, all_reduce=all_reduce)
        tasks.append((*a_task(name, schedule, worker, torch.float64), worker))

    def work(rank: int) -> None:
        task, batches, worker = tasks[rank]
        train(task, batches, schedule, worker, "run")

    with ThreadPoolExecutor(world_size) as pool:
        list(pool.map(work, range(world_size)))
    return tasks[0][0].model


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ranks_and_parts_of_a_batch_equal_the_whole(name: str) -> None:
    """Draws belong to a place in the global batch, so that only the order of sums differs."""
    one = run_ranks(1, name)
    for world_size, micro_batch in ((2, None), (4, None), (1, 2), (2, 2)):
        assert furthest(one, run_ranks(world_size, name, micro_batch)) < 1e-9, (world_size, micro_batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_is_measured(name: str) -> None:
    schedule = replace(SCHEDULE, steps=60, learning_rate=1e-2, log_every=20, validate_every=60)
    task, batches = a_task(name, schedule, Worker())
    pixels = pictures()[:20]
    before = figures(name, task.model.eval(), pixels, (3, 6), "fp32", "cpu", 64)
    task.model.train()
    train(task, batches, schedule, Worker(), "run")
    found = figures(name, task.model.eval(), pixels, (3, 6), "fp32", "cpu", 64)
    assert found["total_bits_per_dim"] < before["total_bits_per_dim"] - 0.5
    if name.startswith("vimco"):
        assert found["total_bits_per_dim"] == found["bound_3_bits_per_dim"] > found["bound_6_bits_per_dim"]
    else:
        parts = found["reconstruction_bits_per_dim"] + found["latents_bits_per_dim"]
        assert found["total_bits_per_dim"] == pytest.approx(parts)
    if name == "vqvae":
        assert found["latents_bits_per_dim"] == pytest.approx(4 * 4 * 3 * math.log2(16) / (3 * 16 * 16))


@pytest.mark.parametrize("name", NAMES)
def test_draws_belong_to_an_images_place(name: str) -> None:
    """A split's figures are the same in parts, each told where it begins: draws are not those of the first images
    again."""
    torch.manual_seed(0)
    model = make_model(name, CONFIG).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(3)  # what is drawn is seen
    pixels = pictures()[:7]

    def total(first: int, stop: int, place: int) -> float:
        return figures(name, model, pixels[first:stop], (3,), "fp32", "cpu", 64, place)["total_bits_per_dim"]

    whole = total(0, 7, 0)
    assert (3 * total(0, 3, 0) + 4 * total(3, 7, 3)) / 7 == pytest.approx(whole, rel=1e-5)
    if name != "vqvae":  # its codes are not drawn
        assert (3 * total(0, 3, 0) + 4 * total(3, 7, 0)) / 7 != pytest.approx(whole, rel=1e-5)


def test_a_vqvae_is_measured_by_its_own_codes() -> None:
    """Those of bf16, where it encodes so; they are decoded in fp32."""
    model = make_model("vqvae", CONFIG).eval()
    assert isinstance(model, VQVAE)
    pixels = pictures()
    tokens = {}
    for model.encodes_in_bf16 in (False, True):
        tokens[model.encodes_in_bf16] = model.encode(pixels)
        with torch.no_grad():
            output = model.decoder(model.quantizer.lookup(tokens[model.encodes_in_bf16]))
            nats = model.likelihood.nll_nats(output, pixels_to_images(pixels)).mean()
        found = figures("vqvae", model, pixels, (1,), "fp32", "cpu", 64)["reconstruction_bits_per_dim"]
        assert found == pytest.approx(bits_per_dim(float(nats), pixels[0].numel()), rel=1e-6)
    assert not torch.equal(tokens[False], tokens[True]), "the two would be the same either way"


def test_all_have_the_same_encoder_and_decoder() -> None:
    """But for the encoder's last convolution: the table compares latents, not networks."""
    shapes = {name: {k: v.shape for k, v in make_model(name, CONFIG).decoder.state_dict().items()} for name in NAMES}
    assert all(found == shapes["vqvae"] for found in shapes.values())
    sizes = {name: sum(p.numel() for p in make_model(name, CONFIG).encoder.conv_down.parameters()) for name in NAMES}
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_density_is_not_trained_for_the_table(name: str) -> None:
    model = make_model(name, replace(CONFIG, likelihood=LikelihoodConfig(kind="density")))
    with pytest.raises(InputError, match="expected a likelihood with bits for the table, found a density"):
        make_task(name, model, steps=1, steps_per_epoch=1, num_samples=3, seed=0, precision="fp32", worker=Worker(),
                  validation=pictures()[:8], mebibytes=64)  # fmt: skip
