"""Sensitivity by topological entropy of feature maps (GMPQ-TE, NeurIPS 2025): a proxy that looks at no error.

A channel's map A (n, n) of an image is a weighted graph of n nodes, by max(A, Aᵀ) without the diagonal. Edges enter
one by one, the largest weight first, and every clique counts as filled. b is the number of edges at which the first
hole appears: the first Betti number β₁ of the clique complex leaves 0. Where a channel sees the same in all images, it
does so at the same b:

    H     = - Σ_b P(b) · log P(b)               P the share of the images, of one channel
    TE    = mean of H over the layer's channels
    Ω(b)  = (b_max - b) · TE

More bits go to layers of larger TE, by the largest Σ bits · TE within the budget, as in GMPQ-TE's linear program. Its
text could not be read; TE is the feature entropy of Zhao and Zhang (ICLR 2022), by whose name and invariants GMPQ-TE
goes. Rescaling a channel changes nothing, nor does any increasing function of it.

The first hole needs no homology by ranks. While β₁ is 0, a new edge (u, v) makes a hole exactly if u and v were
connected before and have no common neighbour: else it joins two components, or its triangles fill the cycle it closes.

Ours: a layer's patch tokens as a square map, what precedes them (class token, registers) left out; all images as one
class, as there are no labels here; no hole as a b of its own; at most `CHANNELS` channels of a layer, evenly spaced;
and for layers without a map (the classifier) the largest TE of all, as nothing is known against them. Cost: one forward
pass, and n²/2 steps over all graphs of a layer. Deterministic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvit.errors import QvitError
from qvit.measure.layers import as_matrices, outputs_by_layer, table_by_layer
from qvit.measure.metric import Task, register_metric
from qvit.measure.table import Table

#: Channels of a layer, or of all its windows together, that are looked at.
CHANNELS = 64
#: Nodes of the smallest graph with a hole.
FEWEST = 4


def births(maps: Tensor) -> Tensor:
    """How many edges, by falling weight, make the first hole: (graphs,) from (graphs, nodes, nodes); 0 for none."""
    graphs, nodes = maps.shape[:2]
    each, steps = torch.arange(graphs), nodes * (nodes - 1) // 2
    rows, columns = torch.triu_indices(nodes, nodes, 1)
    order = torch.maximum(maps, maps.mT)[:, rows, columns].argsort(dim=1, descending=True, stable=True)
    near = torch.zeros(graphs, nodes, nodes, dtype=torch.bool)
    part = torch.arange(nodes).repeat(graphs, 1)  # a number for each component
    born = torch.zeros(graphs, dtype=torch.int64)
    for step in range(steps):
        u, v = rows[order[:, step]], columns[order[:, step]]
        joined, other = part[each, u], part[each, v]
        hole = (joined == other) & ~(near[each, u] & near[each, v]).any(1)
        born[hole & (born == 0)] = step + 1
        if bool(born.all()):
            break
        near[each, u, v] = near[each, v, u] = True
        part = torch.where(part == other[:, None], joined[:, None], part)
    return born


def entropy(labels: Tensor) -> Tensor:
    """The entropy in nats of each column's distribution over its rows: (columns,) from integers (rows, columns)."""
    equal = (labels[:, None] == labels[None]).double().mean(1)  # for each row the share of those like it
    return -equal.log().mean(0)


def square_maps(output: Tensor, images: int) -> Tensor:
    """Maps (images, channels, n, n) of an output (B, tokens, channels), B a multiple of images.

    Windows of an image are channels of their own. Of more tokens than n·n the first are left out.
    """
    rows = output.mT.reshape(images, -1, output.shape[1])
    some = torch.linspace(0, rows.shape[1] - 1, min(CHANNELS, rows.shape[1])).round().long()
    side = math.isqrt(rows.shape[-1])
    return rows[:, some, rows.shape[-1] - side * side :].unflatten(-1, (side, side))


@register_metric("topological-entropy")
@torch.no_grad()
def topological_entropy(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    found: dict[str, list[Tensor]] = {}
    without_map = set()
    for images, outputs in outputs_by_layer(task):
        for path, calls in outputs.items():
            layer = task.probe.model.get_submodule(path)
            maps = torch.cat([square_maps(as_matrices(layer, own), images) for own in calls], 1).cpu()
            if not bool(torch.isfinite(maps).all()):
                raise QvitError(f"metric '{task.metric}': features of '{path}' are NaN or infinite")
            if maps.shape[-1] < FEWEST:
                without_map.add(path)
            found.setdefault(path, []).append(births(maps.flatten(0, 1)).reshape(maps.shape[:2]))
    worth = {path: float(entropy(torch.cat(own)).mean()) for path, own in found.items()}
    return table_by_layer(task, worth | dict.fromkeys(without_map, max(worth.values())))
