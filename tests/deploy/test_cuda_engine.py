"""The engine `cuda`: its kernels in Triton's interpreter, compiled for a GPU that is not there, and on a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_models import frozen, packed_arguments
from without_gpu import compiled, interpreted

from qvit.deploy.engines import available_engines, create_engine
from qvit.deploy.engines.cuda import MOST_GRAPHS
from qvit.deploy.file.artifact import Artifact
from qvit.errors import UsageError

KERNELS = """
import torch
from torch.nn import functional as F
from qvit.deploy.cuda.operators import Codes, Target, linear, normalize, pack, sums_are_exact
from qvit.functional import quantize

torch.manual_seed(0)
assert sums_are_exact(torch.device("cpu"))
for bits_x in range(2, 9):
    for bits_w in range(2, 9):
        segments, length, outputs = (1, 67, 5) if bits_x % 2 else (2, 33, 19)
        low, high = -(2 ** (bits_x - 1)), 2 ** (bits_x - 1) - 1
        x = torch.randint(0, 2, (3, segments * length)) * (high - low) + low
        x[1] = low
        low, high = -(2 ** (bits_w - 1)), 2 ** (bits_w - 1) - 1
        w = torch.randint(0, 2, (outputs, segments, length)) * (high - low) + low
        w[1] = low
        scale, bias, zero = torch.rand(segments, outputs), torch.randn(outputs), 128 * (bits_x == 8)
        expected = bias
        for segment in range(segments):
            part = (x + zero).view(3, segments, length)[:, segment] @ w[:, segment].t()
            expected = expected + part.float() * scale[segment]
        held = pack(w) if bits_w <= 4 else w.to(torch.int8)
        about = {"correction": (zero * w.sum(2).t()).int().contiguous() if zero else None, "packed": bits_w <= 4}
        found = linear(Codes(x.to(torch.int8), zero), held, scale, bias, **about)
        assert torch.equal(found, expected), (bits_x, bits_w)

x, w = torch.randint(-128, 128, (37, 65)), torch.randint(-8, 8, (19, 1, 65))
scale, bias = torch.rand(1, 19) * 1e-3, torch.randn(19)
y = (x @ w[:, 0].t()).float() * scale + bias
target = Target(torch.rand(19) * 0.01 + 0.001, torch.randn(19) * 0.1, torch.zeros(19), torch.full((19,), 255.0), 128)
for name, function in {
    "gelu": F.gelu, "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu,
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x), None: lambda x: x,
}.items():
    found = linear(Codes(x.to(torch.int8), 0), pack(w), scale, bias, packed=True, activation=name, target=target)
    codes = quantize(function(y), target.scale, 8, False, target.offset)
    apart = (found.int() + 128 - codes).abs()
    assert int(apart.max()) <= 1 and int(apart.sum()) <= (0 if name is None else 2), name
gain, residual = torch.randn(19), torch.randn(37, 19)
found = linear(Codes(x.to(torch.int8), 0), pack(w), scale, bias, packed=True, gain=gain, residual=residual)
assert torch.equal(found, residual + y * gain)

x = torch.randn(5, 67) * 3 + 1
gain, shift, step = torch.randn(67), torch.randn(67), torch.tensor(0.05)
grid = Target(step, None, torch.tensor(-8.0), torch.tensor(7.0), 0)
for rms, expected in (
    (False, F.layer_norm(x, (67,), gain, shift, 1e-6)),
    (True, F.rms_norm(x, (67,), gain, 1e-6) + shift),
):
    apart = (normalize(x, gain, shift, 1e-6, grid, rms=rms).stored - quantize(expected, step, 4, True)).abs()
    assert int(apart.max()) <= 1 and int(apart.sum()) <= 2
print("equal")
"""

MODELS = """
import sys, timm, torch
from integer_models import FAMILIES, frozen
from test_integer import mixed, patchwise
from tiny_models import shake
from qvit import QuantPlan, Rule
from qvit.deploy.cuda.form import CudaAttention, CudaBlock, CudaLinear, cuda_form
from qvit.deploy.integer.reference import integer_form
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.methods.pmq import Split
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize

def count(model, images, layers, attentions, blocks=0):
    images = images[:3]
    with torch.no_grad():
        expected = integer_form(model)(images)
        form = cuda_form(integer_form(model, TorchArithmetic(int8=False)))
        found = form(images)
    apart = (found - expected).abs().amax(1) / expected.abs().max()
    assert int((apart > 1e-5).sum()) <= 1 and float(apart.max()) < 0.2, apart
    kinds = [sum(isinstance(own, kind) for own in form.modules()) for kind in (CudaLinear, CudaAttention, CudaBlock)]
    assert kinds == [layers, attentions, blocks], kinds

