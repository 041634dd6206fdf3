import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.local import LocalCluster
from cluster.session import AUTOSCALED, ResourceError, Session, data_threads, own_python
from pipelines.config import Resources
from pipelines.stage import _encoders, fan_out
from tests.pipelines.test_cli import ROOT
from vqvae_core.errors import InputError


@pytest.mark.slow
def test_impossible_resources_are_refused_at_once() -> None:
    session = Session()
    try:
        assert not session.started
        with pytest.raises(
            ResourceError,
            match=r"expected 1000 CPUs \(1000 workers with 1 CPUs each, each on one node\), found room for",
        ):
            session.check(num_workers=1000, cpus_per_worker=1, use_gpu=False)
        with pytest.raises(ResourceError, match=r"expected 99 GPUs \(one a worker\), the cluster has"):
            session.check(num_workers=99, cpus_per_worker=1, use_gpu=True)
        assert session.check(num_workers=1, cpus_per_worker=None, use_gpu=False) >= 1
    finally:
        session.close()


NODES = {
    "two of 8": [(8, 0), (8, 0)],
    "a head and two with GPUs": [(4, 0), (8, 1), (8, 2)],
    "GPUs without CPUs for them": [(1, 4), (16, 0)],
}


@pytest.mark.parametrize(
    ("nodes", "asked", "each"),
    [
        ("two of 8", (2, None, False), 8),
        ("two of 8", (3, None, False), 4),  # 16 // 3 is 5, of which a node has room for one
        ("two of 8", (16, None, False), 1),
        ("two of 8", (2, 8, False), 8),
        ("a head and two with GPUs", (3, None, True), 4),
        ("a head and two with GPUs", (2, None, True), 8),
        ("GPUs without CPUs for them", (1, None, True), 1),
    ],
)
def test_workers_that_fit_on_nodes(
    nodes: str, asked: tuple[int, int | None, bool], each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_nodes", lambda self: NODES[nodes])
    workers, cpus, use_gpu = asked
    assert Session().check(num_workers=workers, cpus_per_worker=cpus, use_gpu=use_gpu) == each


@pytest.mark.parametrize(
    ("nodes", "asked", "each"),
    [
        ([(8, 1)] * 3, (4, 1, True), 8),
        ([(8, 1), (8, 1), (0, 0)], (4, 2, True), 8),
        ([(2, 0)], (4, 1, False), 1),
        ([(8, 0), (8, 0)], (2, 1, False), 8),
    ],
)
def test_workers_that_need_not_all_be_there(
    nodes: list[tuple[int, int]], asked: tuple[int, int, bool], each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their CPUs are shared by as many as there is room for."""
    monkeypatch.setattr(Session, "_nodes", lambda self: nodes)
    most, least, use_gpu = asked
    assert Session().check(num_workers=most, cpus_per_worker=None, use_gpu=use_gpu, min_workers=least) == each


def test_encoders_on_gpus_fit_on_nodes_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large nodes without a GPU are: Ray would wait for ever for a node that has both."""
    monkeypatch.setattr(Session, "_nodes", lambda self: [(64, 0), (8, 1), (8, 1)])
    actors, threads = _encoders(Session(), Resources(num_workers=2, use_gpu=True), 100)
    assert actors == 2 and threads == 4


def test_what_must_hold_of_a_cluster_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray is first needed, and what it raises comes out there."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    session, asked = Session(), []
    session.once_connected = lambda: asked.append(session.started)
    session.connect()
    session.connect()
    assert asked == [True]
    refused = Session()

    def refuse() -> None:
        raise InputError("expected a server for runs")

    refused.once_connected = refuse
    with pytest.raises(InputError, match="expected a server"):
        refused.connect()


def test_nodes_that_an_autoscaler_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without CPUs, and nothing else yet: what may come is what there is room for."""
    head = {"Alive": True, "Resources": {}, "Labels": {}}
    monkeypatch.setattr(Session, "connect", lambda self: SimpleNamespace(nodes=lambda: [head]))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv(AUTOSCALED, '[{"count": 8, "cpus": 16}, {"count": 4, "cpus": 8, "gpus": 1}]')
    session = Session()
    assert session.grows and session.num_nodes() == 13 and session.num_cpus() == 8 * 16 + 4 * 8
    assert session.cpus_of_largest_node() == 16
    assert session.check(num_workers=4, cpus_per_worker=None, use_gpu=True) == 8
    with pytest.raises(ResourceError, match=r"expected 5 GPUs \(one a worker\), the cluster has 4"):
        session.check(num_workers=5, cpus_per_worker=None, use_gpu=True)
    monkeypatch.delenv(AUTOSCALED)
    assert not session.grows and session.num_nodes() == 1
    with pytest.raises(ResourceError, match="expected 1 CPUs"):
        session.check(num_workers=1, cpus_per_worker=1, use_gpu=False)


@pytest.mark.parametrize("text", ["8", "[8]", '[{"count": 8}]', '[{"count": "many", "cpus": 7}]', '{"count": 1}', "{"])
def test_what_the_autoscaler_may_start_is_said_badly(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv(AUTOSCALED, text)
    with pytest.raises(ResourceError, match=r"expected AUTOSCALED_NODES as \[.*found"):
        Session().num_nodes()


@pytest.mark.slow
def test_tasks_belong_on_their_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three nodes two are for work that needs no GPU; where none is named so, all are."""
    labels = [{"pool": "cpu"}, {"pool": "gpu"}, {"pool": "cpu"}]
    for named, expected in ((labels, {0, 2}), ([], {0, 1, 2})):
        cluster, session = LocalCluster(3, labels=named), Session()
        try:
            monkeypatch.setenv("RAY_ADDRESS", cluster.address)
            nodes = [row["node"] for row in fan_out(session, where, [{}] * 24)]
            assert set(nodes) == {cluster.node_ids()[number] for number in expected}
        finally:
            session.close()
            cluster.close()


def where(_: dict[str, Any]) -> dict[str, Any]:
    """The node that this runs on."""
    time.sleep(0.5)
    return {"node": ray.get_runtime_context().get_node_id()}


@pytest.mark.parametrize(
    ("nodes", "asked", "words"),
    [
        ("two of 8", (1, 9, False), r"expected 9 CPUs \(1 workers with 9 CPUs each.*room for 0.*8 CPUs, 8 CPUs"),
        ("two of 8", (3, 5, False), r"expected 15 CPUs \(3 workers with 5 CPUs each.*room for 2"),
        ("two of 8", (17, None, False), r"expected 17 CPUs.*room for 16"),
        ("GPUs without CPUs for them", (2, None, True), r"2 workers with 1 CPUs and a GPU each.*room for 1 of them"),
        ("two of 8", (1, None, True), r"expected 1 GPUs \(one a worker\), the cluster has 0"),
    ],
)
def test_workers_that_fit_in_total_but_on_no_node(
    nodes: str, asked: tuple[int, int | None, bool], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train would wait for them, again and again."""
    monkeypatch.setattr(Session, "_nodes", lambda self: NODES[nodes])
    workers, cpus, use_gpu = asked
    with pytest.raises(ResourceError, match=words):
        Session().check(num_workers=workers, cpus_per_worker=cpus, use_gpu=use_gpu)


def _fail_late(job: dict) -> dict:
    if job["number"] == 20:
        raise InputError("the twentieth")
    return job


@pytest.mark.slow
def test_no_thread_of_ray_data_outlives_its_session() -> None:
    """One that calls Ray after its end ends the process."""
    session = Session()
    try:
        with pytest.raises(InputError, match="the twentieth"):
            list(fan_out(session, _fail_late, ({"number": number} for number in range(40))))
        rows = fan_out(session, _fail_late, ({"number": number} for number in range(40)))
        next(rows)
        assert data_threads(), "Ray Data names its threads otherwise"
        session.close()
        assert not data_threads()
        assert len(list(fan_out(session, _fail_late, ({"number": number} for number in range(20))))) == 20
    finally:
        session.close()
    assert not data_threads()


SPACED = """
import os, sys
from cluster.session import Session
session = Session(num_cpus=1)
ray = session.connect()
task = ray.remote(lambda: sys.executable).options(runtime_env={"env_vars": {"A": "b"}})  # as Ray Train's workers have
print(ray.get(task.remote(), timeout=120))
session.close()
"""


@pytest.mark.slow
def test_a_python_whose_path_a_shell_would_take_apart(tmp_path: Path) -> None:
    """A checkout in `my (own) projects`: workers with variables of their own, as Ray Train's, are started by a shell
    that is given the path as it is."""
    place = tmp_path / "my (own) projects & 'more'"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = place.glob("lib/python3*/site-packages")
    (packages / "here.pth").write_text("\n".join(path for path in sys.path if path) + "\n")
    python = place / "bin" / "python"
    done = subprocess.run([python, "-c", SPACED], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == str(python), done.stderr


def test_other_paths_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/home/you/pipeline/.venv/bin/python")
    assert own_python() is None
