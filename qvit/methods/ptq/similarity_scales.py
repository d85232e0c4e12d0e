"""Scales by the similarity of outputs, and by the order of attention (Liu et al., NeurIPS 2021).

Calibration takes the scales of least squared error of each operand. Here the operands of a linear layer get, one after
the other, the multiple of their scales whose product is most similar to the float one, by Pearson's correlation

    Γ(O, Ô) = Σ (O - mean O)(Ô - mean Ô) / (‖O - mean O‖·‖Ô - mean Ô‖)          over images, tokens and channels

and q and k of every head those whose scores q·kᵀ are. With the ranking loss, q and k maximise Γ - L, where

    L = mean over queries and pairs of keys i < j of  max(0, θ - (Â_i - Â_j)·sign(A_i - A_j))

counts pairs that quantization brings out of order: the softmax keeps the order of scores, so who is attended to most is
decided here. Weights and inputs alternate, as in the paper: a candidate is held against the float output with the
others as they stand. A layer sees float inputs, so layers do not wait for each other.

The text was not available. Ours: the candidates, which are 0.5 to 1.2 times the calibrated scales in steps of 0.05; one
factor for all channels of a weight; scores in units of the float scores' standard deviation, in which L and θ are
measured, on some queries; and the weight 1 of L. Γ does not see a common factor of an output. Where prefix tokens have
a width of their own, the scales of the others are searched. Operands whose tokens are ranked, and q and k whose scales
are not of heads, stay as calibrated.

Cost: a forward of each layer over `IMAGES` images for each candidate, operand and round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.methods.ptq.class_token import scales_of
from qvit.methods.ptq.images import FirstImages
from qvit.models.convert import in_eval_mode, quantizers_disabled
from qvit.models.layers import AttentionSites, QuantLinear, for_all_heads, quantizer_at, weight_parts
from qvit.quantizers import Quantizer

#: What calibrated scales are multiplied by. Of equally good ones the first is taken.
FACTORS = (1.0, *(step / 20 for step in range(10, 25) if step != 20))
#: Images that take part, and how often weights and inputs take turns.
IMAGES, ROUNDS = 8, 2
#: The margin θ of the ranking loss, and how many images (or windows) and queries of each it looks at.
THETA, RANKED_IMAGES, RANKED_QUERIES = 0.1, 4, 8


def pearson(reference: Tensor, found: Tensor) -> Tensor:
    """Pearson's correlation of vectors (..., n), float64: (...); 0 where one of them is constant."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (reference, found))
    lengths = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / lengths.clamp_min(1e-300)


def ranking_loss(reference: Tensor, found: Tensor, theta: float = THETA) -> Tensor:
    """L of rows of attention (..., keys), without the mean over rows: (...)."""
    first, second = torch.triu_indices(reference.shape[-1], reference.shape[-1], 1, device=reference.device)
    signs = (reference[..., first] - reference[..., second]).sign()
    return (theta - (found[..., first] - found[..., second]) * signs).clamp_min(0).mean(-1)


