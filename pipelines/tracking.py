"""MLflow: one parent run per pipeline, a child per stage. The only file that knows it.

The driver owns all runs and logs for all workers. What is logged is an entry of a journal (pipelines/journal.py): a
thread sends it, and a store that is down keeps it waiting, never the work. A run is named by a tag that the pipeline
knows, since its id is the store's to give.
"""

import base64
import binascii
import contextlib
import functools
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.journal import Entry, Journal, RefusedError
from vqvae_core.artifacts import Artifact, ArtifactError, canonical_json
from vqvae_core.storage import Folder, StorageError, check_name

EXPERIMENT = "vqvae-pipeline"
_USER = re.compile(r"(?<=:)//(?!/)\S*@")  # a password may have any sign in it
_SECRET = re.compile(r"\b(user|password|passwd|pwd|token|secret)=[^&\s]*", re.IGNORECASE)
_MAX_PARAM_CHARACTERS = 500
_SECONDS_TO_SEND, _SECONDS_FOR_AN_ID = 120.0, 5.0  # where the store answers
# The store answers, and would say the same tomorrow. That a password is wrong is mended, and what waits is kept.
_FINAL = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "BAD_REQUEST",
    "INVALID_STATE",
}
_SHOWN = (
    "contact_sheet.png",
    "data.json",
    "reconstructions.png",
    "samples.png",
    "decodings.png",
    "walk.png",
    "parallel.png",
    "table.md",
    "table.csv",
    "evaluation.png",
    "evaluation.json",
    "evaluation.md",
)  # files to look at in a run


class Tracker:
    """The runs of one pipeline. Default store: an SQLite file under a local root; else MLFLOW_TRACKING_URI names it."""

    def __init__(self, root: Folder, name: str, config: Mapping[str, Any], fingerprint: str, *, enabled: bool = True):
        default = f"sqlite:///{root.path('mlflow.db')}" if root.is_local else ""
        self.uri: str = (os.environ.get("MLFLOW_TRACKING_URI") or default) if enabled else ""
        self._root, self._name, self._config = root, name, config
        self._key = ["pipeline.fingerprint", fingerprint]
        self._store: _Store | None = None
        self._journal: Journal | None = None
        if enabled and not self.uri:
            print("tracking: off, since an s3:// root has no SQLite store; set MLFLOW_TRACKING_URI to a server")

    @property
    def is_file(self) -> bool:
        """Runs go to an SQLite file, which one process on one machine can write."""
        return self.uri.startswith("sqlite")

    @property
    def place(self) -> str:
        """The store without user and password."""
        return _shown(self.uri)

    @property
    def page(self) -> str:
        """The runs on a server, after its address; MLflow's own first page is an overview of traces."""
        experiment = None if self._store is None else self._store.experiment
        return "" if experiment is None else f"/#/experiments/{experiment}/runs?workflowType=machine_learning"

    def start(self) -> None:
        """Open the parent run: the one that an earlier call of the same config in this root began, if there is one."""
        if not self.uri:
            return
        location = f"file://{self._root.path('mlartifacts')}" if self.is_file else None
        self._store = _Store(self.uri, location, self._root)
        self._store.connect(first_call=self.is_file)
        self._journal = Journal(self._store.send, self._root, say=_say)
        tags = {"pipeline.root": self._root.uri}
        self.tell("open", self._key, name=self._name, tags=tags, params=_params(self._config))

    def tell(self, what: str, key: Sequence[str], **more: Any) -> None:
        """An entry for a run. Never waits."""
        if self._journal is not None:
            self._journal.put({"do": what, "key": list(key), **more})

    def stage(
        self, name: str, work: str, recipe: Any, inputs: Mapping[str, Artifact], below: "StageRun | None" = None
    ) -> "StageRun":
        """The child run of a stage, or of a part of one, which lies below the stage's run: the one that an earlier run
        of the same work began, if there is one."""
        run = StageRun(self, work)
        self.tell(
            "open",
            run.key,
            name=name,
            tags={"stage.name": name},
            parent=self._key if below is None else below.key,
            params=_params(recipe),
            datasets={label: _dataset(artifact) for label, artifact in inputs.items()},
        )
        return run

    def run_id(self, key: Sequence[str]) -> str | None:
        """The store's id of a run, where it answers."""
        if self._journal is None or self._store is None:
            return None
        self._journal.wait(_SECONDS_FOR_AN_ID)
        return self._store.known(key)

    def catch_up(self, work: str, artifact: Artifact) -> None:
        """Finish the run of a reused artifact, where a kill came between the artifact and its run's end."""
        self.tell("catch_up", StageRun(self, work).key, artifact=artifact.folder.uri)

    def finish(self, status: str, report: str | None = None) -> None:
        """End the parent run: FINISHED, FAILED or KILLED. report: name of a page in the root. What the store does not
        take within a few seconds is kept in the root."""
        if self._journal is None:
            return
        if report is not None:
            self.tell("file", self._key, folder=self._root.uri, path=report, name="report.html")
        self.tell("end", self._key, status=status)
        self.close()

    def close(self) -> None:
        """Send what waits. The run stays open."""
        left, self._journal = 0 if self._journal is None else self._journal.close(_SECONDS_TO_SEND), None
        if left:
            place = self._root.path("tracking")
            _say(f"tracking: {left} entries for {self.place} wait in {place}; the same command sends them")


