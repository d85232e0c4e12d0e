"""IRM and DGD: another Q-ViT (Y. Li et al., NeurIPS 2022, arXiv 2210.06707), "accurate and fully quantized".

* Information rectification (IRM): queries and keys are normalised with learned gain and shift before they are quantized
  (`quantizers/irm.py`).
* Distribution-guided distillation (DGD): similarities of quantized queries, and of keys, follow those of the float
  model. For every layer and head, with q of shape (tokens, head_dim),

      G = q·qᵀ / ||q·qᵀ||        L_DGD = Σ over layers, heads, {q, k} of ||G_float - G||        norms: Frobenius

  is added to the loss with weight `guidance`, as a mean over images. The published training adds it to hard
  distillation from the same float model (`distill = 1`, `distill_kind = "hard"`).

The float model that guides is the one that training started from: its copy passes every batch, so a step costs a
forward more, and two (tokens, tokens) matrices per layer and head are kept for the backward pass. Where micro-batches
are accumulated, those of the last one are guided. Weights have one scale per output channel, as published; activations
one per head. The published numbers (DeiT-T 50.4, DeiT-S 72.0, Swin-T 74.7 at 2 bits) are from 300 epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.methods.base import Asymmetric, MethodOptions, register_method
from qvit.methods.lsq import LSQMethod
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.quantizers import quantizers_of

GUIDED = ("query", "key")


class IRMOptions(MethodOptions):
    """Options of `irm`."""

    rectify: bool = Field(True, description="normalize queries and keys before they are quantized")
    guidance: float = Field(
        1.0,
        ge=0,
        description="weight of the distance of the similarities from the float model's (L_DGD); 0 leaves it out, and "
        "the float model's pass with it",
    )
    scales: Literal["per-channel", "per-head", "shared"] = Field(
        "per-channel", description="`per-channel` for weights, and per head for the rest (published)"
    )
    asymmetric: Asymmetric = ()


@register_method("irm")
class IRMMethod(LSQMethod):
    """LSQ+ with rectified, guided queries and keys."""

    Options = IRMOptions
    options: Any

    def plan(self, cost: CostModel) -> QuantPlan:
        plan = super().plan(cost)
        if not self.options.rectify:
            return plan
        guided = [name for name in self._guided(cost) if plan.sites[name] is not None]
        return plan.with_rules(*(Rule(name, {"quantizer": "irm"}) for name in guided)).resolve(cost.sites)

    def _guided(self, cost: CostModel) -> list[str]:
        """The sites of queries and keys."""
        return [n for n, site in cost.sites.items() if site.role == "activation" and n.rpartition(".")[2] in GUIDED]

    def attach(self, model: nn.Module, cost: CostModel, steps_per_epoch: int) -> None:
        self.seen: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        if not self.options.guidance:
            return
        if self.config.compile:
            raise UsageError("method 'irm' looks at tensors inside the model: it cannot be compiled; guidance=0 can")
        # At this point the model has the float weights, in a resumed run, too: its own are loaded after this call.
        float_model = copy.deepcopy(model).eval().requires_grad_(False)
        guided = set(self._guided(cost))
        for store, source in ((self.seen, model), (self.wanted, float_model)):
            for name, quantizer in quantizers_of(source):
                if source is float_model:
                    quantizer.enabled = False
                if name in guided:
                    quantizer.register_forward_hook(_note(store, name, training=source is model))

        def ask(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    float_model(inputs[0])

        model.register_forward_pre_hook(ask)

    def penalty(self, step: int = 0) -> Tensor | None:
        if not self.wanted:
            return None
        parts = [similarity_distance(x, self.wanted[name]) for name, x in self.seen.items()]
        self.seen.clear()
        self.wanted.clear()
        return torch.stack(parts).sum() * self.options.guidance


def similarities(x: Tensor) -> Tensor:
    """G of the formula above, (B, H, N, N), at least float32, for x of shape (B, H, N, d)."""
    products = x.float() @ x.float().transpose(-2, -1)
    return products / torch.linalg.matrix_norm(products, keepdim=True).clamp_min(1e-12)


def similarity_distance(x: Tensor, reference: Tensor) -> Tensor:
    """Σ over heads of ||G_reference - G||, mean over images; both (B, H, N, d), one number."""
    difference = similarities(reference) - similarities(x)
    return difference.square().sum((-2, -1)).clamp_min(1e-12).sqrt().sum(1).mean()


def _note(store: dict[str, Tensor], name: str, *, training: bool) -> Callable[..., None]:
    """A hook that keeps a quantizer's output; of a model in training only where there are gradients."""

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() or not training:
            store[name] = output

    return hook