def vit(plan, **kwargs):
    size = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    model = shake(timm.create_model("vit_tiny_patch16_224", **(size | kwargs))).eval()
    images = torch.randn(3, 3, kwargs.get("img_size", 32), kwargs.get("img_size", 32))
    return freeze(calibrate(quantize(model, plan), [images]).eval()), images

def on(pattern, **changes):
    return QuantPlan.preset("w4a4").with_rules(Rule(pattern, changes))

torch.manual_seed(0)
wanted = sys.argv[1]
if wanted == "vit":
    for plan in ("w8a8", "w3a3", mixed("vit")):
        count(*frozen("vit", plan), 10, 2, 2)
    count(*vit("w4a8", img_size=80, patch_size=8, mlp_ratio=2.3), 6, 1, 1)
    count(*vit("w3a3", qk_norm=True, init_values=0.1, reg_tokens=3), 6, 1, 1)
elif wanted == "grids":
    for name, bits in (("log2", 3), ("log2", 4), ("log-sqrt2", 2), ("log-sqrt2", 4)):
        count(*frozen("vit", on("*.probs", quantizer=name, bit_width=bits)), 10, 2, 2)
    count(*frozen("vit", on("*.probs", quantizer="log2", bit_width=5)), 10, 0)
    count(*frozen("vit", on("*.attn.query", quantizer="irm")), 10, 2, 2)
    offsets = {"signed": False, "symmetric": False, "bit_width": 8}
    rules = [Rule(f"*.attn.{name}", offsets) for name in ("query", "key", "value")]
    count(*frozen("vit", QuantPlan.preset("w4a4").with_rules(*rules)), 10, 2, 2)
    count(*frozen("vit", on("*weight", quantizer="statsq")), 0, 2)
    count(*patchwise("vit", Split(5, 3, 0.5)), 4, 0)
else:
    layers = {"swin": 15, "swin_v2": 15, "cait": 14, "siglip": 10, "sapiens2": 8, "eva02": 9}
    attentions = {"swin": 3, "swin_v2": 3, "cait": 1, "siglip": 2, "sapiens2": 1, "eva02": 1}
    for name in layers:
        count(*frozen(name), layers[name], attentions[name], int(name == "siglip"))
print("equal")
"""

ENGINE = """
import torch
from integer_models import frozen, packed_arguments
from without_gpu import compiled, interpreted

