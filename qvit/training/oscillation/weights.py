"""The weights of a quantized model beside the quantizers that turn them into codes.

A linear layer or a convolution has one quantizer for its weight, a fused q|k|v projection three, each for a third of
its rows. Sites that stay in float, and those on a grid that is not uniform, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qvit.models.layers import QKV
from qvit.quantizers import Quantizer


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight and the quantizers of its equal parts, one or three.

    Attributes:
        parameter: The latent weight, in float.
        sites: The name of each part's site.
        quantizers: The quantizer of each part; None for a part that is left out.
    """

    parameter: nn.Parameter
    sites: tuple[str, ...]
    quantizers: tuple[Quantizer | None, ...]

    def parts(self, *, detached: bool = False) -> Iterator[tuple[str, Quantizer, Tensor]]:
        """Site, quantizer and weight of each part, viewed as the quantizer sees it.

        Detached ones share their memory with the parameter.
        """
        whole = self.parameter.detach() if detached else self.parameter
        chunks = whole.chunk(len(self.sites)) if len(self.sites) > 1 else (whole,)
        for site, quantizer, chunk in zip(self.sites, self.quantizers, chunks, strict=True):
            if quantizer is not None:
                yield site, quantizer, quantizer.view(chunk)


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """All weights of a model that have codes, in the order of its modules."""
    found = []
    for path, module in model.named_modules():
        leaves = [f"{name}_weight" for name in QKV]
        if not any(leaf + Quantizer.SUFFIX in module._modules for leaf in leaves):
            leaves = ["weight"]
        own = [module._modules.get(leaf + Quantizer.SUFFIX) for leaf in leaves]
        quantizers = tuple(
            quantizer if isinstance(quantizer, Quantizer) and quantizer.uniform else None for quantizer in own
        )
        if any(quantizers):
            sites = tuple(f"{path}.{leaf}" for leaf in leaves)
            found.append(QuantizedWeight(module.get_parameter("weight"), sites, quantizers))
    return found
