"""What Ray Train is given instead of its own, without a cluster."""

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
