"""A static scale for each position of a token (FIMA-Q, step 3).

Tokens differ in range, most of all the class token and patches of an image's border from the others, and what a
position holds is alike in all images. A scale for each costs nothing in the products: an input's is one factor of a row
of the output, a query's or a probability's of a row, a key's of a column, and sums stay those of integers. A value's
would lie along the axis that is summed over, so values keep theirs.

    inputs    what q|k|v, `fc1` and `fc2` read          (N, 1)
    all       q, k, probabilities and heads' outputs too      (H, N, 1)

The number of tokens is then fixed: models that take images of any size have no positions, nor have windows, which are
many to an image. In a file each scale is 4 bytes; bit operations are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qvit.errors import UsageError
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Site

#: Sites of a block by option.
INPUTS = ("attn.qkv.input", "mlp.fc1.input", "mlp.fc2.input")
SITES = {"none": (), "inputs": INPUTS, "all": (*INPUTS, "attn.query", "attn.key", "attn.probs", "attn.output")}


def position_rules(model: nn.Module, sites: Mapping[str, Site], plan: QuantPlan, option: str) -> list[Rule]:
    """What gives a plan's activations a scale for each position.

    Args:
        model: The model, float or quantized.
        sites: Its sites.
        plan: Resolved for them; what it leaves in float stays there.
        option: A key of `SITES`.

    Raises:
        UsageError: The model's tokens have no fixed positions.
    """
    named = [name for name in sites if name.endswith(SITES[option])] if SITES[option] else []
    found = [name for name in named if sites[name].layout.positions is not None]
    if option != "none" and not found:
        if getattr(model, "dynamic_img_size", False):
            why = "it takes images of any size, so its number of tokens is not fixed"
        else:
            why = "they are known for timm's VisionTransformer with plain blocks alone"
        raise UsageError(f"this {type(model).__name__} has no scales of positions: {why}; leave out --position-scales")
    return [Rule(name, {"granularity": "per-position"}) for name in found if plan.sites[name] is not None]
