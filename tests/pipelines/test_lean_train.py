"""What Ray Train is given instead of its own, without a cluster."""

import signal
import subprocess
import sys
import time

import pytest
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from pipelines.lean_train import StartsInARow

NOT_STARTED = ControllerError(WorkerGroupStartupTimeoutError(2))
DIED = WorkerGroupError("gone", {0: RuntimeError("gone")})
RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def test_starts_that_fail_are_counted_in_a_row() -> None:
    """A cluster that shrinks costs some starts each time: only as many one after the other end a training."""
    policy = StartsInARow(FailureConfig(max_failures=10, controller_failure_limit=2))
    for _ in range(3):
        assert [policy.make_decision(error) for error in (NOT_STARTED, NOT_STARTED, DIED)] == [RETRY] * 3
    assert [policy.make_decision(NOT_STARTED) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_deaths_are_counted_all_together() -> None:
    policy = StartsInARow(FailureConfig(max_failures=2, controller_failure_limit=2))
    decisions = [policy.make_decision(error) for error in (DIED, NOT_STARTED, DIED, NOT_STARTED, DIED)]
    assert decisions == [RETRY, RETRY, RETRY, RETRY, RAISE]


# What Ray's processes do with their main thread, for some seconds, or until a signal.
TICKS = """
import signal, sys, time
from pipelines import lean_train

def stop(*_):
    print("stopped", flush=True)
    sys.exit(3)

lean_train._SECONDS_OF_REST = float(sys.argv[1])
signal.signal(signal.SIGTERM, stop)
lean_train.rest(0.5)
begin, ticks = time.monotonic(), 0
print("begins", flush=True)
while time.monotonic() - begin < 4:
    time.sleep(0.01)
    ticks += 1
print(ticks)
signal.setitimer(signal.ITIMER_REAL, 1e-6)
"""


@pytest.mark.slow
def test_a_main_thread_that_rests() -> None:
    """And it ends as any other, though the signal comes at its end."""
    program = [sys.executable, "-c", TICKS, "0.9"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    assert 30 <= int(done.stdout.split()[-1]) < 200  # of four hundred


@pytest.mark.slow
def test_a_main_thread_that_rests_is_there_for_other_signals() -> None:
    with subprocess.Popen([sys.executable, "-c", TICKS, "600"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1.5)  # it sleeps since a second
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 3
        assert process.stdout.read() == "stopped\n"
