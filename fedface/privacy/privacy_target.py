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

# Where noise is added: "local", on the device, all of it, in every private step; "central", by the server, to each sum;
# "distributed", on the devices, a share by each, so that only a sum over devices has enough.
Noise = Literal["local", "central", "distributed"]


def check_delta(delta: float) -> None:
    """Raise ValueError unless delta is a number that the accountant can compute with."""
    check("delta", Delta, delta)


def check_noise(unit: Unit, noise: Noise) -> None:
    """Raise ValueError if a guarantee per `unit` cannot come from noise that is added there."""
    if unit == "library" and noise == "local":
        raise ValueError(
            'noise must be "distributed" (each device adds a share, and only masked sums leave) or "central" (the '
            "server is trusted: it sees each update and adds the noise to their sum) with unit library, got "
            f'"{noise}"'
        )
    if unit != "library" and noise == "central":
        raise ValueError(
            f'noise must be "local" (each device adds all of it in each step) or "distributed" with unit {unit}, got '
            f'"{noise}"'
        )


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
    noise: Noise = "local"
    # Of distributed noise: the fraction of the devices in a sum that are assumed to add their shares and to keep them
    # from the server. The others may collude with it.
    honest_fraction: Annotated[float, In("(0, 1]")] = 0.5

    def __post_init__(self) -> None:
        check_noise(self.unit, self.noise)


@dataclass(frozen=True)
class NoPrivacy:
    """Epsilon is infinite. For baselines on photos whose owners know; devices refuse it by default."""

    kind: ClassVar[str] = "no-privacy"


PrivacyGuarantee = PrivacyTarget | NoPrivacy
