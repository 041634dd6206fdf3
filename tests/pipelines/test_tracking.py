from pathlib import Path

import pytest

from pipelines.tracking import Tracker
from vqvae_core.storage import Folder


def test_tracking_that_is_down_never_stops_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")
    tracker = Tracker(Folder.of(tmp_path), "name", {}, "f")

    def broken() -> None:
        raise ConnectionError("refused")

    assert tracker.attempt(broken) is None
    assert tracker.attempt(lambda: 1) is None
    run = tracker.stage("shard", "w", {}, {})
    run.log([(1, {"loss": 1.0})])
    tracker.finish("FINISHED")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("tracking: off for the rest of this run")
    assert said[0].endswith("failed: refused")


def test_an_s3_root_without_a_server_is_told(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Tracker(Folder.of("s3://bucket/root"), "name", {}, "f")
    assert "set MLFLOW_TRACKING_URI to a server" in capsys.readouterr().out
