"""What the forward pass of a training step on a GPU runs in: the forms of whole models that `QVIT_GPU_FUSED` turns on.

A model is changed for the time of the pass alone, so that whoever looks at it in between, a method or an evaluation,
finds it as it is. Attention needs nothing of this kind: its layers choose their form themselves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

from torch import nn

from qvit.kernels import gpu_norm, gpu_weights
from qvit.models.norms import fused_norms
from qvit.training.held_weights import HeldWeights


def fused_forms(model: nn.Module, weights: HeldWeights) -> AbstractContextManager[object]:
    """Within, norms of `model` are left to the layers behind them, and its weights are quantized together."""
    forms = ExitStack()
    if gpu_norm.ENABLED:
        forms.enter_context(fused_norms(model))
    if gpu_weights.ENABLED:
        forms.enter_context(weights.together())
    return forms
