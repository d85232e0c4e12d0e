"""4-bit channels within 8-bit codes: forms by hand and by brute force, nested ratios, and engines that agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_models import frozen, packed_arguments

import qvit
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.nested import narrow_form, nested
from qvit.errors import UsageError


@pytest.fixture(scope="module", params=["vit", "swin"])
def eight(request: Any) -> tuple[Artifact, torch.Tensor]:
    model, images = frozen(request.param, "w8a8")
    return Artifact.from_model(model, **packed_arguments(request.param)), images


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 128))
def test_the_form_is_the_nearest_of_all_that_four_bits_and_a_shift_can_say(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-size, size, (3, 5), generator=generator, dtype=torch.int8)
    steps = torch.rand(3, 1, generator=generator, dtype=torch.float64) + 0.1
    found, error = narrow_form(codes, steps)
    levels = [torch.arange(-8, 8, dtype=torch.float64) * 2**shift for shift in range(5)]
    for channel in range(5):
        own = codes[:, channel].double()
        gaps = [((own[:, None] - level).abs().min(1).values * steps[:, 0]).square().sum() for level in levels]
        assert float(error[channel]) == pytest.approx(float(min(gaps)), abs=1e-9)
        gap = ((found[:, channel].double() - own) * steps[:, 0]).square().sum()
        assert float(gap) == pytest.approx(float(error[channel]), abs=1e-9)
        assert any(torch.isin(found[:, channel].double(), level).all() for level in levels)
    assert found.dtype == torch.int8
    assert size > 8 or torch.equal(found, codes), "4 bits hold these codes as they are"


def test_forms_by_hand() -> None:
    """Unused upper bits are left out first: of 5 bits the last one goes, of 8 bits the last four."""
    codes = torch.tensor([[15, 127, -128, 7], [-16, 30, 16, -8]], dtype=torch.int8)
    found, error = narrow_form(codes, torch.ones(1, 1))
    assert found.tolist() == [[14, 112, -128, 7], [-16, 32, 16, -8]]
    assert error.tolist() == [1.0, 225.0 + 4.0, 0.0, 0.0]


def test_larger_ratios_narrow_the_same_channels_and_more(eight: tuple[Artifact, torch.Tensor]) -> None:
    artifact, _ = eight
    before: dict[str, set[int]] = {}
    for ratio in (0.0, 0.25, 0.5, 1.0):
        found = nested(artifact, ratio)
        assert found.plan == artifact.plan and found.provenance["nested_ratio"] == ratio
        for site, codes in found.integers.items():
            own = artifact.integers[site]
            changed = set((codes != own).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist())
            assert before.get(site, set()) <= changed and len(changed) <= ratio * own.shape[1]
            assert ratio < 1 or "blocks" not in site or len(changed) > 0.5 * own.shape[1]
            assert "blocks" in site or "reduction" in site or not changed, "the first and the last layer stay whole"
            before[site] = changed
    for site in artifact.integers:
        if "blocks" in site:
            codes = nested(artifact, 1.0).integers[site]
            assert max(len(codes[:, channel].unique()) for channel in range(codes.shape[1])) <= 16


def test_parts_of_a_fused_weight_narrow_the_same_channels(eight: tuple[Artifact, torch.Tensor]) -> None:
    artifact, _ = eight
    found = nested(artifact, 0.25)
    for first in (site for site in artifact.integers if site.endswith("query_weight")):
        parts = [first, *(first.replace("query_weight", f"{part}_weight") for part in ("key", "value"))]
        changed = torch.cat([found.integers[part] != artifact.integers[part] for part in parts]).any(0)
        assert 0 < int(changed.sum()) <= len(changed) // 4


@torch.no_grad()
@pytest.mark.parametrize("eight", ["vit"], indirect=True)
def test_engines_run_it_as_any_model_and_files_keep_it(eight: tuple[Artifact, torch.Tensor], tmp_path: Path) -> None:
    artifact, images = eight
    file, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    artifact.save(file)
    nested(artifact, 0.5).save(half)
    assert half.stat().st_size == pytest.approx(file.stat().st_size, abs=64), "no smaller"
    assert torch.equal(qvit.load(file, "reference", ratio=0)(images), qvit.load(file, "reference")(images))
    answers = qvit.load(file, "reference", ratio=0.5)(images)
    torch.testing.assert_close(answers, nested(artifact, 0.5).model()(images), rtol=1e-3, atol=1e-3)
    assert torch.equal(answers, qvit.load(half, "reference")(images))
    full = artifact.model()(images)
    off = [float((nested(artifact, ratio).model()(images) - full).square().mean()) for ratio in (0, 0.5, 1)]
    assert off[0] == 0 < off[1] < off[2]


def test_what_cannot_be_nested_is_refused(eight: tuple[Artifact, torch.Tensor]) -> None:
    for wrong in (-0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(UsageError, match="between 0 and 1"):
            nested(eight[0], wrong)  # type: ignore[arg-type]
    model, _ = frozen("vit", "w4a8")
    with pytest.raises(UsageError, match="nothing to nest"):
        nested(Artifact.from_model(model, **packed_arguments("vit")), 0.5)
