"""The pipeline as a submitted job, on several nodes with an S3 root: what one machine makes."""

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from tests.conftest import ONE_CPU, SmokeRun
from tests.pipelines.test_cli import ROOT
from tests.pipelines.test_ray_train import named
from tests.servers import MlflowServer
from vqvae_core.artifacts import Artifact
from vqvae_core.storage import Folder

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))
# Each stage, and the beginning of the name that Ray's processes have in which its work is done.
WORKERS = {
    "index": "Map(", "shard": "Map(", "train_vqvae": "RayTrainWorker", "tokenize": "MapWorker",
    "train_prior": "RayTrainWorker", "sample": "MapWorker", "evaluate": "MapWorker",
}  # fmt: skip
STAGES = tuple(WORKERS)
OPTIONS = ("--preset", "smoke", *ONE_CPU)


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="module")
def cluster(s3_bucket: str, mlflow_server: MlflowServer) -> Iterator[LocalCluster]:
    """Three nodes with a CPU each, which answer to a token only, with MLflow's server beside them."""
    found = LocalCluster(3, jobs=True, env={**TOKEN, **mlflow_server.client, "RAY_JOB_STOP_WAIT_TIME_S": "120"})
    yield found
    found.close()


def contents(root: Folder) -> dict[str, str]:
    """Stage and fingerprint to the digest of its files."""
    found = {}
    for name in root.folders():
        if (root / name).exists("manifest.json"):
            found[name] = Artifact.open(root / name).manifest.content
    return found


