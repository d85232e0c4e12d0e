"""Integer LayerNorm, softmax and GELU of the native engine: each equal to the bit, whole models to the reference."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_native import FORMS, SWIN_NAME, form, frozen, images_for, require_the_reference

import qvit
from qvit.deploy.engines import create_engine
from qvit.deploy.native.library import forms as all_forms
from qvit.deploy.native.library import function
from qvit.nonlinear import OPERATIONS
from qvit.nonlinear.base import LARGEST, MOST_CHANNELS

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CXX")), reason="needs a C++ compiler")
EVERY = [(operation, name) for operation, names in OPERATIONS.items() for name in names]
MIXED = {"layernorm": "i-vit", "softmax": "i-bert", "gelu": "i-bert", "blocks.1.mlp.act": "i-vit", "norm": "float"}


def rows_for(operation: str) -> list[np.ndarray[Any, Any]]:
    """Rows in fixed point, small and large, odd sizes, and the ends of the range."""
    most, random = LARGEST[operation], np.random.default_rng(5)
    if operation == "gelu":
        return [np.concatenate([np.arange(-20_000, 20_001), [-most, most]])[None]]
    rows = [random.integers(-size, size + 1, (3, n)) for size in (0, 3, 900, 30_000, most) for n in (1, 7, 197)]
    ends = np.full((1, MOST_CHANNELS), -most)
    ends[:, ::2] = most
    return [*rows, ends, -np.abs(ends)]


@pytest.mark.parametrize("isa", FORMS)
@pytest.mark.parametrize(("operation", "name"), EVERY)
def test_functions_are_equal_to_the_bit(isa: str, operation: str, name: str) -> None:
    for rows in rows_for(operation):
        expected = OPERATIONS[operation][name](torch.from_numpy(rows))
        found = function(operation, name, rows.astype(np.int32), form=form(isa))
        np.testing.assert_array_equal(found, expected.numpy())


def with_forms(plan: str, forms: dict[str, str]) -> qvit.QuantPlan:
    return replace(qvit.QuantPlan.preset(plan), nonlinear=forms)


@pytest.mark.parametrize(
    ("name", "forms", "plan", "probs", "kwargs"),
    [
        ("vit_tiny_patch16_224", MIXED, "w8a8", "uniform", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"layernorm": "i-bert", "softmax": "fq-vit", "gelu": "i-vit"}, "w4a4", "log2", {}),
        ("vit_tiny_patch16_224", {"softmax": "i-vit", "gelu": "i-bert"}, "w4a4", "log-sqrt2", {"global_pool": "map"}),
        ("vit_tiny_patch16_224", {"softmax": "i-bert"}, "w5a5", "log-sqrt2", {}),
        (SWIN_NAME, {"layernorm": "i-vit", "softmax": "i-vit", "gelu": "i-vit"}, "w8a8", "uniform", {"img_size": 32}),
    ],
    ids=["mixed", "logarithms", "pooled", "wide logarithms", "windows"],
)
def test_models_answer_as_the_reference(
    name: str, forms: dict[str, str], plan: str, probs: str, kwargs: dict[str, Any]
) -> None:
    images = images_for(4)
    artifact = frozen(with_forms(plan, forms), images, name, probs=probs, **kwargs)
    assert artifact.plan.nonlinear == forms
    require_the_reference(artifact, images, threads=(1, 2), names=all_forms())
    assert "softmaxes in integers" in create_engine(artifact, "native").arithmetic
