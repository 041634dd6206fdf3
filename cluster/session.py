"""Connecting to Ray, or starting it here: as late as possible, and with its resources checked before any work."""

import contextlib
import json
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.driver_memory import keep_little

_DATA_THREADS = ("iter_threaded", "StreamingExecutor")  # Ray Data gives these names
_SECONDS_TO_END, _SECONDS_TO_LOOK = 10.0, 60.0
AUTOSCALED = "AUTOSCALED_NODES"


def data_threads() -> list[threading.Thread]:
    """Those of Ray Data in this process that call Ray."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(_DATA_THREADS)]


def own_python() -> dict[str, str] | None:
    """Ray's name for this interpreter where a shell would take its path apart: Ray starts workers that have variables
    of their own, as those of Ray Train, through one and does not quote it; no worker would ever come. None for other
    paths."""
    quoted = shlex.quote(sys.executable)
    return None if quoted == sys.executable else {"py_executable": quoted}


class ResourceError(ValueError):
    """The cluster does not have what was asked for."""


class Session:
    """A connection to Ray that is made on first use and closed by `close`.

    Where RAY_ADDRESS is set (in a submitted job it always is) that cluster is used, else one is started on this machine
    with all its CPUs, without a dashboard. Ray's own ports listen on the node's address, behind its token.
    """

    def __init__(self, num_cpus: int | None = None) -> None:
        """num_cpus: how many a cluster on this machine has, all of them where it is None."""
        self._num_cpus = num_cpus
        self._ray: Any = None
        self._owner = False
        self._open: list[Any] = []
        self.once_connected: Callable[[], None] | None = None
        """Called by the first use of Ray: what must hold of a cluster before it is given work."""

    @property
    def alone(self) -> bool:
        """Ray runs on this machine, for this program."""
        return self._owner and not os.environ.get("RAY_ADDRESS")

    @property
    def started(self) -> bool:
        return self._ray is not None

    def connect(self) -> Any:
        """The module ray, connected."""
        if self._ray is None:
            # Ray's own lines about its logs and metrics are not this program's output.
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
            if not os.environ.get("RAY_ADDRESS"):  # a minute between two looks at all processes, which nobody reads
                os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
            # A task that is too large for memory ends, where Ray would try it for ever.
            os.environ.setdefault("RAY_task_oom_retries", "3")
            keep_little()
            import ray

            if not ray.is_initialized():
                ray.init(
                    address=os.environ.get("RAY_ADDRESS") or "local",
                    num_cpus=None if os.environ.get("RAY_ADDRESS") else self._num_cpus,
                    include_dashboard=None if os.environ.get("RAY_ADDRESS") else False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env=None if os.environ.get("RAY_ADDRESS") else own_python(),
                )
                self._owner = True
                if self.alone:
                    self._end_idle_processes()
            self._ray = ray
            if self.once_connected is not None:
                self.once_connected()
        return self._ray

    @staticmethod
    def _end_idle_processes() -> None:
        """End what one machine has no use for: logs are not shown here and nodes do not come and go, and on few cores
        each process of Ray takes 1 % of one from training."""
        from ray._private import worker

        node: Any = worker._global_node
        node.kill_log_monitor(check_alive=False)
        node.kill_monitor(check_alive=False)

    def rows(self, data: Any) -> Iterator[dict[str, Any]]:
        """The rows of a Ray dataset, as they come. What is not read to its end is stopped by `close`."""
        found = iter(data.iter_rows())
        self._open.append(found)
        try:
            yield from found
        finally:
            found.close()
            self._open.remove(found)

    def check(
        self, *, num_workers: int, cpus_per_worker: int | None, use_gpu: bool, min_workers: int | None = None
    ) -> int:
        """CPUs for each worker. min_workers: as many as are needed, where the number may change.

        Raises `ResourceError` at once where the cluster cannot hold the workers.
        """
        nodes = self._nodes()
        cpus, gpus = sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes)
        option = "--resources.num-workers" if min_workers is None else "--resources.min-workers"
        needed = min_workers or num_workers
        if use_gpu and gpus < needed:
            raise ResourceError(
                f"expected {needed} GPUs (one a worker), the cluster has {gpus}; lower {option} "
                "or leave out --resources.use-gpu"
            )

        def room(each: int) -> int:
            """Workers with so many CPUs that there is room for: each lies on one node."""
            return sum(min(cpus // each, gpus if use_gpu else cpus) for cpus, gpus in nodes)

        count = max(needed, min(num_workers, room(1)))  # that there can be
        each = cpus_per_worker or next((each for each in range(max(1, cpus // count), 0, -1) if room(each) >= count), 1)
        if room(each) < needed:
            kind = f"{each} CPUs and a GPU" if use_gpu else f"{each} CPUs"
            found = ", ".join(f"{cpus} CPUs" + (f" and {gpus} GPUs" if use_gpu else "") for cpus, gpus in nodes)
            raise ResourceError(
                f"expected {each * needed} CPUs ({needed} workers with {kind} each, each on one node), found room for "
                f"{room(each)} of them on nodes with {found or 'nothing'}; lower {option} or "
                "--resources.cpus-per-worker"
            )
        return each

    def room(self, *, num_workers: int, cpus_per_worker: int | None, use_gpu: bool) -> int:
        """How many trainings with so many workers there is room for at one time, at least 1. Without GPUs and a number
        of CPUs a worker is given a node."""
        nodes = self._nodes()
        workers = 0
        for cpus, gpus in nodes:
            by_cpus = cpus // cpus_per_worker if cpus_per_worker else cpus if use_gpu else min(cpus, 1)
            workers += min(by_cpus, gpus) if use_gpu else by_cpus
        return max(1, workers // num_workers)

    def _nodes(self) -> list[tuple[int, int]]:
        """CPUs and GPUs of each node that lives or, where an autoscaler starts nodes as there is work, of all that may
        come."""
        nodes = [node["Resources"] for node in self._alive()]
        alive = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
        return max(
            alive,
            self._autoscaled(),
            key=lambda nodes: (sum(gpus for _, gpus in nodes), sum(cpus for cpus, _ in nodes)),
        )

    def _alive(self) -> list[Any]:
        return [node for node in self.connect().nodes() if node["Alive"]]

    def _autoscaled(self) -> list[tuple[int, int]]:
        """CPUs and GPUs of each node that an autoscaler may start. Ray does not know them before they live: who writes
        the cluster's manifest says it, in the environment of its head."""
        text = os.environ.get(AUTOSCALED, "")
        if self.alone or not text:
            return []
        try:
            groups = [(int(one["count"]), int(one["cpus"]), int(one.get("gpus", 0))) for one in json.loads(text)]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ResourceError(
                f'expected {AUTOSCALED} as [{{"count": 8, "cpus": 7, "gpus": 1}}], one for each kind of node that the '
                f"autoscaler starts, found {text!r}"
            ) from None
        return [(cpus, gpus) for count, cpus, gpus in groups for _ in range(count)]

    @property
    def grows(self) -> bool:
        """Nodes are started as there is work, which may take minutes."""
        return bool(self._autoscaled())

    def num_nodes(self) -> int:
        """Nodes of the cluster, its head among them; 1 where Ray is started here."""
        if not os.environ.get("RAY_ADDRESS"):
            return 1
        return max(1 + len(self._autoscaled()), len(self._alive()))

    def pool(self, name: str) -> dict[str, Any]:
        """The option of a task or actor that belongs on nodes with the label pool=name; none where no such node lives,
        as on one machine. (With Ray's fallback_strategy it would go elsewhere whenever these are busy.)"""
        there = any(node.get("Labels", {}).get("pool") == name for node in self._alive())
        return {"label_selector": {"pool": name}} if there else {}

    def nodes_without(self, path: str) -> list[str]:
        """Addresses of the nodes that live and on which there is no such file; without those that do not answer."""
        ray = self.connect()
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look: Any = ray.remote(num_cpus=0)(os.path.exists)
        nodes = [(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
        looks = [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path)
                 for node, _ in nodes]  # fmt: skip
        ray.wait(looks, num_returns=len(looks), timeout=_SECONDS_TO_LOOK)
        found = []
        for (_, address), one in zip(nodes, looks, strict=True):
            with contextlib.suppress(RayError):
                if not ray.get(one, timeout=0):
                    found.append(address)
        return found

    def object_store_bytes(self) -> int:
        """What is in the object stores of all nodes now."""
        self.connect()
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        return int(get_memory_info_reply(get_state_from_address()).store_stats.object_store_bytes_used)

    def num_cpus(self) -> int:
        """CPUs of the whole cluster."""
        return max(1, sum(cpus for cpus, _ in self._nodes()))

    def cpus_of_largest_node(self) -> int:
        """No task or actor can have more. One that needs a GPU too may find less: `check` says how much."""
        return max(cpus for cpus, _ in self._nodes())

    def address(self) -> str:
        """Where another process joins this Ray: what its RAY_ADDRESS has to be."""
        return self.connect().get_runtime_context().gcs_address

    def leaving_nodes(self) -> set[str]:
        """Ids of the nodes that are about to be taken away. (What Ray Train has for it makes all ranks wait for each
        other each time that one asks.)"""
        from ray._private.state import state

        return set(state.get_draining_nodes())

    def close(self) -> None:
        """Stop what still runs, then Ray, where it was started here."""
        try:
            self._end_data()
        finally:
            if self._ray is not None and self._owner:
                self._ray.shutdown()
            self._ray = None

    def _end_data(self) -> None:
        # An error on its way up keeps its iterators alive, and their threads: one of them that calls Ray after its end
        # would end this process with it.
        for found in [*self._open]:
            found.close()
        deadline = time.monotonic() + _SECONDS_TO_END
        for thread in data_threads():
            thread.join(max(0.0, deadline - time.monotonic()))
