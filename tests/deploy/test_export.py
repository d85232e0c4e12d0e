"""Exported graphs in ONNX Runtime and OpenVINO: the reference's answers, on integers, whatever the processor.

LayerNorm, softmax and GELU of other libraries differ in the last digit, which moves about one value in a million over
an edge between two integers: one image of eight may answer a little differently, all others equal within 1e-5.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_models import float_model, frozen, packed_arguments
from test_integer import patchwise
from torch import Tensor, nn

from qvit.deploy.engines.openvino import int8_is_exact as openvino_int8_is_exact
from qvit.deploy.export.onnx import (
    OPSET,
    OPSET_OF_2_BITS,
    SAFE_WITHOUT_VNNI,
    GraphArithmetic,
    OnnxRuntimeArithmetic,
    OpenVinoArithmetic,
    export_onnx,
    export_openvino,
    onnx_model,
)
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import integer_form
from qvit.deploy.packages import openvino_core
from qvit.errors import QvitError, UsageError
from qvit.methods.pmq import Split
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.layers import QuantLinear, adopt
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers import create_quantizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

OFFSET = {"signed": False, "symmetric": False, "granularity": "per-tensor"}
#: Heads differ in width; offsets on keys, values and behind GELU; weights of 2, 3, 4 and 8 bits.
MIXED = QuantPlan.preset("w4a4").with_rules(
    Rule("*.attn.query", {"bit_width": [3, 7]}),
    Rule("*.attn.output", {"bit_width": [8, 5]}),
    Rule("*.attn.probs", {"bit_width": [6, 8]}),
    Rule("*.attn.key", OFFSET),
    Rule("*.attn.value", OFFSET),
    Rule("*.fc1.weight", {"bit_width": 2}),
    Rule("*.fc2.weight", {"bit_width": 3, "granularity": "per-channel"}),
    Rule("*.attn.proj.weight", {"bit_width": [2, 4]}),
)


@functools.cache
def source(name: str) -> tuple[nn.Module, Tensor]:
    return frozen("vit", "w4a4") if name == "plain" else frozen(name, MIXED if name == "vit" else "w8a8")


@functools.cache
def graph(name: str, dialect: type[GraphArithmetic], *, small: bool = False, exact_pairs: bool = True) -> Any:
    """An exported model; several tests look at the same one."""
    model, images = source(name)
    size = tuple(images.shape[1:])
    return onnx_model(
        model, dialect(exact_pairs=exact_pairs), size, small=small, metadata={"qvit.plan.quant_plan": "p"}
    )  # type: ignore[arg-type]


def in_onnxruntime(model: Any, images: Tensor, *, basic: bool = False, optimized: Path | None = None) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if basic:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def compiled_by_openvino(model: Any, shape: list[int]) -> Any:
    pytest.importorskip("openvino")
    read = openvino_core().read_model(io.BytesIO(model.SerializeToString()))
    read.reshape(shape)
    return openvino_core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})


def same(found: Tensor, expected: Tensor) -> None:
    apart = (found - expected).abs().amax(-1) / expected.abs().max()
    assert int((apart > 1e-5).sum()) <= 1 and float(apart.max()) < 0.2, apart


def reference(name: str) -> Tensor:
    model, images = source(name)
    with torch.no_grad():
        return integer_form(model)(images)


# --------------------------------------------------------------------------------------------------------- ONNX Runtime


@pytest.mark.parametrize("basic", [False, True])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_onnx_runtime_answers_like_the_reference(name: str, basic: bool) -> None:
    """At its default level of optimization and at the basic one; for any number of images."""
    images, expected = source(name)[1], reference(name)
    model = graph(name, OnnxRuntimeArithmetic)
    for count in (1, 3, 8):
        same(in_onnxruntime(model, images[:count], basic=basic), expected[:count])


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_onnx_runtime_multiplies_integers(name: str, tmp_path: Path) -> None:
    """No product of quantized tensors is left in float once the graph is optimized."""
    in_onnxruntime(graph(name, OnnxRuntimeArithmetic), source(name)[1][:1], optimized=tmp_path / "optimized.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert not {"MatMul", "FusedMatMul", "Gemm", "Conv"} & set(kinds), kinds
    # Both ends, merging of patches, and of a block: qkv, scores, values, fc1, fc2, and proj once for each head.
    expected = 2 + 2 * (5 + 2) if name == "vit" else 2 + 1 + 3 * 5 + (2 + 2 + 4)
    assert sum(kind.startswith("MatMulInteger") for kind in kinds) == expected


@pytest.mark.parametrize("exact_pairs", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_width_for_prefix_tokens(exact_pairs: bool, tmp_path: Path) -> None:
    """Rows of two scales on integers, the weighted values in two parts, in both runtimes, for any number of images."""
    model, images = patchwise("vit", Split(8, 4, 0))
    with torch.no_grad():
        expected = integer_form(model)(images)
    size = images.shape[1:]
    found = onnx_model(model, OnnxRuntimeArithmetic(exact_pairs=exact_pairs), tuple(size))  # type: ignore[arg-type]
    for basic in (False, True):
        same(in_onnxruntime(found, images, basic=basic), expected)
    in_onnxruntime(found, images, optimized=tmp_path / "optimized.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert not {"MatMul", "FusedMatMul", "Gemm", "Conv"} & set(kinds), kinds
    pytest.importorskip("openvino")
    found = onnx_model(model, OpenVinoArithmetic(exact_pairs=exact_pairs), tuple(size))  # type: ignore[arg-type]
    for shape in (list(images.shape), [-1, *size]):
        same(torch.from_numpy(compiled_by_openvino(found, shape)(images.numpy())[0]), expected)


def test_a_product_has_dequantized_integers_on_both_sides() -> None:
    model = graph("vit", OnnxRuntimeArithmetic)
    onnx.checker.check_model(model, full_check=True)
    made_by = {name: node for node in model.graph.node for name in node.output}
    moves = {"Reshape", "Transpose", "Split", "Squeeze", "Gather"}

    def origin(name: str) -> str:
        node = made_by[name]
        while node.op_type in moves:
            node = made_by[node.input[0]]
        return node.op_type

    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 1 + 2 * 7 + 1
    assert all(origin(name) == "DequantizeLinear" for node in products for name in node.input)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    kinds = [node.op_type for node in model.graph.node]
    # Activations of a block: qkv, query, key, probs, value, output, fc1, fc2.
    assert kinds.count("QuantizeLinear") == 1 + 2 * 8 + 1
    weights = 1 + 2 * (1 + 2 + 2) + 1  # of proj one for each of two heads, whose input is dequantized twice, too
    assert kinds.count("DequantizeLinear") == kinds.count("QuantizeLinear") + 2 + weights
    stored = {i.name: i.data_type for i in model.graph.initializer}
    assert {stored[n.input[1]] for n in model.graph.node if n.op_type == "QuantizeLinear"} == {onnx.TensorProto.FLOAT}
    assert {entry.key: entry.value for entry in model.metadata_props}["qvit.plan.quant_plan"] == "p"
    assert model.producer_name == "qvit" and not any(node.metadata_props for node in model.graph.node)


def test_small_containers_hold_the_same_weights() -> None:
    """2 bits take opset 25, which ONNX Runtime has had since 1.24 or so: where it does not load, that is said."""
    large, small = graph("vit", OnnxRuntimeArithmetic), graph("vit", OnnxRuntimeArithmetic, small=True)
    onnx.checker.check_model(small)
    kinds = {tensor.data_type for tensor in small.graph.initializer}
    assert {onnx.TensorProto.UINT8, onnx.TensorProto.UINT4, onnx.TensorProto.UINT2} <= kinds
    assert [entry.version for entry in small.opset_import if entry.domain == ""] == [OPSET_OF_2_BITS]
    weights = [sum(len(t.raw_data) for t in model.graph.initializer if t.data_type != onnx.TensorProto.FLOAT)
               for model in (large, small)]  # fmt: skip
    assert weights[1] < 0.55 * weights[0] and small.ByteSize() < large.ByteSize()
    images, expected = source("vit")[1], reference("vit")
    try:
        found = in_onnxruntime(small, images)
    except Exception as error:
        pytest.skip(f"this ONNX Runtime takes no 2-bit tensors: {error}")
    same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["swin_v2", "eva02", "dinov3", "rope_mixed", "sapiens2", "beit", "cait", "siglip", "pe_core"]
)
def test_all_families_in_both_runtimes(name: str, tmp_path: Path) -> None:
    images, expected = source(name)[1], reference(name)
    model = graph(name, OnnxRuntimeArithmetic)
    for count in (1, 8):
        same(in_onnxruntime(model, images[:count], optimized=tmp_path / "optimized.onnx"), expected[:count])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    takers = {name: node for node in nodes for name in node.input}
    left = [takers[node.output[0]] for node in nodes if node.op_type == "DequantizeLinear"]
    assert all(node.op_type == "Reshape" for node in left), "what is left is moved, not multiplied in float"
    assert all(takers[node.output[0]].op_type == "QuantizeLinear" for node in left)
    other = compiled_by_openvino(graph(name, OpenVinoArithmetic, exact_pairs=openvino_int8_is_exact()), [*images.shape])
    same(torch.from_numpy(other([images.numpy()])[0]), expected)


# ------------------------------------------------------------------------------------------------------------- OpenVINO


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_openvino_answers_like_the_reference(name: str) -> None:
    images = source(name)[1]
    model = graph(name, OpenVinoArithmetic, exact_pairs=openvino_int8_is_exact())
    compiled = compiled_by_openvino(model, [*images.shape])
    same(torch.from_numpy(compiled([images.numpy()])[0]), reference(name))


def test_openvino_multiplies_integers_where_they_cannot_saturate() -> None:
    """4-bit blocks in int8 on every processor; 8-bit ends where it is exact."""
    images, exact = source("plain")[1], openvino_int8_is_exact()
    compiled = compiled_by_openvino(graph("plain", OpenVinoArithmetic, exact_pairs=exact), [*images.shape])
    products = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: op.get_rt_info()[key].astype(str) for key in ("layerType", "primitiveType", "originalLayersNames")}
        kind = info["primitiveType"]
        if info["layerType"] in ("FullyConnected", "MatMul"):
            products.append(kind)
        elif info["layerType"] == "Subgraph" and "softmax" in info["originalLayersNames"]:
            products += [kind, kind]  # with AVX-512, both products of attention are one kernel with all between them
    in_float = [kind for kind in products if not kind.lower().endswith("i8")]
    assert len(products) == 16 and len(in_float) == (0 if exact else 2), products


class Codes(nn.Module):
    """A layer whose activations are all 255 (or 127 and -128) and whose weights are ±127: sums at their largest."""

    def __init__(self, *, signed: bool) -> None:
        super().__init__()
        layer: Any = adopt(QuantLinear, nn.Linear(128, 16, bias=False))
        signs = torch.ones(16, 128)
        signs[8:] = -1
        signs[4, ::2] = -1
        for leaf, spec, step in (("input", TensorSpec(8, signed=signed), 1.0), ("weight", TensorSpec(8), 0.5)):
            quantizer: Any = create_quantizer(spec, Layout(channels=(1,)))
            quantizer.scale.data.fill_(step)
            quantizer.calibrated = True
            layer.add_module(f"{leaf}_quantizer", quantizer)
        layer.weight.data.copy_(signs * 127 / 2)
        self.layer = layer.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_sums_of_the_largest_codes_do_not_saturate(runtime: str, signed: bool) -> None:
    """Pairs of such products pass 2^15, where x86 without VNNI cuts them off."""
    model = Codes(signed=signed).eval()
    images = torch.full((3, 1, 9, 128), 1e4)
    images[1] *= -1
    images[2, ..., ::3] *= -1
    with torch.no_grad():
        expected = integer_form(model)(images)
    assert torch.equal(expected, model(images)) and float(expected.max()) == 128 * 127 * (128 if signed else 255) / 2
    exact = runtime == "onnxruntime" or openvino_int8_is_exact()
    dialect = OnnxRuntimeArithmetic if runtime == "onnxruntime" else OpenVinoArithmetic
    written = onnx_model(model, dialect(exact_pairs=exact), (1, 9, 128))
    if runtime == "onnxruntime":
        found = [in_onnxruntime(written, images), in_onnxruntime(written, images, basic=True)]
    else:
        found = [torch.from_numpy(compiled_by_openvino(written, [*images.shape])([images.numpy()])[0])]
    for one in found:
        assert torch.equal(one, expected)


def test_what_cannot_saturate_without_vnni() -> None:
    """Two products of 255 and 64 stay below 2^15, two of 255 and 65 do not."""
    assert 2 * 255 * SAFE_WITHOUT_VNNI < 2**15 <= 2 * 255 * (SAFE_WITHOUT_VNNI + 1)


# ---------------------------------------------------------------------------------------------------------------- files


@functools.cache
def artifact() -> Artifact:
    return Artifact.from_model(source("vit")[0], class_names=("a", "b"), **packed_arguments("vit"))


def test_files_of_onnx(tmp_path: Path) -> None:
    path = export_onnx(artifact(), tmp_path / "new" / "model.onnx", small=False)
    model = onnx.load(path)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    assert texts["qvit.model"] == "vit_digits" and json.loads(texts["qvit.class_names"]) == ["a", "b"]
    assert json.loads(texts["qvit.data_config"])["input_size"] == [1, 8, 8]
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    same(in_onnxruntime(model, source("vit")[1]), reference("vit"))


def test_files_of_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "new" / "model.xml"
    with pytest.raises(UsageError, match=r"\.xml"):
        export_openvino(artifact(), tmp_path / "model.onnx")
    written = export_openvino(artifact(), path, batch=8, exact_pairs=openvino_int8_is_exact())
    assert written == path and sorted(p.name for p in path.parent.iterdir()) == ["model.bin", "model.xml"]
    model = openvino_core().read_model(path)
    assert model.get_rt_info(["qvit", "model"]).value == "vit_digits" and list(model.inputs[0].shape) == [8, 1, 8, 8]
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    same(torch.from_numpy(compiled([source("vit")[1].numpy()])[0]), reference("vit"))
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(openvino, "save_model", full)
    monkeypatch.setattr("qvit.deploy.export.onnx.openvino_model", lambda *_, **__: model)
    with pytest.raises(QvitError, match=r"model\.xml.*no space left"):
        export_openvino(artifact(), path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 2


# -------------------------------------------------------------------------------------------------------------- refused


def test_widths_that_follow_the_image_are_refused() -> None:
    model, _ = patchwise("vit", Split(5, 3, 0.5))
    with pytest.raises(UsageError, match="widths that follow the image"):
        onnx_model(model, OnnxRuntimeArithmetic(), (1, 8, 8))


def test_a_model_that_is_not_frozen_is_refused() -> None:
    with pytest.raises(UsageError, match="freeze"):
        onnx_model(quantize(float_model("vit")[0], "w4a4"), OnnxRuntimeArithmetic(), (1, 8, 8))


class OnlyTwo(Codes):
    """Takes the number of images for a constant, as `len` of a tensor does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * len(x)


