"""Adjacency: which two libraries are neighbours, and what an event priced for one relation costs under another.

Every event here is priced for neighbours that differ by adding or removing one unit. Two further relations have upper
bounds.

**Replace one**: a unit stays and its content changes, so that its clipped vector is a before and b after, anywhere in
the ball of radius clip_norm.

* A sum in which every unit takes part: |a - b| <= 2 * clip_norm, hence the price of half the noise (Dwork and Roth
  2014, Theorem A.1, and 3.6, with twice the sensitivity).
* A Poisson-sampled Gaussian sum, in units of clip_norm, given all other units: P = (1-q) N(0) + q N(a) beside
  Q = (1-q) N(0) + q N(b), all with variance sigma^2. Nothing is further apart than a = 1 and b = -1 on a line. For
  P(T) - g Q(T) = (1-q)(1-g) m + q (N(a)(T) - g N(b)(T)), where m = N(0)(T), and of all tests T that fire with
  probability m at N(0) none fires more often at N(a), none more rarely at N(b), than m' = Phi(Phi^-1(m) +- 1/sigma)
  allows (the Neyman-Pearson lemma); a half line reaches both bounds at once. So the supremum over T is that of the
  pair on the line, for every g >= 0, which is what composes (Zhu, Dong and Wang 2022, arXiv:2106.08567, Theorem 10).
  Koskela et al. (2020), arXiv:1906.03049, call this pair the substitute relation.

**A photo or an occasion in a run whose unit is the library** is a change of one library's content, whatever it is.

**A photo in a run whose unit is the occasion** has no finite price. Without a photo that alone links several occasions
these are several units, each with a coin and a vector of its own, instead of one; leaving such photos out does not
help, because which photos link depends on all others. An owner who counts in photos takes part in runs per photo or
per library. A run whose unit is the photo says nothing about an occasion of unknown size.
"""

from __future__ import annotations

from fedface.privacy.mechanism import Event
from fedface.privacy.releases import Release, ReplaceOneDpEvent, event_from_releases, flatten_event
from fedface.privacy_units import Unit, covers


def replace_one_event(event: Event) -> Event:
    """What an event releases about the content of a unit that stays: its price is that of replace-one neighbours.

    Guarantees:
        * It costs at least as much as the event: adding or removing a unit is replacing it by zero.

    Raises:
        PrivacyError: The event holds something that cannot be priced.
    """
    return event_from_releases(flatten_event(ReplaceOneDpEvent(event)))


def convert_unit(event: Event, *, source: Unit, target: Unit) -> Event:
    """What an event of a run with the unit `source` releases about one `target`, the unit that an owner counts in.

    Returns:
        The event itself; the same with its content replaced where the run's unit is the library; or, where `source`
        does not cover `target`, one without a guarantee.
    """
    if source == target:
        return event
    if covers(source, target):
        return replace_one_event(event)
    return event_from_releases(
        tuple((Release("nonprivate", 0.0, 1.0), count) for _, count in flatten_event(event))
    )
