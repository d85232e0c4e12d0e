"""SIGTERM as a request: a cluster that takes a machine back sends it, and kills what is still there a little later.

Within the block nothing is interrupted; the loop asks at the end of a step, saves, and raises `Terminated`.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from qvit.errors import QvitError

#: What a shell reports for a process that SIGTERM ended.
EXIT_CODE = 128 + signal.SIGTERM


class Terminated(QvitError):
    """A run was asked to end, and did so after saving."""


class StopRequest:
    """A context manager that notes SIGTERM in `requested`; the previous handler is put back afterwards.

    In a thread other than the main one, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.requested = True
