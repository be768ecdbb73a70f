"""Runs tests of launchers on each kind of them."""

from __future__ import annotations

import pytest

from pilotq.broker.launcher_kind import VARIABLE, native_failure


@pytest.fixture(params=["native", "python"])
def each_launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of the launchers that the test starts.

    Where the native one is not built its tests are skipped, and in CI that is a failure (tests/skips.txt).
    """
    kind: str = request.param
    if kind == "native" and native_failure():
        pytest.skip("the native launcher is not built here")
    monkeypatch.setenv(VARIABLE, kind)
    return kind
