"""4-bit channels within an 8-bit model, as many as a ratio asks for when it is loaded (after FlexiQ, Kim et al. 2025).

A feature channel of a layer is an input channel of its weight. Its 4-bit form is made of its 8-bit codes alone,

    c' = 2^s · clamp(round(c / 2^s), -8, 7)

with the shift s from 0 to 4 of least squared error: a channel of small values leaves its upper bits unused, and its
lower ones are kept. Channels are ranked by that error, Σ (scale · (c' - c))² over the outputs; the share `ratio` of
least error of every layer becomes narrow. A larger ratio narrows the same channels and more. Nothing is calibrated or
stored: what comes out is an ordinary 8-bit model on the same grids with fewer distinct codes, which every engine runs.

FlexiQ narrows the activations of such channels, too, and its kernels multiply them as 4-bit numbers; that is where its
speed comes from. Here activations stay as they are, whose ranges by channel a file does not have, and no engine has
kernels for a layer of two widths: no answer is faster and no file smaller. What is had is what the narrow weights cost
in accuracy, at any ratio. Also ours: c is rounded, not cut off, the order is by error alone (FlexiQ refines it by an
evolutionary search), and every layer has the same ratio. The first and the last layer stay whole.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qvit.deploy.file.artifact import Artifact
from qvit.errors import UsageError
from qvit.models.families import inspect_model

BITS, NARROW = 8, 4


def nested(artifact: Artifact, ratio: float) -> Artifact:
    """The same model with a share of each layer's input channels in the 4-bit form of its weight's codes.

    Args:
        artifact: A packed model with weights of 8 bits on signed grids; other weights stay.
        ratio: From 0 (the model itself) to 1.

    Raises:
        UsageError: Another ratio, or no weight of 8 bits in any block.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise UsageError(f"a ratio of narrow channels lies between 0 and 1, unlike {ratio!r}")
    layers = _layers(artifact)
    if not layers:
        raise UsageError(
            f"no weight in the blocks of this model has {BITS} bits on a signed grid: there is nothing to nest"
        )
    integers = dict(artifact.integers)
    for sites in layers.values():
        forms = [narrow_form(integers[site], steps) for site, steps in sites.items()]
        error = torch.stack([own for _, own in forms]).sum(0)
        chosen = error.argsort(stable=True)[: math.floor(ratio * len(error) + 1e-9)]
        for site, (codes, _) in zip(sites, forms, strict=True):
            integers[site] = integers[site].index_copy(1, chosen, codes[:, chosen])
    return replace(artifact, integers=integers, provenance=artifact.provenance | {"nested_ratio": float(ratio)})


def narrow_form(codes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The 4-bit form of every input channel, and its squared error: codes like `codes`, and (channels,).

    Args:
        codes: Integers of 8 bits (outputs, channels, ...).
        steps: What a step of a code is worth, broadcasting against them.
    """
    low, high = -(1 << NARROW - 1), (1 << NARROW - 1) - 1
    exact, forms, errors = codes.double(), [], []
    for shift in range(BITS - NARROW + 1):
        forms.append((exact / (1 << shift)).round().clamp(low, high) * (1 << shift))
        errors.append(((forms[-1] - exact) * steps).square().transpose(0, 1).flatten(1).sum(1))
    error, best = torch.stack(errors).min(0)
    channel = torch.arange(codes.shape[1])
    return torch.stack(forms).transpose(1, 2)[best, channel].transpose(0, 1).to(codes.dtype), error


def _layers(artifact: Artifact) -> dict[str, dict[str, Tensor]]:
    """By layer the sites that can be narrowed, with what a step of each code is worth, in the shape of the codes.

    The parts of a fused q|k|v weight have the same input channels.
    """
    sites, found = inspect_model(artifact.skeleton).sites, {}
    curved = {key.rpartition(".")[0] for key in artifact.extras}
    for site, codes in artifact.integers.items():
        spec, own = artifact.plan.sites[site], sites[site]
        assert spec is not None
        if own.position == "block" and set(spec.widths) == {BITS} and spec.signed and site not in curved:
            ones = torch.ones(own.layout.view or codes.shape, dtype=torch.float64)
            steps = (ones * artifact.scales[site]).reshape(codes.shape)
            found.setdefault(site.rpartition(".")[0], {})[site] = steps
    return found
