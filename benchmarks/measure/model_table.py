"""What works with which model: small models of many classes and configurations through every step, and why not.

Each model is untrained, with moved parameters, of one block (Swin: two stages) and some 48 channels. The steps:

    quantize    w8a8, calibrated; the answers' relative error from float is at most 0.3
    QAT step    LSQ at w4a4: one optimizer step on cross-entropy, or on features where there are no classes
    ptq         w4a4 with everything that is on by default
    pack        to a file, and read back: equal answers
    engines     each runs the file; relative error from the simulated model at most 0.2: with 4 bits and 48 channels a
                value that last digits move over the edge between two integers shows
    export      to ONNX, run by ONNX Runtime: likewise

A step that an earlier one is needed for is refused with it. What is refused has a UsageError's or QvitError's sentence
as its reason; anything else that goes wrong is a failure, written as such: a defect.

    python benchmarks/measure/model_table.py                  writes benchmarks/results/model_table.json
    python benchmarks/measure/model_table.py --only swin      measures some again
    python benchmarks/measure/model_table.py --missing        goes on where a run was stopped
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of
from torch import Tensor, nn

from qvit.deploy.engines import available_engines, create_engine
from qvit.deploy.export.onnx import export_onnx
from qvit.deploy.export.write import exported_runner
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError, first_line
from qvit.files import write_json
from qvit.methods.ptq.stages import ptq
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.create import create_model, create_shapes
from qvit.models.families import inspect_model
from qvit.models.features import answers_with_features
from qvit.models.transformers import resolved
from qvit.training.distill import feature_loss

ENGINES = ("reference", "torch", "native", "onnxruntime", "openvino")
STEPS = ("quantize", "QAT step", "ptq", "pack", *ENGINES, "export")
#: Relative errors above which a step has failed: of 8 bits beside float, and of integers beside the simulation.
FAR_FROM_FLOAT, FAR_FROM_SIMULATED = 0.3, 0.2
YES = "yes"
FILE = RESULTS / "model_table.json"


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes:
        title: What the table calls it.
        source: `timm` or `transformers`.
        name: timm's name, or the model class and the config class of `transformers`.
        kwargs: Arguments that make it small; None for a model that is only asked whether it is known.
    """

    title: str
    source: str
    name: str
    kwargs: dict[str, Any] | None = field(default_factory=dict)


