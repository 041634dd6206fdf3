"""MLflow's server on PostgreSQL, as on a cluster, for tests: its processes end with the test."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    begin = time.monotonic()
    while not condition():
        said = log.read_text(errors="replace")
        assert process.poll() is None, f"ended with {process.poll()}:\n{said}"
        assert time.monotonic() - begin < seconds, said
        time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


class Postgres:
    """A data base `mlflow` of a user `mlflow`, with a password, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        """Skips the test where PostgreSQL is not installed."""
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        initdb = shutil.which("initdb") or (str(programs[-1]) if programs else None)
        if initdb is None:
            pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)")
        # PostgreSQL refuses root. The folder is not below pytest's own, which only one user may enter.
        user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        folder.mkdir()
        if user:
            shutil.chown(folder, user["user"], user["group"])
        self.port, self.password = free_port(), secrets.token_hex(16)
        password = folder / "password"
        password.write_text(self.password)
        password.chmod(0o644)
        data, programs_at = folder / "data", Path(initdb).resolve().parent
        rules = ["--username=mlflow", f"--pwfile={password}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]
        subprocess.run([initdb, f"--pgdata={data}", *rules], check=True, capture_output=True, cwd="/", **user)
        password.unlink()
        log = folder / "log"
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [programs_at / "postgres", "-D", data, "-p", str(self.port), *settings],
                stdout=output, stderr=output, cwd="/", **user,
            )  # fmt: skip
        env = {**os.environ, "PGPASSWORD": self.password}
        command = [programs_at / "createdb", "--host=127.0.0.1", f"--port={self.port}", "--username=mlflow", "mlflow"]

        def made() -> bool:  # it refuses for a moment after it listens
            return subprocess.run(command, capture_output=True, env=env).returncode == 0

        try:
            wait(made, self._process, log)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)  # do not wait for clients
        self._process.wait(60)


class MlflowServer:
    """What cluster/mlflow-server.sh starts; it may be stopped, and started again at the same address."""

    def __init__(self, folder: Path, database: Postgres, artifacts: str) -> None:
        """artifacts: s3://bucket/..."""
        self._folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        # For whoever logs to it, beside the server's own.
        self.client = {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": "writer",
            "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16),
        }
        self._env = {
            **os.environ, **self.client,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(folder),
            "HOST": "127.0.0.1", "PORT": str(self.port), "WORKERS": "1", "ARTIFACTS": artifacts,
            "DATABASE_HOST": f"127.0.0.1:{database.port}", "DATABASE_PASSWORD": database.password,
            "ALLOWED_HOSTS": f"127.0.0.1:{self.port}", "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        }  # fmt: skip
        del self._env["MLFLOW_TRACKING_URI"]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [str(ROOT / "cluster" / "mlflow-server.sh")], stdout=log, stderr=log, cwd=self._folder, env=self._env,
                start_new_session=True,
            )  # fmt: skip
        try:
            wait(lambda: listens(self.port), self._process, self.log)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """The server with its workers."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
