"""Errors a user can act on, and the search for the name that was meant.

Everything qvit raises on purpose derives from `QvitError`; the command line prints its message as one line and exits
with 1, or with 2 for a `UsageError` (a wrong name, a wrong option, an impossible combination). A message says what was
given, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QvitError(Exception):
    """A failure with a cause outside the program: unreadable data, an impossible budget, a diverged run."""


class UsageError(QvitError, ValueError):
    """An invalid request: an unknown name, a contradiction between options, a wrong order of calls."""


_LONGEST_NAME, _LONGEST_VALUE = 120, 60


def shown(value: object) -> str:
    """A value as a message shows it: cut short, because files of strangers hold texts of any length."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def first_line(error: BaseException) -> str:
    """What went wrong, in a line, for messages that quote the error of a library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Completes an "unknown name" message: `"; did you mean 'a' or 'b'?"`, or an empty string if nothing is close.

    Args:
        name: What was given.
        candidates: What is allowed.
        count: The largest number of names offered.
    """
    given = name.lower()[:_LONGEST_NAME]
    scored = []
    for candidate in dict.fromkeys(candidates):
        other = candidate.lower()
        whole = difflib.SequenceMatcher(None, given, other).ratio()
        beginning = difflib.SequenceMatcher(None, given, other[: len(given)]).ratio() - 0.05
        scored.append((max(whole, beginning), -len(candidate), candidate))
    matches = [candidate for score, _, candidate in sorted(scored, reverse=True)[:count] if score >= 0.6]
    if not matches:
        return ""
    return "; did you mean " + " or ".join(f"'{match}'" for match in matches) + "?"
