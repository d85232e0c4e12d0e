"""A frozen mixed-precision model as an ONNX graph whose products run on integers.

    x ── QuantizeLinear(s_x) ── DequantizeLinear(s_x) ─┐
                                                       ├─ MatMul ── Add(bias)
           integers of W ── DequantizeLinear(s_w) ─────┘

The integer form of a model (`integer/reference.py`) is traced by torch.export, with an arithmetic that writes these
nodes for every product. Runtimes fuse the DQ nodes with the product, and apply scales after the sum. A scale per head
on a Q or DQ node makes ONNX Runtime fail: there the tensor is divided by the vector of scales first, Q and DQ have the
scale 1, and the vector is multiplied in after the product. Either way sums are exact, in integers or in float32.

Widths are those of the plan: below 8 bits a Clip precedes the Q node, with a vector of limits where heads differ, or
where prefix tokens have a width of their own: then the rows of the sums are scaled by a vector, too.

What runs on which integers is decided by the *dialect*, because runtimes differ:

    onnxruntime    uint8 × uint8, zero point 128 for signed grids. x86 processors without VNNI multiply uint8 × int8 in
                   16-bit pairs that saturate: ONNX Runtime's own int8 models are wrong there, silently. Where a probe
                   finds them exact, uint8 × int8: the pair with VNNI kernels.
    openvino       int8 × int8, zero points nowhere: the only form in which all its layers take the int8 path.
                   Saturates likewise; where a probe finds that (`engines/openvino.py`), products that could overflow
                   stay codes in float32, exact up to 2^24.

Height and width may stay open where the model takes any: position embeddings are resampled, windows laid and rotary
angles computed in the graph. OpenVINO resamples otherwise (2026.4), so it gets a file for each size there.

Files are smaller than what runs: weights of at most 4 and 2 bits are stored as UINT4 (opset 21) and UINT2 (opset 25,
which OpenVINO 2026.4 does not read). Widths that follow the image are refused: they need a ranking of tokens that ONNX
does not define for equal scores.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copyfileobj
from typing import Any

import torch
from torch import Tensor, nn

from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.arithmetic import Arithmetic, Grid, Operand
from qvit.deploy.integer.reference import IntegerLinear, arithmetic_in_words, integer_form
from qvit.deploy.integer.simulated import require_codes, require_float_functions
from qvit.deploy.packages import openvino_core, require
from qvit.errors import QvitError, UsageError
from qvit.files import write_atomically
from qvit.functional import integer_range
from qvit.models.sizes import takes_any_size
from qvit.quantizers import quantizers_of

OPSET, OPSET_OF_2_BITS = 21, 25
#: Largest |w| whose products with uint8 cannot overflow a pair of 16-bit sums: 2·255·64 < 2^15.
SAFE_WITHOUT_VNNI = 64
FLOAT = "float32"
#: Key of what a graph computes on integers, in words.
ARITHMETIC = "qvit.arithmetic"
_UINT8, _INT8 = 2, 3  # ONNX's numbers for its types


class GraphArithmetic(Arithmetic):
    """Products as ONNX nodes; a dialect says in which types.

    Args:
        exact_pairs: Whether the runtime's 8-bit products are exact whatever the operands.
    """

    #: Type and zero point of the codes of signed grids: of the left operand, and of the right one.
    left: tuple[torch.dtype, int]
    right: tuple[torch.dtype, int]
    #: The same of q, k and v that leave their projection as codes.
    projected: tuple[torch.dtype, int]

    def __init__(self, *, exact_pairs: bool = True) -> None:
        self.exact_pairs = exact_pairs

    def check_any_size(self, model: nn.Module, any_size: bool) -> None:
        """Raises UsageError where a graph of any size would compute something else than the model."""

    def prepare(self, grids: tuple[Grid, ...], weight: Tensor | None = None) -> None:
        if weight is None:
            grids[1].is_right = True
        if self.exact_pairs:
            return
        largest = max(abs(int(weight.min())), int(weight.max())) if weight is not None else grids[-1].largest
        if largest > SAFE_WITHOUT_VNNI:
            for grid in grids:
                grid.unit = FLOAT

    def encode(self, grid: Grid, x: Tensor) -> Operand:
        x = grid.quantizer.rectify(x)
        x = x if grid.offset is None else x - grid.offset
        step, limits = grid.step, grid.limits
        if step is None or limits is None or grid.unit == FLOAT:
            x, step = x / (step if step is not None else self.spread(grid.scale, x)), 1.0
        if limits is None:
            x = torch.minimum(torch.maximum(x, self.spread(grid.low, x)), self.spread(grid.high, x))
        elif limits[1] - limits[0] < 255 or grid.unit == FLOAT:
            x = x.clamp(limits[0] * step, limits[1] * step)
        return self.rounded(grid, x, step, grid.scale, grid.offset)

    def encode_tokens(self, grid: Grid, x: Tensor, width: Tensor) -> Operand:
        x, (scale, offset) = grid.quantizer.rectify(x), grid.quantizer.grid(width)
        x = (x if offset is None else x - offset) / self.spread(scale, x)
        low, high = (self.spread(limit, x) for limit in integer_range(width, grid.signed))
        return self.rounded(grid, torch.minimum(torch.maximum(x, low), high), 1.0, scale, offset)

    def rounded(self, grid: Grid, x: Tensor, step: float, scale: Tensor, offset: Tensor | None) -> Operand:
        """The integers of an activation that is clipped already, and in units of scale / step."""
        if grid.unit == FLOAT:
            return Operand(torch.round(x), scale, offset)
        kind, zero = (self.right if grid.is_right else self.left) if grid.signed else (torch.uint8, 0)
        return self.kept(Operand(_quantize(x, step, zero, kind), scale, offset, zero))

    def kept(self, operand: Operand) -> Operand:
        """What comes of codes before their product: here they stay integers, to be dequantized right before it."""
        return operand

    projects_codes = True

    def project_codes(self, operand: Operand, layer: IntegerLinear, grids: tuple[Grid, ...]) -> tuple[Tensor, int]:
        """The weight's scales are divided by those of the grids, so the output is in steps: one Q node of scale 1."""
        count = len(layer.bias) // len(grids)

        def of_outputs(values: list[Tensor]) -> Tensor:
            """(out,) from numbers for all heads, (H, 1, 1), or all channels of a part, (H, 1, d)."""
            parts = [value.flatten() for value in values]
            return torch.cat([part.repeat_interleave(count // len(part)) for part in parts])

        steps = of_outputs([grid.scale for grid in grids])
        offsets = of_outputs([grid.scale.new_zeros(()) if grid.offset is None else grid.offset for grid in grids])
        x = self.linear(operand, layer.get_buffer("weight_0"), layer.weight_scale[0] / steps)
        x = x + self.bias_form((layer.bias - offsets) / steps)
        limits = grids[0].limits
        if limits is None or any(grid.limits != limits for grid in grids):
            low, high = ([getattr(grid, name) for grid in grids] for name in ("low", "high"))
            x = torch.minimum(torch.maximum(x, of_outputs(low)), of_outputs(high))
        elif limits[1] - limits[0] < 255:
            x = x.clamp(*limits)
        signed = grids[0].signed
        kind, zero = self.projected if signed else (torch.uint8, 0)
        made = self.kept(Operand(_quantize(x, 1.0, zero, kind), steps, zero=zero))
        return made.codes, made.zero

    def weight_form(self, codes: Tensor, grid: Grid) -> Tensor:
        if grid.unit == FLOAT:
            return codes.t().float().contiguous()
        kind, zero = self.right
        return (codes.t().to(torch.int16) + zero).to(kind).contiguous()

    def linear(self, operand: Operand, weight: Tensor, weight_scale: Tensor) -> Tensor:
        if operand.codes.is_floating_point() or operand.scale.numel() > 1:  # more than one: of rows
            sums = _values(operand.codes, operand.zero) @ _values(weight, self.right[1])
            return self.of_rows(sums, operand.scale * weight_scale)
        # With the scales in the DQ nodes, runtimes multiply by them inside the product.
        x = _dequantize(operand.codes, operand.zero, operand.scale)
        return x @ _dequantize(weight, self.right[1], weight_scale)

    def of_rows(self, sums: Tensor, scales: Tensor) -> Tensor:
        """Sums (..., N, out) times scales that differ by row (N, out)."""
        return sums * scales

    def matmul(self, left: Operand, right: Operand, factor: float | Tensor) -> Tensor:
        single = left.scale.numel() == right.scale.numel() == 1 and isinstance(factor, float)
        if single and not left.codes.is_floating_point():
            values = _dequantize(left.codes, left.zero, left.scale * factor)
            return values @ _dequantize(right.codes, right.zero, right.scale)
        sums = _values(left.codes, left.zero) @ _values(right.codes, right.zero)
        return sums * self.spread(left.scale * factor * right.scale, sums)

    def total(self, operand: Operand, dim: int) -> Tensor:
        return _values(operand.codes, operand.zero).sum(dim, keepdim=True)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Numbers per head (H, 1, 1), as the runtime takes them beside `x` (B, H, N, ...)."""
        return values


class OnnxRuntimeArithmetic(GraphArithmetic):
    """uint8 × int8 where that is exact, and several times faster; else uint8 everywhere: exact on every processor."""

    left = (torch.uint8, 128)

    def __init__(self, *, exact_pairs: bool = False) -> None:
        super().__init__()
        self.right = (torch.int8, 0) if exact_pairs else self.left
        self.projected = self.left

    def project(self, operand: Operand, layer: IntegerLinear) -> Tensor:
        if operand.codes.dim() > 2:
            return super().project(operand, layer)
        return super().project(replace(operand, codes=operand.codes.unsqueeze(0)), layer).squeeze(0)

    def bias_form(self, bias: Tensor) -> Tensor:
        """(1, 1, out): a product and a vector become a Gemm in float before the product is seen to be one of codes."""
        return bias.view(1, 1, -1)


class OpenVinoArithmetic(GraphArithmetic):
    """int8 without zero points; numbers per head are repeated over the tokens, codes dequantized where they are made.

    Where Q and DQ are apart, OpenVINO leaves the product of q and k in float. A product followed by a vector (H, 1, 1)
    is taken for one with a scale per channel by its CPU plugin, which then fails; with (H, N, 1), or (H, 1, d) where
    there is one token (class attention), it is left alone. Sums of codes in (B, N, out) times scales (N, out) are
    wrong where B is open (OpenVINO 2026.4 takes the first row's scales for all); with one dimension more they are not.
    """

    left = right = projected = (torch.int8, 0)

    def check_any_size(self, model: nn.Module, any_size: bool) -> None:
        if any_size and takes_any_size(model) and getattr(model, "pos_embed", None) is not None:
            raise UsageError(
                "OpenVINO resamples position embeddings otherwise than PyTorch: write a file for each size "
                "(--image-size 224x320), or an ONNX file for ONNX Runtime"
            )

    def kept(self, operand: Operand) -> Operand:
        return replace(operand, codes=_dequantize(operand.codes, operand.zero), zero=0)

    def of_rows(self, sums: Tensor, scales: Tensor) -> Tensor:
        return (sums.unsqueeze(-3) * scales).squeeze(-3)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        if values.dim() < 3:
            return values
        rows, columns = x.shape[-2:]
        return values.expand(-1, rows, columns if rows == 1 else -1).contiguous()


def _node(kind: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, like: Tensor, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(kind, inputs, dict(attributes), dtype=dtype, shape=like.shape)


def _quantize(x: Tensor, step: float, zero: int, kind: torch.dtype) -> Tensor:
    if zero:
        return _node("QuantizeLinear", (x, torch.tensor(step), torch.tensor(zero, dtype=kind)), kind, x)
    number = _INT8 if kind == torch.int8 else _UINT8
    return _node("QuantizeLinear", (x, torch.tensor(step)), kind, x, output_dtype=number)


def _dequantize(codes: Tensor, zero: int, scale: Tensor | None = None) -> Tensor:
    """DequantizeLinear with one scale, or one for each column."""
    scale = torch.ones(()) if scale is None else scale.flatten()[0] if scale.numel() == 1 else scale.flatten()
    axis = {} if scale.dim() == 0 else {"axis": codes.dim() - 1}
    inputs = (codes, scale, torch.full_like(scale, zero, dtype=codes.dtype)) if zero else (codes, scale)
    return _node("DequantizeLinear", inputs, torch.float32, codes, **axis)


def _values(codes: Tensor, zero: int) -> Tensor:
    """Codes as floats, which they may be already."""
    return codes if codes.is_floating_point() else _dequantize(codes, zero)


def onnx_model(
    model: nn.Module,
    arithmetic: GraphArithmetic,
    image_size: tuple[int, int, int],
    *,
    integers: Mapping[str, Tensor] | None = None,
    small: bool = False,
    batch: int | None = None,
    any_size: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """The graph of a frozen model, as an `onnx.ModelProto`.

    Args:
        model: A frozen model.
        arithmetic: The dialect.
        image_size: (channels, height, width) of an image.
        integers: See `integer_form`.
        small: Stores weights in the smallest container.
        batch: Images in a call; None for any number.
        any_size: Leaves height and width open, see `traced_images`.
        metadata: Texts to keep in the file, beside what is computed on integers.

    Raises:
        UsageError: A model that is not frozen, whose widths follow the image, or that has one size where any is asked
            for; a package is missing.
        QvitError: What torch cannot export, with its reason.
    """
    require("onnx", "onnxscript")
    for site, quantizer in quantizers_of(model):
        if quantizer.spec.ranks_tokens:
            raise UsageError(
                f"'{site}' has widths that follow the image: ONNX defines no order for tokens of equal importance, "
                "so such a model runs with the engines 'reference' and 'torch' alone"
            )
    require_codes(model)
    require_float_functions(model, "an exported graph")
    arithmetic.check_any_size(model, any_size)
    form = integer_form(model, arithmetic, integers)
    images, dynamic = traced_images(model, image_size, batch, any_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                form, (images,), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"],
                dynamic_shapes=dynamic, verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise cannot_export(model, error) from error
    count, _, *sides = program.model.graph.inputs[0].shape
    if batch is None and isinstance(count, int):
        raise QvitError(f"an exported {type(model).__name__} takes one number of images only: give it as `batch`")
    if any_size and any(isinstance(side, int) for side in sides):
        raise QvitError(f"an exported {type(model).__name__} takes one size of images only: write a file for each size")
    if small:
        _use_small_containers(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces of the export: more bytes than the weights of a small model
    program.model.metadata_props.update({ARITHMETIC: arithmetic_in_words(form), **(metadata or {})})
    program.model.producer_name = "qvit"
    return program.model_proto


def traced_images(
    model: nn.Module, image_size: tuple[int, int, int], batch: int | None, any_size: bool
) -> tuple[Tensor, Any]:
    """Images that a model is traced with, and what is left open in their shape, as torch.export takes it.

    Sides that are equal would be taken for one: where they stay open, the images are wider than the model's own.

    Raises:
        UsageError: Any size is asked for, and the model takes one.
    """
    channels, height, width = image_size
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch")} if batch is None else {}
    if any_size:
        if not takes_any_size(model):
            raise UsageError(
                f"this {type(model).__name__} takes images of {height}x{width} pixels: write a file for each size "
                "(--image-size 224x320), or start from a model made with dynamic_img_size=True"
            )
        width = 2 * width if 2 * width != height else 3 * width
        dynamic |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return torch.zeros(batch or 2, channels, height, width), (dynamic,) if dynamic else None


def float_graph(model: nn.Module, images: Tensor) -> Any:
    """The graph of a float model for any number of images, as an `onnx.ModelProto`; `images` are an example.

    Raises:
        UsageError: A package is missing.
        QvitError: What torch cannot export, with its reason.
    """
    require("onnx", "onnxscript")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model, (images,), dynamo=True, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise cannot_export(model, error) from error
    return program.model_proto


def cannot_export(model: nn.Module, error: Exception) -> QvitError:
    """What torch said about a model that it cannot trace, in one sentence."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return QvitError(f"torch cannot export this {type(model).__name__}: {reason}")


def _use_small_containers(graph_model: Any) -> None:
    """Stores weights of few bits as UINT4 or UINT2, in place."""
    import numpy as np
    import onnx_ir as ir

    graph = graph_model.graph

    def keep(name: str, values: Any, kind: Any) -> Any:
        """An initializer of small integers."""
        tensor = ir.tensor(values.astype(kind.numpy()), dtype=kind, name=name)
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(values.shape), const_value=tensor)
        graph.initializers.pop(name, None)
        graph.register_initializer(value)
        return value

    for node in list(graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.name not in graph.initializers:
            continue
        zero = int(node.inputs[2].const_value.numpy().flat[0]) if len(node.inputs) > 2 else 0
        values = codes.const_value.numpy().astype(np.int16) - zero
        for kind, half in ((ir.DataType.UINT2, 2), (ir.DataType.UINT4, 8)):
            if -half <= values.min() and values.max() < half:
                node.replace_input_with(0, keep(codes.name, values + half, kind))
                node.resize_inputs(3)
                point = np.full(node.inputs[1].shape.numpy(), half)
                node.replace_input_with(2, keep(f"{codes.name}_zero", point, kind))
                if kind is ir.DataType.UINT2:
                    graph.opset_imports[""] = OPSET_OF_2_BITS
                break


def artifact_graph(
    artifact: Artifact,
    arithmetic: GraphArithmetic,
    *,
    small: bool = False,
    batch: int | None = None,
    any_size: bool = False,
) -> Any:
    """The graph of a packed model, which says where it comes from; see `onnx_model`."""
    return onnx_model(
        artifact.model(), arithmetic, image_size(artifact),
        integers=artifact.integers, small=small, batch=batch, any_size=any_size, metadata=origin_of(artifact),
    )  # fmt: skip


def origin_of(artifact: Artifact) -> dict[str, str]:
    """What an exported file says of its model: name, preprocessing, classes, plan."""
    return {
        "qvit.model": artifact.model_name,
        "qvit.data_config": json.dumps(artifact.data_config),
        "qvit.class_names": json.dumps(list(artifact.class_names)),
        "qvit.plan.quant_plan": artifact.plan.name,
    }


def metadata_of(graph: Any) -> dict[str, str]:
    """The texts that a graph keeps: model, preprocessing, classes, plan, and what it computes on integers."""
    return {entry.key: entry.value for entry in graph.metadata_props}


def export_onnx(
    artifact: Artifact, path: str | Path, *, small: bool = True, batch: int | None = None, any_size: bool = False
) -> Path:
    """Writes an ONNX file that runs in ONNX Runtime, and in OpenVINO unless weights are stored in 2 bits.

    Args:
        artifact: A packed model.
        path: The file; it is replaced if it is there.
        small: Weights of at most 4 bits in 4-bit (2-bit) containers: small, but multiplied in float by today's
            runtimes. False: 8-bit containers, on which ONNX Runtime has integer kernels.
        batch: Images in a call; None for any number.
        any_size: Leaves height and width open.

    Raises:
        UsageError, QvitError: See `onnx_model`; or the file cannot be written.
    """
    graph = artifact_graph(artifact, OnnxRuntimeArithmetic(), small=small, batch=batch, any_size=any_size)
    write_atomically(Path(path), lambda file: file.write(graph.SerializeToString()))
    return Path(path)


def export_openvino(
    artifact: Artifact,
    path: str | Path,
    *,
    batch: int | None = None,
    exact_pairs: bool = True,
    any_size: bool = False,
) -> Path:
    """Writes a model for OpenVINO: PATH.xml, and PATH.bin beside it.

    Args:
        artifact: A packed model.
        path: The file `.xml`. Both files are replaced if they are there; without the first, which is removed first
            and comes last, nobody reads the second.
        batch: Images in a call; None for any number.
        exact_pairs: Whether it will run where 8-bit products are exact: everywhere but on x86 processors without
            VNNI. False leaves products that could saturate there in float32.
        any_size: Leaves height and width open.

    Raises:
        UsageError, QvitError: See `onnx_model`; or the files cannot be written.
    """
    require("onnx", "onnxscript", "openvino")
    import openvino

    target = Path(path)
    if target.suffix != ".xml":
        raise UsageError(f"OpenVINO's files end with .xml, unlike {target}")
    graph = artifact_graph(artifact, OpenVinoArithmetic(exact_pairs=exact_pairs), batch=batch, any_size=any_size)
    model = openvino_model(graph)
    for key, text in metadata_of(graph).items():
        model.set_rt_info(text, key.split("."))
    try:
        with tempfile.TemporaryDirectory(prefix="qvit-export-") as folder:
            written = Path(folder) / target.name
            openvino.save_model(model, written, compress_to_fp16=False)
            target.unlink(missing_ok=True)
            for suffix in (".bin", ".xml"):
                with written.with_suffix(suffix).open("rb") as source:
                    write_atomically(target.with_suffix(suffix), lambda file, source=source: copyfileobj(source, file))
    except (OSError, RuntimeError) as error:
        raise QvitError(f"cannot write {target}: {error}") from error
    return target


def image_size(artifact: Artifact) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a packed model takes."""
    channels, height, width = artifact.data_config["input_size"]
    return channels, height, width


def openvino_model(graph: Any) -> Any:
    """A graph as an `openvino.Model`."""
    return openvino_core().read_model(io.BytesIO(graph.SerializeToString()))
