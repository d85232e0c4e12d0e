"""What goes into the blocks of a model: inputs of all images at one place, and from one block to the next.

A model is not asked to be a sequence of blocks. Inputs are caught by running the model up to a block; where a block's
output is what the next one gets (that is measured on a few images), the outputs are handed on instead, and the prefix
is not computed again.

A block takes one tensor with images on its first axis, and perhaps further arguments that are the same for all images
(rotary tables, a shared position bias).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.models.layers import AttentionSites

CHUNK = 32
#: Arguments but for the first, by place and by name.
Extra = tuple[tuple[Any, ...], dict[str, Any]]


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

    def with_extra(self, extra: Extra) -> Inputs:
        """The same tensors with other further arguments."""
        return replace(self, args=extra[0], kwargs=extra[1])


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a quantized model that hold an attention module, by path, in the model's order.

    The model itself is none of them, where it pools by attention.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, AttentionSites)]
    parents = filter(None, dict.fromkeys(path.rpartition(".")[0] for path in paths))
    return {parent: model.get_submodule(parent) for parent in parents}


@torch.no_grad()
def capture(model: nn.Module, path: str, batches: Iterable[Tensor], images: int) -> Inputs | None:
    """Inputs of the block at `path` for the first `images` images; None if further arguments differ by image.

    Raises QvitError if the block is never reached or there are no images.
    """
    parts: list[Tensor] = []
    seen, extra = 0, None
    with _arguments_of(model, path) as ask:
        for batch in batches:
            wanted = batch[: images - seen]
            # The very first piece is one image, so that arguments with one row per image are seen to differ.
            for piece in wanted.split(CHUNK) if parts else (wanted[:1], *wanted[1:].split(CHUNK)):
                if not len(piece):
                    continue
                found = ask(piece)
                if found is None:
                    raise QvitError(f"block '{path}' is not reached by a forward pass")
                x, own = found
                extra = own if extra is None else extra
                if not isinstance(x, Tensor) or len(x) != len(piece) or not _equal(extra, own):
                    return None
                parts.append(x.clone())
                seen += len(piece)
            if seen >= images:
                break
    if extra is None:
        raise QvitError("no images to reconstruct with: pass at least one batch of training images")
    return Inputs(torch.cat(parts), *extra)


@torch.no_grad()
def same_input(model: nn.Module, first: str, second: str, batches: Iterable[Tensor]) -> Extra | None:
    """Whether block `second` gets the output of block `first` and nothing else that differs by image.

    Returns:
        The further arguments of `second`; None if it gets something else.
    """
    outputs: list[Any] = []
    hook = model.get_submodule(first).register_forward_hook(lambda _module, _args, output: outputs.append(output))
    images = next(iter(batches))[:3]
    with hook, _arguments_of(model, second) as ask:
        found = [ask(images[:2]), ask(images[-1:])]
    one, other = found
    if one is None or other is None or not _equal(outputs, [one[0], other[0]]):
        return None
    return one[1] if _equal(one[1], other[1]) else None


@contextmanager
def _arguments_of(model: nn.Module, path: str) -> Iterator[Callable[[Tensor], tuple[Any, Extra] | None]]:
    """Within the block, what the module at `path` gets for some images: its first argument, and all others.

    The model runs no further; None if it does not get there.
    """
    caught: list[tuple[Any, Extra]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else None, (args[1:], kwargs)))
        raise _Reached

    def ask(images: Tensor) -> tuple[Any, Extra] | None:
        with suppress(_Reached):
            model(images)
        return caught.pop() if caught else None

    with model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True):
        yield ask


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same, tensors by value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or a == b
