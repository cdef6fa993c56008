"""What the compute service does when its memory service ends."""

from __future__ import annotations

import socket
import threading

import pytest

from compute_service.kv_pool import KvPool
from compute_service.memory_watch import MemoryWatch
from quire.descriptor import DescriptorRefusedError, PoolDescriptor
from quire.errors import PoolMismatch


@pytest.mark.parametrize(
    "refusal", [PoolMismatch("the pool is another"), DescriptorRefusedError("the pool is another")]
)
def test_it_resumes_until_it_is_refused(refusal: Exception) -> None:
    """Each end of the lifeline is followed by one attempt to resume; the first that fails ends the watch."""
    theirs, ours = socket.socketpair()
    pool = KvPool(PoolDescriptor(None, ours), ())
    lifelines, resumed, is_gone = [theirs], threading.Semaphore(0), threading.Event()

    def resume() -> None:
        if len(lifelines) == 3:
            raise refusal
        pool.descriptor.lifeline.close()
        theirs, pool.descriptor.lifeline = socket.socketpair()
        lifelines.append(theirs)
        resumed.release()

    watch = MemoryWatch(pool, resume, is_gone.set)
    for number in range(2):
        assert watch.why_gone is None
        lifelines[number].close()
        assert resumed.acquire(timeout=5)
    assert not is_gone.is_set()
    lifelines[2].close()
    assert is_gone.wait(5)
    assert watch.why_gone == "the pool is another"
    pool.close()
