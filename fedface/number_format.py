"""How numbers are written for people, the same in reports, on the console and in messages.

An upper bound is rounded up and a lower bound down, so that no printed bound is tighter than the computed one.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, no exponent from 0.0001 to a million, a true minus sign."""
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-4 <= size < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        short = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{short}e{int(exponent)}".replace("-", "−")
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}".replace("-", "−")


def constant(value: float) -> str:
    """A configured number, without trailing zeros."""
    return f"{value:g}".replace("e-0", "e-").replace("-", "−")


def format_delta(delta: float) -> str:
    """A delta as the ledger and every report write it: 0.001, 1e-4, 2.5e-6."""
    if float(f"{delta:.6g}") >= 1e-3:
        return f"{delta:g}"
    digits, _, power = f"{delta:.5e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def format_epsilon(value: float) -> str:
    """An epsilon for people: three decimal places, more if it is small."""
    if value in (0, math.inf):
        return "no bound" if value else "0"
    places = 3 if value >= 0.1 else min(9, 2 - math.floor(math.log10(value)))
    return f"{value:,.{places}f}"


def rounded_up(value: float, digits: int = 4) -> str:
    """An upper bound with that many significant digits, never below the value."""
    return _rounded(value, digits, ROUND_CEILING)


def rounded_down(value: float, digits: int = 4) -> str:
    """A lower bound with that many significant digits, never above the value."""
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    exact = Decimal(repr(float(value)))  # as it is written: 7.92 stays 7.92
    if not exact:
        return "0"
    text = format(exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=rounding), "f")
    return text if "." in text else text.rstrip(".")


def interval_texts(estimate: float, low: float, high: float) -> tuple[str, str]:
    """The estimate and `[low, high]`, with enough places for two digits of half the interval's width."""
    half = (high - low) / 2
    if not 1e-6 <= half < 1e6:
        return number(estimate), f"[{number(low)}, {number(high)}]"
    places = max(0, 1 - math.floor(math.log10(half)))
    if estimate and abs(estimate) < 0.5 * 10.0**-places:  # a small number must not read as zero
        places = min(6, -math.floor(math.log10(abs(estimate))))
    texts = [f"{end:z,.{places}f}".replace("-", "−") for end in (estimate, low, high)]
    return texts[0], f"[{texts[1]}, {texts[2]}]"


def signed(value: float) -> str:
    """A difference with its sign and one place."""
    return f"{value:+.1f}".replace("-", "−")


def counted(count: int, word: str) -> str:
    """`1 round`, `3 rounds`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def size(count: float) -> str:
    """Bytes, in powers of a thousand."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)}{SPACE}{unit}"
    return f"{count:.0f}{SPACE}bytes"


def seconds(value: float) -> str:
    """A duration, from milliseconds to hours."""
    if value < 1:
        return f"{number(value * 1000, 2)}{SPACE}ms"
    if value < 120:
        return f"{number(value)}{SPACE}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """A share in percent; a share close to one is not rounded up to 100 %."""
    if share == 0:
        return f"0{SPACE}%"
    if share >= 1:
        return f"100{SPACE}%"
    if share < 0.99:
        return f"{number(100 * share, 2)}{SPACE}%"
    places = min(12, max(0, -2 - math.floor(math.log10(1 - share))))
    return f"{math.floor(100 * share * 10**places) / 10**places:.{places}f}{SPACE}%"


def at_most_percent(share: float) -> str:
    """An upper bound in percent, rounded up; 100 % only where the rest is too small to print."""
    if share > 1 - 1e-10:
        return f"100{SPACE}%"
    places = min(12, max(1, -1 - math.floor(math.log10(1 - share))))
    return f"{math.ceil(100 * share * 10**places) / 10**places:.{places}f}{SPACE}%"


def one_in(probability: float) -> str:
    """A small probability: `1 in 100,000`."""
    return f"1 in {round(1 / probability):,}"
