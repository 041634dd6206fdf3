import pytest

from cluster.session import ResourceError, Session


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
