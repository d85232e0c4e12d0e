"""Which form of an operator runs on this CPU: the compiled one, unless the plain one is faster here.

A compiler may make slow code of the loops for a processor that nobody has measured. So the first use of an operator
times both forms on a tensor of 0.6 MB, one after the other, a few milliseconds in all; the shorter of their best times
decides for every size. (The compiled form of each was measured to win from 256 elements on, with AVX-512, AVX2 and
SSE2; below that the forms take as long as each other.)

On one grid both yield the same values and gradients of x bit for bit, but sums, and values between two grids, may
differ in their last digits. For a run to repeat itself the choice must not change from one process to the next, so it
is kept beside the library,

    $XDG_CACHE_HOME/qvit/cpu-<key>-<sha256>.forms.json      {"forward": true, ...}      true: compiled

and is made anew with the library alone. Where libraries are not kept, every process makes its own choice. The variable
`QVIT_KERNELS` pins it: with `1`, or the name of an instruction set, operators are compiled; with `0`, plain. A run's
log names the operators that were plain in it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qvit.errors import QvitError
from qvit.files import read_object, write_json

log = logging.getLogger(__name__)
#: Times that each form is run after a first one; the shortest counts.
ROUNDS = 5
_chosen: dict[str, bool] = {}

Form = Callable[[], object]


def is_compiled(operator: str, forms: Callable[[str], tuple[Form, Form]], library: Callable[[], Path]) -> bool:
    """Whether an operator runs in its compiled form.

    Args:
        operator: Its name.
        forms: Makes its compiled and its plain form, to be timed.
        library: Returns the file of the compiled one.
    """
    if operator not in _chosen:
        _chosen[operator] = bool(os.environ.get("QVIT_KERNELS")) or _kept(operator, forms, library())
        if not _chosen[operator]:
            log.warning("'%s' runs as the plain formula, which a trial found faster than its kernel", operator)
    return _chosen[operator]


def plain() -> list[str]:
    """The operators that this process ran in their plain form because that is faster."""
    return sorted(operator for operator, compiled in _chosen.items() if not compiled)


def _kept(operator: str, forms: Callable[[str], tuple[Form, Form]], library: Path) -> bool:
    """The choice that is kept beside the library, or one that is made and kept now."""
    file = library.with_suffix(".forms.json")
    if isinstance(found := _choices(file).get(operator), bool):
        return found
    choice = _wins(*forms(operator))
    if library.exists():
        try:
            write_json(file, _choices(file) | {operator: choice})
        except (OSError, QvitError) as error:
            log.warning("the choice of '%s' is made again by the next process: %s", operator, error)
    return choice


def _choices(file: Path) -> dict[str, object]:
    try:
        return read_object(file, "choice of forms")
    except QvitError:
        return {}


@torch.no_grad()
def _wins(compiled: Form, formula: Form) -> bool:
    """Whether the compiled form takes no longer than the plain one, run in turns."""
    rounds = [(_seconds(compiled), _seconds(formula)) for _ in range(1 + ROUNDS)][1:]
    ours, theirs = (min(times) for times in zip(*rounds, strict=True))
    return ours <= theirs


def _seconds(form: Form) -> float:
    start = time.perf_counter()
    form()
    return time.perf_counter() - start
