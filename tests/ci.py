"""In CI a skip is a failure, unless no set-up could have prevented it: loaded by tests/conftest.py.

Tests name the missing thing as the skip's reason. `.ci/run` installs everything but a kernel, so only a reason
that begins with ``kernel:`` is let through there.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

ALLOWED = "kernel:"


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped, without pytest's own prefix."""
    told: Any = report.longrepr
    text = str(told[2]) if isinstance(told, tuple) else str(told)
    return text.removeprefix("Skipped: ")


def refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip that CI should be able to run into a failure."""
    if report.skipped and not hasattr(report, "wasxfail") and not reason(report).startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"CI must be able to run this, but it was skipped: {reason(report)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    report: pytest.TestReport = yield
    if in_ci():
        refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Any:
    report: pytest.CollectReport = yield
    if in_ci():
        refuse(report)
    return report
