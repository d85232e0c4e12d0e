"""Answers of a model without its first blocks: what they would put out is known, since nothing is quantized there.

Where one tensor of one block is quantized at a time, all blocks before it compute the same numbers every time. Here the
last of them returns what it returned once, those before it return what they are given, and no image is computed twice
up to that place: on average half of a model. A model is not asked to be a sequence of blocks. Which blocks run when is
watched, and the answers without them have to be those with them, to the last bit; else nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.measure.distance import distance_of
from qvit.measure.probe import Probe
from qvit.models.block_inputs import attention_blocks


class Prefix:
    """A model's answers to a few batches, with no more computed than a site needs.

    Args:
        probe: The model.
        batches: Images, (B, channels, height, width) each.
        answer: The probe's `logits` (None), or its `features`.
    """

    def __init__(
        self, probe: Probe, batches: Sequence[Tensor], answer: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.probe, self.batches, self.answer = probe, batches, answer or probe.logits
        self.distance = distance_of(probe.model)
        self.blocks = self._in_order()
        self.asked = self.left_out = 0
        self.outputs: list[Any] = []

    @torch.no_grad()
    def _in_order(self) -> dict[str, nn.Module]:
        """The blocks in the order in which they run; none if one of them runs twice."""
        found, ran = attention_blocks(self.probe.model), []
        hooks = [
            block.register_forward_hook(lambda *_, path=path: ran.append(path))  # type: ignore[misc]
            for path, block in found.items()
        ]
        try:
            self.answer(self.batches[0][:1])
        finally:
            for hook in hooks:
                hook.remove()
        return {path: found[path] for path in ran} if len(set(ran)) == len(ran) else {}

    def before(self, site: str) -> int:
        """How many blocks run before a site's tensor."""
        if self.probe.sites[site].position == "last":
            return len(self.blocks)
        inside = (index for index, path in enumerate(self.blocks) if site.startswith(f"{path}."))
        return next(inside, 0)

    @torch.no_grad()
    def leave_out(self, count: int, reference: Sequence[Tensor]) -> None:
        """Leaves out the first `count` blocks, if that does not change the answers.

        Args:
            count: Blocks, in the order in which they run.
            reference: The logarithms of the model's answers to each batch, as `log_answers` returns them.
        """
        if count == self.asked:
            return
        self.asked, self.left_out, self.outputs = count, 0, []
        if count:
            last = list(self.blocks.values())[count - 1]
            hook = last.register_forward_hook(lambda _module, _inputs, output: self.outputs.append(output))
            try:
                for batch in self.batches:
                    self.answer(batch)
            finally:
                hook.remove()
            self.left_out = count
            tensors = all(isinstance(output, Tensor) for output in self.outputs)
            if not tensors or not torch.equal(self.log_answers(0), reference[0]):
                self.left_out, self.outputs = 0, []

    def log_answers(self, index: int) -> Tensor:
        """log p of a batch, (B, classes); of features, these."""
        skipped = list(self.blocks.values())[: self.left_out]
        try:
            for block in skipped[:-1]:
                block.forward = _what_it_is_given
            if skipped:
                skipped[-1].forward = partial(_known, self.outputs[index])
            return self.distance.prepared(self.answer(self.batches[index]).float())
        finally:
            for block in skipped:
                del block.forward


def _what_it_is_given(x: Tensor, *_args: Any, **_options: Any) -> Tensor:
    return x


def _known(output: Tensor, *_args: Any, **_options: Any) -> Tensor:
    return output
