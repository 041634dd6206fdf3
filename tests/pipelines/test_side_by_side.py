"""Processes side by side: what they are told, what is told of them, and that none is left behind."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipelines.side_by_side import run_side_by_side
from vqvae_core.errors import InputError
from vqvae_core.train import StoppedError

# Notes when it began and ended; waits for seconds; ends with a code; on SIGTERM it says so and ends with 143.
PROGRAM = """
import os, pathlib, signal, sys, time
folder, name, seconds, code = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
def stop(*_):
    (folder / f"{name}.stopped").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
begin = time.time()
(folder / f"{name}.began").write_text("")
print("hello", os.environ["RAY_ADDRESS"], flush=True)
time.sleep(seconds)
(folder / f"{name}.times").write_text(f"{begin} {time.time()}")
if code:
    print("error: it did not work", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def runs(folder: Path, **seconds_and_code: tuple[float, int]) -> dict[str, list[str]]:
    return {name: [str(folder), name, str(seconds), str(code)] for name, (seconds, code) in seconds_and_code.items()}


@pytest.mark.slow
def test_as_many_as_the_limit_run_at_one_time(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = runs(tmp_path, a=(0.6, 0), b=(0.6, 0), c=(0.6, 0))
    run_side_by_side(program, wanted, 2, "here:1")
    times = sorted(tuple(map(float, (tmp_path / f"{name}.times").read_text().split())) for name in wanted)
    assert times[1][0] < times[0][1] < times[2][0] + 0.2, "two, and then the third"
    assert {f"[{name}] hello here:1" for name in wanted} <= set(capsys.readouterr().out.splitlines())


def test_one_that_fails_stops_the_others(program: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected b to end well, it ended with exit code 2: error: it did not work"):
        run_side_by_side(program, runs(tmp_path, a=(60, 0), b=(0.5, 2), c=(60, 0)), 2, "here:1")
    assert (tmp_path / "a.stopped").exists()
    assert not (tmp_path / "c.times").exists()


def test_sigterm_stops_all(program: str, tmp_path: Path) -> None:
    """As from a scheduler: to the parent alone."""
    before = signal.getsignal(signal.SIGTERM)

    def kill_when_both_run() -> None:
        while not all((tmp_path / f"{name}.began").exists() for name in "ab"):
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill_when_both_run)
    thread.start()
    with pytest.raises(StoppedError, match="asked to stop; all trainings do so after a checkpoint"):
        run_side_by_side(program, runs(tmp_path, a=(60, 0), b=(60, 0)), 2, "here:1")
    thread.join()
    assert all((tmp_path / f"{name}.stopped").exists() for name in "ab")
    assert signal.getsignal(signal.SIGTERM) == before
