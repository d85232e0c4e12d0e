"""How a method takes part in training: calls from the loop, and a base class that answers none of them."""

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

    def penalty(self, step: int = 0) -> Tensor | None:
        """Added to the loss of every step, once whatever its micro-batches; None for none.

        `step` steps are done before it.
        """
        ...

    def before_step(self, trainer: Trainer) -> None:
        """Called when all gradients of a step are there, before they are clipped."""
        ...

    def after_step(self, trainer: Trainer) -> None:
        """Called after the optimizer's step; `trainer.step` does not count it yet."""
        ...

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        """Figures for the log: `bit_operations`, and at the end of an epoch the widths.

        Called where waiting for the device is allowed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside model and optimizer: tensors, in dictionaries."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; not called for a checkpoint without it."""
        ...


class NoHooks:
    """A method without a penalty, stages or figures."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None: ...

    def penalty(self, step: int = 0) -> Tensor | None:
        return None

    def before_step(self, trainer: Trainer) -> None: ...

    def after_step(self, trainer: Trainer) -> None: ...

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
