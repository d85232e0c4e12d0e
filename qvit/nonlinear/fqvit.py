"""FQ-ViT (Lin et al., IJCAI 2022, https://arxiv.org/abs/2111.13824): Log-Int-Softmax, whose values are powers of two.

    q = round(log2(round(Σe / e)))        p = 2^-q for q < 16 (4 bits), else 0        e by I-BERT's polynomial

log2 is rounded on the integer itself: with n = round(Σe / e) of L bits it is L - 1, and L if the next bit is
set. Here codes have 15 fraction bits like those of other forms, 2^(15 - q), so whatever grid the plan gives to
probabilities may follow. The paper's LayerNorm, whose 8-bit input has a power-of-two factor for each channel, is not a
form of its own: the input in fixed point has 25 bits, which such factors are a way to avoid.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from qvit.nonlinear.base import SOFTMAX, bit_length, exponential_input, quotient
from qvit.nonlinear.ibert import exponential

_MOST = 15


@SOFTMAX.register("fq-vit")
def softmax(scores: Int[Tensor, "... M"]) -> Int[Tensor, "... M"]:
    """2^(15 - q), or 0: 15 fraction bits."""
    e = exponential(exponential_input(scores))
    own = e.clamp_min(1)
    n = quotient(e.sum(-1, keepdim=True) + (own >> 1), own)
    whole = bit_length(n) - 1
    q = whole + ((n >> (whole - 1).clamp_min(0)) & (whole > 0))
    return torch.where((e > 0) & (q <= _MOST), 1 << (_MOST - q).clamp_min(0), 0)
