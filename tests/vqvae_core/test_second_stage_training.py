"""Training of the second stage by the loop: resume, ranks, pieces, and what three codes can tell apart."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.vqvae_core.shards import InMemory
from tests.vqvae_core.test_second_stage import CONFIG, SHAPE, grids
from tests.vqvae_core.test_train import SCHEDULE, furthest, same, sums
from vqvae_core.checkpoint import StateFolder, TrainingState
from vqvae_core.quantizer import VectorQuantizer
from vqvae_core.second_stage import KINDS, SecondStageConfig, SecondStageNetwork
from vqvae_core.second_stage_training import SecondStageTraining
from vqvae_core.storage import Folder
from vqvae_core.train import Piece, Worker, best_step, train
from vqvae_core.train_config import TrainConfig

ROWS = [20, 28]
TABLES = replace(CONFIG.quantizer, num_codes=24, decay=0.9, revive_every=4)
CONFIGS: dict[str, SecondStageConfig] = {
    **{kind: replace(CONFIG, quantizer=TABLES).with_latents(kind) for kind in KINDS},
    "codes by loss": replace(CONFIG, quantizer=replace(TABLES, learn_by="loss")),
    "codes on the sphere": replace(CONFIG, quantizer=replace(TABLES, normalize=True)),
}
CASES = [pytest.param(case, marks=() if case in ("codes", "gaussian") else pytest.mark.slow) for case in CONFIGS]


def a_task(
    case: str, schedule: TrainConfig, worker: Worker, dtype: torch.dtype = torch.float32
) -> tuple[SecondStageTraining, InMemory]:
    tokens, labels = grids(48), torch.full((48,), -1)
    torch.manual_seed(0)
    batches = InMemory([tokens, labels], ROWS, schedule, rank=worker.rank, world_size=worker.world_size)
    task = SecondStageTraining(
        SecondStageNetwork(CONFIGS[case], SHAPE).to(dtype), steps=schedule.steps,
        steps_per_epoch=batches.order.steps_per_epoch, seed=schedule.seed, precision="fp32", worker=worker,
        pool=tokens[:40], validation=tokens[:10],
    )  # fmt: skip
    return task, batches


def run(
    case: str, schedule: TrainConfig = SCHEDULE, worker: Worker | None = None, resume: TrainingState | None = None
) -> tuple[SecondStageNetwork, list[dict[str, float]]]:
    worker = worker or Worker()
    task, batches = a_task(case, schedule, worker)
    return task.model, train(task, batches, schedule, worker, "run", resume)


@pytest.mark.parametrize("case", CASES)
def test_resume_equals_no_interruption(tmp_path: Path, case: str) -> None:
    """After any step: weights, tables, statistics and curves, bit for bit."""
    states: dict[int, TrainingState] = {}
    worker = Worker(checkpoint_every=1, save=lambda state, best: states.update({state.step: state}))
    whole, history = run(case, worker=worker)
    assert sorted(states) == list(range(1, 13))
    folder = StateFolder(Folder.of(tmp_path), "run")
    for step in (1, 3, 4, 5, 6, 11):
        folder.write(states[step])
        last: list[TrainingState] = []
        worker = Worker(checkpoint_every=99, save=lambda state, best, last=last: last.append(state))
        resumed, resumed_history = run(case, worker=worker, resume=folder.load(step))
        assert same(whole, resumed), f"weights differ after a resume at step {step}"
        assert resumed_history == history
        for name, tensor in states[12].tensors.items():
            assert torch.equal(tensor, last[-1].tensors[name]), name


def run_ranks(world_size: int, case: str, schedule: TrainConfig, *, micro_batch: int | None = None) -> list:
    """The same training in fp64 on ranks that are threads."""
    schedule = replace(schedule, deterministic=False)  # a setting of the process, not of a thread
    tasks = []
    for rank, all_reduce in enumerate(sums(world_size)):
        worker = Worker(rank=rank, world_size=world_size, micro_batch=micro_batch, all_reduce=all_reduce)
        tasks.append((*a_task(case, schedule, worker, torch.float64), worker))

    def work(rank: int) -> None:
        task, batches, worker = tasks[rank]
        train(task, batches, schedule, worker, "run")

    with ThreadPoolExecutor(world_size) as pool:
        list(pool.map(work, range(world_size)))
    return [task.model for task, _, _ in tasks]


THIRTY = replace(SCHEDULE, steps=30, log_every=30, validate_every=30, learning_rate=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_many_ranks_and_pieces_equal_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a k-means++ start and revivals, or noise: only the order of sums differs."""
    revived, whole = [], VectorQuantizer.revive

    def counted(self: VectorQuantizer, candidates: torch.Tensor) -> torch.Tensor:
        codes = whole(self, candidates)
        revived.append(len(codes))
        return codes

    monkeypatch.setattr(VectorQuantizer, "revive", counted)
    (one,) = run_ranks(1, case, THIRTY)
    assert (sum(revived) > 0) == case.startswith("codes"), "no code was revived: nothing of it is tested"
    for world_size, micro_batch in ((2, None), (4, None), (1, 1), (1, 3), (2, 3)):
        many = run_ranks(world_size, case, THIRTY, micro_batch=micro_batch)
        assert all(same(many[0], model) for model in many[1:])
        assert furthest(one, many[0]) < 1e-10


