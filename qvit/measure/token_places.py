"""What each token of an activation adds to the predicted loss, by its place in the ranking of importance.

    D(p, b) = 1/2 · mean over images of  Σ_j g_j² · (t̂_j(b) - t_j)²         j: the elements of the token at place p

is the metric `fisher` (`features` for models without classes) before it is summed over tokens: an image's tokens are
put in the order of their ranking (`models/families/tokens.py`: prefix tokens first, then by the attention that they
received), so that any split of the tokens into groups of different widths is a sum over places. The rankings are those
of the float model. Where a site is measured by another metric, these are the shares of the places in its damage
(`spread`).

Cost: a pass of `fisher` over the images, activations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.files import write_atomically
from qvit.measure.features import signed_features
from qvit.measure.fisher import Sums
from qvit.measure.metric import Task
from qvit.measure.probe import require_finite
from qvit.measure.table import Sensitivity, monotone
from qvit.models.families import inspect_model
from qvit.models.features import answers_with_features
from qvit.plan.quant_plan import QuantPlan, Rule

Places = dict[str, NDArray[np.float64]]


def measure_places(
    model: nn.Module,
    batches: Iterable[Tensor],
    plan: QuantPlan,
    sites: Sequence[str],
    widths: Sequence[int],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    partial: Path | None = None,
) -> Places:
    """D by site: (tokens that are ranked together, widths).

    Args:
        model: A float model.
        batches: Training images (B, channels, height, width).
        plan: Resolved plan of the grids.
        sites: Activations whose tokens can differ in width.
        widths: Ascending, at least two.
        seed: Of the random signs.
        progress: Called with the images done, and all.
        partial: File for what has been measured so far.
    """
    ranked = {"switchable_scale": True, "bit_width_range": [widths[0], widths[-1]], "bit_width": widths[-1]}
    groups = {"learn_bit_width": False, "token_bit_width": {"share": 0.5, "low": widths[0]}}
    specs = plan.with_rules(*(Rule(site, ranked | groups) for site in sites))
    task = Task("token-places", model, tuple(widths), None, list(batches), seed, file=partial)
    task.plan = specs.resolve(inspect_model(model).sites)
    task.progress = progress or task.progress
    sums = Sums(task, task.probe.features, signed_features) if answers_with_features(model) else Sums(task)
    orders: dict[str, Tensor] = {}

    def note(site: str) -> Callable[[nn.Module, tuple[Tensor, Tensor]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            orders[site] = inputs[1].argsort(dim=1, stable=True)

        return hook

    hooks = [task.probe.quantizers[site].register_forward_pre_hook(note(site)) for site in sites]
    try:
        for site, tensor, grad in sums.gradients():
            if site in orders:
                columns = [
                    _by_place(error.mul_(grad), orders[site]) for error in task.probe.errors(site, tensor, widths)
                ]
                found = torch.stack(columns, dim=1)
                require_finite(site, found, "gradients")
                sums.add(site, found)
    finally:
        for hook in hooks:
            hook.remove()
    half = 0.5 / len(sums.images)
    return {site: sums[site].cpu().numpy() * half for site in sites}


def _by_place(weighted: Tensor, order: Tensor) -> Tensor:
    """Sums of squares by place, (N,) float64, of (B, N, C) or (B, H, N, d) by the tokens' order, (B, N)."""
    squares = weighted.double().square().sum(-1)
    squares = squares.sum(1) if squares.dim() == 3 else squares
    return squares.gather(1, order).sum(0)


def save_places(path: Path, places: Places, seconds: float) -> None:
    """Writes D, and the seconds that it took to measure."""
    content = save({site: torch.from_numpy(own) for site, own in places.items()}, {"seconds": repr(seconds)})
    write_atomically(path, lambda file: file.write(content))


def load_places(path: Path) -> tuple[Places, float]:
    """The inverse of `save_places`. Raises QvitError for a file that cannot be read."""
    try:
        with safe_open(str(path), "pt") as file:
            found = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            return found, float((file.metadata() or {})["seconds"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise QvitError(f"cannot read {path}: {error}; delete it, and it is measured again") from None


def spread(places: Places, sensitivity: Sensitivity) -> Places:
    """What a sensitivity says of each site, all heads together, spread over its tokens' places as D says.

    Returns:
        By site (tokens, widths of the sensitivity), never increasing in the width.
    """
    found = {}
    for site, own in places.items():
        whole = sensitivity.table[site].sum(0)
        total = own.sum(0)
        shares = np.where(total > 0, own / np.where(total > 0, total, 1.0), 1.0 / len(own))
        found[site] = monotone(whole * shares)
    return found