VIT = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
EVA = VIT | {"embed_dim": 64, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
NO_CLASSES: dict[str, Any] = {"num_classes": 0}
ALL_TOKENS: dict[str, Any] = {"num_classes": 0, "global_pool": ""}
HF = {
    "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
HF_DINO = {key: value for key, value in HF.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
LABELS = {"id2label": {index: f"class {index}" for index in range(5)}}
HF_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
HF_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 9,
}
HF_TEXT |= {"bos_token_id": 0, "eos_token_id": 1}


def _timm(title: str, name: str, kwargs: dict[str, Any] | None = None, **more: Any) -> Case:
    return Case(title, "timm", name, None if kwargs is None else kwargs | more)


def _transformers(cls: str, config: str, kwargs: dict[str, Any], title: str = "") -> Case:
    return Case(title or cls, "transformers", f"{cls} {config}", kwargs)


CASES = (
    _timm("ViT", "vit_small_patch16_224", VIT),
    _timm("ViT, mean of patches", "vit_small_patch16_224", VIT, global_pool="avg"),
    _timm("ViT without classes", "vit_small_patch16_224", VIT | NO_CLASSES),
    _timm("ViT, all tokens", "vit_small_patch16_224", VIT | ALL_TOKENS),
    _timm("ViT, classes of every token", "vit_small_patch16_224", VIT, global_pool=""),
    _timm("ViT, qk-norm", "vit_small_patch16_224", VIT, qk_norm=True),
    _timm("ViT, RMSNorm, no biases (AIMv2)", "aimv2_large_patch14_224", VIT, img_size=28),
    _timm("ViT, parallel blocks by timm's `ParallelThingsBlock`", "vit_small_patch16_18x2_224", VIT),
    _timm("ViT, parallel scaling blocks", "vit_base_patch16_xp_224", VIT),
    _timm("ViT, post-norm blocks", "vit_base_patch16_rpn_224", VIT),
    _timm("ViT, differential attention", "vit_dlittle_patch16_reg1_gap_256", VIT),
    _timm("DeiT", "deit_tiny_patch16_224", VIT),
    _timm("DeiT, distilled", "deit_tiny_distilled_patch16_224", VIT),
    _timm("DeiT III (LayerScale)", "deit3_small_patch16_224", VIT),
    _timm("DINOv2", "vit_small_patch14_dinov2", VIT | NO_CLASSES, img_size=28),
    _timm("DINOv2, registers, all tokens", "vit_small_patch14_reg4_dinov2", VIT | ALL_TOKENS, img_size=28),
    _timm("DINOv2 giant (SwiGLU)", "vit_giant_patch14_dinov2", VIT | NO_CLASSES, img_size=28),
    _timm("CLIP", "vit_base_patch16_clip_224", VIT),
    _timm("SigLIP (attention pooling)", "vit_base_patch16_siglip_224", VIT | NO_CLASSES),
    _timm("FlexiViT", "flexivit_small", VIT, img_size=32),
    _timm("PE-Core", "vit_pe_core_tiny_patch16_384", VIT, attn_pool_num_heads=3),
    _timm("EVA", "eva_giant_patch14_224", EVA, img_size=28),
    _timm("EVA-02 (SwiGLU, rotary)", "eva02_base_patch14_448", EVA, img_size=28),
    _timm("DINOv3", "vit_small_patch16_dinov3", EVA | NO_CLASSES),
    _timm("ViT, rotary positions, mixed", "vit_small_patch16_rope_mixed_224", EVA),
    _timm("BEiT", "beit_base_patch16_224", VIT),
    _timm("BEiT v2", "beitv2_base_patch16_224", VIT),
    _timm("BEiT-3", "beit3_base_patch16_224", VIT),
    _timm("Swin", "swin_tiny_patch4_window7_224", SWIN),
    _timm("Swin without pooling", "swin_tiny_patch4_window7_224", SWIN | ALL_TOKENS),
    _timm("Swin v2", "swinv2_tiny_window8_256", SWIN),
    _timm("CaiT", "cait_xxs24_224", VIT | {"num_heads": 2}, depth_token_only=1),
    _timm("XCiT", "xcit_nano_12_p16_224"),
    _timm("MLP-Mixer", "mixer_s16_224"),
    _timm("MViT v2", "mvitv2_tiny"),
    _timm("Hiera", "hiera_tiny_224"),
    _timm("Hybrid of ResNet and ViT", "vit_small_r26_s32_224"),
    _timm("PiT", "pit_ti_224"),
    _timm("TinyViT", "tiny_vit_5m_224"),
    _timm("VOLO", "volo_d1_224"),
    _timm("ConViT", "convit_tiny"),
    _timm("MaxViT", "maxvit_tiny_tf_224"),
    _timm("LeViT", "levit_128s"),
    _timm("SAM's ViT", "samvit_base_patch16_224"),
    _timm("NaFlexViT", "naflexvit_base_patch16_gap"),
    _timm("ConvNeXt", "convnext_atto"),
    _timm("ResNet", "resnet18"),
    _transformers("ViTForImageClassification", "ViTConfig", HF | LABELS),
    _transformers("ViTModel", "ViTConfig", HF),
    _transformers("DeiTForImageClassification", "DeiTConfig", HF | LABELS),
    _transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig", HF | LABELS),
    _transformers("SwinForImageClassification", "SwinConfig", HF_SWIN | LABELS),
    _transformers("Dinov2Model", "Dinov2Config", HF_DINO),
    _transformers("Dinov2Model", "Dinov2Config", HF_DINO | {"use_swiglu_ffn": True}, "Dinov2Model, SwiGLU"),
    _transformers("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", HF_DINO),
    _transformers("DINOv3ViTModel", "DINOv3ViTConfig", HF | {"num_register_tokens": 4, "num_attention_heads": 2}),
    _transformers("CLIPVisionModel", "CLIPVisionConfig", HF),
    _transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", HF | {"projection_dim": 24}),
    _transformers(
        "CLIPForImageClassification", "CLIPConfig", {"vision_config": HF, "text_config": HF_TEXT} | LABELS
    ),
    _transformers("SiglipVisionModel", "SiglipVisionConfig", HF),
    _transformers("BeitForImageClassification", "BeitConfig", HF | LABELS | {"use_relative_position_bias": True}),
    _transformers("Dinov2ForImageClassification", "Dinov2Config", HF_DINO | LABELS),
    _transformers("ViTMAEModel", "ViTMAEConfig", HF),
    _transformers("Swinv2Model", "Swinv2Config", HF_SWIN),
    _transformers("ResNetForImageClassification", "ResNetConfig", {"depths": [1, 1], "hidden_sizes": [8, 16]} | LABELS),
)  # fmt: skip


class Wrong(Exception):
    """An answer that is not what it should be."""


@dataclass
class Walk:
    """One model on its way through the steps."""

    name: str
    kwargs: dict[str, Any]
    model: Any
    images: Tensor
    folder: Path
    packed: Artifact | None = None
    simulated: Tensor | None = None
    quantized: Any = None

    @torch.no_grad()
    def quantize(self) -> None:
        quantized = calibrate(quantize(self.model, "w8a8"), [self.images]).eval()
        _near(quantized(self.images), self.model(self.images), FAR_FROM_FLOAT)

    def qat_step(self) -> None:
        model = calibrate(quantize(self.model, "w4a4"), [self.images]).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        with torch.no_grad():
            taught = self.model(self.images)
        answer = model(self.images)
        if answers_with_features(self.model):
            loss = feature_loss(answer, taught)
        else:
            loss = nn.functional.cross_entropy(answer, torch.arange(len(answer)) % answer.shape[-1])
        loss.backward()
        without = [name for name, own in model.named_parameters() if own.grad is None and "qkv" in name]
        optimizer.step()
        if without or not all(bool(torch.isfinite(own).all()) for own in model.parameters()):
            raise Wrong(f"no gradient, or parameters that are not finite: {without[:1]}")

    def ptq(self) -> None:
        quantized = ptq(self.model, "w4a4", [self.images])
        with torch.no_grad():
            self.simulated = quantized(self.images)
        self.quantized = quantized

    @torch.no_grad()
    def pack(self) -> None:
        file = self.folder / "packed.safetensors"
        Artifact.from_model(self.quantized, model_name=self.name, model_kwargs=self.kwargs).save(file)
        self.packed = Artifact.load(file)
        assert self.simulated is not None
        _near(self.packed.model().eval()(self.images), self.simulated, 1e-5)

    def engine(self, name: str) -> None:
        assert self.packed is not None and self.simulated is not None
        if name not in available_engines():
            raise QvitError("not installed where this was measured")
        options = {"compiled": False} if name == "torch" else {}
        _near(create_engine(self.packed, name, threads=1, **options)(self.images), self.simulated, FAR_FROM_SIMULATED)

    def export(self) -> None:
        assert self.packed is not None and self.simulated is not None
        file = self.folder / "model.onnx"
        export_onnx(self.packed, file)
        _near(exported_runner(file, "onnx")(self.images), self.simulated, FAR_FROM_SIMULATED)


def _near(found: Tensor, right: Tensor, most: float) -> None:
    """Raises Wrong if the relative error is larger."""
    if found.shape != right.shape:
        raise Wrong(f"an answer of shape {tuple(found.shape)}, not {tuple(right.shape)}")
    error = float((found - right).norm() / right.norm().clamp_min(1e-12))
    if not error <= most:
        raise Wrong(f"relative error {error:.2g}, more than {most:g}")


def opened(case: Case, folder: Path) -> Walk:
    """The model of a case. Raises UsageError or QvitError if it is refused."""
    torch.manual_seed(0)
    if case.source == "transformers":
        import transformers

        cls, config = (getattr(transformers, name) for name in case.name.split())
        original: Any = _shaken(cls(config(**(case.kwargs or {}))))
        original.save_pretrained(folder / "saved")
        name, kwargs, _ = resolved(str(folder / "saved"), {})
        model = create_model(str(folder / "saved")).eval()
        kwargs = {"num_classes": getattr(model, "num_classes", 0)} | dict(kwargs)
    else:
        name, kwargs = case.name, dict(case.kwargs or {})
        if case.kwargs is None:
            inspect_model(create_shapes(name))
            raise Wrong("known, but not measured: give it arguments that make it small")
        model = _shaken(create_model(name, **kwargs)).eval()
    inspect_model(model)
    size = getattr(model.get_submodule("patch_embed"), "img_size", None) or (32, 32)
    return Walk(name, kwargs, model, torch.randn(6, 3, *size), folder)


@torch.no_grad()
def _shaken(model: nn.Module) -> nn.Module:
    """Moves every parameter: in a fresh model biases and scores are so close to zero that much could be missing."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return model


def outcome_of(step: Callable[[], Any]) -> dict[str, str]:
    """`{"outcome": "yes"}`, or `refused` or `failed` with the reason in its first line."""
    try:
        step()
    except QvitError as error:
        return {"outcome": "refused", "why": _short(error)}
    except Exception as error:  # a defect, which is what is being looked for
        return {"outcome": "failed", "why": f"{type(error).__name__}: {_short(error)}"}
    return {"outcome": YES}


def _short(error: Exception) -> str:
    return re.sub(r"\S*/saved/", "", first_line(error))  # the folder of a model of transformers


def measured(case: Case, last: Sequence[str] = (*ENGINES, "export")) -> dict[str, Any]:
    """The row of a case; `last` are the steps after packing."""
    row: dict[str, Any] = {"title": case.title, "source": case.source, "name": case.name.split()[0]}
    steps: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[Walk] = []
        start = outcome_of(lambda: found.append(opened(case, Path(folder))))
        if not found:
            return row | {"steps": dict.fromkeys((*STEPS[:4], *last), start)}
        walk = found[0]
        steps["quantize"] = outcome_of(walk.quantize)
        steps["QAT step"] = outcome_of(walk.qat_step)
        steps["ptq"] = outcome_of(walk.ptq)
        steps["pack"] = outcome_of(walk.pack) if steps["ptq"]["outcome"] == YES else steps["ptq"]
        for name in last:
            if walk.packed is None:
                steps[name] = steps["pack"]
            else:
                steps[name] = outcome_of(walk.export if name == "export" else lambda name=name: walk.engine(name))
    return row | {"model_class": type(walk.model).__name__, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure what has this text in its title or name, and keep the rest")
    parser.add_argument("--missing", action="store_true", help="measure what the file has no row for")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.only or options.missing
    rows = {row["title"]: row for row in json.loads(FILE.read_text())["rows"]} if kept and FILE.is_file() else {}
    chosen = [case for case in CASES if options.only.lower() in f"{case.title} {case.name}".lower()]
    for case in chosen:
        if options.missing and case.title in rows:
            continue
        rows[case.title] = row = measured(case)
        write(rows)
        told = " ".join(own["outcome"] for own in row["steps"].values())
        reasons = dict.fromkeys(own["why"] for own in row["steps"].values() if "why" in own)
        sys.stderr.write(f"{case.title}: {told} {'; '.join(reasons)}\n")


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Writes the rows, in the order of the cases."""
    ordered = [rows[case.title] for case in CASES if case.title in rows]
    record = record_of(threads=1, packages=("transformers", "onnxruntime", "openvino"))
    write_json(FILE, {"rows": ordered} | record)


if __name__ == "__main__":
    main()
