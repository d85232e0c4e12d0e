"""Sensitivity by nuclear norms of attention maps and MLP outputs (Liu et al., NeurIPS 2021, mixed precision).

    Ω(b) = mean over images of Σ ‖Y‖_*  ·  mean over images of ‖Ŷ(b) - Y‖²        ‖Y‖_* = Σ_j σ_j(Y), singular values

with Y the attention map of an attention module, one matrix (N, N) per head, or the output (N, C) of an MLP. Maps of
high rank spread over many directions and lose more to rounding than those that one direction explains. That widths
follow these norms is the paper's; its text was not available, and the form (HAWQ-V2's, with the nuclear norm in place
of the trace) is reconstructed. These are ours:

- Only q, k and what they come from change an attention map, but a plan also has v, the heads' outputs and `proj`. So
  the norm is that of the maps, and the error ‖Ŷ - Y‖² that of the module's output, one tensor for all of its sites.
- A site of its own, or a head of it, is quantized at a time; the module gets its inputs of the float model.
- A layer outside attention and MLPs (patches, classifier) is its own module, with the norm of its output.
- The two means are taken apart: their product needs one number per module, as the trace of HAWQ-V2 does.

It is no divergence, and orders tensors alone. Cost: the singular values of every map once; then a forward of one module
over all images for each head and width of its sites, a fraction of `kl`. Memory: the inputs of all modules for all
images.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.measure.layers import as_matrices
from qvit.measure.metric import Task, register_metric
from qvit.measure.probe import Probe, require_finite
from qvit.measure.table import Table
from qvit.models.layers import AttentionSites

Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


def nuclear_norms(matrices: Tensor) -> Tensor:
    """The sum of the singular values of each matrix: (...) from (..., N, C)."""
    return torch.linalg.svdvals(matrices.double()).sum(-1)


def module_of(model: nn.Module, site: str) -> str:
    """The attention module or MLP that a site lies in; else the layer whose operand it is."""
    parts = site.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        if parts[end - 1] == "mlp" or isinstance(model.get_submodule(path), AttentionSites):
            return path
    return site.rpartition(".")[0]


@register_metric("nuclear-norm")
@torch.no_grad()
def nuclear_norm(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    probe, partial = task.probe, task.partial()
    _, done = partial.load()
    places = {site: module_of(probe.model, site) for site in probe.quantizers}
    calls, norms = _float_pass(task, places)
    images = sum(len(batch) for batch in task.batches)
    for count, (site, path) in enumerate(places.items(), 1):
        if site not in done:
            if not calls[path]:
                raise QvitError(f"metric 'nuclear-norm': no input reached '{path}', whose site '{site}' is quantized")
            rows = [
                [norms[path] / images * _error(probe, site, head, width, calls[path]) / images for width in task.widths]
                for head in range(probe.heads(site))
            ]
            done[site] = torch.tensor(rows, dtype=torch.float64)
            require_finite(site, done[site], "outputs once it is quantized")
            partial.save(len(done), lambda: done)
        task.progress(count, len(places))
    return {site: done[site].numpy() for site in places}


def _float_pass(task: Task, places: Mapping[str, str]) -> tuple[dict[str, list[Call]], dict[str, float]]:
    """Of each module the arguments and outputs of all its calls, and the sum over images of ‖Y‖_*."""
    model, probe = task.probe.model, task.probe
    calls: dict[str, list[Call]] = {path: [] for path in places.values()}
    maps = {path for site, path in places.items() if site == f"{path}.probs"}
    norms = dict.fromkeys(calls, 0.0)

    with ExitStack() as stack:
        for path in calls:

            def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor, path: str = path) -> None:
                calls[path].append((args, kwargs, output))
                if path not in maps:
                    norms[path] += float(nuclear_norms(as_matrices(module, output)).sum())

            stack.enter_context(model.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
        seen = stack.enter_context(probe.watched())
        for batch in task.batches:
            model(batch)
            for site, tensor in seen:
                if site == f"{places[site]}.probs":
                    norms[places[site]] += float(nuclear_norms(tensor).sum())
            seen.clear()
    return calls, norms


def _error(probe: Probe, site: str, head: int, width: int, calls: list[Call]) -> float:
    """The sum over images of ‖Ŷ - Y‖² with one head of a site at `width` bits."""
    module = probe.model.get_submodule(module_of(probe.model, site))
    with probe.only(site, head, width):
        return sum(float((module(*args, **kwargs) - output).square().sum()) for args, kwargs, output in calls)
