"""The privacy guarantee that an experiment requests, as a value that is checked once.

Either a target (epsilon, delta, unit) or, chosen by name and never by default, none: a baseline that shows what privacy
costs.
Source: Dwork & Roth (2014), "The Algorithmic Foundations of Differential Privacy", Definition 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fedface.privacy_units import Unit
from fedface.validation import Above, In, check, checked

# Smaller deltas would meet the floating-point error of the accountant.
Delta = Annotated[float, In("[1e-10, 1)")]


def check_delta(delta: float) -> None:
    """Raise ValueError unless delta is a number that the accountant can compute with."""
    check("delta", Delta, delta)


@dataclass(frozen=True, kw_only=True)
@checked
class PrivacyTarget:
    """At most epsilon of privacy loss for one unit over the whole run, except with probability about delta.

    Two data sets are neighbours if one has one unit more than the other (add or remove one).

    Raises:
        ValueError: A number outside its bounds, or a unit that no mechanism here covers.
    """

    kind: ClassVar[str] = "privacy-target"

    # Upper bound on the privacy loss.
    epsilon: Annotated[float, Above(0, "; without a bound on epsilon the kind is no-privacy")]
    delta: Delta  # choose well below 1 / number of units
    unit: Unit = "photo"  # what the guarantee covers
    # Who is trusted with updates without noise, see `DPParameters`
    trust: Literal["nobody", "server"] = "nobody"

    def __post_init__(self) -> None:
        if self.unit == "library" and self.trust != "server":
            raise ValueError(
                'trust must be "server" with unit library: the server adds the noise to the sum of whole updates. '
                "Noise in shares that only the sum completes, which needs no trust, does not exist here yet"
            )
        if self.unit != "library" and self.trust != "nobody":
            raise ValueError(
                f'trust must be "nobody" with unit {self.unit}: devices add their own noise, got "{self.trust}"'
            )


@dataclass(frozen=True)
class NoPrivacy:
    """Epsilon is infinite. For baselines on photos whose owners know; devices refuse it by default."""

    kind: ClassVar[str] = "no-privacy"


PrivacyGuarantee = PrivacyTarget | NoPrivacy
