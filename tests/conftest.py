"""Shapes in signatures are checked while the tests run; Ray is started once."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.servers import MlflowServer, Postgres

install_import_hook("vqvae_core", "beartype.beartype")

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
SHARED_DATA = Path(os.environ.get("VQVAE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and frames, where they lie beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}; set VQVAE_SHARED_DATA to a folder that has it")
    return SHARED_DATA


# Threads are part of what decides the last bits of a sum.
ONE_CPU = ("--resources.cpus-per-worker", "1")


@dataclass(frozen=True)
class SmokeRun:
    """A root with a run of the smoke preset, what that printed, and the digest of each artifact's files by its name."""

    root: Path
    said: str
    contents: dict[str, str]


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """The whole pipeline on one machine, uninterrupted. Tests may add to its root."""
    from vqvae_core.artifacts import MANIFEST, Artifact
    from vqvae_core.storage import Folder

    root, place = tmp_path_factory.mktemp("smoke"), tmp_path_factory.mktemp("place")
    command = [sys.executable, str(Path(__file__).parents[1] / "pipelines" / "full.py"), "--preset", "smoke"]
    command += ["--root", str(root), *ONE_CPU]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(place.iterdir()), "it left something where it was started"
    artifacts = [Artifact.open(Folder.of(path.parent)) for path in root.glob(f"*/{MANIFEST}")]
    return SmokeRun(root, result.stdout, {one.folder.name: one.manifest.content for one in artifacts})


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket on an S3 server of this test session, as s3://bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    patch = pytest.MonkeyPatch()
    for name, value in settings.items():
        patch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="test-bucket")
    yield "s3://test-bucket"
    patch.undo()
    server.stop()


@pytest.fixture(scope="session")
def mlflow_server(s3_bucket: str) -> Iterator[MlflowServer]:
    """MLflow on PostgreSQL, with artifacts in the bucket and a user that it asks for."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)  # PostgreSQL may run as another user
        database = Postgres(place / "postgres")
        try:
            server = MlflowServer(place, database, f"{s3_bucket}/mlflow")
            yield server
            server.stop()
        finally:
            database.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory; `mount -o remount,size=...` makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system: mount says {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
