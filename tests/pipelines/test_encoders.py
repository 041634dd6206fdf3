"""Reading and encoding: by the same actors on CPUs, by tasks and actors where there is a GPU; deaths included."""

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.session import Session
from pipelines import stage
from pipelines.config import Resources
from pipelines.stage import encode_shards, fan_out
from vqvae_core.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """A cluster that says it has a GPU."""
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    session = Session()
    session.connect()
    session._owner = True  # as one that it started itself
    yield session
    session.close()


def read(job: dict[str, Any]) -> dict[str, Any]:
    return {"job": json.dumps(job), "value": job["number"] * 10, "error": job.get("error", ""), "reader": os.getpid()}


class Encoder:
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = json.loads(row["job"])
        if job["dies"] and not Path(job["dies"]).exists():
            Path(job["dies"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        together = row["reader"] == os.getpid()
        return {"name": job["name"], "value": row["value"] + 1, "together": together, "error": row["error"]}


def jobs(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": f"s{number}", "number": number, "dies": "", **changes} for number in range(7)]


@pytest.mark.parametrize("use_gpu", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_every_shard_is_read_and_encoded_once(
    session: Session, tmp_path: Path, use_gpu: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    work = jobs()
    work[3]["dies"] = str(tmp_path / "died")
    made = list(encode_shards(session, read, Encoder, work, Resources(use_gpu=use_gpu)))
    assert sorted((row["name"], row["value"]) for row in made) == [(f"s{n}", 10 * n + 1) for n in range(7)]
    assert {row["together"] for row in made} == {not use_gpu}
    assert (tmp_path / "died").exists()
    assert "an encoder died; going on with the" in capsys.readouterr().out


def test_shards_come_in_waves(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, Ray Data is given so many at a time, and jobs are made as they are needed."""
    monkeypatch.setattr(stage, "_WAVE", 3)
    monkeypatch.setattr(stage, "_WAVE_AN_ENCODER", 1)
    asked: list[str] = []

    def one_by_one() -> Iterator[dict[str, Any]]:
        for job in jobs():
            asked.append(job["name"])
            yield job

    found = encode_shards(session, read, Encoder, one_by_one(), Resources())
    first = next(found)
    assert asked == ["s0", "s1", "s2"]
    assert sorted(row["name"] for row in [first, *found]) == [f"s{number}" for number in range(7)]


def test_the_store_holds_one_wave(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wave put into the object stores is given back by its end, however many waves there are."""
    monkeypatch.setattr(stage, "_WAVE", 16)
    monkeypatch.setattr(stage, "_WAVE_A_CPU", 1)
    size = 16 * 10_000
    gc.disable()  # it would hide what is not given back, now and then
    try:
        for number, _ in enumerate(fan_out(session, dict, ({"pad": "x" * 10_000} for _ in range(48)))):
            if number % 16 == 15:
                assert session.object_store_bytes() >= size, "a wave lies in the store"
                begin = time.monotonic()
                while session.object_store_bytes() >= 2 * size:  # Ray frees once a second
                    assert time.monotonic() - begin < 10, "an earlier wave is still there"
                    time.sleep(0.1)
    finally:
        gc.enable()


@pytest.mark.parametrize("use_gpu", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_an_error_of_a_shard_is_raised(session: Session, use_gpu: bool) -> None:
    with pytest.raises(InputError, match="^expected a shard that can be read$"):
        list(encode_shards(session, read, Encoder, jobs(error="expected a shard that can be read"),
                           Resources(use_gpu=use_gpu)))  # fmt: skip
