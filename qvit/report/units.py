"""Numbers for people: one unit per column, and as many digits as carry information; a number not known is no text.

Bit operations are given in G (1e9) or M (1e6), bytes in MB (1e6), kB (1e3) or B; a column takes the largest unit in
which its smallest value still is 0.01 (bytes: 0.1) or more, so a tiny model beside its float original reads `0.0123`
and not `0.00`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

UNITS = {
    "bops": (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)),
    "bytes": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)),
}


def significant(value: float | None, digits: int = 4) -> str:
    """A number with that many significant digits, never in exponent notation: `21.46`, `0.01230`, `1,255`."""
    if value is None:
        return ""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), 12)}f}"


def fixed(value: float | None, decimals: int = 2) -> str:
    """A number with that many decimals: `95.13`."""
    return "" if value is None else f"{value:.{decimals}f}"


def plus_minus(value: float, deviation: float) -> str:
    """A number and its deviation: `95.13 ± 0.32`."""
    return f"{value:.2f} ± {deviation:.2f}"


def unit_for(values: Iterable[float | None], kind: str) -> tuple[str, float]:
    """The unit for a column: its name and its size.

    Args:
        values: The numbers that will be shown together.
        kind: `bops` or `bytes`.
    """
    known = [abs(value) for value in values if value]
    smallest, floor = min(known, default=1.0), 0.01 if kind == "bops" else 0.1
    return next((unit for unit in UNITS[kind] if smallest >= floor * unit[1]), UNITS[kind][-1])


def column(values: Sequence[float | None], kind: str) -> tuple[str, list[str]]:
    """The unit of a column and its cells; None becomes an empty cell."""
    name, size = unit_for(values, kind)
    if not any(values):
        name = ""
    return name, ["" if value is None else significant(value / size) for value in values]


def titled(name: str, unit: str) -> str:
    """A name with its unit, if there is one: `bit operations (G)`."""
    return f"{name} ({unit})" if unit else name


def _one(value: float | None, kind: str) -> str:
    if value is None:
        return ""
    name, size = next((unit for unit in UNITS[kind] if abs(value) >= unit[1]), UNITS[kind][-1])
    return f"{significant(value / size) if size > 1 else f'{value:g}'} {name}".strip()


def bops_text(value: float | None) -> str:
    """Bit operations: `21.46 G`, `12.30 M`."""
    return _one(value, "bops")


def bytes_text(value: float | None) -> str:
    """Bytes: `2.145 MB`, `80.12 kB`, `512 B`."""
    return _one(value, "bytes")


def difference(value: float) -> str:
    """A signed number with two decimals and a true minus sign: `+0.40`, `−1.10`, `0.00`."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def percent(share: float | None) -> str:
    """A share in percent: `98.0 %`."""
    return "" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds for people: `0.8 s`, `45 s`, `12 min 03 s`, `2 h 05 min`."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