from qvit.deploy.engines import create_engine
from qvit.deploy.file.artifact import Artifact
model, images = frozen("vit", "w4a4")
artifact = Artifact.from_model(model, **packed_arguments("vit"))
engine = create_engine(artifact, "cuda", threads=1)
assert torch.equal(engine(images.double()), create_engine(artifact, "reference")(images))
weights = [t for name, t in engine.module.state_dict().items() if "blocks" in name and t.dtype is torch.int8]
held, codes = sum(t.nbytes for t in weights), sum(model.get_submodule(f"blocks.{i}.{name}").weight.numel()
    for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
assert 2 * held == codes
print(engine.arithmetic)
"""


def test_kernels_in_the_interpreter() -> None:
    """Linear layers at pairs of widths and the extremes of their range, epilogues, norms: equal to the formulas."""
    assert interpreted(KERNELS) == "equal\n"


@pytest.mark.slow
@pytest.mark.parametrize("models", ["vit", "grids", "families"])
def test_models_in_the_interpreter(models: str) -> None:
    """Whole models equal the reference, up to a value on the edge between two integers."""
    assert interpreted(MODELS, models) == "equal\n"


@pytest.mark.slow
def test_the_engine_in_the_interpreter() -> None:
    said = "all 14 products in integers, by int8 kernels for 10 layers and 2 attentions\n"
    assert interpreted(ENGINE) == said


def test_a_device_that_multiplies_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from qvit.deploy.cuda import operators

    def breaks(_: torch.device) -> bool:
        raise RuntimeError("no such target\nand more")

    artifact = Artifact.from_model(frozen("vit")[0], **packed_arguments("vit"))
    monkeypatch.setattr(operators, "interpreted", lambda: True)
    for probe, said in ((lambda _: False, "largest codes are wrong there"), (breaks, "kernels on cpu: no such target")):
        monkeypatch.setattr(operators, "sums_are_exact", probe)
        with pytest.raises(UsageError, match=said):
            create_engine(artifact, "cuda", device="cpu")


def test_graphs_of_the_latest_shapes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that comes back is not recorded again, unless eight others came since."""
    pytest.importorskip("triton")
    from qvit.deploy.cuda import operators

    monkeypatch.setattr(operators, "interpreted", lambda: True)
    monkeypatch.setattr(operators, "sums_are_exact", lambda _: True)
    artifact = Artifact.from_model(frozen("vit")[0], **packed_arguments("vit"))
    engine: Any = create_engine(artifact, "cuda", device="cpu")
    recorded: list[int] = []

    def record(images: torch.Tensor) -> Any:
        count = len(images)
        recorded.append(count)
        return lambda batch: torch.full((count, 5), float(batch.sum()))

    monkeypatch.setattr(engine, "_record", record)
    engine.records = True
    for count in (*range(1, 9), 1, 9, 1, 2):
        images = torch.full((count, 1, 2, 2), 3.0)
        assert torch.equal(engine(images), torch.full((count, 5), 12.0 * count))
    assert recorded == [*range(1, 10), 2]
    assert len(engine._recorded._kept) == MOST_GRAPHS == 8


def test_the_engine_needs_a_device() -> None:
    pytest.importorskip("triton")
    assert "cuda" not in available_engines() and "native" not in available_engines("cuda")
    assert available_engines("cuda") == ["torch", "cuda", "reference"]
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    artifact = Artifact.from_model(frozen("vit")[0], **packed_arguments("vit"))
    with pytest.raises(
        UsageError, match="'cuda' needs a CUDA device, and PyTorch finds none: take the engine 'native'"
    ):
        create_engine(artifact, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("plan", ["w8a8", "w4a4"])
def test_on_a_gpu(name: str, plan: str) -> None:
    """Recorded and not, at several batch sizes; the digits of norms, softmax and activations are the GPU's."""
    model, images = frozen(name, plan)
    artifact = Artifact.from_model(model, **packed_arguments(name))
    expected = create_engine(artifact, "reference")(images)
    for graphs in (False, True):
        engine = create_engine(artifact, "cuda", graphs=graphs)
        for count in (8, 1, 8):
            found = engine(images[:count])
            apart = (found - expected[:count]).abs().amax(1) / expected.abs().max()
            assert found.device == images.device and int((apart > 1e-4).sum()) <= 2, apart


@pytest.mark.slow
@pytest.mark.parametrize("case", ["int8", "packed", "large", "norm", "attention", "log2", "log-sqrt2"])
def test_kernels_compile_for_a_gpu_that_is_not_there(case: str, tmp_path: Path) -> None:
    """With int8 tensor cores, within the registers of a thread and the memory of a multiprocessor."""
    pytest.importorskip("triton")
    from qvit.deploy.cuda import kernels
    from qvit.deploy.cuda.operators import NUMBERS

    linear: dict[str, Any] = {
        "SEGMENTS": 3, "PACKED": case != "int8", "CORRECTED": True, "ACTIVATION": "gelu", "RESIDUAL": False,
        "GAIN": False, "CODES": True, "OFFSET": True, "ROWS": 64, "OUTPUTS": 64, "DEPTH": 64,
    }  # fmt: skip
    large = linear | {"ROWS": 128, "OUTPUTS": 128, "CODES": False, "RESIDUAL": True, "GAIN": True, "ACTIVATION": ""}
    log = {"log2": 1, "log-sqrt2": 2}.get(case, 0)
    attention = {f"{name}_ZERO": 0 for name in "QKV"} | {f"{name}_OFFSET": False for name in "QKV"}
    attention |= {"P_ZERO": 0 if log else 128, "BIAS": True, "LOG": log, "CODES": True, "OFFSET": False}
    attention |= {"NUMBERS": NUMBERS, "QUERIES": 64, "KEYS": 64, "DIM": 64}
    norm = {"RMS": False, "SHIFT": True, "OFFSET": True, "BLOCK": 1024}
    kind = "attention" if log or case == "attention" else "norm" if case == "norm" else "linear"
    constants = {"attention": attention, "norm": norm, "linear": large if case == "large" else linear}[kind]
    codes = {"attention": {"q", "k", "v", "out"}, "norm": {"out"}, "linear": {"x", "weight"}}[kind]
    codes |= {"out"} if case != "large" else set()
    pointers = {"bias", "numbers", "scale", "residual", "gain", "shift", "x", "to_scale", "to_offset", "to_low"}
    pointers |= {"to_high", "out"}
    function: Any = getattr(kernels, f"{kind}_kernel")
    types = {name: "*fp32" if name in pointers else "i32" for name in function.arg_names}
    types |= dict.fromkeys(codes, "*i8") | {"correction": "*i32", "epsilon": "fp32"}
    ptx = compiled(function, types, constants, tmp_path, warps=8 if case == "large" else 4)
    assert kind == "norm" or re.search(r"wgmma.mma_async.sync.aligned.m64n\d+k32.s32.s8.s8", ptx)
