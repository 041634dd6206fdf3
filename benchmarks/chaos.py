"""Training that is killed again and again, against the same training that is not.

    python -m benchmarks.chaos --kills 20
    python -m benchmarks.chaos --kills 3 --quick

Two trainings, fp32 on 3 ranks and bf16 on 2, on a local Ray cluster of several nodes. Each is killed at random moments
over its whole length: SIGKILL of a worker, of the driver, of a whole node (its raylet and with it all its workers), and
SIGTERM with grace to the driver. What ended the driver is followed by the same command again. Bars: weights, table and
curves are those of a run that nothing interrupted, bit for bit; of the samples that count, those of every step of the
run, none is lost and none repeated within an epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Bar, report
from cluster.local import LocalCluster
from pipelines import ray_train
from pipelines.config import Resources
from tests.vqvae_core.shards import make_images
from vqvae_core.artifacts import hash_bytes
from vqvae_core.augment import AugmentConfig
from vqvae_core.checkpoint import TrainingState, save_model
from vqvae_core.image_shards import ImageShards
from vqvae_core.loader import ImageLoader
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.storage import Folder
from vqvae_core.train import Worker, train
from vqvae_core.train_config import Precision, TrainConfig
from vqvae_core.vqvae import VQVAE, VQVAEConfig
from vqvae_core.vqvae_training import VQVAETraining

SHARDS, PER_SHARD, SIZE, BATCH, LANES, GRACE_SECONDS, PATIENCE_SECONDS = 37, 41, 16, 24, 6, 30, 300
RUNS: dict[str, tuple[Precision, int]] = {"fp32_3_ranks": ("fp32", 3), "bf16_2_ranks": ("bf16", 2)}
KINDS = ("worker", "driver", "node", "sigterm")


class Recorded:
    """A loader whose batches are noted, as hashes of their pictures, before a step gets them.

    So a step that is in a saved state is noted, wherever the kill fell; one in no state is done again.
    """

    def __init__(self, loader: ImageLoader, place: Path, rank: int) -> None:
        self._loader = loader
        self._file = (place / f"rank{rank}-{os.getpid()}-{time.time_ns()}.jsonl").open("a")

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        for step, batch in enumerate(self._loader.batches(start, stop), start):
            hashes = [hashlib.sha256(picture.numpy().tobytes()).hexdigest()[:16] for picture in batch]
            self._file.write(json.dumps([step, hashes]) + "\n")
            self._file.flush()
            yield batch


def loop(settings: dict[str, Any], worker: Worker, resume: TrainingState | None) -> dict[str, Any]:
    """A small training, as its stage does it, that leaves the hashes of what it made."""
    images = ImageShards.open(Folder(settings["images"]))
    config = TrainConfig(**settings["train"])
    loader = ImageLoader(
        images, config, AugmentConfig(), rank=worker.rank, world_size=worker.world_size, num_workers=worker.rank % 2
    )
    torch.manual_seed(0)
    quantizer = QuantizerConfig(num_codes=64, code_dim=8, learn_by="moving_average", revive_every=20)
    model = VQVAE(VQVAEConfig(hidden_channels=16, residual_channels=8, num_residual_blocks=1, quantizer=quantizer))
    task = VQVAETraining(
        model, steps=config.steps, steps_per_epoch=loader.order.steps_per_epoch, seed=0, precision=config.precision,
        worker=worker, validation=torch.from_numpy(images.read("validation-000000.tar")[0].pixels())[None],
    )  # fmt: skip
    records = Path(settings["records"])
    (records / f"pid-{os.getpid()}").write_text(str(worker.rank))
    history = train(task, Recorded(loader, records, worker.rank), config, worker, settings["identity"], resume)
    return {
        "weights": hash_bytes(save_model(model)),
        "table": hash_bytes(model.state_dict()["quantizer.table"].numpy().tobytes()),
        "history": hash_bytes(json.dumps(history).encode()),
        "steps_per_epoch": loader.order.steps_per_epoch,
        "samples": loader.order.num_samples,
        "left_out": loader.order.left_out,
    }


def _trains(pid: int) -> bool:
    """Whether a process lives and is a rank: numbers of processes are given out again."""
    try:
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class _Silent:
    """A run that is tracked nowhere."""

    def log(self, points: Any) -> None: ...

    def show(self, step: int, pictures: Any) -> None: ...


def drive(settings: dict[str, Any]) -> int:
    """What is killed: one training, from its command line."""
    from cluster.session import Session
    from pipelines import cli
    from pipelines.stage import Pipeline

    def run(_: list[str]) -> None:
        session, root = Session(), Folder.of(settings["root"])
        resources = Resources(
            num_workers=settings["ranks"], cpus_per_worker=1, checkpoint_every=25, max_failures=100, keep_checkpoints=2
        )
        pipeline = Pipeline(root, resources, session, tracker=None)  # type: ignore[arg-type]
        try:
            made = ray_train.fit(
                pipeline, loop, settings, name="chaos", work=settings["identity"], folder=root,
                run=_Silent(),  # type: ignore[arg-type]
            )  # fmt: skip
        finally:
            session.close()
        root.write("made.json", json.dumps(made).encode())

    cli.run(run)


class Run:
    """One training and all that happens to it."""

    def __init__(self, place: Path, images: str, name: str, steps: int, cluster: LocalCluster) -> None:
        precision, ranks = RUNS[name]
        config = TrainConfig(
            steps=steps, batch_size=BATCH, num_lanes=LANES, shuffle_window=64, learning_rate=1e-3, log_every=10,
            validate_every=max(1, steps // 4), precision=precision,
        )  # fmt: skip
        self.records = place / "records"
        self.records.mkdir(parents=True)
        self.place = place
        self._settings = {
            "images": images, "train": dataclasses.asdict(config), "records": str(self.records), "ranks": ranks,
            "root": str(place / "root"), "identity": f"chaos-{name}", "steps": steps,
        }  # fmt: skip
        self._environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._log = (place / "log").open("ab")
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.chaos", "--drive", json.dumps(self._settings)]
        self.driver = subprocess.Popen(command, env=self._environment, stdout=self._log, stderr=subprocess.STDOUT)
        return self.driver

    def newest_step(self) -> int:
        """The furthest step that any rank has recorded."""
        last = 0
        for path in self.records.glob("rank0-*.jsonl"):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4000))  # a few lines, the first perhaps not from its beginning
                last = max([last, *(int(step) for step in re.findall(rb"^\[(\d+), \[", file.read(), re.MULTILINE))])
        return last

    def workers(self) -> list[int]:
        """The processes of ranks that live."""
        pids = [int(path.name[4:]) for path in self.records.glob("pid-*")]
        return [pid for pid in pids if _trains(pid)]

    def said(self) -> str:
        return (self.place / "log").read_text()

    def finish(self, seconds: float = 900) -> dict[str, Any]:
        code = self.driver.wait(seconds)
        if code:
            raise RuntimeError(f"the training ended with {code}:\n{self.said()[-4000:]}")
        return json.loads((self.place / "root" / "made.json").read_text())


def strike(run: Run, cluster: LocalCluster, kind: str, rng: random.Random) -> None:
    """Kill one thing that lives. What ends the driver is followed by the same command."""
    if kind == "worker":
        begin = time.monotonic()
        while True:
            with contextlib.suppress(IndexError, ProcessLookupError):  # none lives right now, or it has just ended
                os.kill(rng.choice(run.workers()), signal.SIGKILL)
                return
            if time.monotonic() - begin > PATIENCE_SECONDS:
                raise RuntimeError(f"no rank came back within {PATIENCE_SECONDS} s:\n{run.said()[-3000:]}")
            time.sleep(0.05)
    elif kind == "node":
        cluster.replace(rng.randrange(len(cluster)))
    elif kind == "driver":
        run.driver.send_signal(signal.SIGKILL)
        run.driver.wait()
        run.start()
    else:
        run.driver.send_signal(signal.SIGTERM)
        try:
            code = run.driver.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"expected an end within {GRACE_SECONDS} s of SIGTERM:\n{run.said()[-3000:]}") from None
        if code == 0:
            raise RuntimeError("the training was finished before it could be killed")
        run.start()


def killed(
    run: Run, cluster: LocalCluster, kills: int, steps: int, rng: random.Random
) -> tuple[dict[str, Any], Counter]:
    """The training with so many kills, spread over its steps; every fourth one follows the last within seconds."""
    done: Counter[str] = Counter()
    moments = sorted(rng.uniform(0.02, 0.95) * steps for _ in range(kills))
    for number, moment in enumerate(moments):
        kind = KINDS[number % len(KINDS)] if number < len(KINDS) else rng.choice(KINDS)
        if number % 4 == 3 and kind != "sigterm":
            time.sleep(rng.uniform(0, 8))
        else:
            begin = time.monotonic()
            while run.newest_step() < moment:
                if run.driver.poll() is not None:
                    raise RuntimeError(f"the training ended by itself:\n{run.said()[-4000:]}")
                if time.monotonic() - begin > PATIENCE_SECONDS:
                    raise RuntimeError(f"no way to step {moment:.0f} in {PATIENCE_SECONDS} s:\n{run.said()[-4000:]}")
                time.sleep(rng.uniform(0.005, 0.05))
        strike(run, cluster, kind, rng)
        done[kind] += 1
        print(f"kill {number + 1} of {kills}: {kind} at step {run.newest_step()} of {steps}", flush=True)
    return run.finish(), done


def samples(run: Run, made: dict[str, Any], steps: int) -> dict[str, int]:
    """What ranks recorded, by step: attempts at a step must agree, and an epoch must have each sample at most once."""
    seen: dict[int, dict[int, set[tuple[str, ...]]]] = {}
    for path in run.records.glob("rank*.jsonl"):
        rank = int(path.name[4 : path.name.index("-")])
        for line in path.read_text().splitlines():
            try:
                step, hashes = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            seen.setdefault(step, {}).setdefault(rank, set()).add(tuple(hashes))
    lost = repeated = different = 0
    per_epoch = made["steps_per_epoch"]
    for first in range(0, steps, per_epoch):
        counts: Counter[str] = Counter()
        for step in range(first, min(first + per_epoch, steps)):
            ranks = seen.get(step, {})
            different += sum(len(attempts) > 1 for attempts in ranks.values())
            counts.update(name for attempts in ranks.values() for name in next(iter(attempts)))
        expected = BATCH * (min(first + per_epoch, steps) - first)
        lost += expected - len(counts)
        repeated += sum(count - 1 for count in counts.values())
    attempts = sum(1 for path in run.records.glob("rank0-*.jsonl") for _ in path.open())
    return {"lost": lost, "repeated": repeated, "steps_that_differ": different, "steps_done_again": attempts - steps}


def compare(name: str, kills: int, steps: int, seed: int) -> tuple[list[Bar], dict[str, Any]]:
    rng = random.Random(f"{seed}-{name}")  # noqa: S311
    _, ranks = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        images = make_images(Folder.of(place / "images"), [PER_SHARD] * SHARDS, size=SIZE)
        cluster = LocalCluster(ranks)
        try:
            whole = Run(place / "whole", images.artifact.folder.uri, name, steps, cluster).finish()
            begin = time.monotonic()
            run = Run(place / "killed", images.artifact.folder.uri, name, steps, cluster)
            made, done = killed(run, cluster, kills, steps, rng)
            seconds = time.monotonic() - begin
        finally:
            cluster.close()
        counted = samples(run, made, steps)
    equal = {part: float(whole[part] == made[part]) for part in ("weights", "table", "history")}
    bars = [Bar(f"{name}_{part}_equal", value, 1.0) for part, value in equal.items()]
    bars += [
        Bar(f"{name}_{part}", float(counted[part]), 0.0, at_most=True)
        for part in ("lost", "repeated", "steps_that_differ")
    ]
    return bars, {
        "kills": dict(done), "of": kills, "seconds": round(seconds), "steps_done_again": counted["steps_done_again"],
        "samples_an_epoch": made["samples"], "left_out_of_an_epoch": made["left_out"], "weights": made["weights"][:16],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        return drive(json.loads(options.drive))
    steps = 800 if options.quick else options.steps
    bars: list[Bar] = []
    figures: dict[str, Any] = {}
    for name in options.runs:
        found, figures[name] = compare(name, options.kills, steps, options.seed)
        bars += found
    settings = {"kills": options.kills, "steps": steps, "seed": options.seed, "batch": BATCH}
    return report("chaos", settings, bars, figures)


if __name__ == "__main__":
    sys.exit(main())
