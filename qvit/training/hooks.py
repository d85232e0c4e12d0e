"""How a method takes part in training: calls from the loop, and a base class that composes the parts of a method.

A method is often several classes, such as Q-ViT and what VVTQ adds to it. Each defines its own part of a hook, under
the hook's name, and knows nothing of the others; `ComposedHooks` calls all parts, those of base classes first. No part
calls another one, so none can be left out: `super()` in a hook is an error.

    attach, on_epoch, before_step, after_step, finish    every part is called
    penalty                                              the sum of the parts that are not None
    figures                                              one dictionary; no key may come from two parts
    state_dict, load_state_dict                          a dictionary per part, by the name of its class
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from qvit.errors import QvitError

if TYPE_CHECKING:
    from qvit.plan.cost import CostModel
    from qvit.training.loop import Trainer

#: A class and its own part of a hook.
Part = tuple[type, Callable[..., Any]]


class ComposedHooks:
    """What the loop calls: hooks without parts; the base of classes that have some.

    Every class of an instance's method resolution order that defines a hook has a part in it, mixins that do not derive
    from this class included.
    """

    _own: ClassVar[dict[str, Callable[..., Any]]] = {}
    _parts: ClassVar[dict[str, tuple[Part, ...]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own = {name: vars(cls)[name] for name in COMPOSED if name in vars(cls)}
        cls._parts = {name: _parts_of(cls, name) for name in COMPOSED}
        for name in COMPOSED:
            setattr(cls, name, _composed(cls, name))

    def attach(self, model: nn.Module, cost: CostModel, steps_per_epoch: int) -> None:
        """Called once with the calibrated (or resumed) model, before training."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Called before the epoch's first step."""

    def penalty(self, step: int = 0) -> Tensor | None:
        """Added to the loss of every step, once whatever its micro-batches; None for none.

        `step` steps are done before it.
        """

    def before_step(self, trainer: Trainer) -> None:
        """Called when all gradients of a step are there, before they are clipped."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after the optimizer's step; `trainer.step` does not count it yet."""

    def finish(self, trainer: Trainer) -> None:
        """Called after the last step, before the result is evaluated."""

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        """Figures for the log: `bit_operations`, and at the end of an epoch the widths.

        Called where waiting for the device is allowed.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside model and optimizer: tensors, in dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; not called for a checkpoint without it."""


def _parts_of(cls: type, name: str) -> tuple[Part, ...]:
    """The classes that have a part in a hook, and the parts: base classes first."""
    found = []
    for owner in reversed(cls.__mro__):
        own = vars(owner) if not issubclass(owner, ComposedHooks) else vars(owner)["_own"]
        if name in own:
            found.append((owner, own[name]))
    return tuple(found)


def _composed(cls: type[ComposedHooks], name: str) -> Callable[..., Any]:
    """The hook that calls all parts. Raises TypeError if it is called by one of them."""
    combine = COMPOSED[name]
    documented: Any = cls._own.get(name, getattr(ComposedHooks, name))

    @functools.wraps(documented)
    def hook(self: ComposedHooks, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not cls:
            raise TypeError(
                f"'{name}' of {type(self).__name__} calls that of {cls.__name__}: each class defines its own part "
                "alone, and all parts are called; leave out super()"
            )
        return combine(cls._parts[name], self, *args, **kwargs)

    return hook


def _call_each(parts: tuple[Part, ...], *args: Any, **kwargs: Any) -> None:
    for _, part in parts:
        part(*args, **kwargs)


def _sum(parts: tuple[Part, ...], *args: Any, **kwargs: Any) -> Tensor | None:
    total = None
    for _, part in parts:
        own = part(*args, **kwargs)
        total = own if total is None else total if own is None else total + own
    return total


def _merge(parts: tuple[Part, ...], *args: Any, **kwargs: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for owner, part in parts:
        own = part(*args, **kwargs)
        if common := sorted(merged.keys() & own.keys()):
            raise TypeError(f"figure '{common[0]}' of {owner.__name__} is that of another class as well: rename one")
        merged |= own
    return merged


def _by_owner(parts: tuple[Part, ...], *args: Any) -> dict[str, Any]:
    states = [(owner.__name__, part(*args)) for owner, part in parts]
    return {name: state for name, state in states if state}


def _to_owners(parts: tuple[Part, ...], hooks: ComposedHooks, state: dict[str, Any]) -> None:
    owners = {owner.__name__: part for owner, part in parts}
    if unknown := sorted(state.keys() - owners.keys()):
        raise QvitError(f"the checkpoint has a state of '{unknown[0]}', which is no part of {type(hooks).__name__}")
    for name, own in state.items():
        owners[name](hooks, own)


#: Every hook, and how its parts make one.
COMPOSED: dict[str, Callable[..., Any]] = {
    "attach": _call_each,
    "on_epoch": _call_each,
    "penalty": _sum,
    "before_step": _call_each,
    "after_step": _call_each,
    "finish": _call_each,
    "figures": _merge,
    "state_dict": _by_owner,
    "load_state_dict": _to_owners,
}