def test_codes_start_at_latents_of_the_pool() -> None:
    """More codes than a batch has images: each at another latent."""
    task, batches = a_task("codes", SCHEDULE, Worker())
    quantizer = task.model.quantizer
    assert quantizer is not None and not quantizer.started
    batch = next(batches.batches(0, 1))
    task.before_training([(batch, Piece(0, 8))], Worker())
    assert quantizer.started
    for table in quantizer.tables():
        assert len(table.codes().unique(dim=0)) == 24
    with torch.no_grad():
        latent = task.model.latent(grids(48)[:40])
    assert latent.quantized is not None
    for number, table in enumerate(quantizer.tables()):
        rows = latent.quantized.rows.chunk(3, dim=1)[number]
        assert torch.cdist(table.codes(), rows).amin(dim=1).max() < 1e-3


@pytest.mark.slow
def test_curves_and_the_best_step() -> None:
    schedule = replace(SCHEDULE, steps=24, validate_every=3, learning_rate=2e-2)
    for case, names in {
        "codes": {"nll_nats", "shuffled_nll_nats", "total_nats", "bits_per_token",
                  *(f"{name}_{number}" for name in ("perplexity", "usage") for number in (1, 2, 3))},
        "none": {"nll_nats", "total_nats", "bits_per_token"},
        "gaussian": {"nll_nats", "shuffled_nll_nats", "total_nats", "bits_per_token", "kl_nats"},
    }.items():  # fmt: skip
        task, batches = a_task(case, schedule, Worker())
        history = train(task, batches, schedule, Worker(), "run")
        points = [point for point in history if "validation_nll_nats" in point]
        assert len(points) == 8
        assert {name[11:] for name in points[0] if name.startswith("validation_")} == names
        scores = {point["step"]: point["validation_nll_nats"] + point.get("validation_kl_nats", 0) for point in points}
        assert best_step(history, task) == min(scores, key=lambda step: scores[step])
        assert task.score({"validation_nll_nats": 3.0, "validation_kl_nats": 2.0}) == 5.0
        assert task.score({"validation_nll_nats": 3.0}) == 3.0
        assert ("epoch_usage" in history[-1]) == (case == "codes")


@pytest.mark.slow
def test_three_codes_tell_grids_apart() -> None:
    """16 grids of 15 random tokens: the decoder knows which one it is from the first token on, where it is told the
    codes, and has to guess where it is told nothing or another one's."""
    tokens = grids(16)
    schedule = replace(SCHEDULE, steps=500, batch_size=16, learning_rate=1e-2, log_every=100, validate_every=100)
    found = {}
    for case in ("codes", "none"):
        torch.manual_seed(0)
        batches = InMemory([tokens, torch.full((16,), -1)], [16], schedule)
        task = SecondStageTraining(
            SecondStageNetwork(CONFIGS[case], SHAPE), steps=schedule.steps, steps_per_epoch=1, seed=0,
            precision="fp32", worker=Worker(), pool=tokens, validation=tokens,
        )  # fmt: skip
        train(task, batches, schedule, Worker(), "run")
        found[case] = task.validate()
        if task.model.quantizer is not None:
            latent = task.model.eval().latent(tokens)
            assert latent.quantized is not None
            assert len(latent.quantized.tokens.flatten(0, 2).unique(dim=0)) >= 8
    print(found)
    codes, none = found["codes"]["validation_nll_nats"], found["none"]["validation_nll_nats"]
    assert codes < 1.0 < none
    assert found["codes"]["validation_shuffled_nll_nats"] > 5 * none
