"""Random masked inputs that every test of the algorithms shares."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

B, R = 5, 7


@pytest.fixture(params=range(6))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """float32 arrays [B, R] and a mask: right-padded as rollouts have it on even seeds, with holes anywhere on odd ones.

    One row has no real token, one row has all. Log-probabilities and values differ from the old ones by enough that
    both branches of every clip occur.
    """
    rng = np.random.default_rng(request.param)

    def normal(scale: float = 1.0) -> np.ndarray:
        return rng.normal(scale=scale, size=(B, R)).astype(np.float32)

    lengths = np.array([0, R, *rng.integers(1, R + 1, size=B - 2)])
    mask = np.arange(R) < lengths[:, None] if request.param % 2 == 0 else rng.random((B, R)) < (lengths / R)[:, None]
    old_logprobs, old_values = -np.abs(normal()), normal()
    return SimpleNamespace(
        mask=mask,
        old_logprobs=old_logprobs,
        logprobs=old_logprobs + normal(0.3),
        ref_logprobs=old_logprobs + normal(0.3),
        old_values=old_values,
        values=old_values + normal(0.3),
        rewards=normal(),
        returns=normal(),
        advantages=normal(),
        scores=normal()[:, 0],
    )