def test_a_model_that_takes_one_number_of_images_is_not_exported_for_any() -> None:
    model = OnlyTwo(signed=True).eval()
    with pytest.raises(QvitError, match="batch"):
        onnx_model(model, OnnxRuntimeArithmetic(), (1, 9, 128))
    images = torch.randn(4, 1, 9, 128)
    written = onnx_model(model, OnnxRuntimeArithmetic(), (1, 9, 128), batch=4)
    assert torch.equal(in_onnxruntime(written, images), model(images))


def test_what_torch_cannot_export_has_its_reason() -> None:
    class Odd(Codes):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) > 0 else x

    with pytest.raises(QvitError, match="torch cannot export this Odd"):
        onnx_model(Odd(signed=True).eval(), OnnxRuntimeArithmetic(), (1, 9, 128))


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UsageError, match=r'onnxscript: pip install "qvit\[onnx\]"'):
        export_onnx(artifact(), "model.onnx")


def test_a_plan_with_float_and_logarithmic_tensors() -> None:
    """What is simulated in the reference is simulated in the graph; weights of statsq have an offset."""
    model, images = float_model("vit")
    plan = QuantPlan.preset("w4a4").with_rules(
        Rule("*.attn.probs", {"quantizer": "log2"}),
        Rule("*.fc1.input", None),
        Rule("*.qkv.*_weight", {"quantizer": "statsq"}),
    )
    quantized = freeze(calibrate(quantize(model, plan), [images]).eval())
    with torch.no_grad():
        expected = integer_form(quantized)(images)
    same(in_onnxruntime(onnx_model(quantized, OnnxRuntimeArithmetic(), (1, 8, 8)), images), expected)
