"""MLflow: one parent run per pipeline, a child per stage. The only file that knows it.

The driver owns all runs and logs for all workers, in batches. Tracking that fails never stops the work and says so.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vqvae_core.artifacts import Artifact, canonical_json
from vqvae_core.storage import Folder

T = TypeVar("T")
EXPERIMENT = "vqvae-pipeline"
_MAX_PARAM_CHARACTERS = 500
_SHOWN = (
    "contact_sheet.png",
    "data.json",
    "reconstructions.png",
    "samples.png",
    "decodings.png",
    "walk.png",
    "table.md",
    "table.csv",
    "evaluation.png",
    "evaluation.json",
    "evaluation.md",
)  # files to look at in a run


class Tracker:
    """The runs of one pipeline. Default store: an SQLite file under a local root; else MLFLOW_TRACKING_URI names it."""

    def __init__(self, root: Folder, name: str, config: Mapping[str, Any], fingerprint: str, *, enabled: bool = True):
        self.uri: str = os.environ.get("MLFLOW_TRACKING_URI") or (
            f"sqlite:///{root.path('mlflow.db')}" if root.is_local else ""
        )
        self._root, self._name, self._config, self._fingerprint = root, name, config, fingerprint
        self._client: Any = None
        self._parent = ""
        self._experiment: str | None = None
        self._failed = not enabled
        if enabled and not self.uri:
            self._failed = True
            print("tracking: off, since an s3:// root has no SQLite store; set MLFLOW_TRACKING_URI to a server")

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Do something with MLflow; where it fails, say so once and go on without."""
        if self._failed:
            return None
        try:
            return action()
        except Exception as error:  # a store can fail in any way; none of them may stop training
            self._failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"tracking: off for the rest of this run, {self.place} failed: {reason}", flush=True)
            return None

    @property
    def place(self) -> str:
        """The store without user and password."""
        return re.sub(r"//[^/@]*@", "//***@", self.uri)

    @property
    def page(self) -> str:
        """The runs on a server, after its address; MLflow's own first page is an overview of traces."""
        experiment = self._experiment
        return "" if experiment is None else f"/#/experiments/{experiment}/runs?workflowType=machine_learning"

    @property
    def client(self) -> Any:
        if self._client is None:
            os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
            # A server that is down is given up within seconds, not minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            import logging

            logging.getLogger("alembic").setLevel(logging.ERROR)
            import mlflow

            logging.getLogger("mlflow").setLevel(logging.ERROR)
            mlflow.set_tracking_uri(self.uri)
            mlflow.set_registry_uri(self.uri)
            self._client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        return self._client

    def start(self) -> None:
        """Open the parent run: the one that an earlier call of the same config in this root began, if there is one."""
        self.attempt(self._start)

    def _start(self) -> None:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            location = f"file://{self._root.path('mlartifacts')}" if self.uri.startswith("sqlite") else None
            self._experiment = self.client.create_experiment(EXPERIMENT, artifact_location=location)
        else:
            self._experiment = experiment.experiment_id
        self._parent = self._find("pipeline.fingerprint", self._fingerprint) or ""
        if self._parent:
            self.client.update_run(self._parent, status="RUNNING")
            return
        tags = {"pipeline.fingerprint": self._fingerprint, "pipeline.root": self._root.uri}
        self._parent = self.client.create_run(self._experiment, run_name=self._name, tags=tags).info.run_id
        self._log_params(self._parent, self._config)

    def _find(self, tag: str, value: str) -> str | None:
        filter_string = f"tags.`{tag}` = '{value}'"
        found = self.client.search_runs([self._experiment], filter_string=filter_string, max_results=1)
        return found[0].info.run_id if found else None

    def _log_params(self, run_id: str, config: Any) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:_MAX_PARAM_CHARACTERS]) for name, value in _flat(config).items()]
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[start : start + 100])

    def stage(self, name: str, work: str, recipe: Any, inputs: Mapping[str, Artifact]) -> "StageRun":
        """The child run of a stage: the one that an earlier run of the same work began, if there is one."""
        run = StageRun(self, name)
        run.run_id = self.attempt(lambda: self._stage(name, work, recipe, inputs))
        return run

    def _stage(self, name: str, work: str, recipe: Any, inputs: Mapping[str, Artifact]) -> str:
        found = self._find("stage.work", work)
        if found is not None:
            self.client.update_run(found, status="RUNNING")
            return found
        tags = {"mlflow.parentRunId": self._parent, "stage.work": work, "stage.name": name}
        run_id = self.client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
        self._log_params(run_id, recipe)
        if inputs:
            from mlflow.entities import DatasetInput, InputTag

            datasets = [
                DatasetInput(_dataset(artifact), [InputTag("mlflow.data.context", label)])
                for label, artifact in inputs.items()
            ]
            self.client.log_inputs(run_id, datasets=datasets)
        return run_id

    def catch_up(self, stage: str, artifact: Artifact) -> None:
        """Finish the run of a reused artifact, where a kill came between the artifact and its run's end."""
        run_id = artifact.manifest.provenance["mlflow_run"]
        if run_id:
            self.attempt(lambda: self._catch_up(stage, run_id, artifact))

    def _catch_up(self, stage: str, run_id: str, artifact: Artifact) -> None:
        from mlflow.exceptions import MlflowException

        try:
            status = self.client.get_run(run_id).info.status
        except MlflowException:  # the artifact was made with another store
            return
        if status != "FINISHED":
            run = StageRun(self, stage)
            run.run_id = run_id
            run.finish(artifact)

    def finish(self, status: str, report: bytes | None = None) -> None:
        """End the parent run: FINISHED, FAILED or KILLED."""
        if not self._parent:
            return
        if report is not None:
            self.attempt(lambda: _log_file(self.client, self._parent, "report.html", report))
        self.attempt(lambda: self.client.set_terminated(self._parent, status=status))

    def log_parent(self, metrics: Mapping[str, float]) -> None:
        if self._parent:
            self.attempt(lambda: self._log_metrics(self._parent, [(0, metrics)]))

    def _log_metrics(self, run_id: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, step)
            for step, point in points
            for name, value in point.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000])


