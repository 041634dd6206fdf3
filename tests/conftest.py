"""Shapes in signatures are checked while the tests run; Ray is started once."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
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
