"""VVTQ: variation-aware quantization of vision transformers (Huang et al. 2023, arXiv 2307.00331).

    L = L_KD + λ(t)·L_OBR

Transformers vary in three ways that make few bits hard: modules differ in how sensitive they are, weights and
activations have outliers, and in training weights oscillate between grid points. Each has its answer:

* Module-dependent quantization. Every module has its own scale, q, k and v each theirs (`scales`; one per head on
  request), and the gradient of a weight's scale is divided by the weight's size, not by the number of its elements:
  1/sqrt(Σ|w|·quant_max) (`scale_gradient`). Under Adam, which divides by the size of a gradient, a constant factor
  cancels: what is left is that the factor follows the weights while they change. With SGD it acts in full.
* Knowledge distillation from a strong teacher on several crops of each image, in place of labels (options of the run).
* Oscillation-aware bin regularization, L_OBR, which draws weights to the middle of their bin, late in training
  (`oscillation`; formulas and alternatives in `training/oscillation/remedies.py`).

Grids and widths are those of LSQ+; `qvit+vvtq` learns widths as Q-ViT does, with its scales per head, and starts the
remedy when they are frozen.

Where this differs from the public code (HuangOwen/Quantization-Variation), and why:
* Scales are fitted by calibration before processes start, activations too, by least squared error, the offset of the
  GELU's output with them. There, activations start at 2·mean|x|/sqrt(2^(b-1) - 1) and offsets at 0, in one process.
* Bins are told apart by integer codes; there, by comparing floats with multiples of the scale.
* λ follows the steps, not the epochs.
* The paper as we know it divides by Σ|w|·sqrt(quant_max) (`norm-squared`); the default is the code's.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from qvit.methods.base import Asymmetric, Method, MethodOptions, register_method
from qvit.methods.lsq import LSQMethod
from qvit.methods.qvit import QViTMethod, QViTOptions
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.training.loop import Trainer
from qvit.training.oscillation import Remedy, RemedyOptions, create_remedy


class VariationOptions(RemedyOptions, MethodOptions):
    """What `vvtq` and `qvit+vvtq` have in common: the remedies, and the gradients of scales."""

    scale_gradient: Literal["norm", "norm-squared", "count"] = Field(
        "norm",
        description="factor of the gradient of a weight's scale: the `norm` Σ|w| (public code), its square (paper), "
        "or LSQ's `count` of elements",
    )
    activation_scale_gradient: Literal["count-linear", "count"] = Field(
        "count-linear",
        description="that of an activation's scale: `count-linear`, 1/(sqrt(N)·quant_max) (public code), or LSQ's "
        "`count`",
    )


class VVTQOptions(VariationOptions):
    """Options of `vvtq`."""

    scales: Literal["shared", "per-head"] = Field(
        "shared", description="`shared` by the heads of a tensor (public code)"
    )
    asymmetric: Asymmetric = ()


class QViTVVTQOptions(QViTOptions, VariationOptions):
    """Options of `qvit+vvtq`: those of `qvit`, and those that it shares with `vvtq`."""


class WithRemedy(Method):
    """Adds a remedy against oscillation to a method with quantized weights, whose options are `RemedyOptions`, too."""

    options: RemedyOptions
    remedy: Remedy
    total_steps: int

    @property
    def not_before(self) -> float:
        """The share of training after which codes mean something."""
        return 0.0

    def attach(self, model: nn.Module, cost: CostModel, steps_per_epoch: int) -> None:
        self.total_steps = self.config.epochs * steps_per_epoch
        self.remedy = create_remedy(model, self.options, self.not_before)

    def penalty(self, step: int = 0) -> Tensor | None:
        return self.remedy.penalty(step / self.total_steps)

    def before_step(self, trainer: Trainer) -> None:
        self.remedy.before_step(trainer.step / self.total_steps)

    def after_step(self, trainer: Trainer) -> None:
        self.remedy.after_step((trainer.step + 1) / self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        return self.remedy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remedy.load_state_dict(state)


class _VariationAware(WithRemedy):
    """What VVTQ adds to a method with learned scales: gradient factors, and a remedy against oscillation."""

    options: VariationOptions

    def plan(self, cost: CostModel) -> QuantPlan | None:
        plan = super().plan(cost)
        if plan is None:
            return None
        forms = {"weight": self.options.scale_gradient, "activation": self.options.activation_scale_gradient}
        rules = [Rule(site.name, {"scale_gradient": forms[site.role]}) for site in plan.quantized(cost.sites)]
        return plan.with_rules(*rules).resolve(cost.sites)


@register_method("vvtq")
class VVTQMethod(_VariationAware, LSQMethod):
    """Uniform widths, module-dependent scales, a remedy against oscillation."""

    Options = VVTQOptions


@register_method("qvit+vvtq")
class QViTVVTQMethod(_VariationAware, QViTMethod):
    """Learned widths within a budget; once they are frozen, VVTQ's remedy."""

    Options = QViTVVTQOptions
    searching_epochs: int

    @property
    def not_before(self) -> float:
        return self.searching_epochs / self.config.epochs
