"""What has to be one for all nodes of a cluster, asked before they are given work: the root, the source, the store of
runs."""

import uuid
from typing import Any

from cluster.session import Session
from pipelines.tracking import Tracker
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder


def check_cluster(session: Session, root: Folder, tracker: Tracker) -> None:
    """Check the root and the store of runs. Raises `InputError` where they are of one machine, and there are more."""
    nodes = session.num_nodes()
    if nodes == 1:
        return
    if tracker.is_file or tracker.uri.startswith(("file:", "/", ".")):
        raise InputError(
            f"expected a server for runs, since the cluster has {nodes} nodes, found the file {tracker.place}; set "
            "MLFLOW_TRACKING_URI to a server (docs/cluster.md starts one), or give --no-track"
        )
    if root.is_local:
        name = f".seen-{uuid.uuid4().hex[:12]}"
        root.write(name, b"")
        try:
            _check_seen(session, root.path(name), "root", root.uri, "--root")
        finally:
            root.delete(name)


def check_source(session: Session, source: Any) -> None:
    """Check that all nodes see the files of a source, where it has some. Raises `InputError`."""
    path = getattr(source, "path", None)
    if path is not None and (folder := Folder.of(path)).is_local and session.num_nodes() > 1:
        _check_seen(session, folder.uri, "source", path, "--source")


def _check_seen(session: Session, path: str, what: str, name: str, option: str) -> None:
    if blind := session.nodes_without(path):
        raise InputError(
            f"expected a {what} that all nodes of the cluster see, found {name}, which is not the same on {len(blind)} "
            f"of the nodes that live ({', '.join(blind)}); give {option} s3://..., or a folder that they share"
        )
