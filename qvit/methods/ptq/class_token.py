"""A width of its own for the class token, and for registers: the prefix of the tokens.

Every block reads the class token's row of a product for the answer, and it is one of some 200: 8 bits for it in a plan
of 4 cost 0.4 % more bit operations. In the plan this is a token split with a share of 0 (`TokenSplit`):

    {"bit_width": 8, "token_bit_width": {"share": 0, "low": 4}, "switchable_scale": true}

Sites that get it are left operands, whose tokens are rows of a product (`ROWS`): two scales for two ranges of rows, and
every sum stays one of integers. Keys and values lie along the axis that is summed over or normalised over, where one
token of 200 counts little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from qvit.quantizers import Quantizer, quantizers_of


def step_of(quantizer: Quantizer) -> float:
    """The mean scale of a quantizer; where prefix tokens have a width of their own, of the other tokens."""
    split = quantizer.spec.token_bit_width
    scale, _ = quantizer.grid() if split is None else quantizer.grid(quantizer.group_widths()[1])
    return float(scale.mean())


@contextmanager
def upper_scales_held(block: nn.Module) -> Iterator[None]:
    """Within the block the scales of prefix tokens are not trained.

    They share a parameter, hence a learning rate, with the scales of the other tokens, which are up to a hundred times
    as large, and have nothing to gain: their grid is fine.
    """
    with ExitStack() as stack:
        for _, quantizer in quantizers_of(block):
            split = quantizer.spec.token_bit_width
            if split is None:
                continue
            lower = quantizer.get_buffer("candidates") == split.low

            def only_lower(grad: Tensor, lower: Tensor = lower) -> Tensor:
                return grad * lower

            for name in ("scale", "offset"):
                bank = quantizer._parameters.get(name)
                if bank is not None:
                    stack.callback(bank.register_hook(only_lower).remove)
        yield
