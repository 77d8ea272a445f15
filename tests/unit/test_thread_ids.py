"""Ranges of thread ids for CRIU's own processes in a berth."""

from __future__ import annotations

import os
import threading

from hypothesis import given
from hypothesis import strategies as st

from quicferry.host import thread_ids


@given(st.integers(min_value=0), st.sets(st.integers(min_value=1, max_value=32_767), max_size=thread_ids.RANGES - 1))
def test_a_range_has_none_of_the_ids_in_use(epoch: int, taken: set[int]) -> None:
    start = thread_ids.free_range(epoch, taken)
    assert not taken & set(range(start, start + thread_ids.RANGE))
    assert thread_ids.FIRST <= start < start + thread_ids.RANGE < 32_768


def test_each_epoch_has_another_range_until_they_begin_anew() -> None:
    starts = [thread_ids.free_range(epoch, ()) for epoch in range(thread_ids.RANGES)]
    assert len(set(starts)) == thread_ids.RANGES
    assert thread_ids.free_range(thread_ids.RANGES, ()) == starts[0]


def test_the_ids_of_all_threads() -> None:
    over = threading.Event()
    threads = [threading.Thread(target=over.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert set(thread_ids.of(os.getpid())) >= {thread.native_id for thread in threads}
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert thread_ids.of(0) == []
