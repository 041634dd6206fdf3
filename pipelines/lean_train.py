"""Ray Train without the processes and wakes that have nothing to do here, and patient; bound to this version of Ray.

An idle actor wakes a hundred times a second, which takes a hundredth of a core; and where ranks wait for each other in
every step, what delays one of them delays all (measured: two of these took 3 % from a training on two cores).
"""

import atexit
import contextlib
import signal
import threading
import time
from typing import Any

import ray
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

# Namespaces and names of the actors that Ray Data leaves running when its work is done, and starts again at need.
_LEFTOVERS = {
    ("AutoscalingCoordinator", "AutoscalingCoordinator"),
    ("_dataset_stats_actor", "datasets_stats_actor"),
    ("ActorLocationTracker", "ActorLocationTracker"),
}

_SECONDS_OF_REST, _SECONDS_AWAKE = 0.9, 0.1
_SECONDS_BEFORE_REST = 10.0  # so that the start of a training is not slower


def end_leftovers() -> None:
    """End what Ray Data left running: for a cluster in which nothing else happens now."""
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    for one in actors:
        if (one["namespace"], one["name"]) in _LEFTOVERS:
            with contextlib.suppress(ValueError):  # gone by itself
                ray.kill(ray.get_actor(one["name"], one["namespace"]))


def leave_out_helpers(trainer: TorchTrainer, *, alone: bool, elastic: bool) -> None:
    """Let the trainer start without them. alone: in a cluster that ends with this program and has one node. elastic:
    the number of workers may change."""
    internal: Any = trainer
    idle = (DatasetsCallback, PlacementGroupCleanerCallback) if alone else DatasetsCallback
    make = internal._create_default_callbacks
    more = [_EndSynchronizer()] if alone else []
    internal._create_default_callbacks = lambda: [
        *(callback for callback in make() if not isinstance(callback, idle)),
        *more,
    ]
    if alone and not elastic:
        _give(trainer, scaling_policy=_SameNumber(trainer.scaling_config))


def let_main_threads_rest(trainer: TorchTrainer) -> None:
    """Those of its workers. Their calls take up to a second longer: for a cluster that ends with this program."""
    internal: Any = trainer
    make = internal._create_default_callbacks
    internal._create_default_callbacks = lambda: [*make(), _Rest()]


def count_starts_in_a_row(trainer: TorchTrainer) -> None:
    """Let `FailureConfig.controller_failure_limit` bound the starts of a group that fail one after the other: Ray
    counts all of a run, so that a long one on a cluster that often loses nodes would end."""
    _give(trainer, failure_policy=StartsInARow(trainer.run_config.failure_config or FailureConfig()))


def _give(trainer: TorchTrainer, **policies: Any) -> None:
    """Let the trainer's controller have these instead of its own."""
    internal: Any = trainer
    run = internal._initialize_and_run_controller
    internal._initialize_and_run_controller = lambda **settings: run(**{**settings, **policies})


class StartsInARow(DefaultFailurePolicy):
    """Ray's policy, but a group that has run clears the count of those that did not start before it."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if not isinstance(training_failed_error, ControllerError):  # workers died or were taken away, so there were any
            self._controller_failures = 0
        return super().make_decision(training_failed_error)


class _EndSynchronizer(WorkerGroupCallback):
    """Ends the actor through which workers report checkpoints to Ray, as soon as they stand: they never do."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        ray.kill(worker_group.get_worker_group_state().sync_actor)


class _Rest(WorkerCallback):
    """Lets the main threads of workers sleep most of the time: training runs in another."""

    def after_init_train_context(self) -> None:
        if threading.current_thread() is threading.main_thread():
            rest(_SECONDS_BEFORE_REST)


def rest(after: float) -> None:
    """In so many seconds, let the main thread, which calls this, begin to sleep for 0.9 s of each second.

    That of Ray's processes looks a hundred times a second whether a signal came in, and takes Python's lock for it: on
    the core on which a rank computes that costs 1 to 2 % of a training. The handler of a signal is where it can be
    held. An actor's calls wait for its end, other signals do not.
    """

    def sleep(*_: object) -> None:
        time.sleep(_SECONDS_OF_REST)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_AWAKE)

    def end() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)

    signal.signal(signal.SIGALRM, sleep)
    signal.siginterrupt(signal.SIGALRM, False)  # a system call that it meets goes on
    signal.setitimer(signal.ITIMER_REAL, after)
    atexit.register(end)  # Python gives up its handlers before it has ended, and a signal without one ends a process


class _SameNumber(FixedScalingPolicy):
    """Always as many workers, on the one node that there is: no autoscaler's actor is asked for more."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...
