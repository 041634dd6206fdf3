"""Sweeps: what is refused, what is shown, and the whole program in small, killed in the middle."""

import csv
import io
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.objective import OBJECTIVES
from pipelines.presets import PRESETS
from pipelines.search_space import parse_all
from pipelines.sweep_options import Sweep, read_options
from pipelines.sweep_table import csv_of, markdown, parallel_coordinates, place
from tests.pipelines.test_cli import ROOT
from vqvae_core.artifacts import Artifact
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

SMOKE = PRESETS["smoke"][0]
SPACE = ["train.learning-rate=log:1e-4..1e-2", "vqvae.quantizer.num-codes=choice:16,32,64"]


def sweep_of(*arguments: str, config=SMOKE) -> Sweep:
    return read_options(dict(zip(arguments[::2], arguments[1::2], strict=True)), config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected fields to search over, found none"),
        (("--search", "train.steps=choice:10,20"), "expected the same budget and the same measure .* train.steps"),
        (("--search", "prior.channels=choice:16,32"), "expected fields of vqvae, train, augment, .* prior.channels"),
        (("--search", SPACE[0], "--objective", "fid"), "--objective to be one of psnr, bits_per_dim, prior_bits"),
        (("--search", SPACE[0], "--objective", "bits_per_dim"), "expected a likelihood with bits"),
        (("--search", SPACE[0], "--scheduler", "hyperband"), "one of asha, pbt, none, found 'hyperband'"),
        (
            ("--search", SPACE[1], "--scheduler", "pbt"),
            "that may change in the middle .* found vqvae.quantizer.num-codes",
        ),
        (("--search", SPACE[0], "--scheduler", "pbt", "--trials", "1"), "--trials to be a whole number of at least 2"),
        (("--search", SPACE[0], "--scheduler", "pbt", "--generations", "99"), "at most 24 generations, .* found 99"),
        (
            ("--search", SPACE[0], "--generations", "3"),
            "--generations with --scheduler pbt only, found the scheduler asha",
        ),
        (("--search", SPACE[0], "--trials", "0"), "--trials to be a whole number of at least 1, found '0'"),
        (("--search", SPACE[0], "--concurrent", "two"), "--concurrent to be a whole number .* found 'two'"),
        (("--search", "train.learning-rate=log:1..0"), "expected two numbers LOW..HIGH"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep_of(*arguments)


def test_draws_are_a_function_of_the_seed() -> None:
    base = ("--search", " ".join(SPACE), "--trials", "5")
    one, same, other = (sweep_of(*base, *more).draws(SMOKE) for more in ((), (), ("--seed", "1")))
    assert one == same != other and len(one) == 5
    assert all(1e-4 <= draw["train.learning_rate"] <= 1e-2 for draw in one)
    assert one[:3] == sweep_of(*base[:2], "--trials", "3").draws(SMOKE)  # more trials are further ones


def test_no_two_trials_have_the_same_values() -> None:
    space = ("--search", "vqvae.quantizer.num-codes=choice:8,16,32")
    found = sweep_of(*space, "--trials", "3").draws(SMOKE)
    assert sorted(draw["vqvae.quantizer.num_codes"] for draw in found) == [8, 16, 32]
    with pytest.raises(InputError, match="expected 4 different trials in this search space, found 3"):
        sweep_of(*space, "--trials", "4")


def test_draws_are_taken_by_the_config() -> None:
    """Batches that the lanes do not divide are never drawn, though both ends of the range are fine."""
    found = sweep_of("--search", "train.batch-size=uniform:4..16", "--trials", "4").draws(SMOKE)
    assert sorted(draw["train.batch_size"] for draw in found) == [4, 8, 12, 16]  # of 4 lanes
    with pytest.raises(InputError, match="found 4 .*; lower --trials or widen --search"):
        sweep_of("--search", "train.batch-size=uniform:4..16", "--trials", "5")


def test_a_preset_that_has_no_value_can_be_shown() -> None:
    """max_gradient_norm is None unless it is set: its line has no place on that axis."""
    dimensions = parse_all(["train.max-gradient-norm=log:0.1..10", SPACE[0]], SMOKE)
    values = [{"train.max_gradient_norm": norm, "train.learning_rate": 1e-3} for norm in (None, 1.0)]
    shown = [{**row, "values": value} for row, value in zip(rows()[:2], values, strict=True)]
    assert "| preset | None | 0.001 |" in markdown(shown, dimensions, OBJECTIVES["psnr"])
    assert parallel_coordinates(shown, dimensions, OBJECTIVES["psnr"])


def test_optuna_gives_no_values_twice_and_none_that_are_refused() -> None:
    pytest.importorskip("optuna")
    from pipelines.optuna_search import OptunaSearch

    sweep = sweep_of("--search", "train.batch-size=uniform:4..16", "--trials", "4")

    def asked(known: dict[int, dict]) -> list[dict]:
        search = OptunaSearch(sweep.dimensions, lambda values: sweep.refusal(SMOKE, values), 0, known)
        search.set_search_properties("objective", "max", {})
        found = []
        for number in range(1, 6):
            config = search.suggest(str(number))
            assert search.is_exhausted == (config == OptunaSearch.FINISHED)
            if config == OptunaSearch.FINISHED:
                break
            assert config["trial"]["number"] == number
            found.append(config["trial"]["values"])
            search.on_trial_complete(str(number), {"objective": float(number)})
        return found

    found = asked({})
    assert sorted(values["train.batch_size"] for values in found) == [4, 8, 12, 16]
    assert asked({1: found[2], 2: found[3]})[:2] == found[2:], "those of earlier runs come first"
    again = asked({2: found[2], 4: found[0]})
    assert again[1] == found[2] and again[3] == found[0], "each with its number, whichever were noted"
    assert sorted(values["train.batch_size"] for values in again) == [4, 8, 12, 16]


def test_the_objective_counts_the_codes() -> None:
    """Under the uniform prior, log2 K a code: a larger table costs more."""
    objective = OBJECTIVES["bits_per_dim"]
    point = {"step": 12, "validation_reconstruction_bits_per_dim": 3.0}
    sites = (32 // 4) ** 2
    assert objective.value(point, SMOKE) == pytest.approx(3 + sites * math.log2(32) / 3072)
    assert objective.value({"step": 4, "mse": 0.1}, SMOKE) is None
    history = [point, {"step": 24, "validation_reconstruction_bits_per_dim": 2.5}, {"step": 28}]
    assert objective.at(24, history, SMOKE) == pytest.approx(2.5 + sites * 5 / 3072)


def rows() -> list[dict]:
    values = [{"train.learning_rate": rate, "vqvae.quantizer.num_codes": codes}
              for rate, codes in ((1e-3, 32), (1e-4, 16), (1e-2, 64), (5e-3, 16))]  # fmt: skip
    shown = [("preset", 20.0, "done", "m0"), (2, 21.5, "done", "m1"), (1, 18.0, "stopped", None),
             (3, None, "diverged", None)]  # fmt: skip
    return [
        {"trial": name, "values": value, "steps": 24, "objective": found, "state": state, "model": model}
        for value, (name, found, state, model) in zip(values, shown, strict=True)
    ]


def test_the_table_and_the_picture() -> None:
    dimensions, objective = parse_all(SPACE, SMOKE), OBJECTIVES["psnr"]
    text = markdown(rows(), dimensions, objective).splitlines()
    assert text[0].startswith("| trial | train.learning-rate | vqvae.quantizer.num-codes | steps | PSNR")
    assert text[3] == "| 2 | 0.0001 | 16 | 24 | 21.5000 | done |" and text[5].endswith("| 24 | - | diverged |")
    read = list(csv.DictReader(io.StringIO(csv_of(rows(), dimensions))))
    assert [row["state"] for row in read] == ["done", "done", "stopped", "diverged"] and read[3]["objective"] == ""
    assert [place(value, dimensions[0]) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0, 0.5, 1])
    assert [place(value, dimensions[1]) for value in (16, 32, 64)] == [0, 0.5, 1]
    assert math.isnan(place(48, dimensions[1]))
    picture = np.asarray(Image.open(io.BytesIO(parallel_coordinates(rows(), dimensions, objective))).convert("RGB"))
    assert picture.std() > 5 and picture.shape[0] > 300


def start(root: Path, *more: str) -> subprocess.Popen:
    arguments = ["--preset", "smoke", "--root", str(root), "--search", " ".join(SPACE), "--trials", "3", *more]
    # The last of an option given twice holds.
    return subprocess.Popen(
        [sys.executable, "pipelines/tune.py", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen, code: int = 0, seconds: float = 600) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, output
    return output


class Silent:
    """A tracked run that is tracked nowhere."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def log(self, points: object) -> None: ...

    def fail(self, status: str = "FAILED") -> None:
        self.ended.append(status)


@pytest.mark.parametrize("decided", [True, False], ids=["by the scheduler", "by Ctrl-C"])
def test_only_a_scheduler_stops_a_trial(tmp_path: Path, decided: bool) -> None:
    """A trial that Ctrl-C ends is not over: the same command goes on with it."""
    from pipelines.sweep_record import RUNNING, STOPPED, read_records
    from pipelines.trial import Notes

    run = Silent()
    notes = Notes(Folder(str(tmp_path)), 3, "psnr", lambda record: run)  # type: ignore[arg-type, return-value]
    result = {"steps": 8, "objective": 20.0, "news": True}
    config = {"trial": {"number": 2, "values": {"train.learning_rate": 1e-3}}}
    trial = SimpleNamespace(config=config, last_result={**result, "done": decided})
    notes.on_trial_start(0, [], trial)
    notes.on_trial_result(0, [], trial, result)
    notes.on_trial_complete(0, [], trial)
    notes.end()
    [record] = read_records(Folder(str(tmp_path))).values()
    assert record.state == (STOPPED if decided else RUNNING) and record.is_over == decided
    assert (record.number, record.points, run.ended) == (2, [(8, 20.0)], ["KILLED"])


@pytest.mark.parametrize(("state", "last"), [("stopped", 21.0), ("diverged", -1e9)])
def test_what_an_earlier_run_saw_of_a_trial_comes_first_and_holds(tmp_path: Path, state: str, last: float) -> None:
    """The scheduler is told all of it again; nothing is trained, and the record and the run end as they were."""
    from pipelines.sweep_record import Record, Shared
    from pipelines.trial import Notes, Trial

    folder = Folder(str(tmp_path))
    known = Record(
        number=2, values={"train.learning_rate": 1e-3}, points=[(8, 20.0), (12, 21.0)], state=state, steps=12
    )
    known.write(folder)
    (written,) = tmp_path.rglob("*.json")
    before = written.read_bytes()
    config = {"trial": {"number": 2, "values": known.values}}
    trial = Trial.__new__(Trial)  # an actor of Ray's otherwise
    trial.setup(config, Shared(root="", config={}, objective="psnr", data="", records=folder.uri))
    told = [trial.step() for _ in range(3)]
    assert [one["steps"] for one in told] == [8, 12, 12] and [one.get("done", False) for one in told] == [
        False,
        False,
        True,
    ]
    assert [one["objective"] for one in told] == [20.0, 21.0, last]
    run = Silent()
    notes = Notes(folder, 3, "psnr", lambda record: run)  # type: ignore[arg-type, return-value]
    shown = SimpleNamespace(config=config, last_result=told[-1])
    notes.on_trial_start(0, [], shown)
    for one in told:
        notes.on_trial_result(0, [], shown, one)
    notes.on_trial_complete(0, [], shown)
    assert written.read_bytes() == before
    assert run.ended == ["KILLED" if state == "stopped" else "FAILED"]


def sweep_in(root: Path) -> Artifact:
    [manifest] = root.glob("tune-*/manifest.json")
    return Artifact.open(Folder.of(manifest.parent))


def wait_for_line(process: subprocess.Popen, part: str) -> None:
    assert process.stdout is not None
    seen, deadline = [], time.monotonic() + 600
    for line in process.stdout:
        seen.append(line)
        if part in line:
            return
        if time.monotonic() > deadline:
            break
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("".join(seen))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_that_is_killed_goes_on(tmp_path: Path) -> None:
    """Three trials; Ctrl-C in the first, kill -9 in the second: what is done is not trained again, and the table has
    all three, as without either."""
    root, more = tmp_path / "root", ("--scheduler", "none", "--concurrent", "1")
    process = start(root, *more)
    wait_for_line(process, "tune: trial 1 of 3: ")
    process.send_signal(signal.SIGINT)
    assert "the same command goes on from here" in finished(process, 130, seconds=120)
    assert not list(root.glob("tune-*/manifest.json"))
    process = start(root, *more)
    wait_for_line(process, "tune: trial 2 of 3: ")
    process.kill()
    process.wait()
    time.sleep(1)
    models = {path: path.stat().st_mtime_ns for path in root.glob("train_vqvae-*/manifest.json")}
    assert len(models) >= 2, "the preset and the first trial"
    output = finished(start(root, *more))
    assert "tune: made in" in output and "best:   " in output
    assert {path: path.stat().st_mtime_ns for path in models} == models
    sweep = sweep_in(root)
    found = json.loads(sweep.read("sweep.json"))["rows"]
    assert found[0]["trial"] == "preset" and {row["trial"] for row in found[1:]} == {1, 2, 3}
    assert all(row["state"] == "done" and row["steps"] == 24 for row in found)
    check_rows(sweep)
    check_runs(root, sweep)
    assert "data:image/png" in (root / "sweep.html").read_text()
    again = finished(start(root, *more))
    assert "tune: reused" in again


def check_rows(sweep: Artifact) -> None:
    """The best first, and each row that has a model has that model's values and figures."""
    found = json.loads(sweep.read("sweep.json"))["rows"]
    assert found[0]["trial"] == "preset"
    done = [row for row in found[1:] if row["model"] is not None]
    assert done and found[1 : 1 + len(done)] == done
    values = [row["objective"] for row in done]
    assert values == sorted(values, reverse=True)
    assert sweep.facts["best"] == max(row["objective"] for row in (found[0], *done))
    for row in (found[0], *done):
        model = Artifact.open(Folder(row["model"]))
        assert model.manifest.recipe["train"]["learning_rate"] == row["values"]["train.learning_rate"]
        assert model.manifest.recipe["model"]["quantizer"]["num_codes"] == row["values"]["vqvae.quantizer.num_codes"]
        history = json.loads(model.read("history.json"))
        kept = next(point for point in history if point["step"] == model.facts["best_step"])
        assert row["objective"] == kept["validation_psnr_db"]


def check_runs(root: Path, sweep: Artifact) -> None:
    """Each trial is a child of the sweep's run, which is a child of the pipeline's; the best model has its alias."""
    with sqlite3.connect(root / "mlflow.db") as store:
        parents = dict(store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        names = dict(store.execute("select run_uuid, value from tags where key = 'stage.name'"))
        status = dict(store.execute("select run_uuid, status from runs"))
        aliases = store.execute("select name, version from registered_model_aliases where alias = 'best'").fetchall()
        runs = dict(store.execute("select name || version, run_id from model_versions"))
    [above] = [run for run, name in names.items() if name == "tune"]
    trials = {names[run]: run for run, parent in parents.items() if parent == above}
    ends = {"done": "FINISHED", "stopped": "KILLED"}
    assert {name: status[run] for name, run in trials.items()} == {
        f"trial {row['trial']}": ends[row["state"]] for row in json.loads(sweep.read("sweep.json"))["rows"][1:]
    }
    if sweep.facts["best_trial"] == "preset":
        assert not aliases
    else:
        [(name, version)] = aliases
        assert runs[f"{name}{version}"] == trials[f"trial {sweep.facts['best_trial']}"]


SIX = ("--trials", "6", "--concurrent", "1", "--train.validate-every", "8")


@pytest.mark.slow
def test_asha_stops_trials_early(tmp_path: Path) -> None:
    """Six trials one after the other, rungs at 8 and 24 steps; Ctrl-C in the first, kill -9 in the third: some are
    stopped, their workers are given back, what came to its end is compared, and none of it is trained again."""
    root = tmp_path / "root"
    process = start(root, *SIX)
    wait_for_line(process, "tune: trial 1 of 6: ")
    process.send_signal(signal.SIGINT)
    assert "the same command goes on from here" in finished(process, 130, seconds=120)
    process = start(root, *SIX)
    wait_for_line(process, "tune: trial 3 of 6 begins")
    process.kill()
    process.wait()
    time.sleep(1)
    models = {path: path.stat().st_mtime_ns for path in root.glob("train_vqvae-*/manifest.json")}
    assert len(models) >= 2, "the preset and the first trial"
    output = finished(start(root, *SIX))
    assert "tune: made in" in output and "best:   " in output
    assert {path: path.stat().st_mtime_ns for path in models} == models
    sweep = sweep_in(root)
    found = json.loads(sweep.read("sweep.json"))["rows"][1:]
    states = [row["state"] for row in found]
    assert {row["trial"] for row in found} == set(range(1, 7)) and set(states) == {"done", "stopped"}, output
    assert all(row["steps"] < 24 and row["model"] is None for row in found if row["state"] == "stopped")
    assert all(row["steps"] == 24 for row in found if row["state"] == "done")
    check_rows(sweep)
    check_runs(root, sweep)
    assert "data:image/png" in (root / "sweep.html").read_text()
    assert "tune: reused" in finished(start(root, *SIX))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_asha_decides_the_same_after_a_kill(tmp_path: Path) -> None:
    finished(start(tmp_path / "root", *SIX))
    found = json.loads(sweep_in(tmp_path / "root").read("sweep.json"))["rows"][1:]
    process = start(tmp_path / "other", *SIX)
    wait_for_line(process, "tune: trial 4 of 6: ")
    process.kill()
    process.wait()
    time.sleep(1)
    output = finished(start(tmp_path / "other", *SIX))
    without = json.loads(sweep_in(tmp_path / "other").read("sweep.json"))["rows"][1:]
    same = ("trial", "values", "steps", "objective", "state")
    assert [[row[name] for name in same] for row in without] == [[row[name] for name in same] for row in found], output


@pytest.mark.slow
@pytest.mark.exhaustive
def test_optuna_draws_within_the_space(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    finished(start(tmp_path / "root", "--searcher", "optuna", "--scheduler", "none", "--concurrent", "1"))
    found = json.loads(sweep_in(tmp_path / "root").read("sweep.json"))["rows"][1:]
    assert len(found) == 3 and all(row["state"] == "done" for row in found)
    assert all(1e-4 <= row["values"]["train.learning_rate"] <= 1e-2 for row in found)
    assert all(row["values"]["vqvae.quantizer.num_codes"] in (16, 32, 64) for row in found)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_trial_that_diverges_is_the_worst(tmp_path: Path) -> None:
    """A learning rate of 1e30 is no failure of the sweep."""
    more = ("--search", "train.learning-rate=choice:1e-3,1e30", "--trials", "2", "--scheduler", "none")
    finished(start(tmp_path / "root", *more, "--concurrent", "1", "--train.precision", "fp32"))
    found = {
        row["values"]["train.learning_rate"]: row
        for row in json.loads(sweep_in(tmp_path / "root").read("sweep.json"))["rows"][1:]
    }
    assert (found[1e-3]["state"], found[1e30]["state"]) == ("done", "diverged") and found[1e30]["objective"] is None


POPULATION = (
    "--search", "train.learning-rate=log:1e-4..1e-2 vqvae.commitment-cost=log:1..50", "--scheduler", "pbt",
    "--trials", "3", "--generations", "2", "--train.precision", "fp32", "--resources.cpus-per-worker", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three trials in two generations, one at a time, which was killed in the second."""
    root = tmp_path_factory.mktemp("population") / "root"
    process = start(root, *POPULATION, "--concurrent", "1")
    wait_for_line(process, " goes on from trial ")
    wait_for_line(process, "tune: trial 2 of 3: ")
    process.kill()
    process.wait()
    time.sleep(1)
    output = finished(start(root, *POPULATION, "--concurrent", "1"))
    assert "trial 1 of 3 begins" not in output.partition("at step 12")[0], "what is done is not done again"
    return root


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_population_that_is_killed_goes_on(population: Path) -> None:
    """Each has its own values to its end, and the one that goes on from another has the other's up to there."""
    sweep = sweep_in(population)
    found = json.loads(sweep.read("sweep.json"))
    models = {row["trial"]: Artifact.open(Folder(row["model"])) for row in found["rows"]}
    for row in found["rows"]:
        recipe = models[row["trial"]].manifest.recipe
        assert row["steps"] == 24 and recipe["train"]["learning_rate"] == row["values"]["train.learning_rate"]
        if row["trial"] != "preset":
            assert [part["until"] for part in recipe["before"]] == [12]
    (move,) = found["moves"]
    child, parent = re.match(r"trial (\d) goes on from trial (\d) at step 12: ", move).groups()
    (record,) = Path(sweep.folder.uri).glob(f"training-*/generation-1/trials/trial-0000{parent}.json")
    told = json.loads(record.read_text())
    assert told["reached"]["step"] == 12 and list(Path(told["reached"]["folder"]).glob("step-*12/state.safetensors"))
    assert models[int(child)].manifest.recipe["before"][0]["values"] == told["values"], "the parent's"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_population_two_at_a_time(population: Path, tmp_path: Path) -> None:
    """The same values, the same figures, and the bytes of the models."""
    finished(start(tmp_path / "other", *POPULATION, "--concurrent", "2"))
    found, other = (json.loads(sweep_in(place).read("sweep.json")) for place in (population, tmp_path / "other"))
    assert found["moves"] == other["moves"]
    for row, same in zip(found["rows"], other["rows"], strict=True):
        model, copy = (Artifact.open(Folder(one["model"])) for one in (row, same))
        assert (row["values"], row["objective"], row["steps"]) == (same["values"], same["objective"], same["steps"])
        assert model.manifest.content == copy.manifest.content
