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
from vqvae_core.storage import Folder

pytestmark = pytest.mark.slow
SECONDS_DOWN = 60
OPTIONS = ["--preset", "smoke", "--no-track", "--train.steps", "1500", "--train.validate-every", "500",
           "--resources.checkpoint-every", "20"]  # fmt: skip


def command(root: str) -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / "train_vqvae.py"), "--root", root, *OPTIONS]


def test_s3_is_away_for_a_minute(s3_bucket: str, tmp_path: Path) -> None:
    """In the middle of a training: it waits, goes on, and ends with the bytes of one with a local root."""
    root, log = Folder.of(f"{s3_bucket}/outage"), tmp_path / "log"
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    proxy = FaultyProxy(str(address.hostname), int(address.port or 80), period=10**9)
    try:
        with log.open("w") as output:
            process = subprocess.Popen(
                command(root.uri), stdout=output, stderr=output, env={**os.environ, "AWS_ENDPOINT_URL": proxy.url}
            )
        wait(lambda: is_training(root), process, log)
        proxy.down = True
        time.sleep(SECONDS_DOWN)
        assert process.poll() is None, log.read_text()
        assert proxy.counts["503"] > 5, "nobody asked for anything meanwhile"
        proxy.down = False
        assert process.wait(300) == 0, log.read_text()
    finally:
        proxy.stop()
    alone = subprocess.run(command(str(tmp_path / "root")), capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    expected = artifacts(tmp_path / "root")
    found = [name for name in root.folders() if root.exists(f"{name}/manifest.json")]
    assert len(found) == len(expected) == 3
    for artifact in expected.values():
        name = artifact.folder.name
        assert name in found
        for path in artifact.files:
            assert (root / name).read(path) == artifact.read(path), f"{name}/{path}"


def is_training(root: Folder) -> bool:
    """There is a state of a training."""
    for name in root.folders():
        if name.startswith("train_vqvae-"):
            return any(
                work.startswith("training-") and (root / name / work).folders() for work in (root / name).folders()
            )
    return False
