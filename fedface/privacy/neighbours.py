"""Which two libraries must look alike, and what an event priced for one such pair costs for another.

Called from privacy/ledger.py, where runs of several units meet in one book. Every event here is priced for
neighbours that differ by adding or removing one unit. Two further questions have safe answers:

* Replace one: a unit's content changes. Its clipped vector moves by at most 2 * clip_norm (triangle inequality),
  so that a Gaussian or Laplace sum costs what it costs with half the noise (Dwork and Roth 2014, Theorem A.1, and
  3.6, with twice the sensitivity). Nothing is claimed from sampling: whoever is told the coins learns more, and
  then each step is the unsampled one (convexity of the hockey-stick divergence, Balle et al. 2018,
  arXiv:1807.01647, Theorem 2, with the trivial bound).
* A photo in a run that promises per occasion: one photo more or less changes the content of one occasion, or adds
  or removes an occasion; replace one covers both, since half the noise and no sampling cost at least as much.
  A run that promises per photo says nothing about an occasion of unknown size: its price is infinite.
"""

from __future__ import annotations

from typing import Literal

from fedface.privacy.accounting import Leaf, event_of_leaves, leaves_of
from fedface.privacy.mechanism import Event
from fedface.units import Unit, covers

Neighbours = Literal["add or remove one", "replace one"]


def for_replacing_one(event: Event) -> Event:
    """What an event releases about the content of a unit that stays: its price is that of replace-one neighbours.

    Raises:
        PrivacyError: The event holds something that cannot be priced.
    """
    halved = tuple((Leaf(leaf.kind, leaf.scale / 2.0, 1.0), count) for leaf, count in leaves_of(event))
    return event_of_leaves(halved)


def seen_by(event: Event, *, told: Unit, wanted: Unit) -> Event:
    """What an event of a run that promises per `told` releases about one `wanted`.

    Args:
        event: Priced for adding or removing one `told`.
        told: The unit whose vectors the run clips.
        wanted: The unit that an owner counts in.
    """
    if told == wanted:
        return event
    if covers(told, wanted):
        return for_replacing_one(event)
    return event_of_leaves(tuple((Leaf("nonprivate", 0.0, 1.0), count) for _, count in leaves_of(event)))
