"""Divergences measured without the blocks before a site are those measured with them, in every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from family_models import images_for, tiny
from tiny_models import digit_batches, digits_model, shake
from torch import Tensor, nn

from qvit.measure import measure_sensitivity
from qvit.measure.prefix import Prefix
from qvit.measure.probe import Probe
from qvit.models.block_inputs import attention_blocks

CAIT = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 4}
EVA = {"img_size": 28, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 4}
Case = Callable[[], tuple[nn.Module, list[Tensor]]]


def timm_model(name: str, **kwargs: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(4)
    model = shake(timm.create_model(name, **kwargs)).eval()
    return model, [torch.randn(size, 3, kwargs["img_size"], kwargs["img_size"]) for size in (3, 2)]


CASES: dict[str, Case] = {
    "vit": lambda: (digits_model(depth=3), digit_batches(2, 3)),
    "swin": lambda: (model := tiny(), list(images_for(model, 4).split(3))),
    "eva": lambda: timm_model("eva02_tiny_patch14_224", **EVA),
    "cait": lambda: timm_model("cait_xxs24_224", **CAIT),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_changes_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = CASES[case]()
    whole: list[int] = []
    original = Prefix.leave_out

    def watched(self: Prefix, count: int, reference: list[Tensor]) -> None:
        original(self, count, reference)
        whole.append(self.left_out)

    monkeypatch.setattr(Prefix, "leave_out", watched)
    found = measure_sensitivity(model, batches, metric="kl", widths=(2, 4))
    assert max(whole) >= 2, "blocks are left out"
    monkeypatch.setattr(Prefix, "before", lambda self, site: 0)
    expected = measure_sensitivity(model, batches, metric="kl", widths=(2, 4))
    assert all((found.raw[site] == expected.raw[site]).all() for site in expected.raw)
    assert sum(float(np.abs(values).sum()) for values in expected.raw.values()) > 0


def test_blocks_before_a_site_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    original = nn.Module.__call__

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[type(self).__name__] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counted)
    model, batches = digits_model(depth=4), digit_batches(1, 4)
    measure_sensitivity(model, batches, metric="kl", widths=(2, 4))
    layers = calls["LayerNorm"]
    calls.clear()
    monkeypatch.setattr(Prefix, "before", lambda self, site: 0)
    measure_sensitivity(model, batches, metric="kl", widths=(2, 4))
    assert layers < 0.7 * calls["LayerNorm"]


def test_a_model_with_another_way_around_its_blocks_is_computed_in_full() -> None:
    """The output of the first block is added to that of the last one."""
    model, batches = digits_model(depth=3), digit_batches(1, 3)
    probe = Probe(model, batches)
    first, *_, last = attention_blocks(probe.model).values()
    kept: list[Tensor] = []
    first.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    last.register_forward_hook(lambda _module, _inputs, output: output + kept[-1])
    prefix = Prefix(probe, batches)
    reference = [prefix.log_answers(0)]
    prefix.leave_out(2, reference)
    assert prefix.left_out == 0 and torch.equal(prefix.log_answers(0), reference[0])
    prefix.leave_out(1, reference)
    assert prefix.left_out == 1 and torch.equal(prefix.log_answers(0), reference[0])
