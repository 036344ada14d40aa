"""The interface of the methods that the page offers.

`MethodCatalog` in method_provider.py implements it for the methods of fedface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedface.upsampling.upsampler import Progress, StepCallback, Upsampler


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One method as the page lists it."""

    name: str  # as the command line knows it
    title: str
    description: str  # what it does, for laypeople
    several: bool  # whether it can generate several faces for the same pixels


class MethodProvider(Protocol):
    """Builds upsamplers for one size of face."""

    size: int  # height and width of the faces in pixels
    methods: Sequence[MethodInfo]  # to choose from, at least one; the first is preselected

    def training_data(self, method: str) -> str:
        """The training data of a method's network in a sentence; empty if unknown."""

    def make(
        self, method: str, *, side: int, seed: int, progress: Progress | None, watch: StepCallback | None
    ) -> Upsampler:
        """An upsampler from `side` pixels to `size`.

        Raises:
            ConfigError: The method does not support this; with the reason.
        """


def describe_training_data(notes: Mapping[str, Any]) -> str:
    """A sentence on a checkpoint's training data, from its notes; empty if they do not contain it."""
    for part in (notes, notes.get("generator_notes")):
        recipe = part.get("recipe") if isinstance(part, Mapping) else None
        share = recipe.get("light_fraction") if isinstance(recipe, Mapping) else None
        if isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1:
            return f"Its network was trained on synthetic faces: {100 * share:.0f} % had light skin."
    return ""
