"""Privacy targets are validated at construction."""

from __future__ import annotations

import math

import pytest

from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_epsilon_is_finite_and_positive(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon must be a finite number above 0"):
        PrivacyTarget(epsilon=epsilon, delta=1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, 1.5, -1e-5, math.nan])
def test_delta_lies_between_zero_and_one(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must lie in"):
        PrivacyTarget(epsilon=1.0, delta=delta)


def test_no_privacy_is_a_type_of_its_own() -> None:
    assert not isinstance(NoPrivacy(), PrivacyTarget)
    assert NoPrivacy() == NoPrivacy()
