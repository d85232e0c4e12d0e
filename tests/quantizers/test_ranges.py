"""Observers that take a range as it is, and the one that keeps values: closed forms, and agreement with histograms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import digit_batches, digits_model
from torch import Tensor

from qvit.errors import QvitError, UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.quantizers import quantizers_of
from qvit.quantizers.observers import HistogramObserver, ValueObserver
from qvit.quantizers.ranges import OBSERVERS, PERCENTILE, MinMaxObserver, PercentileObserver, observer_class

WIDTHS = (2, 4, 8)


def seen(observer: HistogramObserver, *batches: Tensor) -> HistogramObserver:
    for batch in batches:
        observer.observe(batch)
    return observer


@given(
    low=st.floats(-50, 49, width=32),
    span=st.floats(0.125, 50, width=32),
    signed=st.booleans(),
    with_offset=st.booleans(),
)
def test_minmax_reaches_both_ends(low: float, span: float, signed: bool, with_offset: bool) -> None:
    x = torch.linspace(low, low + span, 77)
    signed = signed and not with_offset
    scales, offsets = seen(MinMaxObserver(()), x[:40], x[40:]).fit(WIDTHS, signed=signed, with_offset=with_offset)
    for scale, offset, bits in zip(scales, offsets, WIDTHS, strict=True):
        largest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        if with_offset:
            assert float(offset) == pytest.approx(float(x[0]))
            assert float(scale * largest + offset) == pytest.approx(float(x[-1]), abs=1e-4)
        elif signed:
            expected = max(float(x[-1]) / largest, float(x[0]) / (-(2 ** (bits - 1))))
            assert float(scale) == pytest.approx(max(expected, 1e-8), rel=1e-5)
        elif float(x[-1]) > 1e-3:
            assert float(scale) == pytest.approx(float(x[-1]) / largest, rel=1e-5)


def test_percentiles_cut_outliers_and_little_else() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200_000, generator=generator) * 2 - 1
    x[:3] = torch.tensor([40.0, -30.0, 35.0])
    bottom, top = PercentileObserver(()), MinMaxObserver(())
    low, high = seen(bottom, x).range()  # type: ignore[attr-defined]
    exact = torch.quantile(x[:100_000].double(), torch.tensor([1 - PERCENTILE, PERCENTILE]).double())
    width = 128 / 4096
    assert float(low) == pytest.approx(float(exact[0]), abs=width)
    assert float(high) == pytest.approx(float(exact[1]), abs=width)
    assert [float(end) for end in seen(top, x).range()] == [-30.0, 40.0]  # type: ignore[attr-defined]


def test_percentiles_never_exceed_what_was_seen() -> None:
    observer = seen(PercentileObserver((2,)), torch.tensor([[0.3, -0.1], [0.3, 0.7]]))
    low, high = observer.range()  # type: ignore[attr-defined]
    assert float(low[0]) == pytest.approx(0.3, abs=1e-3) and float(high[0]) == pytest.approx(0.3, abs=1e-3)
    assert float(low[1]) >= -0.1 - 1e-6 and float(high[1]) <= 0.7 + 1e-6


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("with_offset", [True, False])
def test_values_and_histograms_agree(signed: bool, with_offset: bool) -> None:
    signed = signed and not with_offset
    x = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 6).unsqueeze(1)
    fits = []
    for cls in (ValueObserver, HistogramObserver):
        fits.append(seen(cls((6, 1)), x).fit(WIDTHS, signed=signed, with_offset=with_offset))
    errors = []
    for scales, offsets in fits:
        column = []
        for index, bits in enumerate(WIDTHS):
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            scale, offset = scales[..., index], offsets[..., index]
            column.append(((((x - offset) / scale).clamp(low, high).round() * scale + offset - x) ** 2).mean(1))
        errors.append(torch.stack(column))
    assert bool((errors[0] <= errors[1] * 1.01 + 1e-12).all()), "the values themselves are no worse"


def test_values_are_seen_once() -> None:
    with pytest.raises(QvitError, match="nothing was observed"):
        ValueObserver(()).fit(WIDTHS, signed=True, with_offset=False)
    with pytest.raises(QvitError, match="keeps one tensor"):
        seen(ValueObserver(()), torch.ones(3), torch.ones(3))
    with pytest.raises(QvitError, match="NaN"):
        seen(ValueObserver(()), torch.tensor([float("nan")]))


def test_names() -> None:
    assert {name: observer_class(name) for name in OBSERVERS} == OBSERVERS
    with pytest.raises(UsageError, match="did you mean 'percentile'"):
        observer_class("percentiles")
    with pytest.raises(UsageError, match="minmax"):
        calibrate(quantize(digits_model(), "w4a4"), digit_batches(), observer="largest")


def test_calibration_with_each_observer() -> None:
    scales = {}
    for name in OBSERVERS:
        model = calibrate(quantize(digits_model(), "w4a4"), digit_batches(), observer=name)
        found = dict(quantizers_of(model))
        scales[name] = float(found["blocks.0.mlp.fc1.input"].get_parameter("scale").detach())
        weight = found["blocks.0.mlp.fc1.weight"].get_parameter("scale").detach()
        assert torch.equal(weight, scales.setdefault("weight", weight)), "weights do not depend on it"
    assert scales["mse"] < scales["minmax"] and scales["percentile"] <= scales["minmax"] * 1.001
