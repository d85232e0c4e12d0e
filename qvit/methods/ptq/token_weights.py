"""How much the answer depends on the outputs of each layer, by token position and by channel.

For a layer's output z (positions, channels) and L = -log p of an answer drawn from the float model's own distribution,
E[(∂L/∂z)²] is the diagonal of the Fisher information: half of Σ F·δ² is what an error δ adds to the divergence. The
mean over channels says what a token is worth, the mean over tokens what a channel is. In the last block the class
token is worth everything at `fc1` and nothing at `attn.qkv` but its query; an error that is averaged over tokens knows
nothing of that. Of a model that answers with features the divergence is the cosine distance, and its gradients start
from the vectors of `measure.features.signed_features`.

`FLOOR` of every mean is shared out evenly: where one token counts alone, there is one row per image, and moments of so
few would be singular.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.measure.features import signed_features
from qvit.methods.ptq.images import OneSize
from qvit.models.features import answers_with_features

FLOOR = 0.1
#: No more images than this take part: a mean over them and their tokens has settled.
MOST_IMAGES = 64
#: Images of a backward pass.
CHUNK = 8


@dataclass(frozen=True)
class Worth:
    """Weights of a layer's output errors, both of mean 1.

    Attributes:
        tokens: (positions,): all of an image that pass through the layer, windows one after the other.
        channels: (channels,).
    """

    tokens: Tensor
    channels: Tensor

    def rows(self, count: int) -> Tensor:
        """Weights of `count` rows, which are images times positions."""
        return self.tokens.repeat(count // len(self.tokens))


def worth_of(model: nn.Module, paths: Iterable[str], batches: Iterable[Tensor], seed: int = 0) -> dict[str, Worth]:
    """The worth of the outputs of some layers of a float model; those that the answer does not depend on are left out.

    Args:
        model: In eval mode.
        paths: Layers, whose outputs have channels last.
        batches: Images of one size, on the model's device; at most `MOST_IMAGES` are used.
        seed: Draws the answers.

    Raises:
        UsageError: Images of several sizes.
    """
    outputs: dict[str, Tensor] = {}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[path] = output

    seen, alike = 0, OneSize(batches, "the worth of tokens")
    with ExitStack() as stack, torch.enable_grad():
        for path in paths:
            stack.enter_context(model.get_submodule(path).register_forward_hook(partial(keep, path)))
        for images in (chunk for batch in alike for chunk in batch.split(CHUNK)):
            answer = model(images[: MOST_IMAGES - seen])
            if answers_with_features(model):
                loss = (answer * signed_features(answer, generator)).sum()
            else:
                drawn = torch.multinomial(answer.detach().softmax(-1).cpu(), 1, generator=generator)
                loss = nn.functional.cross_entropy(answer, drawn.flatten().to(answer.device), reduction="sum")
            grads = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
            for path, grad in zip(outputs, grads, strict=True):
                if grad is None:
                    continue
                own = grad.square().reshape(len(answer), -1, grad.shape[-1])
                tokens, channels = own.sum((0, 2)), own.sum((0, 1))
                before = sums.get(path)
                sums[path] = (tokens, channels) if before is None else (before[0] + tokens, before[1] + channels)
            outputs.clear()
            seen += len(answer)
            if seen >= MOST_IMAGES:
                break
    return {path: Worth(*map(_weights, own)) for path, own in sums.items()}


def _weights(total: Tensor) -> Tensor:
    """Of mean 1, with the floor."""
    return (1 - FLOOR) * total / total.mean().clamp_min(1e-30) + FLOOR
