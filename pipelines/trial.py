"""One trial of a sweep, a Ray Train run with values of its own, as an actor of Ray Tune; and what the driver notes."""

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray import tune

from cluster.session import Session
from pipelines.config import config_to_manifest
from pipelines.lineage import NO_LINEAGE, SavedState
from pipelines.objective import OBJECTIVES, history_of, train_for, train_part
from pipelines.stage import Pipeline
from pipelines.sweep_record import DIVERGED, DONE, FAILED, RUNNING, STOPPED, Record, Shared, read_records, short
from pipelines.tracking import StageRun, Tracker
from vqvae_core.artifacts import Artifact
from vqvae_core.errors import StoppedError
from vqvae_core.storage import Folder
from vqvae_core.train import NonFiniteLossError

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_TO_START = "120"  # of a trial's workers: another one may still write its last checkpoint


class Trial(tune.Trainable):
    """Results: steps done, the objective there, and at the end the model's folder.

    What an earlier run of the sweep saw of this trial comes first, so that a scheduler knows what it knew, and decides
    of others as it would have. When Ray Tune ends a trial it saves it first, and no other trial begins meanwhile: that
    is where training is asked to stop, writes a checkpoint and has Ray Train give its workers back. A trial that is
    killed instead keeps them for minutes, or for ever where Ray has no dashboard.
    """

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        assert shared is not None
        self._shared, self._number, self._values = shared, config["trial"]["number"], config["trial"]["values"]
        self._objective = OBJECTIVES[shared.objective]
        self._found: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._stops = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: dict[str, Any] = {"steps": 0, "objective": self._objective.worst}
        known = read_records(Folder(shared.records)).get(self._number)
        self._seen = list(known.points) if known is not None else []
        self._known = known if known is not None and known.is_over else None

    def step(self) -> dict[str, Any]:
        if self._seen:
            return self._told("point", self._seen.pop(0))
        if self._known is not None and self._known.state != DONE:  # how it ended in an earlier run holds
            worst = {"objective": self._objective.worst} if self._known.state == DIVERGED else {}
            return {**self._last, **worst, "news": False, "done": True}
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
            self._thread.start()
        try:
            return self._told(*self._found.get(timeout=_SECONDS_BETWEEN_LOOKS))
        except queue.Empty:  # so that Ray Tune can end this actor in between
            return {**self._last, "news": False}

    def _told(self, kind: str, found: Any) -> dict[str, Any]:
        if kind == "point":
            step, value = found
            if step <= self._last["steps"]:  # of a checkpoint that an earlier run had already gone beyond
                return {**self._last, "news": False}
            self._last = {"steps": step, "objective": value}
            return {**self._last, "news": True}
        if kind == "model":
            history, best = history_of(found), found.facts["best_step"]
            steps = int(history[-1]["step"])
            value = self._objective.at(best, history, self._config)
            return {"steps": steps, "objective": value, "model": found.folder.uri, "news": True, "done": True}
        if kind == "part":
            history, reached = found
            value = self._objective.at(reached.step, history, self._config)
            return {"steps": reached.step, "objective": value, "reached": asdict(reached), "news": True, "done": True}
        if kind == "diverged":
            worst = {"steps": self._last["steps"], "objective": self._objective.worst}
            return {**worst, "diverged": str(found), "news": True, "done": True}
        raise found

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Training has states of its own, and goes on from them."""
        self._end()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    def cleanup(self) -> None:
        self._end()

    def _end(self) -> None:
        self._stops.set()
        if self._thread is not None:
            self._thread.join()

    def _train(self) -> None:
        kind, found = "error", None
        try:
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = _SECONDS_TO_START
            self._config = self._shared.config_of(self._values)
            self._budget = getattr(self._config, self._objective.schedule).steps
            root, manifest = Folder(self._shared.root), config_to_manifest(self._config)
            tracker = _Listening(self._listen, root, "trial", {}, "", enabled=False)  # the driver tracks
            pipeline = Pipeline(root, self._config.resources, Session(), tracker, manifest, stops=self._stops)
            data = Artifact.open(Folder(self._shared.data))
            before = self._shared.before.get(self._number, NO_LINEAGE)
            if self._shared.until is None:
                kind, found = "model", train_for(self._objective, pipeline, self._config, data, before)
            else:
                self._budget = self._shared.until
                run = tracker.stage("part", "", {}, {})
                found = train_part(
                    self._objective, pipeline, self._config, data, before, self._shared.until,
                    Folder(self._shared.parts), run,
                )  # fmt: skip
                kind = "part"
        except NonFiniteLossError as error:
            kind, found = "diverged", error
        except StoppedError as error:
            kind, found = "stopped", error
        except BaseException as error:  # raised by `step`, where Ray Tune looks for it
            found = error
        finally:
            self._found.put((kind, found))

    def _listen(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        for step, point in points:
            value = self._objective.value(point, self._config)
            if value is not None and step < self._budget:  # the last one comes with the model
                self._found.put(("point", (step, value)))


class _Listening(Tracker):
    """A tracker whose runs tell someone else their points."""

    def __init__(self, listener: Callable[[Any], None], *more: Any, enabled: bool) -> None:
        super().__init__(*more, enabled=enabled)
        self._listener = listener

    def stage(
        self, name: str, work: str, recipe: Any, inputs: Mapping[str, Artifact], below: StageRun | None = None
    ) -> StageRun:
        super().stage(name, work, recipe, inputs, below)
        return _ListeningRun(self._listener, self, work)


class _ListeningRun(StageRun):
    def __init__(self, listener: Callable[[Any], None], tracker: Tracker, work: str) -> None:
        super().__init__(tracker, work)
        self._listener = listener

    def log(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        self._listener(points)
        super().log(points)


class Notes(tune.Callback):
    """What the driver does with trials' results: prints and tracks them, and writes their records.

    open_run(record): the tracked run of a trial. Ray Tune pickles its callbacks with the sweep, which nothing reads
    again: what cannot be pickled stays here.
    """

    def __init__(self, folder: Folder, count: int, metric: str, open_run: Callable[[Record], StageRun]) -> None:
        self.records = read_records(folder)
        self._folder, self._count, self._metric, self._open_run = folder, count, metric, open_run
        self._runs: dict[int, StageRun] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _of(self, trial: Any) -> Record:
        told = trial.config["trial"]
        return self.records.setdefault(told["number"], Record(number=told["number"], values=told["values"]))

    def _say(self, record: Record, what: str) -> None:
        print(f"tune: trial {record.number} of {self._count}{what}", flush=True)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._of(trial)
        if record.number not in self._runs:
            values = " ".join(f"{name}={short(value)}" for name, value in record.values.items())
            self._say(record, f" begins: {values}")
            self._runs[record.number] = self._open_run(record)
        if not record.is_over:
            record.state = RUNNING
            record.write(self._folder)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self._of(trial)
        if not result["news"] or (record.is_over and "model" not in result):  # the latter as an earlier run saw it
            return
        record.steps, run, value = result["steps"], self._runs[record.number], float(result["objective"])
        if "diverged" in result:
            record.state, record.objective, record.reason = DIVERGED, None, result["diverged"]
            self._say(record, f": {record.reason}")
            run.fail()
        else:
            record.objective = value
            self._say(record, f": {value:.4f} after {record.steps} steps")
            if "model" in result:
                record.state, record.model = DONE, result["model"]
                run.finish(Artifact.open(Folder(result["model"])))
            elif "reached" in result:
                record.state, record.reached = DONE, SavedState(**result["reached"])
                run.log([(record.steps, {self._metric: value})])
            elif record.steps > max((step for step, _ in record.points), default=0):
                record.points.append((record.steps, value))
                run.log([(record.steps, {self._metric: value})])
        record.write(self._folder)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._of(trial)
        if record.state == RUNNING and trial.last_result.get("done"):  # else the whole sweep is ended, by Ctrl-C
            record.state = STOPPED
            self._say(record, f" is stopped after {record.steps} steps")
            self._runs[record.number].fail("KILLED")
            record.write(self._folder)
        elif record.is_over and "model" not in trial.last_result and "reached" not in trial.last_result:
            self._end_again(record)

    def _end_again(self, record: Record) -> None:
        """Its run was opened, though an earlier run of the sweep had ended it."""
        run = self._runs[record.number]
        if record.state == DONE and record.model is not None:
            run.finish(Artifact.open(Folder(record.model)))
        else:
            run.fail("KILLED" if record.state == STOPPED else "FAILED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._of(trial)
        record.state, record.reason = FAILED, _last_line(trial) or "Ray Tune says no more"
        self._say(record, f" failed: {record.reason}")
        if record.number in self._runs:
            self._runs[record.number].fail()
        record.write(self._folder)

    def end(self) -> None:
        """Of a sweep that is ended by Ctrl-C: close the tracked runs of trials that go on with the next call."""
        for number, run in self._runs.items():
            if self.records[number].state == RUNNING:
                run.fail("KILLED")


def _last_line(trial: Any) -> str:
    error = trial.get_error()
    return (str(error).strip().splitlines() or [""])[-1]
