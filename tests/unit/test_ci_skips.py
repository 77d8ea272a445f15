"""CI fails on a skip that it should be able to run."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

CASES = """
    import pytest
    def test_kernel(): pytest.skip("kernel: no CONFIG_MEM_SOFT_DIRTY")
    def test_missing(): pytest.skip("podman is missing")
    @pytest.mark.skipif(True, reason="root is missing")
    def test_marked(): pass
    @pytest.mark.xfail(reason="known")
    def test_known(): assert False
    def test_good(): pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makeconftest('pytest_plugins = ["tests.ci"]')
    pytester.makepyfile(CASES)
    return pytester


def test_in_ci_a_missing_thing_fails_and_a_missing_kernel_feature_does_not(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=1, skipped=1, failed=1, errors=1, xfailed=1)
    result.stdout.fnmatch_lines(["*skipped: podman is missing*"])


def test_elsewhere_skips_are_skips(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    project.runpytest_inprocess().assert_outcomes(passed=1, skipped=3, xfailed=1)
