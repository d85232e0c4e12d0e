"""How a method takes part in training: three calls from the loop, and a base class that answers none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from qvit.training.loop import Trainer


class Hooks(Protocol):
    """How a method takes part in training. `NoHooks` does nothing."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Called before the epoch's first step."""
        ...

    def penalty(self) -> Tensor | None:
        """Added to the loss of every step; None for none."""
        ...

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        """Figures for the log: `bit_operations`, and at the end of an epoch the widths.

        Called where waiting for the device is allowed.
        """
        ...


class NoHooks:
    """A method without a penalty, stages or figures."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None: ...

    def penalty(self) -> Tensor | None:
        return None

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        return {}
