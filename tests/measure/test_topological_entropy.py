"""Topological entropy: first holes against homology by ranks, entropies in closed form, and the table that follows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from family_models import images_for, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import digit_batches, digits_model
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.measure import measure_sensitivity
from qvit.measure.layers import as_matrices
from qvit.measure.topological_entropy import births, entropy, square_maps


def first_betti_number(edges: set[tuple[int, int]], nodes: int) -> int:
    """β₁ = edges - rank ∂₁ - rank ∂₂ of the clique complex."""
    triangles = [t for t in itertools.combinations(range(nodes), 3) if set(itertools.combinations(t, 2)) <= edges]
    own = sorted(edges)
    first, second = torch.zeros(nodes, len(own)), torch.zeros(len(own), len(triangles))
    for column, (u, v) in enumerate(own):
        first[u, column], first[v, column] = -1, 1
    for column, (a, b, c) in enumerate(triangles):
        for edge, sign in (((a, b), 1), ((b, c), 1), ((a, c), -1)):
            second[own.index(edge), column] = sign
    ranks = [int(torch.linalg.matrix_rank(matrix)) if matrix.numel() else 0 for matrix in (first, second)]
    return len(own) - sum(ranks)


def graph(order: list[tuple[int, int]], nodes: int) -> Tensor:
    """A map whose edges enter in this order, the others last."""
    found = torch.full((nodes, nodes), -1.0)
    for place, (u, v) in enumerate(order):
        found[u, v] = len(order) - place
    return found[None]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), nodes=st.integers(2, 7))
def test_the_first_hole_is_where_the_first_betti_number_leaves_zero(seed: int, nodes: int) -> None:
    maps = torch.randn(1, nodes, nodes, generator=torch.Generator().manual_seed(seed))
    weights = torch.maximum(maps, maps.mT)[0]
    pairs = sorted(itertools.combinations(range(nodes), 2), key=lambda edge: -float(weights[edge]))
    counts = [first_betti_number(set(pairs[:many]), nodes) for many in range(len(pairs) + 1)]
    assert int(births(maps)) == next((many for many, holes in enumerate(counts) if holes), 0)


def test_holes_by_hand() -> None:
    square = [(0, 1), (1, 2), (2, 3), (0, 3)]
    assert int(births(graph(square, 4))) == 4, "a square is a hole"
    assert int(births(graph([*square[:2], (0, 2), *square[2:]], 4))) == 0, "two triangles with a common edge have none"
    assert int(births(graph([(0, 1), (0, 2), (0, 3), (1, 2), (2, 3), (1, 3)], 4))) == 0
    triangle = [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (4, 5), (2, 5)]
    assert int(births(graph(triangle, 6))) == 7, "a triangle is none, the square that hangs on it is"
    maps = torch.randn(20, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(births(maps), births(maps.mT)) and torch.equal(births(maps), births(torch.exp(3 * maps) - 7))


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_entropy_by_its_definition(counts: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)) * 7, torch.tensor(counts))[:, None]
    wanted = -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)
    assert float(entropy(labels)) == pytest.approx(wanted, abs=1e-12)
    many = torch.cat([labels, labels[:1].expand_as(labels), torch.arange(len(labels))[:, None]], 1)
    assert entropy(many).tolist() == pytest.approx([wanted, 0.0, math.log(len(labels))], abs=1e-12)


def test_maps_are_the_patches_of_an_image() -> None:
    tokens = torch.arange(2 * 17 * 3, dtype=torch.float32).reshape(2, 17, 3)  # a class token and 4 times 4 patches
    maps = square_maps(tokens, 2)
    assert maps.shape == (2, 3, 4, 4) and torch.equal(maps[1, 2].flatten(), tokens[1, 1:, 2])
    assert torch.equal(square_maps(as_matrices(nn.Conv2d(3, 3, 1), tokens[:, 1:].mT.unflatten(2, (4, 4))), 2), maps)
    windows = torch.randn(6, 9, 5)  # three windows for each of two images
    assert torch.equal(square_maps(windows, 2)[1, 5 + 4], windows[4, :, 4].reshape(3, 3))
    assert square_maps(torch.randn(2, 50, 768), 2).shape == (2, 64, 7, 7)


def test_the_table_falls_by_the_layers_entropy_for_every_bit() -> None:
    model, images = digits_model(depth=2), digit_batches(2, 8)
    found, again = (measure_sensitivity(model, images, metric="topological-entropy", widths=(2, 3, 8)) for _ in "ab")
    first, last = found.raw["blocks.0.mlp.fc1.weight"], found.raw["head.weight"]
    assert first[0].tolist() == pytest.approx([first[0, 1] * 6 / 5, first[0, 1], 0.0]) and first[0, 0] > 0
    assert (found.raw["blocks.0.mlp.fc1.input"] == first).all() and found.raw["blocks.0.attn.query"].shape == (2, 3)
    assert last[0, 0] == max(values[0, 0] for values in found.raw.values())
    assert all((again.raw[site] == values).all() for site, values in found.raw.items())
    same = [images[0][:1].expand(8, -1, -1, -1)]
    assert not any(
        values.any() for values in measure_sensitivity(model, same, metric="topological-entropy").raw.values()
    )
    windows = tiny("swin")
    other = measure_sensitivity(windows, [images_for(windows, 4)], metric="topological-entropy", widths=(2, 8)).raw
    assert all((values >= 0).all() for values in other.values()) and any(values.any() for values in other.values())


def test_features_that_are_not_finite_are_named() -> None:
    model = digits_model()
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(float("nan"))
    with pytest.raises(QvitError, match="features of 'head'"):
        measure_sensitivity(model, digit_batches(), metric="topological-entropy")
