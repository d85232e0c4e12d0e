"""Nuclear norms have their closed forms, and the table is the norm times an error measured by hand."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from tiny_models import digit_batches, digits_model, shake
from torch import nn

from qvit.allocate import allocate_plan
from qvit.measure import measure_sensitivity
from qvit.measure.layers import as_matrices
from qvit.measure.metric import Task
from qvit.measure.nuclear_norm import module_of, nuclear_norms
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan


def test_a_nuclear_norm_is_the_sum_of_singular_values() -> None:
    matrices = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted = np.linalg.svd(matrices.double().numpy(), compute_uv=False).sum(-1)
    np.testing.assert_allclose(nuclear_norms(matrices).numpy(), wanted, rtol=1e-10)
    # A map that attends everywhere alike has rank one; one in which each token sees itself has full rank.
    assert float(nuclear_norms(torch.full((4, 4), 0.25))) == pytest.approx(1)
    assert float(nuclear_norms(torch.eye(4))) == pytest.approx(4)
    layer = nn.Linear(5, 5)
    assert as_matrices(nn.Conv2d(8, 8, 1), torch.zeros(2, 8, 3, 4)).shape == (2, 12, 8)
    assert as_matrices(layer, torch.zeros(2, 3, 4, 5)).shape == (2, 12, 5)  # Swin's have rows and columns
    assert as_matrices(layer, torch.zeros(2, 5)).shape == (2, 1, 5)


def test_the_table_is_the_norm_of_the_maps_times_the_error_of_the_module() -> None:
    model, images = digits_model(), digit_batches(1, 4)[0]
    found = measure_sensitivity(model, [images[:3], images[3:]], metric="nuclear-norm", widths=(2, 5))
    probe = Task(
        "nuclear-norm", model, (2, 5), QuantPlan("default").resolve(inspect_model(model).sites), [images]
    ).probe
    caught = {}
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    for name, module in (("qkv", attention.qkv), ("mlp", mlp)):
        module.register_forward_hook(lambda _m, args, out, name=name: caught.update({name: out, f"{name}:in": args[0]}))
    with torch.no_grad():
        model(images)
    q, k, _ = caught["qkv"].unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    probs = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    norms = {
        "attn": np.linalg.svd(probs.detach().numpy(), compute_uv=False).sum() / 4,
        "mlp": np.linalg.svd(caught["mlp"].detach().numpy(), compute_uv=False).sum() / 4,
    }
    copy = probe.model.blocks[0]
    with torch.no_grad():
        for kind, site, place in (("attn", "query", "qkv:in"), ("mlp", "fc1.weight", "mlp:in")):
            path, module = f"blocks.0.{kind}.{site}", getattr(copy, kind)
            for head in range(probe.heads(path)):
                for column, width in enumerate((2, 5)):
                    exact = module(caught[place])
                    with probe.only(path, head, width):
                        error = float((module(caught[place]) - exact).square().sum()) / 4
                    assert found.raw[path][head, column] == pytest.approx(norms[kind] * error, rel=1e-3)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_windows_and_gated_mlps_have_a_table_for_every_site(name: str) -> None:
    arguments = {
        "swin_tiny_patch4_window7_224": {"patch_size": 4, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4)},
        "eva02_tiny_patch14_224": {"patch_size": 16, "depth": 1, "num_heads": 2},
    }[name]
    torch.manual_seed(0)
    model = shake(timm.create_model(name, img_size=32, embed_dim=16, num_classes=5, **arguments)).eval()
    cost = inspect_model(model)
    found = measure_sensitivity(model, [torch.randn(4, 3, 32, 32)], metric="nuclear-norm", widths=(2, 8))
    found.check(cost.sites)
    assert all((values[:, 0] > values[:, 1]).all() for values in found.raw.values())
    plan = allocate_plan(cost, found, cost.bit_operations(cost.uniform(5)))
    assert cost.bit_operations(plan.widths()) <= cost.bit_operations(cost.uniform(5))


def test_a_site_belongs_to_its_attention_module_its_mlp_or_its_own_layer() -> None:
    model = digits_model()
    probe = Task("", model, (4,), QuantPlan("default").resolve(inspect_model(model).sites), digit_batches()).probe
    places = {site: module_of(probe.model, site) for site in probe.quantizers}
    assert places["blocks.0.attn.qkv.query_weight"] == places["blocks.0.attn.probs"] == "blocks.0.attn"
    assert places["blocks.0.mlp.fc2.input"] == "blocks.0.mlp"
    assert places["patch_embed.proj.weight"] == "patch_embed.proj"
