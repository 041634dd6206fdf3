"""A store of files that is away for a minute: nothing is lost, and nobody has to do anything."""

import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults import FaultyProxy
from tests.pipelines.test_cli import ROOT
from tests.pipelines.test_full import artifacts
from tests.servers import wait
from vqvae_core.artifacts import Artifact
from vqvae_core.storage import Folder

pytestmark = pytest.mark.slow
SECONDS_DOWN = {"begins": 30, "is in its middle": 60}  # of the first, Ray Train gives up after 6
OPTIONS = ["--preset", "smoke", "--no-track", "--train.steps", "1500", "--train.validate-every", "500",
           "--resources.checkpoint-every", "20"]  # fmt: skip


def command(root: str) -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / "train_vqvae.py"), "--root", root, *OPTIONS]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """What is made with a local root."""
    root = tmp_path_factory.mktemp("alone")
    done = subprocess.run(command(str(root)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return artifacts(root)


@pytest.mark.parametrize("when", ["begins", "is in its middle"])
def test_s3_is_away(when: str, s3_bucket: str, tmp_path: Path, alone: dict[str, Artifact]) -> None:
    """A training waits, goes on, and ends with the bytes of one with a local root."""
    root, log = Folder.of(f"{s3_bucket}/outage-{when.split()[0]}"), tmp_path / "log"
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    proxy = FaultyProxy(str(address.hostname), int(address.port or 80), period=10**9)
    with log.open("w") as output:
        process = subprocess.Popen(
            command(root.uri), stdout=output, stderr=output, env={**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        )
    try:
        wait(lambda: begun(root) if when == "begins" else is_training(root), process, log)
        proxy.down = True
        time.sleep(SECONDS_DOWN[when])
        assert process.poll() is None, log.read_text()
        assert proxy.counts["503"] > 5, "nobody asked for anything meanwhile"
        proxy.down = False
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.kill()
        proxy.stop()
    found = [name for name in root.folders() if root.exists(f"{name}/manifest.json")]
    assert len(found) == len(alone) == 3
    for artifact in alone.values():
        name = artifact.folder.name
        assert name in found
        for path in artifact.files:
            assert (root / name).read(path) == artifact.read(path), f"{name}/{path}"


def begun(root: Folder) -> bool:
    """Images are there, and Ray Train is being started."""
    return any(root.exists(f"{name}/manifest.json") for name in root.folders() if name.startswith("shard-"))


def is_training(root: Folder) -> bool:
    """There is a state of a training."""
    models = [root / name for name in root.folders() if name.startswith("train_vqvae-")]
    trainings = [model / name for model in models for name in model.folders() if name.startswith("training-")]
    return any(name.startswith("step-") for training in trainings for name in training.folders())