class StageRun:
    """The child run of one stage."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name
        self.run_id: str | None = None

    def log(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Points of curves: (step, metrics)."""
        run_id = self.run_id
        if points and run_id is not None:
            self._tracker.attempt(lambda: self._tracker._log_metrics(run_id, points))

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """PNG files by name, of a step."""
        run_id = self.run_id
        if run_id is None:
            return
        for name, data in pictures.items():
            file = f"{name.removesuffix('.png')}-{step:06d}.png"
            self._tracker.attempt(
                lambda file=file, data=data: _log_file(self._tracker.client, run_id, file, data, folder="validation")
            )

    def fail(self) -> None:
        """End the run as failed: the same command goes on with it."""
        run_id = self.run_id
        if run_id is not None:
            self._tracker.attempt(lambda: self._tracker.client.set_terminated(run_id, status="FAILED"))

    def finish(self, artifact: Artifact) -> None:
        """Log the artifact's numbers and pictures, register it where it is a model, and end the run."""
        run_id = self.run_id
        if run_id is not None:
            self._tracker.attempt(lambda: self._finish(run_id, artifact))

    def _finish(self, run_id: str, artifact: Artifact) -> None:
        client = self._tracker.client
        facts = {name: value for name, value in artifact.facts.items() if name != "label_map"}  # it may be long
        numbers = {f"final.{_metric(name)}": value for name, value in _flat(facts).items() if _is_number(value)}
        seconds = {f"{name}": artifact.manifest.provenance[name] for name in ("seconds", "work_seconds")}
        self._tracker._log_metrics(run_id, [(0, {**numbers, **seconds})])
        if "history.json" in artifact.files:
            self._fill(run_id, json.loads(artifact.read("history.json")))
        client.set_tag(run_id, "artifact", artifact.folder.uri)
        client.set_tag(run_id, "artifact.content", artifact.manifest.content)
        _log_file(client, run_id, "manifest.json", artifact.manifest.dump())
        for path in _SHOWN:
            if path in artifact.files:
                _log_file(client, run_id, path, artifact.read(path))
        if "model.safetensors" in artifact.files:
            self._register(run_id, artifact)
        client.set_terminated(run_id, status="FINISHED")

    def _fill(self, run_id: str, history: list[dict[str, float]]) -> None:
        """Log the points that a kill kept from the store."""
        first = next(name for name in history[0] if name != "step")
        known = {metric.step for metric in self._tracker.client.get_metric_history(run_id, first)}
        points = [(int(point["step"]), {name: value for name, value in point.items() if name != "step"})
                  for point in history if point["step"] not in known]  # fmt: skip
        self._tracker._log_metrics(run_id, points)

    def _register(self, run_id: str, artifact: Artifact) -> None:
        """Log the weights with their config and register them, with the alias `newest`."""
        client = self._tracker.client
        for path in ("model.safetensors", "config.json"):
            _log_file(client, run_id, path, artifact.read(path), folder="model")
        name = model_name(artifact)
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            from mlflow.exceptions import MlflowException

            with contextlib.suppress(MlflowException):  # another training was faster: the next call would say the rest
                client.create_registered_model(name)
        source = f"{client.get_run(run_id).info.artifact_uri}/model"
        tags = {"fingerprint": artifact.manifest.fingerprint, "content": artifact.manifest.content}
        version = client.create_model_version(name, source=source, run_id=run_id, tags=tags)
        client.set_registered_model_alias(name, "newest", version.version)


def model_name(artifact: Artifact) -> str:
    """What a model is registered as: its kind, and which one of the kind, so that `newest` is among its like."""
    variants = [artifact.facts[name] for name in ("name", "latents") if name in artifact.facts]
    return "-".join([artifact.manifest.kind, *variants])


def _log_file(client: Any, run_id: str, name: str, data: bytes, folder: str | None = None) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        path.write_bytes(data)
        client.log_artifact(run_id, str(path), folder)


def _dataset(artifact: Artifact) -> Any:
    from mlflow.entities import Dataset

    digest = artifact.manifest.content[:36]
    profile = canonical_json({name: value for name, value in artifact.facts.items() if name != "label_map"})
    source = canonical_json({"uri": artifact.folder.uri})
    return Dataset(
        name=artifact.folder.name, digest=digest, source_type="local", source=source, profile=profile[:10_000]
    )


def _metric(name: str) -> str:
    """A name that the store accepts: letters, digits, / _ - . : and spaces."""
    return re.sub(r"[^\w/.:\- ]", "_", name)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if isinstance(value, Mapping):
        pairs = [_flat(inner, f"{prefix}.{name}" if prefix else str(name)) for name, inner in value.items()]
        return {name: inner for pair in pairs for name, inner in pair.items()}
    return {prefix: value}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
