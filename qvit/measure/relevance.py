"""Importance by relevance: the share of an answer that a tensor carries, times how far its width moves it.

Layer-wise relevance propagation (Bach et al. 2015) hands the logit of the predicted class back through the model, from
the outputs of every operation to its inputs. Relevance is R = t·g, element by element, with g the gradient of a graph
in which

    linear layers, sums     are as they are: the ε-rule with ε = 0; a bias keeps its own share
    LayerNorm, RMSNorm      take the deviation for a constant, so that they are linear
    activation functions    take φ(x)/x for a constant: all relevance passes from output to input
    products                give each factor a half: q·k, probabilities·values, gates
    softmax                 is as it is, a Taylor expansion at the scores: what they do not get, it keeps

These are the rules of AttnLRP (Achtibat et al., ICML 2024). They conserve relevance: inputs, biases and what softmaxes
keep add up to the logit. LRP-QViT (Ranjan and Savakis 2024) takes layers that carry more for more important, and gives
them more bits; its rules and its objective could not be read. Ours, per head of each site:

    Ω(b) = 1/2 · mean over images of  Σ_j |R_j| · ||t̂(b) - t||² / ||t||²

One forward and one backward per image; no labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qvit.measure.fisher import Sums
from qvit.measure.metric import Task, register_metric
from qvit.measure.probe import Probe, require_finite
from qvit.measure.table import Table

#: Operands of products of two activations, by the last name of their sites.
FACTORS = ("query", "key", "value", "probs")


def predicted_class(logits: Tensor, _generator: torch.Generator) -> Tensor:
    """What the backward pass of one image starts from: 1 at the largest logit."""
    return torch.zeros_like(logits).scatter_(-1, logits.detach().argmax(-1, keepdim=True), 1.0)


def share_of(site: str) -> float:
    """The share of t·g that is a site's relevance: half of it for a factor of a product."""
    return 0.5 if site.rpartition(".")[2] in FACTORS else 1.0


def carried(probe: Probe, site: str, tensor: Tensor, grad: Tensor) -> Tensor:
    """Σ|R| of each head of a site: (heads,), in double precision."""
    root = (tensor * grad).abs_().sqrt_()
    return share_of(site) * probe.squares_per_head(site, probe.quantizers[site].view(root)).double()


@contextmanager
def relevance_graph(probe: Probe) -> Iterator[None]:
    """Within the block, gradients of the probe's model are those of the rules above."""
    with ExitStack() as stack:
        for path, module in probe.model.named_modules():
            if hasattr(module, "normalized_shape"):
                stack.enter_context(module.register_forward_hook(_linear_norm))
            elif path.rpartition(".")[2] == "act" and not list(module.parameters()):
                stack.enter_context(module.register_forward_hook(_constant_slope))
            elif hasattr(module, "fc1_g") or hasattr(module, "gate_last"):
                gated: Any = module.norm  # behind the product with the gate
                stack.enter_context(gated.register_forward_pre_hook(_half))
        for site, quantizer in probe.quantizers.items():
            if share_of(site) < 1:
                stack.enter_context(quantizer.register_forward_pre_hook(_half))
        yield


def _linear_norm(norm: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    """The output of a norm whose deviation is a constant."""
    x = inputs[0]
    axes = tuple(range(-len(norm.normalized_shape), 0))
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(axes, keepdim=True)
    y = x * torch.rsqrt(x.detach().square().mean(axes, keepdim=True) + norm.eps)
    if norm.weight is not None:
        y = y * norm.weight
    return y if getattr(norm, "bias", None) is None else y + norm.bias


def _constant_slope(_act: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """φ(x) as x times a constant."""
    x = inputs[0]
    return x * torch.where(x == 0, 0.0, output / x).detach()


def _half(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The input as it is, with half the gradient."""
    return (inputs[0] + inputs[0].detach()) / 2


@register_metric("relevance")
def relevance(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    sums, probe = Sums(task, start=predicted_class), task.probe
    with relevance_graph(probe):
        for site, tensor, grad in sums.gradients():
            own = carried(probe, site, tensor, grad)
            require_finite(site, own, "gradients")
            if probe.sites[site].role == "weight":
                sums.add(f"carried:{site}", own)
            else:
                sums.add(site, own[:, None] * relative_errors(task, site, tensor))
        for site, weight in sums.weights.items():
            sums.add(site, sums[f"carried:{site}"][:, None] * relative_errors(task, site, weight))
    return sums.table()


def relative_errors(task: Task, site: str, tensor: Tensor) -> Tensor:
    """||t̂ - t||²/||t||² by head and width."""
    probe = task.probe
    squares = probe.squares_per_head(site, probe.quantizers[site].view(tensor)).double().clamp_min(1e-30)
    columns = [probe.squares_per_head(site, error).double() for error in probe.errors(site, tensor, task.widths)]
    return torch.stack(columns, dim=1) / squares[:, None]
