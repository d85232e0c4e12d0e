"""What follows a block of a float model, as a function of the block's output: up to what the classifier sees.

A local error counts every channel of every token alike; what matters is what the rest of the model makes of it (GLF-Q,
2026: beside the local error, that of the feature in front of the classifier, through the frozen float blocks).

The model is not asked to be a sequence of blocks: while a suffix is in use, the block hands out what it is told, and
the blocks before it hand on what they get, at no cost. That needs blocks whose output has the shape of their input,
which is what a residual connection gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qvit.models.block_inputs import CHUNK
from qvit.models.features import feature_function

Suffix = Callable[[Tensor], Tensor]


class _Given(nn.Module):
    """In the place of a block: hands out `output`, or its own input."""

    output: Tensor | None = None

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return x if self.output is None else self.output


@contextmanager
def suffix_of(model: nn.Module, blocks: list[str], path: str, images: Tensor) -> Iterator[Suffix]:
    """Within the block, what the model makes of outputs (B, ...) of the block at `path`: features (B, channels).

    Args:
        model: A float model in eval mode. Its blocks are replaced meanwhile and its parameters get no gradients; all
            of that is undone at the end.
        blocks: All blocks in order; those before `path` are skipped.
        path: One of them.
        images: Any images of the right size (at least one): they decide nothing but shapes.
    """
    own = _Given()
    with ExitStack() as stack:
        for parameter in [parameter for parameter in model.parameters() if parameter.requires_grad]:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for each in blocks[: blocks.index(path) + 1]:
            stack.callback(model.set_submodule, each, model.get_submodule(each))
            model.set_submodule(each, own if each == path else _Given())
        feature = stack.enter_context(feature_function(model))

        def run(outputs: Tensor) -> Tensor:
            own.output = outputs
            return feature(images[:1].expand(len(outputs), *images.shape[1:]))

        yield run


@torch.no_grad()
def features_of(model: nn.Module, batches: Iterable[Tensor], images: int) -> Tensor:
    """What the classifier of a float model sees of the first `images` images: (images, channels)."""
    found: list[Tensor] = []
    with feature_function(model) as feature:
        for batch in batches:
            found += [feature(part) for part in batch[: images - sum(map(len, found))].split(CHUNK) if len(part)]
    return torch.cat(found)
