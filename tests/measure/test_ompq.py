"""OMPQ's proxy: orthogonality by hand, and the table that follows from it."""

from __future__ import annotations

import math

import pytest
import torch
from family_models import images_for, tiny
from tiny_models import digit_batches, digits_model

from qvit.measure import measure_sensitivity
from qvit.measure.ompq import BETA, orthogonality, worth


def test_orthogonality_by_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    f = [torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (3, 4, 7)]
    found = orthogonality(f)
    for i, own in enumerate(f):
        for j, other in enumerate(f):
            wanted = (other.T @ own).square().sum() / ((own.T @ own).norm() * (other.T @ other).norm())
            assert float(found[i, j]) == pytest.approx(float(wanted))


def test_layers_that_say_the_same_are_worth_less() -> None:
    """Two equal layers and one orthogonal to both: mean ORM 1/2, 1/2 and 0; a layer counts with those behind it."""
    basis = torch.eye(4, dtype=torch.float64)
    similar = orthogonality([basis[:, :1], 3 * basis[:, :1], basis[:, 1:2]])
    assert torch.equal(similar, torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64))
    theta = math.exp(-BETA / 2)
    assert worth(similar).tolist() == pytest.approx([(2 * theta + 1) / 3, (theta + 1) / 2, 1.0])


def test_the_table_falls_by_the_layers_worth_for_every_bit() -> None:
    found = measure_sensitivity(digits_model(depth=2), digit_batches(2, 4), metric="ompq", widths=(2, 3, 8)).raw
    first, last = found["blocks.0.mlp.fc1.weight"], found["head.weight"]
    assert first[0].tolist() == pytest.approx([first[0, 1] * 6 / 5, first[0, 1], 0.0])
    assert (found["blocks.0.mlp.fc1.input"] == first).all() and found["blocks.0.attn.query"].shape == (2, 3)
    windows = tiny("swin")
    other = measure_sensitivity(windows, [images_for(windows, 4)], metric="ompq", widths=(2, 8)).raw
    assert all((values[:, 0] > 0).all() for values in other.values())
    assert all((values >= 0).all() for values in found.values()) and last[0, 0] > first[0, 0]
