"""Training under Ray: what dies, what is asked for, what is impossible. Each run is a process of its own."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from tests.conftest import SmokeRun
from tests.pipelines.test_cli import ROOT, assert_one_line
from tests.pipelines.test_full import artifacts
from tests.vqvae_core.shards import make_images
from vqvae_core.artifacts import MANIFEST, Artifact
from vqvae_core.checkpoint import StateFolder
from vqvae_core.storage import Folder

pytestmark = pytest.mark.slow
STEPS = 400
OPTIONS = [
    "--preset", "smoke", "--no-track", "--train.steps", str(STEPS), "--train.precision", "fp32",
    "--train.validate-every", "100", "--train.log-every", "10", "--resources.checkpoint-every", "20",
]  # fmt: skip


def command(root: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / "train_vqvae.py"), "--root", str(root), *OPTIONS, *options]


def run(root: Path, *options: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, *options), capture_output=True, text=True, timeout=300, **settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, smoke_run: SmokeRun) -> Path:
    """A root with one training on two ranks that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    copy_images(smoke_run.root, root)
    result = run(root, "--resources.num-workers", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    return root


@pytest.fixture
def root(done: Path, tmp_path: Path) -> Path:
    """A root with the same shards, and no model."""
    copy_images(done, tmp_path / "root")
    return tmp_path / "root"


def copy_images(root: Path, to: Path) -> None:
    for stage in ("index", "shard"):
        place = Path(artifacts(root)[stage].folder.uri)
        shutil.copytree(place, to / place.name)


def model(root: Path) -> Artifact:
    return artifacts(root)["train_vqvae"]


def log_of(root: Path) -> Path:
    return root.with_name(f"{root.name}.log")


def start(root: Path, *options: str) -> subprocess.Popen[str]:
    log = log_of(root).open("a")
    return subprocess.Popen(command(root, *options), stdout=log, stderr=subprocess.STDOUT, text=True)


def said_by(process: subprocess.Popen[str]) -> str:
    """What a process made by `start` has written."""
    arguments = list(map(str, process.args))  # type: ignore[arg-type]
    return log_of(Path(arguments[arguments.index("--root") + 1])).read_text(errors="replace")


def states_of(root: Path) -> list[int]:
    """Steps of which there is a whole state."""
    return [int(path.parent.name[5:]) for path in root.glob("train_vqvae-*/training-*/step-*/state.json")]


def until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, f"ended with {process.poll()}:\n{said_by(process)}"
        assert time.monotonic() - begin < seconds, said_by(process)
        time.sleep(0.02)


def wait_for_step(root: Path, step: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    until(lambda: any(found >= step for found in states_of(root)), process, seconds)


def named(process: subprocess.Popen[str] | int) -> list[tuple[str, int]]:
    """What Ray's processes under a process, such as a driver, call themselves, without their method."""
    ancestor = process if isinstance(process, int) else process.pid
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            title = path.read_text(errors="replace").split("\0")[0].strip()
            if title.startswith("ray::") and _under(int(path.parent.name), ancestor):
                found.append((title.removeprefix("ray::").split(".")[0], int(path.parent.name)))
    return sorted(found)


def workers(process: subprocess.Popen[str] | int) -> list[int]:
    """The processes of Ray Train's workers under a process, such as a driver."""
    return [pid for name, pid in named(process) if name.startswith("RayTrainWorker")]


def wakes(pid: int) -> int:
    """How often a process's main thread has gone to sleep so far."""
    lines = Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("voluntary_ctxt_switches")).split()[1])