@torch.no_grad()
def fit_similarity_scales(model: nn.Module, batches: Iterable[Tensor], *, ranking: bool = False) -> list[str]:
    """Chooses the scales of linear layers' operands, of q and of k again, in place; the model's mode is restored.

    Args:
        model: A calibrated model.
        batches: Calibration images of one size, on the model's device; the first `IMAGES` are used.
        ranking: Whether the ranking loss takes part for q and k.

    Returns:
        Paths of the layers and attention modules whose scales were searched.
    """
    found: list[str] = []
    values: dict[str, Tensor] = {}

    def layer(path: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        leaves = [*weight_parts(module), "input"]
        operands = [own for leaf in leaves if (own := _searched(quantizer_at(module, leaf))) is not None]
        _alternate(operands, lambda: pearson(output.flatten(), module.forward(inputs[0]).flatten()).reshape(1))
        found.append(path)

    def keep(name: str, _quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
        values[name] = inputs[0]

    def attention(path: str, query: Quantizer, key: Quantizer, *_given: Any) -> None:
        q, k = values.pop(f"{path}.query"), values.pop(f"{path}.key")
        exact = scores(q, k)
        _alternate([query, key], lambda: agreement(exact, scores(query.forward(q), key.forward(k)), ranking))
        found.append(path)

    images = torch.cat(list(FirstImages(batches, IMAGES)))
    with quantizers_disabled(model), in_eval_mode(model), ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, QuantLinear):
                stack.enter_context(module.register_forward_hook(partial(layer, path)))
            elif isinstance(module, AttentionSites):
                query, key = (_searched(quantizer_at(module, leaf), by_head=True) for leaf in ("query", "key"))
                if query is None or key is None:
                    continue
                for leaf, own in (("query", query), ("key", key)):
                    stack.enter_context(own.register_forward_pre_hook(partial(keep, f"{path}.{leaf}")))
                stack.enter_context(module.register_forward_hook(partial(attention, path, query, key)))
        model(images)
    return found


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q·kᵀ by head, (H, B, N, M), of q (B, H, N, d) and k (B, G, M, d), without a factor."""
    return (q @ for_all_heads(k, q.shape[1]).mT).transpose(0, 1)


def agreement(exact: Tensor, found: Tensor, ranking: bool) -> Tensor:
    """Γ, or Γ - L, of scores (H, B, N, M) by head: (H,)."""
    similar = pearson(exact.flatten(1), found.flatten(1))
    if not ranking:
        return similar
    deviation = exact.flatten(1).std(-1).clamp_min(1e-12).view(-1, 1, 1, 1)
    rows = slice(None, None, -(-exact.shape[2] // RANKED_QUERIES))
    a, b = (own[:, :RANKED_IMAGES, rows] / deviation for own in (exact, found))
    return similar - ranking_loss(a, b).double().mean((1, 2))


def _searched(quantizer: Quantizer | None, *, by_head: bool = False) -> Quantizer | None:
    """The quantizer if its scales are chosen here; those of q and k belong to heads, or to all."""
    split = None if quantizer is None else quantizer.spec.token_bit_width
    if quantizer is None or (split is not None and split.ranks):
        return None
    return quantizer if not by_head or scales_of(quantizer).numel() in (1, quantizer.num_groups) else None


def _set_scales(quantizer: Quantizer, scales: Tensor) -> None:
    """Replaces what `scales_of` returns."""
    split = quantizer.spec.token_bit_width
    quantizer.restore({"scale": scales} if split is None else {"scale": quantizer.grid()[0], "low_scale": scales})


def _alternate(quantizers: list[Quantizer], objective: Callable[[], Tensor]) -> None:
    """Gives each quantizer in turn, `ROUNDS` times, the scales of the largest objective, with all of them at work.

    `objective` answers with one number per head, or with one.
    """
    starts = [scales_of(own).clone() for own in quantizers]
    for own in quantizers:
        own.enabled = True
    try:
        for own, start in [*zip(quantizers, starts, strict=True)] * ROUNDS:
            _set_scales(own, start * best_factors(own, start, objective))
    finally:
        for own in quantizers:
            own.enabled = False


def best_factors(quantizer: Quantizer, start: Tensor, objective: Callable[[], Tensor]) -> Tensor:
    """The best of `FACTORS`: by scale, where the objective is by head and so are scales, or one for all, ()."""
    rows = []
    for factor in FACTORS:
        _set_scales(quantizer, start * factor)
        rows.append(objective())
    gains = torch.stack(rows)
    count = start.numel() if gains.shape[1] > 1 else 1
    chosen = gains.view(len(FACTORS), count, -1).mean(-1).argmax(0)
    factors = start.new_tensor(FACTORS)[chosen]
    return factors.view(start.shape) if count > 1 else factors.squeeze(0)
