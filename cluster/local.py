"""Several Ray nodes as processes of this machine: for tests and trials of what a cluster does."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class LocalCluster:
    """A head without CPUs, and nodes that may be killed and replaced. A process of its own starts them all and ends
    them with this one, for Ray keeps in a process what it once read of its token and its settings.
    """

    def __init__(
        self,
        nodes: int,
        *,
        cpus_per_node: int = 1,
        jobs: bool = False,
        env: Mapping[str, str] | None = None,
        labels: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """jobs: the head takes submitted jobs, at `jobs_address`. env: what all nodes have in their environment beside
        this process's. labels: of the first nodes, in their order.
        """
        self._host = subprocess.Popen(
            [sys.executable, "-m", "cluster.local"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parents[1], env={**os.environ, **(env or {})},
        )  # fmt: skip
        self._cpus = cpus_per_node
        self._nodes: list[tuple[str, int]] = []
        try:
            self.address, self.jobs_address = self._ask("start", jobs=jobs)
            for number in range(nodes):
                self.add(labels[number] if number < len(labels) else {})
        except BaseException:
            self.close()
            raise

    def replace(self, number: int) -> None:
        """SIGKILL a node, and with it all its workers; let another come in its place."""
        self.remove(number)
        self.add()

    def remove(self, number: int) -> None:
        """SIGKILL a node, and with it all its workers."""
        self._ask("remove", node=self._nodes.pop(number)[0])

    def add(self, labels: Mapping[str, str] | None = None) -> None:
        node, process = self._ask("add", num_cpus=self._cpus, labels=dict(labels or {}))
        self._nodes.append((node, process))

    def __len__(self) -> int:
        return len(self._nodes)

    def node_ids(self) -> list[str]:
        return [node for node, _ in self._nodes]

    def raylets(self) -> list[int]:
        """The process of each node under which its workers are."""
        return [process for _, process in self._nodes]

    def close(self) -> None:
        assert self._host.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._host.stdin.close()
        try:
            self._host.wait(60)
        finally:
            self._host.kill()

    def _ask(self, name: str, **arguments: Any) -> Any:
        assert self._host.stdin is not None and self._host.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([name, arguments]), file=self._host.stdin, flush=True)
        answer = self._host.stdout.readline()
        if not answer:
            raise RuntimeError(f"expected Ray's nodes on this machine, their process ended with {self._host.wait(60)}")
        return json.loads(answer)


def _host() -> None:
    """Does what a LocalCluster asks for, a line of JSON each, until there are no more lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    from ray.cluster_utils import Cluster

    cluster: Any = None
    nodes: dict[str, Any] = {}
    try:
        for line in sys.stdin:
            name, arguments = json.loads(line)
            if name == "start":
                jobs = arguments["jobs"]
                head = {"num_cpus": 0, "include_dashboard": jobs, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
                cluster = Cluster(initialize_head=True, head_node_args=head)
                answer: Any = [cluster.address, f"http://{cluster.head_node.webui_url}" if jobs else ""]
            elif name == "add":
                node = cluster.add_node(**arguments)
                nodes[node.node_id] = node
                answer = [node.node_id, node.all_processes["raylet"][0].process.pid]
            else:
                cluster.remove_node(nodes.pop(arguments["node"]), allow_graceful=False)
                answer = None
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        if cluster is not None:
            cluster.shutdown()


if __name__ == "__main__":
    _host()
