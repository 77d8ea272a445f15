"""Which parts of a heap are worth a huge page."""

from __future__ import annotations

import os

from quicferry.host.heap import HUGE_PAGE, _well_filled

PAGE = os.sysconf("SC_PAGE_SIZE")


def test_half_of_a_huge_page_has_to_be_there() -> None:
    fd = os.memfd_create("heap", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 16 * HUGE_PAGE)
        assert list(_well_filled(fd)) == []
        whole, half = bytes(HUGE_PAGE), bytes(HUGE_PAGE // 2)
        os.pwrite(fd, whole, 0)
        os.pwrite(fd, half, 2 * HUGE_PAGE)
        os.pwrite(fd, half[PAGE:], 4 * HUGE_PAGE)  # a page short
        for page in range(0, HUGE_PAGE, 2 * PAGE):  # every second
            os.pwrite(fd, b"x", 6 * HUGE_PAGE + page)
        os.pwrite(fd, whole, 8 * HUGE_PAGE + HUGE_PAGE // 2)  # half of one and half of the next
        os.pwrite(fd, b"x", 15 * HUGE_PAGE)
        assert [offset // HUGE_PAGE for offset in _well_filled(fd)] == [0, 2, 6, 8, 9]
    finally:
        os.close(fd)