def check_runs(server: MlflowServer, root: str) -> None:
    """The server has a run of the root and of each stage, all ended well, with their files."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri, server.uri)  # whatever this process used before
    experiment = client.get_experiment_by_name("vqvae-pipeline")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`pipeline.root` = '{root}'")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    found = {run.info.run_name: run.info for run in (parent, *children)}
    assert {name: info.status for name, info in found.items()} == dict.fromkeys([*STAGES, "smoke"], "FINISHED")
    files = {"train_vqvae": ("model", "model.safetensors"), "sample": ("", "samples.png"), "smoke": ("", "report.html")}
    for name, (folder, file) in files.items():
        path = f"{folder}/{file}" if folder else file
        assert path in {one.path for one in client.list_artifacts(found[name].run_id, folder)}


def submit(cluster: LocalCluster, name: str, *arguments: str) -> subprocess.Popen[str]:
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        cluster.jobs_address,
        "--submission-id",
        name,
        "--working-dir",
        str(ROOT),
    ]
    return subprocess.Popen(
        [*command, "--", sys.executable, "pipelines/full.py", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", env={**os.environ, **TOKEN},
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    return output


def test_a_job_that_is_stopped_writes_a_checkpoint_first(cluster: LocalCluster, s3_bucket: str) -> None:
    root = Folder.of(f"{s3_bucket}/checkpoint")
    long = ("--train.steps", "1000000", "--train.validate-every", "1000000", "--resources.checkpoint-every", "200")
    process = submit(cluster, "long", "--root", root.uri, *OPTIONS, "--no-track", *long)
    deadline = time.monotonic() + 300
    while not states(root):
        assert time.monotonic() < deadline and process.poll() is None, said(process)
        time.sleep(0.2)
    stop(cluster, "long")
    output = said(process)  # it ends with 0: Ray counts a job that was stopped as one that did as it was told
    found = re.search(r"did so at step (\d+), after a checkpoint; the same command goes on from here", output)
    assert found is not None, output
    assert states(root)[-1] == f"step-{int(found[1]):09d}"


def states(root: Folder) -> list[str]:
    """The states of the first training in a root."""
    trainings = [root / stage / name for stage in root.folders() if stage.startswith("train_vqvae-")
                 for name in (root / stage).folders() if name.startswith("training-")]  # fmt: skip
    return [name for folder in trainings for name in folder.folders() if (folder / name).exists("state.json")]


def stop(cluster: LocalCluster, name: str) -> None:
    command = [RAY, "job", "stop", "--address", cluster.jobs_address, name]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **TOKEN})


@pytest.mark.exhaustive
def test_a_job_that_is_stopped_goes_on(cluster: LocalCluster, s3_bucket: str, smoke_run: SmokeRun) -> None:
    """The same job under another name goes on from what a stopped one left."""
    root = Folder.of(f"{s3_bucket}/stopped")
    more = ("--root", root.uri, *OPTIONS, "--no-track", "--resources.checkpoint-every", "4")
    process = submit(cluster, "to-stop", *more)
    deadline = time.monotonic() + 300
    while not any(name.startswith("train_vqvae-") for name in root.folders()):
        assert time.monotonic() < deadline and process.poll() is None, said(process)
        time.sleep(0.2)
    stop(cluster, "to-stop")
    process.wait(120)
    assert len(contents(root)) < len(STAGES)
    again = submit(cluster, "goes-on", *more)
    output = said(again)
    assert again.returncode == 0 and "shard: reused" in output, output
    assert contents(root) == smoke_run.contents


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(("train_vqvae", "tokenize"), id="two"),  # a training's worker and one that encodes
        pytest.param(STAGES, id="seven", marks=pytest.mark.exhaustive),
    ],
)
def test_a_job_that_loses_nodes_makes_what_one_machine_makes(
    stages: tuple[str, ...],
    cluster: LocalCluster,
    s3_bucket: str,
    smoke_run: SmokeRun,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that works dies in these stages, and another comes in its place: the same bytes, and each stage is made
    once, tracked on the server, with the token that the nodes have."""
    root = Folder.of(f"{s3_bucket}/killed-{len(stages)}")
    more = ("--root", root.uri, *OPTIONS, "--resources.checkpoint-every", "4")
    process = submit(cluster, f"loses-{len(stages)}", *more)
    seen: set[int] = set()
    for stage in stages:
        done, worker = STAGES.index(stage), WORKERS[stage]
        number = until(lambda done=done, worker=worker: works(cluster, root, done, worker, seen), process)
        cluster.remove(number)
        assert len(contents(root)) == done, f"{stage} was over before its node was killed"
        cluster.add()
    output = said(process)
    assert process.returncode == 0, output
    assert all(f"{stage}: made in" in output for stage in STAGES), output
    assert f"report: {root.uri}/report.html" in output
    assert contents(root) == smoke_run.contents
    for name, value in mlflow_server.client.items():
        monkeypatch.setenv(name, value)
    check_runs(mlflow_server, root.uri)
    again = submit(cluster, f"again-{len(stages)}", *more)
    output = said(again)
    assert again.returncode == 0 and all(f"{stage}: reused" in output for stage in STAGES), output


def works(cluster: LocalCluster, root: Folder, done: int, worker: str, seen: set[int]) -> int | None:
    """The number of a node that works when so many stages are done: a process of that name runs on it which did not in
    the stage before, whose processes become those that were seen."""
    nodes = [[pid for name, pid in named(raylet) if name.startswith(worker)] for raylet in cluster.raylets()]
    if len(contents(root)) < done:
        seen.update(*nodes)
        return None
    return next((number for number, pids in enumerate(nodes) if set(pids) - seen), None)


def until(condition: Callable[[], int | None], process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 300
    while (found := condition()) is None:
        assert time.monotonic() < deadline and process.poll() is None, said(process)
        time.sleep(0.02)
    return found


def test_a_bad_option_fails_with_its_reason(cluster: LocalCluster) -> None:
    process = submit(cluster, "bad", "--preset", "doom48")
    output = said(process)
    assert process.returncode != 0 and "expected a preset out of" in output


def test_nothing_answers_without_the_token(cluster: LocalCluster) -> None:
    env = {**os.environ, **TOKEN, "RAY_AUTH_TOKEN": "0" * 64}
    command = [RAY, "job", "list", "--address", cluster.jobs_address]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode != 0 and "doom" not in done.stdout
