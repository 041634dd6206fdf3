import pytest

from cluster.session import ResourceError, Session, data_threads
from pipelines.stage import fan_out
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
