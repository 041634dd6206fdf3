from pathlib import Path

import pytest

from pipelines.tracking import Tracker
from vqvae_core.artifacts import FileEntry, commit
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


@pytest.mark.filterwarnings("ignore")
def test_labels_are_no_metrics_and_names_fit_the_store(tmp_path: Path) -> None:
    """Names of classes have commas and brackets, which would turn tracking off; and there may be 20,000."""
    facts = {"label_map": {"tench, Tinca tinca": 0}, "rejects": {"cannot be (odd), decoded": 2}}
    artifact = commit(Folder.of(tmp_path / "shard-1"), kind="K", stage="s", stage_version=1, fingerprint="f", recipe={},
                      inputs={}, files=[], facts=facts, provenance={"seconds": 1.0, "work_seconds": 0.5})  # fmt: skip
    tracker = Tracker(Folder.of(tmp_path), "name", {}, "f")
    tracker.start()
    run = tracker.stage("shard", "w", {}, {})
    run.finish(artifact)
    assert run.run_id is not None
    logged = tracker.client.get_run(run.run_id).data.metrics
    assert logged == {"final.rejects.cannot be _odd__ decoded": 2, "seconds": 1.0, "work_seconds": 0.5}


@pytest.mark.filterwarnings("ignore")
def test_the_newest_of_a_kind_of_model_is_one_of_its_like(tmp_path: Path) -> None:
    tracker = Tracker(Folder.of(tmp_path), "name", {}, "f")
    tracker.start()
    models = [
        ("VQVAEModel", {"K": 8}),
        ("BaselineModel", {"name": "vae"}),
        ("SecondStageModel", {"latents": "codes"}),
        ("SecondStageModel", {"latents": "none"}),
    ]
    for kind, facts in models:
        folder = Folder.of(tmp_path / f"{kind}-{next(iter(facts.values()))}")
        files = [FileEntry.of(name, b"{}") for name in ("model.safetensors", "config.json")]
        for file in files:
            folder.write(file.path, b"{}")
        artifact = commit(folder, kind=kind, stage="s", stage_version=1, fingerprint=folder.name, recipe={}, inputs={},
                          files=files, facts=facts, provenance={"seconds": 1.0, "work_seconds": 0.5})  # fmt: skip
        tracker.stage("train", folder.name, {}, {}).finish(artifact)
    client = tracker.client
    expected = {
        "VQVAEModel": "VQVAEModel-8",
        "BaselineModel-vae": "BaselineModel-vae",
        "SecondStageModel-codes": "SecondStageModel-codes",
        "SecondStageModel-none": "SecondStageModel-none",
    }
    newest = {name: client.get_model_version_by_alias(name, "newest").tags["fingerprint"] for name in expected}
    assert newest == expected
    assert tracker.page == "/#/experiments/1/runs?workflowType=machine_learning"
