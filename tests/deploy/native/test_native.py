"""The native engine: every product exact at the ends of its range, whole models equal to the reference."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm
import torch
from tiny_models import shake
from torch import Tensor

import qvit
from qvit.deploy.engines import create_engine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import integer_form
from qvit.deploy.native.library import forms, kinds, multiply
from qvit.errors import UsageError
from qvit.methods.ptq.stages import ptq

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CXX")), reason="needs a C++ compiler")
FORMS = ("AVX-512 VNNI", "AVX-VNNI", "AVX2", "NEON dot", "portable")
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}
SWIN_NAME = "swin_tiny_patch4_window7_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def form(name: str) -> str:
    if name not in forms():
        pytest.skip(f"this processor has no {name}")
    return name


def filled(shape: tuple[int, int], low: int, high: int, how: str) -> np.ndarray[Any, Any]:
    """Integers within a range: at one end, at both in turn, or anywhere."""
    if how == "random":
        return np.random.default_rng(3).integers(low, high + 1, shape)
    ends = np.full(shape, low if how == "least" else high)
    if how == "alternating":
        ends[:, ::2] = low
    return ends


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("width", range(2, 9))
def test_products_are_exact_at_the_ends_of_every_range(name: str, width: int) -> None:
    for other in range(2, 9):
        low, high, most = -(2 ** (width - 1)), 2 ** (width - 1) - 1, 2 ** (other - 1)
        for ways in (("greatest", "greatest"), ("greatest", "least"), ("least", "least"), ("alternating", "random")):
            for m, n, k in ((7, 33, 300), (1, 1, 1)):
                a = filled((m, k), 0, high - low, ways[0])
                w = filled((n, k), -most, most - 1, ways[1])
                found = multiply(a.astype(np.uint8), low, high, w.astype(np.int8), form=form(name))
                np.testing.assert_array_equal(found, (a + low) @ w.T)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 3), (13, 5, 7), (25, 31, 197), (6, 64, 768), (37, 100, 64)])
def test_products_of_odd_sizes(name: str, m: int, n: int, k: int) -> None:
    a, w = filled((m, k), 0, 255, "random"), filled((n, k), -128, 127, "random")
    found = multiply(a.astype(np.uint8), 0, 255, w.astype(np.int8), form=form(name))
    np.testing.assert_array_equal(found, a @ w.T)


def frozen(plan: Any, images: Tensor, name: str = "vit_tiny_patch16_224", probs: str = "uniform", **kwargs: Any) -> Any:
    """A packed small model, quantized after training."""
    torch.manual_seed(5)
    kwargs = (SWIN if name.startswith("swin") else SMALL) | kwargs
    model = shake(timm.create_model(name, **kwargs)).eval()
    quantized = ptq(model, plan, [images], probs=probs, calibration_images=len(images))
    qvit.freeze(quantized)
    return Artifact.from_model(quantized, model_name=name, model_kwargs=kwargs)


def images_for(count: int = 6, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def require_the_reference(
    artifact: Artifact, images: Tensor, *, threads: tuple[int, ...] = (1,), names: Sequence[str] = ()
) -> None:
    """Answers as the reference's: equal but for values on the edge of two integers, which few images have.

    Each number of threads is tried in each form that is named, or else in the one that the engine takes by itself.
    """
    reference = integer_form(artifact.model(), None, artifact.integers)
    with torch.no_grad():
        expected = reference(images)
    for name, count in itertools.product(names or (None,), threads):
        options = {} if name is None else {"form": name}
        found = create_engine(artifact, "native", threads=count, **options)(images)
        assert found.shape == expected.shape
        error = (found - expected).abs().flatten(1).amax(1) / expected.std()
        close = float(error.median()) < 1e-4 and float(error.max()) < 0.3
        assert found.isfinite().all() and close, f"{name}, {count} threads: {error}"


def prefix_plan(plan: str, width: int, sites: tuple[str, ...]) -> Any:
    """A preset with `width` bits for class token and registers at some activations of each block."""
    low = int(plan[-1])
    changes = {
        "bit_width": width,
        "switchable_scale": True,
        "token_bit_width": {"share": 0, "low": low},
    }
    return qvit.QuantPlan.preset(plan).with_rules(*(qvit.Rule(f"blocks.*.{site}", changes) for site in sites))


ROW_SITES = ("attn.qkv.input", "attn.query", "mlp.fc1.input", "mlp.fc2.input")
TOKEN_SITES = (*ROW_SITES, "attn.key", "attn.value")


@pytest.mark.parametrize(
    ("plan", "width", "probs", "kwargs"),
    [
        ("w4a4", 8, "uniform", {}),
        ("w8a4", 8, "uniform", {}),  # AVX2: weights of -128, patches in 16-bit sums, the class token not
        ("w3a3", 6, "log2", {"reg_tokens": 3}),
        ("w4a4", 8, "log-sqrt2", {"reg_tokens": 3, "global_pool": "avg"}),
        ("w4a2", 4, "uniform", {"qk_norm": True, "init_values": 0.1, "reg_tokens": 1}),
        ("w4a4", 8, "uniform", {"scale_mlp_norm": True, "img_size": (32, 64)}),
        ("w4a4", 8, "uniform", {"class_token": False, "global_pool": "avg"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sites", [ROW_SITES, TOKEN_SITES], ids=["rows", "all"])
def test_a_width_for_prefix_tokens(
    plan: str, width: int, probs: str, kwargs: dict[str, Any], sites: tuple[str, ...]
) -> None:
    size = kwargs.get("img_size", (32, 32))
    images = torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(7))
    artifact = frozen(prefix_plan(plan, width, sites), images, probs=probs, **kwargs)
    require_the_reference(artifact, images, threads=(1, 2), names=forms())


def test_a_prefix_width_is_seen_by_prefix_tokens_alone() -> None:
    """With the width of all others it is the plain model; with another one it is not."""
    images = images_for()
    plain, same, other = (
        create_engine(frozen(prefix_plan(plan, width, ROW_SITES) if width else plan, images), "native")(images)
        for plan, width in (("w4a4", 0), ("w4a4", 4), ("w4a4", 8))
    )
    assert torch.equal(plain, same) and not torch.equal(plain, other)


@pytest.mark.parametrize(
    ("plan", "probs"),
    [("w8a8", "uniform"), ("w4a4", "uniform"), ("w3a3", "log2"), ("w4a4", "log-sqrt2"), ("w2a8", "uniform")],
)
def test_models_answer_as_the_reference(plan: str, probs: str) -> None:
    require_the_reference(frozen(plan, images_for(), probs=probs), images_for(), threads=(2,), names=forms())


@pytest.mark.parametrize(("plan", "probs"), [("w3a3", "log2"), ("w4a4", "log-sqrt2")])
def test_long_rows_of_logarithmic_probabilities(plan: str, probs: str) -> None:
    """65 keys: codes are looked up 64 at a time where that can be done, and one is left."""
    images = images_for(2, 64)
    require_the_reference(frozen(plan, images, probs=probs, img_size=64), images, threads=(2,), names=forms())


@pytest.mark.parametrize("probs", ["log2", "log-sqrt2"])
def test_wide_logarithmic_probabilities(probs: str) -> None:
    """Codes behind 16 are other operands: attention that is sharp has all of them, up to those that are taken for 0."""
    images, kwargs = images_for(3, 64), SMALL | {"img_size": 64}
    torch.manual_seed(5)
    model: Any = shake(timm.create_model("vit_tiny_patch16_224", **kwargs)).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data[: 2 * 48] *= 8
    widths = {"quantizer": probs, "bit_width": (8, 5, 4)}
    quantized = qvit.quantize(model, qvit.QuantPlan.preset("w8a8").with_rules(qvit.Rule("blocks.*.attn.probs", widths)))
    qvit.calibrate(quantized, [images])
    qvit.freeze(quantized)
    site: Any = quantized.get_submodule("blocks.1.attn.probs_quantizer")
    seen: list[Tensor] = []
    site.register_forward_hook(lambda module, inputs, output: seen.append(module.to_int(inputs[0])))
    with torch.no_grad():
        quantized(images)
    most, codes = 96 if probs == "log-sqrt2" else 48, torch.cat(seen)
    inside, narrow = ((codes[:, 0] > 16) & (codes[:, 0] < most)).sum(), ((codes[:, 1] > 15) & (codes[:, 1] < 31)).sum()
    assert inside > 100 and narrow > 100 and (codes[:, 0] > most).any() and (codes[:, 1] == 31).any()
    artifact = Artifact.from_model(quantized, model_name="vit_tiny_patch16_224", model_kwargs=kwargs)
    require_the_reference(artifact, images, threads=(2,), names=forms())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"init_values": 0.1},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False, "reg_tokens": 3, "no_embed_class": True},
        {"pre_norm": True, "qkv_bias": False},
        {"act_layer": "quick_gelu"},
        {"act_layer": "silu"},
        {"act_layer": "gelu_tanh"},
        {"act_layer": "relu"},
        {"in_chans": 3, "class_token": False, "global_pool": "avg"},
        {"img_size": (32, 64)},
        {"qk_norm": True},
        {"qk_norm": True, "norm_layer": "rmsnorm"},
        {"scale_mlp_norm": True},
        {"pos_embed": "none"},
    ],
    ids=str,
)
def test_variants_answer_as_the_reference(kwargs: dict[str, Any]) -> None:
    images = images_for() if "img_size" not in kwargs else torch.randn(6, 3, 32, 64)
    require_the_reference(frozen("w8a8", images, **kwargs), images)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_giant_patch14_reg4_dinov2", {"patch_size": 8}),
        ("vit_little_patch16_reg4_gap_256", {}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_other_models_answer_as_the_reference(name: str, kwargs: dict[str, Any]) -> None:
    """Gated MLPs with registers, the mean of patches behind `fc_norm`, LayerScale."""
    images = images_for()
    require_the_reference(frozen("w6a8", images, name, **(SMALL | kwargs)), images)


def test_a_gated_mlp_of_two_layers() -> None:
    """AIMv2: SwiGLU, RmsNorm, a norm of embedded patches."""
    images = images_for()
    artifact = frozen("w8a8", images, "aimv2_large_patch14_224", **SMALL)
    assert artifact.skeleton.get_submodule("blocks.0.mlp.fc1_g") is not None
    require_the_reference(artifact, images)


FEATURES: dict[str, Any] = {"num_classes": 0}
ATTENTION: dict[str, Any] = {"global_pool": "map", "class_token": False}


@pytest.mark.parametrize(
    ("model", "kwargs", "plan"),
    [
        ("vit_base_patch16_siglip_224", FEATURES, "w8a8"),
        ("vit_base_patch16_siglip_224", {"probs": "log2"}, "w4a4"),
        ("vit_so400m_patch14_siglip_gap_224", FEATURES | {"patch_size": 8}, "w8a8"),
        ("vit_base_patch32_clip_quickgelu_224", FEATURES | {"global_pool": ""}, "w4a4"),
        ("vit_small_patch14_reg4_dinov2", FEATURES | {"global_pool": "", "patch_size": 8}, "w8a8"),
        (SWIN_NAME, FEATURES | {"global_pool": ""}, "w8a8"),
    ],
    ids=str,
)
def test_towers_answer_as_the_reference(model: str, kwargs: dict[str, Any], plan: str) -> None:
    """Pooled by attention, by the mean, or not at all; features, or a classifier behind them."""
    images = images_for(5, 64 if model == SWIN_NAME else 32)
    small: dict[str, Any] = {} if model == SWIN_NAME else SMALL
    require_the_reference(frozen(plan, images, model, **(small | kwargs)), images, threads=(2,), names=forms())


@pytest.mark.parametrize(
    "kwargs",
    [
        FEATURES,
        {"global_pool": ""},
        {"global_pool": "max"},
        {"global_pool": "avgmax", "reg_tokens": 2},
        FEATURES | {"global_pool": "avg", "pool_include_prefix": True},
        FEATURES | {"global_pool": "", "fc_norm": True, "final_norm": False},
        ATTENTION | {"reg_tokens": 3},
        {"global_pool": "map", "reg_tokens": 3, "pool_include_prefix": True, "norm_layer": "rmsnorm"},
        ATTENTION | {"qk_norm": True, "img_size": (32, 64)},
    ],
    ids=str,
)
def test_ways_to_pool_answer_as_the_reference(kwargs: dict[str, Any]) -> None:
    images = torch.randn(6, 3, *kwargs.get("img_size", (32, 32)), generator=torch.Generator().manual_seed(7))
    require_the_reference(frozen("w8a8", images, **kwargs), images, threads=(3,))


def test_the_answers_of_tokens_depend_on_neither_threads_nor_batch() -> None:
    images = images_for(5)
    for kwargs in (FEATURES | {"global_pool": ""}, {"global_pool": "map"}):
        artifact = frozen("w4a8", images, **kwargs)
        expected = create_engine(artifact, "native", threads=1)(images)
        engine = create_engine(artifact, "native", threads=4)
        assert torch.equal(engine(images), expected)
        assert torch.equal(torch.cat([engine(image[None]) for image in images]), expected)


@pytest.mark.parametrize(("plan", "probs"), [("w8a8", "uniform"), ("w4a4", "uniform"), ("w3a3", "log-sqrt2")])
@pytest.mark.parametrize("img_size", [64, (32, 96)], ids=str)
def test_swin_answers_as_the_reference(plan: str, probs: str, img_size: Any) -> None:
    """Windows with shifts along both axes, and where a stage is one window high and does not shift along that axis."""
    sides = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    images = torch.randn(4, 3, *sides, generator=torch.Generator().manual_seed(7))
    artifact = frozen(plan, images, SWIN_NAME, probs, img_size=img_size)
    require_the_reference(artifact, images, threads=(2,), names=forms())


def test_rectified_queries_answer_as_the_reference() -> None:
    images = images_for()
    model = shake(timm.create_model("vit_tiny_patch16_224", **SMALL)).eval()
    plan = qvit.QuantPlan.preset("w4a4").with_rules(
        *(qvit.Rule(f"blocks.*.attn.{site}", {"quantizer": "irm"}) for site in ("query", "key"))
    )
    quantized = qvit.quantize(model, plan)
    qvit.calibrate(quantized, [images])
    qvit.freeze(quantized)
    artifact = Artifact.from_model(quantized, model_name="vit_tiny_patch16_224", model_kwargs=SMALL)
    require_the_reference(artifact, images)


def test_widths_of_heads_may_differ() -> None:
    images = images_for()
    torch.manual_seed(5)
    model = shake(timm.create_model("vit_tiny_patch16_224", **SMALL)).eval()
    plan = qvit.QuantPlan.preset("w4a4").with_rules(
        *(qvit.Rule(f"blocks.*.attn.{site}", {"bit_width": (2, 8, 3)}) for site in ("query", "key", "value", "output")),
        qvit.Rule("blocks.*.attn.probs", {"bit_width": (8, 3, 5)}),
    )
    quantized = qvit.quantize(model, plan)
    qvit.calibrate(quantized, [images])
    qvit.freeze(quantized)
    artifact = Artifact.from_model(quantized, model_name="vit_tiny_patch16_224", model_kwargs=SMALL)
    require_the_reference(artifact, images)


def test_the_answer_depends_on_neither_threads_nor_batch_nor_form() -> None:
    images = images_for(9)
    artifact = frozen("w4a8", images)
    expected = create_engine(artifact, "native", threads=1)(images)
    for threads in (2, 3, 7):
        assert torch.equal(create_engine(artifact, "native", threads=threads)(images), expected)
    engine = create_engine(artifact, "native", threads=2)
    assert torch.equal(torch.cat([engine(image[None]) for image in images]), expected)
    for name in forms():
        found = create_engine(artifact, "native", form=name)(images)
        assert torch.allclose(found, expected, atol=0.1)  # without fused multiply-add, last digits of floats differ
        assert name == "portable" or torch.equal(found, expected)


def test_many_python_threads_and_a_fork() -> None:
    images = images_for(4)
    engine = create_engine(frozen("w8a8", images), "native", threads=2)
    expected = engine(images)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: engine(images), range(40)))
    child = os.fork()
    if child == 0:
        same = np.array_equal(engine.model(images.numpy()), expected.numpy())  # type: ignore[attr-defined]
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(engine(images), expected)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "a norm or a gate in its attention"),
        ("vit_tiny_patch16_224", {"depth": 0}, "no blocks"),
        ("vit_tiny_patch16_224", {"global_pool": "max", "pool_include_prefix": True}, "pools prefix tokens by 'max'"),
        ("vit_tiny_patch16_224", {"num_heads": 8}, "multiple of 4 channels, up to 256"),
        (SWIN_NAME, {"img_size": 48}, "windows that do not divide its 6x6 tokens"),
    ],
    ids=str,
)
def test_a_model_that_it_does_not_run(name: str, kwargs: dict[str, Any], reason: str) -> None:
    kwargs = {"img_size": 32, **kwargs} if name.startswith("vit") else kwargs
    artifact = frozen("w8a8", images_for(2, kwargs["img_size"]), name, **kwargs)
    with pytest.raises(UsageError, match=f"engine 'native' does not run this model: .*{reason}"):
        create_engine(artifact, "native")
    if kwargs.get("depth") == 0:  # the quickest to open
        assert create_engine(artifact).name != "native", "the next engine serves"


RULES: dict[str, tuple[str, dict[str, Any], str]] = {
    "weights in float": ("blocks.0.mlp.fc1.weight", {}, "'blocks.0.mlp.fc1.weight' stays in float"),
    "activations in float": ("blocks.1.attn.key", {}, "'blocks.1.attn.key' stays in float"),
    "wide": ("blocks.0.mlp.fc1.input", {"bit_width": 10, "bit_width_range": (2, 10)}, "more than 8 bits"),
    "no zero": ("blocks.0.mlp.fc1.weight", {"quantizer": "statsq"}, "'blocks.0.mlp.fc1.weight' is a weight on a grid"),
    "channels": ("blocks.0.mlp.fc1.input", {"granularity": "per-channel"}, "scale for each channel"),
    "groups of tokens": (
        "blocks.0.mlp.fc1.input",
        {"switchable_scale": True, "token_bit_width": {"share": 0.5, "low": 3}},
        "two groups of tokens that follow the image",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_a_plan_that_it_does_not_run(case: str) -> None:
    site, changes, reason = RULES[case]
    torch.manual_seed(5)
    model = shake(timm.create_model("vit_tiny_patch16_224", **SMALL)).eval()
    plan = qvit.QuantPlan.preset("w8a8").with_rules(qvit.Rule(site, changes or None))
    quantized = qvit.quantize(model, plan)
    qvit.calibrate(quantized, [images_for()])
    qvit.freeze(quantized)
    artifact = Artifact.from_model(quantized, model_name="vit_tiny_patch16_224", model_kwargs=SMALL)
    with pytest.raises(UsageError, match=reason):
        create_engine(artifact, "native")


def test_a_profile_names_kinds_of_kernels() -> None:
    images = images_for(2)
    engine: Any = create_engine(frozen("w8a8", images), "native", threads=1)
    expected, found = engine(images), engine.profile(images)
    assert {"layernorm", "qkv", "attention", "fc1+activation"} <= set(found) <= set(kinds())
    assert all(value > 0 for value in found.values()) and torch.equal(engine(images), expected)


def test_wrong_requests() -> None:
    images = images_for(2)
    artifact = frozen("w8a8", images)
    engine = create_engine(artifact, "native")
    for wrong in (images[:0], images[:, :, :16], images[0]):
        with pytest.raises(UsageError, match=r"images of shape \(B, 3, 32, 32\)"):
            engine(wrong)
    with pytest.raises(UsageError, match="no form 'AMX'"):
        create_engine(artifact, "native", form="AMX")
    with pytest.raises(UsageError, match="1 to 1024 threads"):
        create_engine(artifact, "native", threads=-1)


def test_images_that_are_no_numbers_do_no_harm() -> None:
    images = images_for(3)
    engine = create_engine(frozen("w4a4", images, probs="log2"), "native", threads=2)
    expected = engine(images)
    images[1] = float("nan")
    images[2] = float("inf")
    found = engine(images)
    assert torch.equal(found[0], expected[0]) and found.isfinite().all()
