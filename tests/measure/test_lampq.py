"""The normaliser of LampQ's metric, and its table by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_models import digit_batches, digits_model

from qvit.measure import measure_sensitivity, site_type
from qvit.measure.lampq import normalisers
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of


def test_every_kind_has_traces_of_mean_one() -> None:
    """Kinds are counted by head: of the queries, three heads in two blocks."""
    traces = {
        "blocks.0.attn.query": torch.tensor([1.0, 2.0]),
        "blocks.1.attn.query": torch.tensor([6.0]),
        "blocks.0.mlp.fc1.input": torch.tensor([1e-6]),
        "head.input": torch.tensor([0.0]),
    }
    alpha = normalisers(traces)
    assert alpha == pytest.approx({"blocks.attn.query": 1 / 3, "blocks.mlp.fc1.input": 1e6, "head.input": 0.0})


@pytest.mark.parametrize("features", [False, True])
def test_the_table_is_the_normalised_trace_times_the_relative_error(features: bool) -> None:
    """With one site of a kind α·tr(F) is 1, and the table is the relative error of the tensor itself."""
    model = digits_model(num_classes=0) if features else digits_model()
    images = digit_batches(1, 4)[0]
    found = measure_sensitivity(model, [images], metric="lampq", widths=(3,), seed=1)
    quantized = calibrate(quantize(model, QuantPlan.preset("w3a3", boundary_bits=3)), [images]).eval()
    weight = quantized.blocks[0].mlp.fc1.weight.detach()
    error = dict(quantizers_of(quantized))["blocks.0.mlp.fc1.weight"](weight).detach() - weight
    wanted = float(error.square().sum() / weight.square().sum())
    assert found.raw["blocks.0.mlp.fc1.weight"][0, 0] == pytest.approx(wanted, rel=1e-4)
    assert all((values >= 0).all() for values in found.raw.values())
    # Heads of one kind differ by their traces.
    query = found.raw["blocks.0.attn.query"]
    assert query.shape == (2, 1) and query[0, 0] != pytest.approx(query[1, 0], rel=1e-3)


def test_orders_within_a_kind_are_those_of_the_fisher_traces() -> None:
    model, images = digits_model(depth=2), digit_batches(1, 4)
    options = {"widths": (4,), "seed": 1}
    ours, hessian = (measure_sensitivity(model, images, metric=name, **options).raw for name in ("lampq", "hessian"))
    sites = [f"blocks.{block}.mlp.fc1.weight" for block in (0, 1)]
    sizes = [float(model.get_parameter(site).detach().square().mean()) for site in sites]
    ratio = [float(own[sites[0]][0, 0] / own[sites[1]][0, 0]) for own in (ours, hessian)]
    # Both are traces times squared errors; ours are relative to the tensor.
    assert ratio[0] == pytest.approx(ratio[1] * sizes[1] / sizes[0], rel=1e-4)
    assert site_type(sites[0]) == site_type(sites[1])
