"""How often weights oscillate (Nagel et al. 2022, arXiv 2203.11086), and how modules vary (Huang et al. 2023).

A weight oscillates in a step if its code changes in the direction opposite to that of its last change. Its frequency is
the moving average

    f ← f + m·(o - f),        o = 1 in a step with an oscillation, else 0,        m = 0.01

and it counts as oscillating where f > 0.005: where it has oscillated in the last 69 steps. (Their section 2.3.)

`Oscillations` is this state for any tensor of codes: the last code (int8 where codes fit), the direction of the last
change (int8) and f (float16). `Diagnostics` keeps it for a sample of every weight, spread evenly over each scale's
elements, about 4096 of a site: the share of oscillating weights is then known to within 0.8 points (one standard
deviation), and a step costs a few small operations for the whole model. At the ends of epochs it also tells, from all
weights of a site,

    variation   standard deviation / mean of |w|        outliers   max |w| / standard deviation

the first two of VVTQ's variations: of modules, and within them. What is kept is a function of the weights of all
steps: equal in all processes, part of every checkpoint. Nothing is asked of the device within a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qvit.functional import integer_range
from qvit.quantizers import Quantizer
from qvit.training.oscillation.weights import QuantizedWeight, quantized_weights

MOMENTUM = 0.01
OSCILLATING = 0.005
ROW = 64
SAMPLES = 4096


def codes_of(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """The integers of a viewed weight, in its own float dtype."""
    scale, offset = quantizer.grid()
    quant_min, quant_max = quantizer.quant_range()
    u = (weight if offset is None else weight - offset) / scale
    return torch.minimum(torch.maximum(u, quant_min), quant_max).round_()


class Oscillations:
    """The state of a tensor of codes; see the formula above.

    Attributes:
        codes: The last codes.
        direction: -1, 0 or 1: that of the last change; 0 before there was one.
        frequency: f.
    """

    def __init__(self, codes: Tensor, *, compact: bool) -> None:
        self.codes = codes.to(torch.int8 if compact else torch.int16)
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(codes, dtype=torch.float16)

    @torch.no_grad()
    def observe(self, codes: Tensor, momentum: float = MOMENTUM) -> None:
        """Takes the codes after a step."""
        change = torch.sign(codes - self.codes)
        oscillated = (change * self.direction).neg_().clamp_min_(0)
        self.frequency.mul_(1 - momentum).add_(oscillated, alpha=momentum)
        change.add_(self.direction * (1 - change.abs()))
        self.direction.copy_(change)
        self.codes.copy_(codes)

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors."""
        return {"codes": self.codes, "direction": self.direction, "frequency": self.frequency}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` returned, of the same shapes."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])


class Diagnostics:
    """Follows a sample of a model's weights through training.

    Args:
        model: A calibrated model; its quantizers and weights must stay the same objects.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = quantized_weights(model)
        self.parts = [part for weight in self.weights for part in weight.parts(detached=True)]
        device = self.weights[0].parameter.device
        groups = [quantizer.num_groups for _, quantizer, _ in self.parts]
        rows = [_rows_per_group(quantizer, weight) for _, quantizer, weight in self.parts]
        self.rows = [count * own for count, own in zip(groups, rows, strict=True)]
        self.samples = [_sample(weight).to(device) for weight in self.weights]
        before = torch.tensor([0, *groups]).cumsum(0).tolist()
        owners = [
            torch.arange(start, start + count).repeat_interleave(own)
            for start, count, own in zip(before, groups, rows, strict=False)
        ]
        self.group_of_row = torch.cat(owners).to(device)
        self.oscillations: Oscillations | None = None

    @torch.no_grad()
    def observe(self) -> None:
        """Takes the weights after a step; the first call only remembers them."""
        codes = self._codes()
        if self.oscillations is None:
            self.oscillations = self._create(codes)
        else:
            self.oscillations.observe(codes)

    @torch.no_grad()
    def record(self) -> dict[str, dict[str, float]]:
        """`oscillating` (a share), `variation` and `outliers` of every site; waits for the device."""
        rows = []
        shares = None
        if self.oscillations is not None:
            oscillating = (self.oscillations.frequency > OSCILLATING).float().mean(1)
            shares = [own.mean() for own in oscillating.split(self.rows)]
        for index, (_, _, weight) in enumerate(self.parts):
            size = weight.abs()
            deviation = weight.std(correction=0).clamp_min(torch.finfo(weight.dtype).tiny)
            share = size.new_zeros(()) if shares is None else shares[index]
            rows.append(torch.stack([share, deviation / size.mean().clamp_min(1e-30), size.max() / deviation]))
        table = torch.stack(rows).tolist()
        names = ("oscillating", "variation", "outliers")
        return {part[0]: dict(zip(names, row, strict=True)) for part, row in zip(self.parts, table, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs; empty before the first."""
        return {} if self.oscillations is None else self.oscillations.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.oscillations = None
        if state:
            self.oscillations = self._create(torch.zeros(len(self.group_of_row), ROW, device=self.group_of_row.device))
            self.oscillations.load_state_dict(state)

    def _create(self, codes: Tensor) -> Oscillations:
        return Oscillations(codes, compact=all(fits_int8(quantizer) for _, quantizer, _ in self.parts))

    def _codes(self) -> Tensor:
        """The sampled codes, rows of 64 that share a scale."""
        found = [
            weight.parameter.detach().view(-1).index_select(0, sample)
            for weight, sample in zip(self.weights, self.samples, strict=True)
        ]
        grids = zip(*[_grid_of_groups(quantizer) for _, quantizer, _ in self.parts], strict=True)
        grid = torch.stack([torch.cat(own) for own in grids]).index_select(1, self.group_of_row)
        scale, offset, quant_min, quant_max = grid.unsqueeze(-1).unbind()
        u = torch.cat(found).view(-1, ROW).sub_(offset).div_(scale)
        return torch.minimum(torch.maximum(u, quant_min), quant_max).round_()


def fits_int8(quantizer: Quantizer) -> bool:
    """Whether all codes that the quantizer may give fit into a signed byte."""
    return integer_range(quantizer.largest_width, quantizer.spec.signed)[1] <= 127


def _rows_per_group(quantizer: Quantizer, weight: Tensor) -> int:
    """Rows of 64 samples for each scale of a weight: no more than it has, and at least one."""
    return max(1, min(SAMPLES, weight.numel()) // (ROW * quantizer.num_groups))


def _sample(weight: QuantizedWeight) -> Tensor:
    """Positions in the flat weight: for every part and scale a number of rows of 64, spread evenly."""
    found = []
    for index, quantizer in enumerate(weight.quantizers):
        if quantizer is None:
            continue
        numel = weight.parameter.numel() // len(weight.sites)
        part = quantizer.view(weight.parameter.detach().chunk(len(weight.sites))[index])
        group = torch.arange(quantizer.num_groups).view(quantizer.groups).expand(part.shape)
        members = group.reshape(-1).argsort(stable=True).view(quantizer.num_groups, -1)
        count = ROW * _rows_per_group(quantizer, part)
        columns = torch.arange(count) * members.shape[1] // count
        found.append(members[:, columns].reshape(-1) + index * numel)
    return torch.cat(found)


def _grid_of_groups(quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, offset, quant_min and quant_max of every group of elements that share them, each flat."""
    scale, offset = quantizer.grid()
    values = (scale, torch.zeros_like(scale) if offset is None else offset, *quantizer.quant_range())
    scale, offset, low, high = (value.expand(quantizer.groups).reshape(-1) for value in values)
    return scale, offset, low, high
