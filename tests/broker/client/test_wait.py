"""How often a wait polls: it knows of the end soon, and costs little however long it takes."""

from __future__ import annotations

import pytest

from pilotq.broker.client.broker import poll_after


@pytest.mark.parametrize(("waited", "pause"), [(0.0, 0.005), (0.1, 0.005), (1.0, 0.03), (5.0, 0.15), (3600.0, 0.2)])
def test_the_next_poll_comes_three_percent_later(waited: float, pause: float) -> None:
    assert poll_after(waited) == pytest.approx(pause)
