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
            ResourceError, match=r"expected 1000 CPUs \(1000 workers with 1 each\), the cluster has \d+"
        ):
            session.check(num_workers=1000, cpus_per_worker=1, use_gpu=False)
        with pytest.raises(ResourceError, match=r"expected 99 GPUs \(one a worker\), the cluster has"):
            session.check(num_workers=99, cpus_per_worker=1, use_gpu=True)
        assert session.check(num_workers=1, cpus_per_worker=None, use_gpu=False) >= 1
    finally:
        session.close()


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
