"""Several Ray nodes as processes of this machine: for tests and trials of what a cluster does."""

from typing import Any


class LocalCluster:
    """A head without CPUs, and nodes that may be killed and replaced. jobs: the head takes submitted jobs, at
    `jobs_address`. Nodes have the environment that this process has when they are added.
    """

    def __init__(self, nodes: int, *, cpus_per_node: int = 1, jobs: bool = False) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": jobs, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._cpus = cpus_per_node
        self.address: str = self._cluster.address
        self._nodes = [self._cluster.add_node(num_cpus=cpus_per_node) for _ in range(nodes)]

    @property
    def jobs_address(self) -> str:
        """Where jobs are submitted to."""
        return f"http://{self._cluster.head_node.webui_url}"

    def replace(self, number: int) -> None:
        """SIGKILL a node, and with it all its workers; let another come in its place."""
        self.remove(number)
        self.add()

    def remove(self, number: int) -> None:
        """SIGKILL a node, and with it all its workers."""
        self._cluster.remove_node(self._nodes.pop(number), allow_graceful=False)

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=self._cpus))

    def __len__(self) -> int:
        return len(self._nodes)

    def node_ids(self) -> list[str]:
        return [node.node_id for node in self._nodes]

    def close(self) -> None:
        self._cluster.shutdown()
