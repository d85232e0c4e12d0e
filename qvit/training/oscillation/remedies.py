"""Three remedies against oscillating weights, with one interface: calls around every optimizer step.

    regularizer   VVTQ (Huang et al. 2023): λ(t)·Σ over weights of the bin regularizer (`bins.py`) is added to the loss,

                      λ(t) = peak/2·(1 - cos(π·(t - t₀)/(1 - t₀)))  from t₀ on, 0 before;  t₀ = 0.25, peak = 0.01

    freezing      Nagel et al. 2022, Algorithm 1: a weight whose frequency f of oscillation (`tracking.py`) exceeds a
                  threshold is frozen for good, at the moving average of its code (same momentum), rounded. The
                  threshold falls from `freezing_from` to `freezing_to` by half a cosine.
    annealing     OFQ (Liu et al. 2023, arXiv 2302.02210), confidence-guided annealing: in the last share of training
                  only weights within 0.005 steps of a rounding boundary move.

t is the share of training that is done. A remedy starts at t₀ or later where widths are learned: codes of a grid that
still changes say nothing. OFQ adds epochs for its annealing, here it takes place in the last ones; scales go on
learning in all three. What a remedy remembers depends on the weights alone: it is equal in all processes, and in a
checkpoint.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qvit.quantizers import Quantizer
from qvit.training.config import Options
from qvit.training.oscillation.bins import bin_regularizer
from qvit.training.oscillation.tracking import Oscillations, codes_of, fits_int8
from qvit.training.oscillation.weights import quantized_weights


class RemedyOptions(Options):
    """What is done about oscillation."""

    oscillation: Literal["regularizer", "freezing", "annealing", "none"] = Field(
        "regularizer", description="the remedy"
    )
    regularizer_start: float = Field(
        0.25,
        ge=0,
        le=1,
        description="t₀: the share of training after which λ rises; with learned widths not before they are frozen",
    )
    regularizer_peak: float = Field(0.01, ge=0, description="λ at the end of training")
    freezing_from: float = Field(
        0.04, gt=0, le=1, description="frequency of oscillation above which a weight is frozen, at the start"
    )
    freezing_to: float = Field(0.01, gt=0, le=1, description="the same at the end")
    freezing_momentum: float = Field(0.01, gt=0, lt=1, description="momentum of the frequency and of the mean code")
    annealing_share: float = Field(
        0.1, ge=0, le=1, description="the last share of training, in which weights are annealed"
    )
    annealing_distance: float = Field(
        0.005, gt=0, le=0.5, description="steps from a rounding boundary within which weights move then"
    )


class Remedy:
    """Does nothing; base class of the three.

    Args:
        model: A calibrated model.
        options: What the remedy is to do.
        not_before: The share of training that has to be done first.

    `t` is the share of training that is done before the step, and in `after_step` with it.
    """

    def __init__(self, model: nn.Module, options: RemedyOptions, not_before: float = 0.0) -> None:
        self.weights = quantized_weights(model)
        self.options, self.start = options, not_before

    def penalty(self, t: float) -> Tensor | None:
        """Added to the loss; None for nothing."""

    def before_step(self, t: float) -> None:
        """Called with all gradients there, before the optimizer's step."""

    def after_step(self, t: float) -> None:
        """Called after the optimizer's step."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be remembered across an interruption, as tensors in dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""


class Regularizer(Remedy):
    """The oscillation-aware bin regularizer with its schedule."""

    def __init__(self, model: nn.Module, options: RemedyOptions, not_before: float = 0.0) -> None:
        super().__init__(model, options, max(not_before, options.regularizer_start))

    def strength(self, t: float) -> float:
        """λ(t)."""
        if t <= self.start:
            return 0.0
        return self.options.regularizer_peak / 2 * (1 - math.cos(math.pi * (t - self.start) / (1 - self.start)))

    def loss(self) -> Tensor:
        """The sum over all weights, without λ."""
        parts = [part for weight in self.weights for part in weight.parts()]
        return torch.stack([_regularized(quantizer, weight) for _, quantizer, weight in parts]).sum()

    def penalty(self, t: float) -> Tensor | None:
        strength = self.strength(t)
        return self.loss() * strength if strength > 0 else None


def _regularized(quantizer: Quantizer, weight: Tensor) -> Tensor:
    offset = quantizer.grid()[1]
    bits = quantizer.integer_bit_width().detach()
    centred = weight if offset is None else weight - offset
    return bin_regularizer(centred, quantizer.active_scale(), bits, quantizer.spec.signed, 2**quantizer.largest_width)


class Freezing(Remedy):
    """Iterative freezing: weights that oscillate are held at the code at which they are most of the time."""

    def __init__(self, model: nn.Module, options: RemedyOptions, not_before: float = 0.0) -> None:
        super().__init__(model, options, not_before)
        self.parts = {site: (quantizer, w) for own in self.weights for site, quantizer, w in own.parts(detached=True)}
        self.oscillations: dict[str, Oscillations] = {}
        self.means: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}

    def threshold(self, t: float) -> float:
        """Half a cosine from `freezing_from` to `freezing_to`."""
        first, last = self.options.freezing_from, self.options.freezing_to
        done = (t - self.start) / max(1e-9, 1 - self.start)
        return last + (first - last) * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2

    @torch.no_grad()
    def after_step(self, t: float) -> None:
        if t <= self.start:
            return
        threshold = self.threshold(t)
        for site, (quantizer, weight) in self.parts.items():
            codes = codes_of(quantizer, weight)
            if site not in self.oscillations:
                self._create(site, codes)
                continue
            frozen, mean = self.frozen[site], self.means[site]
            codes = torch.where(frozen, mean, codes)
            own = self.oscillations[site]
            own.observe(codes, self.options.freezing_momentum)
            mean.lerp_(codes, self.options.freezing_momentum)
            new = (own.frequency > threshold) & ~frozen
            mean.copy_(torch.where(new, mean.round(), mean))
            frozen |= new
            scale, offset = quantizer.grid()
            held = mean * scale if offset is None else mean * scale + offset
            weight.copy_(torch.where(frozen, held, weight))

    def _create(self, site: str, codes: Tensor) -> None:
        self.oscillations[site] = Oscillations(codes, compact=fits_int8(self.parts[site][0]))
        self.means[site] = codes.clone()
        self.frozen[site] = torch.zeros_like(codes, dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        return {
            site: {**own.state_dict(), "mean": self.means[site], "frozen": self.frozen[site]}
            for site, own in self.oscillations.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.oscillations, self.means, self.frozen = {}, {}, {}
        for site, own in state.items():
            self._create(site, torch.zeros_like(self.parts[site][1]))
            self.oscillations[site].load_state_dict(own)
            self.means[site].copy_(own["mean"])
            self.frozen[site].copy_(own["frozen"])


class Annealing(Remedy):
    """Only weights next to a rounding boundary move: those that oscillate, while all others have come to rest."""

    def __init__(self, model: nn.Module, options: RemedyOptions, not_before: float = 0.0) -> None:
        super().__init__(model, options, max(not_before, 1 - options.annealing_share))
        self.held: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before_step(self, t: float) -> None:
        self.held = []
        if t < self.start:
            return
        for own in self.weights:
            free = torch.ones_like(own.parameter, dtype=torch.bool)
            chunks = free.chunk(len(own.sites))
            for site, quantizer, weight in own.parts(detached=True):
                chunk = chunks[own.sites.index(site)]
                chunk.copy_(self._near_boundary(quantizer, weight).view_as(chunk))
            if own.parameter.grad is not None:
                own.parameter.grad.mul_(free)
            self.held.append((free, own.parameter.detach().clone()))

    def _near_boundary(self, quantizer: Quantizer, weight: Tensor) -> Tensor:
        """Whether rounding would change within the distance; beyond the grid there are no boundaries."""
        scale, offset = quantizer.grid()
        u = (weight if offset is None else weight - offset) / scale
        low, high = quantizer.quant_range()
        return ((u - u.floor() - 0.5).abs() <= self.options.annealing_distance) & (u > low) & (u < high)

    @torch.no_grad()
    def after_step(self, t: float) -> None:
        if self.held:
            for own, (free, before) in zip(self.weights, self.held, strict=True):
                own.parameter.copy_(torch.where(free, own.parameter, before))
        self.held = []


REMEDIES: dict[str, type[Remedy]] = {
    "regularizer": Regularizer,
    "freezing": Freezing,
    "annealing": Annealing,
    "none": Remedy,
}


def create_remedy(model: nn.Module, options: RemedyOptions, not_before: float = 0.0) -> Remedy:
    """The remedy that the options name."""
    return REMEDIES[options.oscillation](model, options, not_before)
