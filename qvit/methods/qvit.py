"""Q-ViT: fully differentiable quantization for vision transformers (Li et al. 2022, arXiv 2201.07703).

    min over weights W, scales S, widths B     E[ loss ] + η·max(0, C(B)/c - 1)²   (eq. 12-14; relative form, see below)

* Scales and widths are learned together, each attention head has its own widths (section 3.3, eq. 7-10).
* Switchable scale: one scale per candidate width 2…8 (eq. 11, Table 3b).
* Widths start near the budget, the first and the last layer at 8; both are learned (section 4.1).
* Two stages: widths move in the first σ of all epochs (searching), then stand still while weights and scales finish
  (diving). Table 3c: σ = 0.9 for 300 epochs.

The penalty in the paper is η·max(0, C - c)² with C in G bit operations and η = 0.1 (`penalty="absolute"`): its strength
depends on the model's size. The default divides by the budget, so that one η serves all models; 0.1/G² is 46 for DeiT-T
at 4 bits and 583 for DeiT-S in this form.

What differs from the paper, by option back to it (`docs/evidence.md` has what each is worth):
* Every element tells a width what one bit more would change (`width_gradient`, see `quantizers/lsq.py`). By the paper's
  rule (`clipping`) only elements beyond the limits do: a tensor that hardly clips, such as attention probabilities, has
  nothing to hold its widths against the penalty.
* Widths start at N for an N-bit budget. From N + 1, as published (`initial_bits`), the penalty first takes all widths
  far below the budget.
* Widths have their own learning rate, which falls to zero within the searching stage: they come to rest before they are
  frozen. With Adam a width moves by about one learning rate per step; the first rate is never below the weights' rate.
* σ is 0.4 for runs below 200 epochs, whose weights need the time after the widths have come to rest.
* The penalty counts real-valued widths. With rounding, the widths of all large layers, which fall in step, cross 2.5
  together: the model drops far below its budget and the search has to climb back.
* The penalty is soft, the budget is not: at the end of the search an integer program turns b̃ into widths within the
  budget (`allocate/rounding.py`). The paper reports overshoots up to 2 %.

`docs/paper-to-code.md` has what differs from the public code.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qvit.allocate import round_to_budget
from qvit.errors import UsageError
from qvit.functional import clamp_inward, round_ste, straight_through
from qvit.methods.base import Asymmetric, Method, MethodOptions, register_method
from qvit.methods.lsq import offset_rules, scale_rules
from qvit.methods.search import DifferentiableCost
from qvit.models.convert import freeze
from qvit.plan.budget import parse_budget
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule, plan_from
from qvit.plan.spec import Site, TensorSpec
from qvit.quantizers import Quantizer, quantizers_of
from qvit.quantizers.base import QUANTIZERS
from qvit.training.config import TrainConfig
from qvit.training.loop import Trainer
from qvit.training.optimizer import drop_widths

_log = logging.getLogger(__name__)
LOW, HIGH = 2, 8
LONG_RUN, LONG_SEARCH, SHORT_SEARCH = 200, 0.9, 0.4
WIDTH_TRAVEL = 10.0


class SearchOptions(MethodOptions):
    """Options of every method that learns widths within a budget."""

    head_wise: bool = Field(True, description="a width per head; off: one per tensor (Table 3a)")
    searching_ratio: float | None = Field(
        None, ge=0, le=1, description="σ (Table 3c); by default 0.9 from 200 epochs on, else 0.4"
    )
    penalty: Literal["relative", "absolute"] = Field(
        "relative", description="`relative` to the budget, or `absolute` in G bit operations (paper)"
    )
    penalty_weight: float | None = Field(None, gt=0, description="η; by default 50 (relative) or 0.1 (absolute)")
    width_lr: float | None = Field(
        None,
        gt=0,
        description="first learning rate of the widths; by default 10 over the steps of the searching stage, at most "
        "0.1, at least `lr`; for fixed widths use `lsq+`",
    )
    width_schedule: Literal["search", "run"] = Field(
        "search",
        description="the widths' rate falls to zero within the searching stage; `run`: with the weights' rate within "
        "the whole run (paper)",
    )
    asymmetric: Asymmetric = ()


class RealWidthOptions(SearchOptions):
    """Options of methods whose widths are real numbers, started near the budget."""

    penalty_widths: Literal["real", "rounded"] = Field(
        "real", description="what the penalty counts: `real` widths, or `rounded` ones (paper)"
    )
    initial_bits: int | None = Field(
        None,
        ge=LOW,
        le=HIGH,
        description="width of the blocks at the start; by default the largest uniform one within the budget: `N` for "
        "`Nbit` (paper: `N + 1`)",
    )


class QViTOptions(RealWidthOptions):
    """Options of `qvit`; each ablation of the paper's Table 3 is one of them."""

    switchable_scale: bool = Field(True, description="a scale per candidate width; off: one for all (Table 3b)")
    scales: Literal["per-head", "shared"] = Field(
        "per-head", description="every head has its own scale (eq. 9); `shared` by all heads, as in the public code"
    )
    width_gradient: Literal["interpolation", "difference", "clipping"] = Field(
        "interpolation",
        description="between the two neighbouring widths (FracBits); `difference`: by what a bit more or less makes; "
        "`clipping`: through the limits, which clipped elements alone feel (paper)",
    )


