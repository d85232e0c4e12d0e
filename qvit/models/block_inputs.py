"""What goes into the blocks of a model: inputs of all images at one place, and from one block to the next.

A model is not asked to be a sequence of blocks. Inputs are caught by running the model up to a block; where a block's
output is what the next one gets (that is measured on a few images), the outputs are handed on instead, and the prefix
is not computed again.

A block takes one tensor with images on its first axis, and perhaps further arguments that are the same for all images
(rotary tables, a shared position bias).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.models.layers import AttentionSites

CHUNK = 32


class _Reached(Exception):
    """The block was reached: the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a block for all images.

    Attributes:
        x: (images, ...).
        args, kwargs: Further arguments, the same for all images.
    """

    x: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """The block's output for some inputs."""
        return block(x, *self.args, **(self.kwargs or {}))

    @torch.no_grad()
    def through(self, block: nn.Module) -> Inputs:
        """The block's outputs, as inputs of what follows."""
        return Inputs(torch.cat([self.call(block, part) for part in self.x.split(CHUNK)]))

    def with_extra(self, extra: tuple[tuple[Any, ...], dict[str, Any]]) -> Inputs:
        """The same tensors with other further arguments."""
        return replace(self, args=extra[0], kwargs=extra[1])


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a quantized model that hold an attention module, by path, in the model's order."""
    paths = [path for path, module in model.named_modules() if isinstance(module, AttentionSites)]
    return {parent: model.get_submodule(parent) for parent in dict.fromkeys(p.rpartition(".")[0] for p in paths)}


@torch.no_grad()
def capture(model: nn.Module, path: str, batches: Iterable[Tensor], images: int) -> Inputs | None:
    """Inputs of the block at `path` for the first `images` images; None if further arguments differ by image.

    Raises QvitError if the block is never reached or there are no images.
    """
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    parts, seen = [], 0
    hook = model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            # The very first piece is one image, so that arguments with one row per image are seen to differ.
            wanted = batch[: images - seen]
            sizes = [1] if not parts else []
            rest = len(wanted) - len(sizes)
            sizes += [min(CHUNK, rest - done) for done in range(0, rest, CHUNK)]
            for piece in wanted.split(sizes):
                try:
                    model(piece)
                except _Reached:
                    args, _ = caught[-1]
                    if not args or not isinstance(args[0], Tensor) or len(args[0]) != len(piece):
                        return None
                    parts.append(args[0].clone())
                else:
                    raise QvitError(f"block '{path}' is not reached by a forward pass")
                seen += len(piece)
                first, last = _extra(caught[0]), _extra(caught[-1])
                caught[1:] = []
                if not _equal(first, last):
                    return None
            if seen >= images:
                break
    finally:
        hook.remove()
    if not parts:
        raise QvitError("no images to reconstruct with: pass at least one batch of training images")
    args, kwargs = caught[0]
    return Inputs(torch.cat(parts), args[1:], kwargs)


@torch.no_grad()
def same_input(
    model: nn.Module, first: str, second: str, batches: Iterable[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Whether block `second` gets the output of block `first` and nothing else that differs by image.

    Returns:
        The further arguments of `second`; None if it gets something else.
    """
    outputs: list[Tensor] = []
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        raise _Reached

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output)

    hooks = [
        model.get_submodule(first).register_forward_hook(keep),
        model.get_submodule(second).register_forward_pre_hook(stop, with_kwargs=True),
    ]
    images = next(iter(batches))[:3]
    try:
        for piece in (images[:2], images[-1:]):
            try:
                model(piece)
            except _Reached:
                continue
            return None
    finally:
        for hook in hooks:
            hook.remove()
    for output, (args, _) in zip(outputs, inputs, strict=True):
        if not args or not isinstance(args[0], Tensor) or not _equal(args[0], output):
            return None
    return _extra(inputs[0]) if _equal(_extra(inputs[0]), _extra(inputs[1])) else None


def _extra(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All arguments but the first."""
    return call[0][1:], call[1]


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same, tensors by value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or a == b