def _under(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


@pytest.fixture(scope="module")
def stopped(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose training was asked to stop in the middle."""
    root = tmp_path_factory.mktemp("stopped") / "root"
    copy_images(done, root)
    process = start(root, "--resources.num-workers", "2")
    wait_for_step(root, 60, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    return root


@pytest.mark.exhaustive
def test_nothing_idle_runs_beside_the_ranks(tmp_path: Path) -> None:
    """Where they train on one machine, what shared it before (here the sharding) and what has nothing to do is gone,
    and the ranks' main threads rest."""
    root = tmp_path / "root"
    process = start(root, "--resources.num-workers", "2", "--train.steps", "100000")
    wait_for_step(root, 20, process)
    names = [name for name, _ in named(process) if name != "IDLE"]
    ranks = workers(process)
    time.sleep(12)  # they do so after ten seconds
    before = [wakes(pid) for pid in ranks]
    time.sleep(4)
    assert all(wakes(pid) - since < 200 for pid, since in zip(ranks, before, strict=True))  # of four hundred
    process.terminate()
    assert process.wait(60) == 143
    assert names == ["DashboardAgent", "RayTrainWorker", "RayTrainWorker", "RuntimeEnvAgent", "TrainController"]


def test_a_killed_worker(done: Path, root: Path) -> None:
    """Ray Train starts the group again; the weights, the table and the curves come out the same."""
    process = start(root, "--resources.num-workers", "2")
    wait_for_step(root, 60, process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    assert process.wait(300) == 0, log_of(root).read_text()
    assert re.search(r"^train_vqvae: went on from step [1-9]\d*$", log_of(root).read_text(), re.MULTILINE)
    assert model(root).files == model(done).files


def test_sigterm_makes_a_checkpoint_and_the_same_command_goes_on(done: Path, root: Path) -> None:
    process = start(root, "--resources.num-workers", "2", "--resources.checkpoint-every", "100000")
    wait_for_step(root, 100, process)  # the first validation
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert process.wait(60) == 143
    assert time.monotonic() - begin < 30
    said = log_of(root).read_text()
    assert "train_vqvae: asked to stop; a checkpoint is written first" in said
    step = int(
        re.search(r"did so at step (\d+), after a checkpoint; the same command goes on from here", said).group(1)
    )
    result = run(root, "--resources.num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert f"train_vqvae: went on from step {step}" in result.stdout
    assert model(root).files == model(done).files


def test_a_node_that_is_about_to_be_taken_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within seconds there is a checkpoint that nothing else asked for, again and again while the node is there."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    cluster = LocalCluster(2)
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        options = ["--resources.num-workers", "2", "--resources.cpus-per-worker", "1", "--train.steps", "100000",
                   "--train.validate-every", "100000", "--resources.checkpoint-every", "100000"]  # fmt: skip
        process = start(root, *options)
        until(lambda: " of 100000 steps" in log_of(root).read_text(), process)
        assert not list(root.glob("train_vqvae-*/training-*/step-*"))
        deadline = time.time_ns() // 1_000_000 + 60_000
        GcsClient(address=cluster.address).drain_node(
            cluster.node_ids()[0], DRAIN_NODE_REASON_PREEMPTION, "a test", deadline
        )
        begin = time.monotonic()
        until(lambda: len(states_of(root)) > 0, process)
        assert time.monotonic() - begin < 10
        assert "train_vqvae: a node is about to be taken away, a checkpoint is written" in log_of(root).read_text()
        first = max(states_of(root))
        until(lambda: max(states_of(root)) > first, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        cluster.close()


def test_another_number_of_workers_in_the_middle(done: Path, stopped: Path, tmp_path: Path) -> None:
    """Two ranks, then one, which takes its batch in pieces: the same samples in each step, weights that differ by the
    order of sums only."""
    root = tmp_path / "root"
    shutil.copytree(stopped, root)
    result = run(root, "--resources.num-workers", "1", "--resources.micro-batch", "2")
    assert result.returncode == 0, result.stderr
    assert "went on from step" in result.stdout
    assert model(root).manifest.fingerprint == model(done).manifest.fingerprint
    assert model(root).facts["psnr_db"] == pytest.approx(model(done).facts["psnr_db"], abs=0.1)
    history = json.loads(model(root).read("history.json"))
    assert [point["step"] for point in history] == list(range(10, STEPS + 10, 10))


def test_elastic_workers_take_what_there_is(done: Path, root: Path) -> None:
    """Up to 4 asked for, 2 CPUs there: two train, with processes that decode, and the result is theirs."""
    options = ["--resources.num-workers", "4", "--resources.min-workers", "1", "--resources.cpus-per-worker", "1",
               "--resources.loader-workers", "2"]  # fmt: skip
    result = run(root, *options)
    assert result.returncode == 0, result.stderr
    assert model(root).files == model(done).files


def test_impossible_resources_fail_within_seconds(root: Path) -> None:
    begin = time.monotonic()
    result = run(root, "--resources.num-workers", "4", "--resources.cpus-per-worker", "64")
    assert_one_line(result, "expected 256 CPUs (4 workers with 64 CPUs each, each on one node)")
    assert time.monotonic() - begin < 60


def test_a_disk_that_is_full_when_a_checkpoint_is_written(done: Path, root: Path, small_disk: Path) -> None:
    """One line says so, no half state stays, and with room again the same command goes on."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    place = small_disk / "root"
    shutil.copytree(root, place)
    process = start(place, "--resources.num-workers", "2")
    wait_for_step(place, 60, process)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)) == 1 << 12:
            pass
    assert process.wait(120) == 2, log_of(place).read_text()
    said = log_of(place).read_text()
    assert re.search(r"^error: .*no space left in .*step-\d+", said, re.MULTILINE), said
    assert "Traceback" not in said
    ballast.unlink()
    assert all((state / "state.json").exists() for state in place.glob("train_vqvae-*/training-*/step-*"))
    result = run(place, "--resources.num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^train_vqvae: went on from step [1-9]\d*$", result.stdout, re.MULTILINE)
    assert model(place).files == model(done).files


def test_a_finished_training_whose_artifact_is_gone_says_so(done: Path, tmp_path: Path) -> None:
    copy = tmp_path / "root"
    shutil.copytree(done, copy)
    (Path(next(copy.glob("train_vqvae-*"))) / MANIFEST).unlink()
    result = run(copy, "--resources.num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert f"train_vqvae: went on from step {STEPS} (it was finished)" in result.stdout
    assert model(copy).files == model(done).files


@pytest.mark.exhaustive
def test_a_checkpoint_of_another_config_is_refused(done: Path, root: Path) -> None:
    """Nothing of it is lost, and with the right one in its place training goes on."""
    process = start(root, "--resources.num-workers", "2")
    wait_for_step(root, 20, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    place = next(root.glob("train_vqvae-*/training-*"))
    step, identity = max(states_of(root)), place.name.removeprefix("training-")
    state = StateFolder(Folder.of(place), identity).load(step)
    StateFolder(Folder.of(place), "another").write(dataclasses.replace(state, identity="another"))
    result = run(root, "--resources.num-workers", "2")
    assert_one_line(result, "expected the training state of run", "found one of run another", "move that folder away")
    assert StateFolder(Folder.of(place), "another").load(step).history == state.history
    StateFolder(Folder.of(place), identity).write(state)
    result = run(root, "--resources.num-workers", "2")
    assert f"train_vqvae: went on from step {step}" in result.stdout, result.stdout + result.stderr
    assert model(root).files == model(done).files


def test_a_changed_data_artifact_is_trained_anew(stopped: Path, tmp_path: Path) -> None:
    """The same recipe over other contents is another work: old states are not used."""
    root = tmp_path / "root"
    shutil.copytree(stopped, root)
    before = {path: path.read_bytes() for path in root.glob("train_vqvae-*/training-*/step-*/*")}
    shard = next(root.glob("shard-*"))
    manifest = json.loads((shard / MANIFEST).read_text())
    images = make_images(Folder.of(root / "made"), [96], size=32, validation=48)
    for path in (root / "made").iterdir():
        if path.name != MANIFEST:
            shutil.copy(path, shard / path.name)
    made = images.artifact.manifest
    manifest |= {"files": dict(made.files), "content": made.content}
    (shard / MANIFEST).write_text(json.dumps(manifest))
    result = run(root, "--resources.num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert "went on from step" not in result.stdout
    assert "train_vqvae: starting from step 0, since the 1 training in" in result.stdout
    assert len(list(root.glob("train_vqvae-*/training-*"))) == 2
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resources.num-workers", "3"], ["expected a number of workers that divides --train.num-lanes 4, found 3"]),
        (["--train.batch-size", "10"], ["num_lanes must divide batch_size 10, was 4; the largest that does is 2"]),
        (["--train.batch-size", "4000", "--train.num-lanes", "4"], ["expected at least one batch of 4000 samples"]),
        (["--augment.crop-size", "30"], ["expected --augment.crop-size to be a multiple of 4, found 30"]),
        (["--augment.crop-size", "64"], ["expected a crop_size of at most 32, the size of the stored images, was 64"]),
        (["--train.learning-rate", "1e18"], ["expected finite numbers, found", "in step", "lower the learning rate"]),
    ],
)
def test_bad_input(root: Path, options: list[str], words: list[str]) -> None:
    assert_one_line(run(root, *options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resources.num-workers", "3"], "expected a number of workers that divides --train.num-lanes 4, found 3"),
        (["--train.batch-size", "10"], "num_lanes must divide batch_size 10"),
        (["--resources.cpus-per-worker", "64"], "workers with 64 CPUs each"),
        (["--resources.use-gpu"], "expected 2 GPUs"),
    ],
)
def test_what_is_refused_in_the_middle_loses_nothing(done: Path, stopped: Path, options: list[str], words: str) -> None:
    """A run with states, a command that is refused, and the right one: it goes on, and ends with the same bits."""
    before = {path: path.read_bytes() for path in stopped.glob("train_vqvae-*/training-*/step-*/*")}
    assert before
    assert_one_line(run(stopped, "--resources.num-workers", "2", *options), words)
    assert {path: path.read_bytes() for path in stopped.glob("train_vqvae-*/training-*/step-*/*")} == before


def test_what_was_refused_in_the_middle_goes_on(done: Path, stopped: Path) -> None:
    result = run(stopped, "--resources.num-workers", "2")
    assert "train_vqvae: went on from step" in result.stdout, result.stdout + result.stderr
    assert model(stopped).files == model(done).files


def test_too_many_failures_end_with_the_last_error_and_keep_states(root: Path) -> None:
    options = ["--resources.num-workers", "2", "--resources.max-failures", "1", "--train.steps", "100000"]
    process = start(root, *options)
    wait_for_step(root, 20, process)
    first = workers(process)
    os.kill(first[0], signal.SIGKILL)
    until(lambda: len(workers(process)) == 2 and not set(workers(process)) & set(first), process)
    wait_for_step(root, max(states_of(root)) + 20, process)
    os.kill(workers(process)[0], signal.SIGKILL)
    assert process.wait(120) == 2
    said = log_of(root).read_text()
    assert "train_vqvae: training stopped after 1 restarts (--resources.max-failures), the last error was:" in said
    assert "the last checkpoint is kept, the same command goes on from it" in said
    assert said.splitlines()[-1].startswith("error: ")
    kept = max(states_of(root))
    process = start(root, *options)
    wait_for_step(root, kept + 20, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    history = json.loads(max(root.glob("train_vqvae-*/training-*/step-*/state.json")).read_text())["history"]
    assert [point["step"] for point in history] == list(range(10, history[-1]["step"] + 10, 10))


@pytest.mark.exhaustive
def test_nodes_that_go_and_come(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node that trains is killed once; as many ranks train as there is room for, and more again later."""
    cluster = LocalCluster(2)
    ours = os.getpid()  # whose children the nodes are
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        options = ["--resources.num-workers", "2", "--resources.min-workers", "1", "--resources.cpus-per-worker", "1",
                   "--train.steps", "100000", "--train.validate-every", "100000"]  # fmt: skip
        process = start(root, *options)
        wait_for_step(root, 20, process)
        assert len(workers(ours)) == 2
        cluster.remove(0)
        wait_for_step(root, max(states_of(root)) + 100, process, 300)  # Ray counts on a dead node for up to a minute
        assert len(workers(ours)) == 1
        cluster.add()
        until(lambda: len(workers(ours)) == 2, process, 240)  # Ray Train looks once a minute
        wait_for_step(root, max(states_of(root)) + 40, process)
        cluster.remove(0)  # the one that was there all the time
        wait_for_step(root, max(states_of(root)) + 100, process, 300)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, log_of(root).read_text()
        history = json.loads(max(root.glob("train_vqvae-*/training-*/step-*/state.json")).read_text())["history"]
        assert [point["step"] for point in history] == list(range(10, history[-1]["step"] + 10, 10))
    finally:
        cluster.close()


def test_an_alarm_where_few_codes_are_used(root: Path) -> None:
    many = ["--vqvae.quantizer.num-codes", "4096", "--vqvae.quantizer.revive-every", "0"]
    result = run(root, *many, "--resources.usage-alarm", "1.0", "--train.steps", "40")
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"^train_vqvae: alarm at step \d+: \d+\.\d % of the codes were used in the last epoch, expected at least 100 %",
        result.stdout, re.MULTILINE,
    )  # fmt: skip