@register_method("qvit")
class QViTMethod(Method):
    """Learned widths within a budget."""

    Options = QViTOptions
    options: Any

    def __init__(self, config: TrainConfig, options: SearchOptions) -> None:
        super().__init__(config, options)
        ratio = options.searching_ratio
        self.searching_ratio = (
            ratio if ratio is not None else LONG_SEARCH if config.epochs >= LONG_RUN else SHORT_SEARCH
        )
        searched = int(self.searching_ratio * config.epochs + 1e-9)
        self.searching_epochs = max(1, searched) if self.searching_ratio > 0 else 0
        self.steps_per_epoch = 1
        self.model: nn.Module | None = None
        self.differentiable: DifferentiableCost | None = None
        self.limit = 0

    def budget(self, cost: CostModel) -> int:
        if self.config.budget is None:
            raise UsageError(f"method '{self.config.method}' needs a --budget, such as 4bit or 21.455G")
        return parse_budget(self.config.budget, cost)

    def plan(self, cost: CostModel) -> QuantPlan:
        budget = self.budget(cost)
        given = self.config.plan
        start = self.start(cost, budget) if given is None else plan_from(given).resolve(cost.sites)
        changes = {
            "token_bit_width": None,
            "learn_bit_width": True,
            "bit_width_range": [LOW, HIGH],
            **self.spec_changes(),
        }
        rules = []
        for name, site in cost.sites.items():
            spec = start.sites[name]
            if spec is None:
                continue
            heads = site.layout.num_heads if self.options.head_wise and site.layout.heads else 1
            widths, split = spec.widths, spec.token_bit_width
            if split is not None:  # learned is one width for all tokens, from their mean on
                totals = (split.total(width, site.tokens, site.layout.prefix_tokens) for width in widths)
                widths = tuple(round(total / site.tokens) for total in totals)
            widths = widths if len(widths) == heads else (round(sum(widths) / len(widths)),) * heads
            clamped = [min(max(width, LOW), HIGH) for width in widths]
            own = {"bit_width": clamped if heads > 1 else clamped[0]}
            rules.append(Rule(name, {**self.grid(spec, site), **changes, **own}))
        rules += [*offset_rules(self.options.asymmetric), *scale_rules(self.scales, cost.sites.values())]
        return start.with_rules(*rules, name=f"{self.config.method}-{self.config.budget}").resolve(cost.sites)

    def start(self, cost: CostModel, budget: int) -> QuantPlan:
        """The widths to start from where no plan is given."""
        bits = self.options.initial_bits or next(
            (n for n in range(HIGH, LOW, -1) if cost.bit_operations(cost.uniform(n)) <= budget), LOW
        )
        return QuantPlan.preset(f"w{bits}a{bits}").resolve(cost.sites)

    def grid(self, spec: TensorSpec, site: Site) -> dict[str, Any]:
        """What else changes: a grid whose width cannot be learned, such as a logarithmic one, becomes the default."""
        if QUANTIZERS[spec.quantizer].uniform:
            return {}
        own = site.default
        return {"quantizer": own.quantizer, "signed": own.signed, "symmetric": own.symmetric}

    def spec_changes(self) -> dict[str, Any]:
        """What the specs of all sites say of how their widths are learned."""
        return {"switchable_scale": self.options.switchable_scale, "width_gradient": self.options.width_gradient}

    @property
    def scales(self) -> str:
        """What shares a scale, see `scale_rules`."""
        return self.options.scales

    @property
    def width_lr(self) -> float:
        if self.options.width_lr is not None:
            return self.options.width_lr
        return max(self.config.lr, min(0.1, WIDTH_TRAVEL / max(1, self.searching_epochs * self.steps_per_epoch)))

    def attach(self, model: nn.Module, cost: CostModel, steps_per_epoch: int) -> None:
        self.model, self.cost, self.steps_per_epoch = model, cost, steps_per_epoch
        self.limit = self.budget(cost)
        found = dict(quantizers_of(model))
        self.order = [name for name in cost.sites if name in found]
        if len(self.order) != len(cost.sites):
            raise UsageError(
                f"method '{self.config.method}' learns the widths of all sites: "
                "a plan that leaves tensors in float can be trained with lsq+"
            )
        self.quantizers = [found[name] for name in self.order]
        counts = {name: found[name].bit_width.numel() for name in self.order}
        self.differentiable = DifferentiableCost(cost, counts).to(self.quantizers[0].bit_width.device)

    def bit_operations(self) -> Tensor:
        """C(B) of the current widths, in BOPs, differentiable.

        Widths enter real-valued, or rounded if so asked.
        """
        assert self.differentiable is not None
        widths = self.widths()
        return self.differentiable(round_ste(widths) if self.options.penalty_widths == "rounded" else widths)

    def widths(self) -> Tensor:
        """The current widths of all sites as one vector, real-valued and differentiable while they are learned.

        With `clipping`, their gradient counts at the limits, too: the optimizer judges its sum with that of the task.
        """
        widths = torch.cat([q.bit_width.flatten() for q in self.quantizers])
        if self.spec_changes().get("width_gradient") == "clipping":
            return straight_through(widths, widths.detach().clamp(LOW, HIGH))
        return clamp_inward(widths, LOW, HIGH)

    def wish(self, quantizer: Quantizer) -> Tensor:
        """What the search would have a site's widths be, at its end."""
        return quantizer.clamped_bit_width()

    def penalty(self, step: int = 0) -> Tensor | None:
        if not self.quantizers[0].learns_width:
            return None
        if self.options.penalty == "absolute":
            excess = ((self.bit_operations() - self.limit) / 1e9).clamp_min(0)
            return (self.options.penalty_weight or 0.1) * excess.square()
        return (self.options.penalty_weight or 50.0) * (self.bit_operations() / self.limit - 1).clamp_min(0).square()

    def before_step(self, trainer: Trainer) -> None:
        if self.options.width_schedule == "search" and self.quantizers[0].learns_width:
            done = trainer.step / (self.searching_epochs * self.steps_per_epoch)
            for group in trainer.optimizer.param_groups:
                if group.get("name") == "widths":
                    group["lr"] = self.width_lr * (1 + math.cos(math.pi * done)) / 2

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Ends the searching stage when its time has come.

        A run that searches to its last epoch is frozen by `finish`.
        """
        if epoch >= self.searching_epochs and self.quantizers[0].learns_width:
            self.end_search(trainer)

    def finish(self, trainer: Trainer) -> None:
        if self.quantizers[0].learns_width:
            self.end_search(trainer)

    @torch.no_grad()
    def end_search(self, trainer: Trainer) -> None:
        """Freezes the widths within the budget and logs what that changed."""
        learned = {name: self.wish(q).flatten().tolist() for name, q in zip(self.order, self.quantizers, strict=True)}
        rounded = {name: tuple(round(width) for width in own) for name, own in learned.items()}
        final = round_to_budget(self.cost, learned, self.limit, low=LOW, high=HIGH)
        changes = [
            {
                "site": name,
                "head": head if len(own) > 1 else None,
                "learned": round(own[head], 4),
                "rounded": rounded[name][head],
                "final": final[name][head],
            }
            for name, own in learned.items()
            for head in range(len(own))
            if rounded[name][head] != final[name][head]
        ]
        assert self.differentiable is not None
        widths = [width for own in learned.values() for width in own]
        before = float(self.differentiable(torch.tensor(widths, device=self.quantizers[0].bit_width.device)))
        after = self.cost.bit_operations(final)
        for model in trainer.models():
            freeze(model, final)
        drop_widths(trainer.optimizer)
        trainer.log.write(
            "freeze",
            step=trainer.step,
            epoch=trainer.epoch,
            budget_bit_operations=self.limit,
            bit_operations_learned=before,
            bit_operations_rounded=self.cost.bit_operations(rounded),
            bit_operations=after,
            changes=changes,
        )
        _log.info(
            "widths frozen: %d of %d changed to fit the budget, BOPs %.4f of it",
            len(changes),
            sum(map(len, final.values())),
            after / self.limit,
        )

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        with torch.no_grad():
            figures: dict[str, Any] = {"bit_operations": float(self.bit_operations())}
            if every_width:
                figures["bit_widths"] = {
                    name: q.clamped_bit_width().flatten().tolist()
                    for name, q in zip(self.order, self.quantizers, strict=True)
                }
            return figures