class StageRun:
    """The child run of one stage. work: names the job exactly."""

    def __init__(self, tracker: Tracker, work: str) -> None:
        self._tracker, self.key = tracker, ["stage.work", work]

    @property
    def run_id(self) -> str | None:
        return self._tracker.run_id(self.key)

    def log(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Points of curves: (step, metrics)."""
        if points:
            rows = [[step, _numbers(point)] for step, point in points]
            self._tracker.tell("points", self.key, time=_now(), points=rows)

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """PNG files by name, of a step."""
        for name, data in pictures.items():
            file, text = f"{name.removesuffix('.png')}-{step:06d}.png", base64.b64encode(data).decode()
            self._tracker.tell("file", self.key, name=file, below="validation", data=text)

    def fail(self, status: str = "FAILED") -> None:
        """End the run as failed, or as KILLED: the same command goes on with it."""
        self._tracker.tell("end", self.key, status=status)

    def mark(self, alias: str) -> None:
        """Give the model that the run registered an alias."""
        self._tracker.tell("alias", self.key, alias=alias)

    def finish(self, artifact: Artifact) -> None:
        """Log the artifact's numbers and pictures, register it where it is a model, and end the run."""
        self._tracker.tell("finish", self.key, artifact=artifact.folder.uri, time=_now())


class _Store:
    """Takes a journal's entries to MLflow; each may come twice."""

    def __init__(self, uri: str, location: str | None, root: Folder) -> None:
        """location: where the artifacts of a new experiment go; None: where the server says. root: what entries tell to
        log lies in it."""
        self._uri, self._location, self._root = uri, location, root
        self.experiment: str | None = None
        self._runs: dict[tuple[str, ...], str] = {}

    def known(self, key: Sequence[str]) -> str | None:
        return self._runs.get(tuple(key))

    def send(self, entry: Entry) -> None:
        """Raises `RefusedError` where MLflow will never take it, or where it is none of this program's: a root may be
        somebody else's, or a later version's. Anything else where it may be taken later."""
        actions: dict[str, Callable[[Entry], None]] = {
            "open": self._open,
            "points": self._points,
            "file": self._file,
            "finish": self._finish,
            "catch_up": self._catch_up,
            "alias": self._alias,
            "end": lambda entry: self._client.set_terminated(self._run(entry), status=entry["status"]),
        }
        from mlflow.exceptions import MlflowException

        try:
            actions[entry["do"]](entry)
        except MlflowException as error:
            if error.error_code in _FINAL:
                raise RefusedError(str(error)) from error
            raise
        except (LookupError, TypeError, AttributeError, binascii.Error) as error:
            raise RefusedError(f"an entry that this version does not know ({entry.get('do')!r})") from error

    def connect(self, *, first_call: bool) -> None:
        """Import what is needed, here and not by the journal's thread, beside which others are imported; with a first
        call, which for SQLite imports more and makes the file. It may fail: the journal asks again."""
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        # A server that is down is given up within seconds, not minutes, and asked again.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        logging.getLogger("alembic").setLevel(logging.ERROR)
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        mlflow.set_tracking_uri(self._uri)
        mlflow.set_registry_uri(self._uri)
        for name, value in before.items():  # MLflow sets them, and the tracker of another root would believe them
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if first_call:
            with contextlib.suppress(Exception):
                self._in_experiment()

    @functools.cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _in_experiment(self) -> str:
        if self.experiment is None:
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                found = self._new_experiment()
            self.experiment = found.experiment_id
        assert self.experiment is not None
        return self.experiment

    def _new_experiment(self) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_experiment(EXPERIMENT, artifact_location=self._location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another program made it in this moment
                raise
        return self._client.get_experiment_by_name(EXPERIMENT)

    def _find(self, key: Sequence[str]) -> str | None:
        found = self._runs.get(tuple(key))
        if found is None:
            tag, value = key
            runs = self._client.search_runs([self._in_experiment()], f"tags.`{tag}` = '{value}'", max_results=1)
            if not runs:
                return None
            found = self._runs[tuple(key)] = runs[0].info.run_id
        return found

    def _run(self, entry: Entry) -> str:
        found = self._find(entry["key"])
        if found is None:
            raise RefusedError(f"no run with the tag {entry['key'][0]} {entry['key'][1]}, was it deleted?")
        return found

    def _open(self, entry: Entry) -> None:
        found = self._find(entry["key"])
        if found is None:
            found = self._create(entry)
        else:
            self._client.update_run(found, status="RUNNING")
        self._describe(found, entry)

    def _create(self, entry: Entry) -> str:
        tag, value = entry["key"]
        tags = {**entry["tags"], tag: value}
        if "parent" in entry:
            tags["mlflow.parentRunId"] = self._run({"key": entry["parent"]})
        run = self._client.create_run(self._in_experiment(), run_name=entry["name"], tags=tags).info.run_id
        self._runs[tag, value] = run
        return run

    def _describe(self, run: str, entry: Entry) -> None:
        """Params and inputs that a run does not have yet: the store may have gone away in the middle."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        run_now = self._client.get_run(run)
        params = [Param(name, text) for name, text in entry["params"].items() if name not in run_now.data.params]
        for start in range(0, len(params), 100):
            self._client.log_batch(run, params=params[start : start + 100])
        inputs = [
            DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", label)])
            for label, dataset in entry.get("datasets", {}).items()
        ]
        if inputs and not run_now.inputs.dataset_inputs:
            self._client.log_inputs(run, datasets=inputs)

    def _points(self, entry: Entry) -> None:
        self._log(self._run(entry), entry["points"], entry["time"])

    def _log(self, run: str, points: Sequence[Sequence[Any]], now: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, now, step) for step, point in points for name, value in point.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run, metrics=metrics[start : start + 1000])

    def _file(self, entry: Entry) -> None:
        run = self._run(entry)
        if "data" in entry:
            data = base64.b64decode(entry["data"])
        else:
            try:
                data = self._within(entry["folder"]).read(_checked(entry["path"]))
            except FileNotFoundError as error:
                raise RefusedError(f"{entry['path']} is no longer there") from error
        self._put(run, entry["name"], data, entry.get("below"))

    def _within(self, uri: str) -> Folder:
        """Raises `RefusedError` for a folder that is not the root or in it."""
        inside = uri.removeprefix(f"{self._root.uri}/")
        if uri != self._root.uri and (inside == uri or {"..", "."} & set(inside.split("/"))):
            raise RefusedError(f"{uri} is not in {self._root.uri}")
        return Folder(uri)

    def _put(self, run: str, name: str, data: bytes, below: str | None = None) -> None:
        _checked(below or name)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / Path(_checked(name)).name
            path.write_bytes(data)
            self._client.log_artifact(run, str(path), below)

    def _finish(self, entry: Entry) -> None:
        run, artifact = self._run(entry), _opened(self._within(entry["artifact"]))
        facts = {name: value for name, value in artifact.facts.items() if name != "label_map"}  # it may be long
        numbers = {f"final.{_metric(name)}": value for name, value in _flat(facts).items()}
        seconds = {name: artifact.manifest.provenance[name] for name in ("seconds", "work_seconds")}
        self._log(run, [[0, _numbers({**numbers, **seconds})]], entry["time"])
        if "history.json" in artifact.files:
            self._fill(run, json.loads(artifact.read("history.json")), entry["time"])
        self._client.set_tag(run, "artifact", artifact.folder.uri)
        self._client.set_tag(run, "artifact.content", artifact.manifest.content)
        self._put(run, "manifest.json", artifact.manifest.dump())
        for path in _SHOWN:
            if path in artifact.files:
                self._put(run, path, artifact.read(path))
        if "model.safetensors" in artifact.files:
            self._register(run, artifact)
        self._client.set_terminated(run, status="FINISHED")

    def _catch_up(self, entry: Entry) -> None:
        run = self._find(entry["key"])  # None: the artifact was made with another store
        if run is not None and self._client.get_run(run).info.status != "FINISHED":
            self._finish({**entry, "time": _now()})

    def _fill(self, run: str, history: list[dict[str, float]], now: int) -> None:
        """Log the points that a kill kept from the store."""
        first = next(name for name in history[0] if name != "step")
        known = {metric.step for metric in self._client.get_metric_history(run, first)}
        points = [[int(point["step"]), _numbers({name: value for name, value in point.items() if name != "step"})]
                  for point in history if point["step"] not in known]  # fmt: skip
        self._log(run, points, now)

    def _register(self, run: str, artifact: Artifact) -> None:
        """Log the weights with their config and register them, with the alias `newest`."""
        client = self._client
        for path in ("model.safetensors", "config.json"):
            self._put(run, path, artifact.read(path), "model")
        name = model_name(artifact)
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            from mlflow.exceptions import MlflowException

            with contextlib.suppress(MlflowException):  # another training was faster: the next call would say the rest
                client.create_registered_model(name)
        content = artifact.manifest.content
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run}'")
        version = next((one for one in known if one.tags.get("content") == content), None)
        if version is None:
            source = f"{client.get_run(run).info.artifact_uri}/model"
            tags = {"fingerprint": artifact.manifest.fingerprint, "content": content}
            version = client.create_model_version(name, source=source, run_id=run, tags=tags)
        client.set_registered_model_alias(name, "newest", version.version)

    def _alias(self, entry: Entry) -> None:
        """Raises `RefusedError` where the run has no registered model."""
        run = self._run(entry)
        found = self._client.search_model_versions(f"run_id = '{run}'")
        if not found:
            raise RefusedError(f"no model of the run {run} is registered")
        self._client.set_registered_model_alias(found[0].name, entry["alias"], found[0].version)


def _checked(name: str) -> str:
    """The relative path of a file. Raises `RefusedError` for anything that could leave its folder."""
    try:
        return check_name(name)
    except StorageError as error:
        raise RefusedError(str(error)) from error


def _opened(folder: Folder) -> Artifact:
    try:
        return Artifact.open(folder)
    except (FileNotFoundError, ArtifactError) as error:
        raise RefusedError(f"{folder.uri} cannot be read any more: {error}") from error


def model_name(artifact: Artifact) -> str:
    """What a model is registered as: its kind, and which one of the kind, so that `newest` is among its like."""
    variants = [artifact.facts[name] for name in ("name", "latents") if name in artifact.facts]
    return "-".join([artifact.manifest.kind, *variants])


def _dataset(artifact: Artifact) -> dict[str, str]:
    """An artifact as MLflow's dataset."""
    profile = canonical_json({name: value for name, value in artifact.facts.items() if name != "label_map"})
    return {
        "name": artifact.folder.name,
        "digest": artifact.manifest.content[:36],
        "source_type": "local",
        "source": canonical_json({"uri": artifact.folder.uri}),
        "profile": profile[:10_000],
    }


def _params(config: Any) -> dict[str, str]:
    return {name: str(value)[:_MAX_PARAM_CHARACTERS] for name, value in _flat(config).items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What a store can take as metrics."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _now() -> int:
    return int(time.time() * 1000)


def _say(line: str) -> None:
    """Print a line without the user and password of any address in it."""
    print(_shown(line), flush=True)


def _shown(text: str) -> str:
    """A text without the user and password of any address in it."""
    return _SECRET.sub(r"\1=***", _USER.sub("//***@", text))


def _metric(name: str) -> str:
    """A name that the store accepts: letters, digits, / _ - . : and spaces."""
    return re.sub(r"[^\w/.:\- ]", "_", name)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if isinstance(value, Mapping):
        pairs = [_flat(inner, f"{prefix}.{name}" if prefix else str(name)) for name, inner in value.items()]
        return {name: inner for pair in pairs for name, inner in pair.items()}
    return {prefix: value}
