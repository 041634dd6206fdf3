import json
import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines import journal
from pipelines.tracking import Tracker
from vqvae_core.artifacts import FileEntry, commit
from vqvae_core.storage import Folder

pytestmark = pytest.mark.slow  # each makes a store


@pytest.mark.filterwarnings("ignore")
def test_a_store_that_is_down_never_stops_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was told is kept, and is in the store after the same command with the store there."""
    place = tmp_path / "not" / "yet"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    monkeypatch.setattr(journal, "_SECONDS_OF_HOPE", 0.1)
    tmp_path.joinpath("not").write_text("a file, so that no folder can be made")

    def command() -> Tracker:
        tracker = Tracker(Folder.of(tmp_path), "name", {"a": 1}, "f")
        tracker.start()
        run = tracker.stage("train", "w", {"b": 2}, {})
        run.log([(1, {"loss": 1.0}), (2, {"loss": math.nan, "other": 3})])
        run.show(2, {"picture.png": b"bytes"})
        return tracker

    tracker = command()
    assert tracker.run_id(["stage.work", "w"]) is None
    tracker.finish("FINISHED")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("tracking: the store does not answer (")
    assert said[1].endswith(f"wait in {tmp_path}/tracking; the same command sends them")
    tmp_path.joinpath("not").unlink()
    place.mkdir(parents=True)
    tracker = command()
    run_id = tracker.run_id(["stage.work", "w"])
    assert run_id is not None
    tracker.finish("FINISHED")
    client = client_of(tracker)
    run = client.get_run(run_id)
    assert (run.data.params, run.data.metrics) == ({"b": "2"}, {"loss": 1.0, "other": 3.0})
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert (parent.info.status, parent.data.params) == ("FINISHED", {"a": "1"})
    assert [file.path for file in client.list_artifacts(run_id, "validation")] == ["validation/picture-000002.png"]
    assert list(tmp_path.glob("tracking/*")) == [] and "tracking:" not in capsys.readouterr().out


def tracked(root: Path, name: str = "name", fingerprint: str = "f", **params: int) -> Tracker:
    """A run that has begun and ended."""
    tracker = Tracker(Folder.of(root), name, params, fingerprint)
    tracker.start()
    tracker.finish("FINISHED")
    return tracker


def client_of(tracker: Tracker) -> MlflowClient:
    return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)


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
    logged = client_of(tracker).get_run(run.run_id).data.metrics
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
        run = tracker.stage("train", folder.name, {}, {})
        run.finish(artifact)
        run.finish(artifact)  # an entry may come twice
    tracker.close()
    client = client_of(tracker)
    assert len(client.search_model_versions()) == 4
    expected = {
        "VQVAEModel": "VQVAEModel-8",
        "BaselineModel-vae": "BaselineModel-vae",
        "SecondStageModel-codes": "SecondStageModel-codes",
        "SecondStageModel-none": "SecondStageModel-none",
    }
    newest = {name: client.get_model_version_by_alias(name, "newest").tags["fingerprint"] for name in expected}
    assert newest == expected
    assert tracker.page == "/#/experiments/1/runs?workflowType=machine_learning"


@pytest.mark.filterwarnings("ignore")
def test_a_store_that_goes_down_while_a_run_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is there, its params are not: they follow."""
    calls = []
    log_batch = MlflowClient.log_batch

    def fails_once(*arguments, **named) -> None:
        calls.append(named)
        if len(calls) == 1:
            raise ConnectionError("http://user:secret@host is gone")
        log_batch(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", fails_once)
    tracker = tracked(tmp_path, a=1)
    runs = client_of(tracker).search_runs(["1"])
    assert [(run.data.params, run.info.status) for run in runs] == [({"a": "1"}, "FINISHED")]


@pytest.mark.filterwarnings("ignore")
def test_a_program_that_ends_while_a_run_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one finds the run without its params, and gives it those."""
    with monkeypatch.context() as patch:

        def fails(*arguments, **named) -> None:
            raise ConnectionError("gone")

        patch.setattr(MlflowClient, "log_batch", fails)
        patch.setattr(journal, "_SECONDS_OF_HOPE", 0.1)
        tracked(tmp_path, a=1)
    for number in range(2):  # other params later are not an error, and change nothing
        tracker = tracked(tmp_path, a=1 + number)
    runs = client_of(tracker).search_runs(["1"])
    assert [(run.data.params, run.info.status) for run in runs] == [({"a": "1"}, "FINISHED")]


@pytest.mark.filterwarnings("ignore")
def test_two_programs_make_the_experiment_at_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked(tmp_path)
    find, asked = MlflowClient.get_experiment_by_name, []

    def not_yet(self: MlflowClient, name: str):
        asked.append(name)
        return None if len(asked) == 1 else find(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", not_yet)
    tracker = tracked(tmp_path, "other", "g")
    assert len(asked) == 2
    assert {run.info.run_name for run in client_of(tracker).search_runs(["1"])} == {"name", "other"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "address",
    ["http://user:secret@host", "postgresql://user:sec/secret@host/db", "postgresql://user:p@secret@host",
     "postgresql://host/db?user=u&password=secret"],
)  # fmt: skip
def test_no_password_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    def fails(*arguments, **named) -> None:
        raise ConnectionError(f"{address} is gone")

    monkeypatch.setattr(MlflowClient, "search_runs", fails)
    monkeypatch.setattr(journal, "_SECONDS_OF_HOPE", 0.1)
    tracked(tmp_path, a=1)
    said = capsys.readouterr().out
    assert "host" in said and "***" in said and "is gone" in said and "secret" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert "secret" not in Tracker(Folder.of(tmp_path), "a", {}, "").place


def test_a_path_is_shown_as_it_is(tmp_path: Path) -> None:
    root = Folder.of(tmp_path / "me@home")
    assert Tracker(root, "a", {}, "").place == f"sqlite:///{root.path('mlflow.db')}"


@pytest.mark.filterwarnings("ignore")
def test_entries_of_somebody_elses_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out with their reason, write and read nothing outside the root, and hold up none behind them."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "private").write_text("private")
    inside, unknown = "expected a relative file name inside the folder", "an entry that this version does not know"
    entries = [
        ({"do": "file", "name": f"{outside}/taken", "data": "aGk="}, inside),
        ({"do": "file", "name": "../taken", "data": "aGk="}, inside),
        ({"do": "file", "name": "a", "below": "../../x", "data": "aGk="}, inside),
        ({"do": "file", "name": "a", "folder": str(outside), "path": "private"}, f"{outside} is not in {root}"),
        ({"do": "file", "name": "a", "folder": f"{root}/../outside", "path": "private"}, "outside is not in "),
        ({"do": "file", "name": "a", "folder": str(root), "path": "../outside/private"}, inside),
        ({"do": "finish", "artifact": str(outside), "time": 0}, f"{outside} is not in {root}"),
        ({"do": "rename", "to": "b"}, f"{unknown} ('rename')"),
        ({"do": "points"}, f"{unknown} ('points')"),
        ({"do": "file", "name": "a", "data": "a"}, f"{unknown} ('file')"),
    ]
    tracked(root, a=1)  # a run that the entries can be for
    (root / "tracking").mkdir(parents=True, exist_ok=True)
    text = json.dumps([{**entry, "key": ["pipeline.fingerprint", "f"]} for entry, _ in entries])
    (root / "tracking" / "waiting-1.json").write_text(text)
    capsys.readouterr()
    tracker = tracked(root, a=1)
    said = capsys.readouterr().out.splitlines()
    for line, (entry, reason) in zip(said, entries, strict=True):
        assert line.startswith("tracking: left out, since the store refuses it: ") and reason in line, (line, entry)
    assert list(tmp_path.rglob("*taken*")) == [] and list(outside.iterdir()) == [outside / "private"]
    assert not [path for path in (root / "mlartifacts").rglob("*") if path.is_file()]
    assert client_of(tracker).search_runs(["1"])[0].info.status == "FINISHED"
    assert not list((root / "tracking").iterdir())
