"""What is checked before any stage: that a cluster's nodes share what they have to."""

from pathlib import Path

import pytest

from cluster.local import LocalCluster
from cluster.session import Session
from pipelines.cluster_check import check_cluster, check_source
from pipelines.sources import ClassFoldersSource, ViZDoomSource
from pipelines.tracking import Tracker
from tests.pipelines.test_cli import full
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder


@pytest.fixture
def four_nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster; the addresses of its nodes that see no other's disk are the test's to say."""
    blind: list[str] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Session, "num_nodes", lambda self: 4)
    monkeypatch.setattr(Session, "nodes_without", lambda self, path: blind if Path(path).exists() else ["all"])
    return blind


def check(root: Path, *, track: bool) -> None:
    folder = Folder.of(str(root))
    check_cluster(Session(), folder, Tracker(folder, "t", {}, "", enabled=track))
    assert not list(root.iterdir()), "the check leaves nothing behind"


def test_runs_in_a_file_are_refused_on_a_cluster(four_nodes: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the cluster has 4 nodes, found the file sqlite:///.*mlflow\.db; set MLFLOW_"
    ):
        check(tmp_path, track=True)
    check(tmp_path, track=False)


def test_runs_on_a_server_are_fine(four_nodes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    check(tmp_path, track=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///runs")
    with pytest.raises(InputError, match="found the file file:///runs"):
        check(tmp_path, track=True)


def test_one_node_may_have_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check(tmp_path, track=True)


def test_a_root_that_not_all_nodes_see(four_nodes: list[str], tmp_path: Path) -> None:
    four_nodes.append("10.0.0.3")
    with pytest.raises(
        InputError, match=r"not the same on 1 of the nodes that live \(10\.0\.0\.3\); give --root s3://"
    ):
        check(tmp_path, track=False)
    assert not list(tmp_path.iterdir())


def test_a_source_that_not_all_nodes_see(four_nodes: list[str], tmp_path: Path) -> None:
    """Else what a blind node is given to read would be files that are missing."""
    source = ClassFoldersSource(path=str(tmp_path))
    check_source(Session(), source)
    four_nodes.append("10.0.0.3")
    with pytest.raises(InputError, match=r"expected a source that all nodes.*\(10\.0\.0\.3\); give --source s3://"):
        check_source(Session(), source)
    check_source(Session(), ClassFoldersSource(path="s3://bucket/images"))
    check_source(Session(), ViZDoomSource())


@pytest.mark.slow
def test_nodes_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = LocalCluster(2)
    session = Session()
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert session.num_nodes() == 3
        assert session.nodes_without(str(tmp_path)) == []
        assert len(session.nodes_without(str(tmp_path / "nothing"))) == 3
        done = full("--preset", "smoke", "--root", str(tmp_path / "root"))  # whose runs would go to a file
        assert done.returncode != 0 and "the cluster has 3 nodes, found the file sqlite:///" in done.stderr, done.stderr
    finally:
        session.close()
        cluster.close()
