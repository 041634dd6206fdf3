"""Tracking on a server with a data base, as on a cluster: what a server that goes away costs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipelines.test_cli import ROOT
from tests.servers import MlflowServer, wait

pytestmark = pytest.mark.slow
SECONDS_DOWN = 60


def newest(root: Path) -> Path | None:
    """The state of the training that has the most steps."""
    return max(root.glob("train_vqvae-*/training-*/step-*/state.json"), default=None)


def test_a_server_that_is_down_for_a_minute(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a training, which goes on meanwhile; no point of a curve is missing in the end."""
    from mlflow import MlflowClient

    root, log = tmp_path / "root", tmp_path / "log"
    options = ["--preset", "smoke", "--train.steps", "1000000", "--train.validate-every", "1000",
               "--train.log-every", "20", "--resources.checkpoint-every", "50"]  # fmt: skip
    for name, value in mlflow_server.client.items():
        monkeypatch.setenv(name, value)
    with log.open("w") as output:
        command = [sys.executable, str(ROOT / "pipelines" / "train_vqvae.py"), "--root", str(root), *options]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(os.environ))
    try:
        wait(lambda: newest(root) is not None, process, log)
        mlflow_server.stop()
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS_DOWN:
            before = newest(root)
            wait(lambda before=before: newest(root) > before, process, log, seconds=10)
            time.sleep(5)
        assert "tracking: the store does not answer" in log.read_text()
    except BaseException:
        process.kill()
        raise
    finally:  # others use it too
        mlflow_server.stop()
        mlflow_server.start()
    wait(lambda: "tracking: the store answers again" in log.read_text(), process, log, seconds=60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, log.read_text()
    assert "wait in" not in log.read_text(), log.read_text()

    found = newest(root)
    assert found is not None
    history = json.loads(found.read_text())["history"]
    assert len(history) > SECONDS_DOWN
    client = MlflowClient(mlflow_server.uri, mlflow_server.uri)  # whatever this process used before
    experiment = client.get_experiment_by_name("vqvae-pipeline")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`pipeline.root` = '{root}'")
    mine = f"tags.`stage.name` = 'train_vqvae' and tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    (run,) = client.search_runs([experiment.experiment_id], mine)
    assert run.info.status == "KILLED"
    for name in {name for point in history for name in point if name != "step"}:
        expected = {point["step"]: point[name] for point in history if name in point}
        stored = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert stored == pytest.approx(expected), name
    assert [file.path for file in client.list_artifacts(run.info.run_id, "validation")]
