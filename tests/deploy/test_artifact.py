"""Packed models: the same outputs as the frozen model, bit for bit; exact sizes; the same bytes each time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from tiny_models import SMALL, calibrated_model, digit_batches, digits_model, shake
from torch import Tensor, nn

from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.packing import unpack_site
from qvit.deploy.file.summary import describe, describe_file
from qvit.errors import QvitError, UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import Stage, freeze, plan_of, quantize, stage_of
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import TokenSplit
from qvit.quantizers import quantizers_of

QKV_WEIGHTS = "blocks.*.attn.qkv.*_weight"
SWIN = {"depths": [2, 1], "embed_dim": 16, "num_heads": [2, 4], "img_size": 32, "window_size": 4, "num_classes": 5}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin_v2": ("swinv2_tiny_window8_256", SWIN),
    "distilled": ("deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "eva02": ("eva02_base_patch14_448", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 28}),
    "grouped": (
        "vit_large_patch16_sapiens2",
        {"depth": 1, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "img_size": 32},
    ),
    "beit": ("beit_base_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "cait": (
        "cait_xxs24_224",
        {"depth": 1, "depth_token_only": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32},
    ),
}


def rules(*given: tuple[str, dict[str, Any] | None]) -> QuantPlan:
    return QuantPlan.preset("w3a4").with_rules(*(Rule(pattern, changes) for pattern, changes in given))


def mixed(model: nn.Module, *, switchable: bool, granularity: str | None = None, low: int = 2) -> QuantPlan:
    """Every head of every tensor has a width of its own."""
    sites = inspect_model(model).sites
    changes: dict[str, Any] = {"switchable_scale": switchable, "learn_bit_width": False}
    specs = {}
    for index, (name, site) in enumerate(sites.items()):
        heads = site.layout.num_heads
        widths = [low + (index + head) % 5 for head in range(heads)]
        own = changes | {"bit_width": widths if heads > 1 else widths[0]}
        if granularity is not None and (granularity != "per-channel" or site.layout.channels is not None):
            own["granularity"] = granularity
        specs[name] = site.default.changed(own)
    return QuantPlan("mixed", (), specs)


def patchwise() -> QuantPlan:
    split = {"token_bit_width": {"share": 0.5, "low": 2}, "switchable_scale": True}
    names = ("attn.qkv.input", "attn.query", "attn.value", "mlp.fc1.input", "mlp.fc2.input")
    return rules(*((f"blocks.*.{name}", split) for name in names))


PLANS: dict[str, Any] = {
    "uniform": lambda m: QuantPlan.preset("w4a4"),
    "eight": lambda m: QuantPlan.preset("w8a8"),
    "two": lambda m: QuantPlan.preset("w2a2"),
    "sixteen": lambda m: QuantPlan.preset("w16a12"),
    "mixed": lambda m: mixed(m, switchable=False),
    "switchable": lambda m: mixed(m, switchable=True),
    "shared-scales": lambda m: mixed(m, switchable=True, granularity="per-tensor"),
    "shared-scale": lambda m: mixed(m, switchable=False, granularity="per-tensor"),
    "channels": lambda m: mixed(m, switchable=True, granularity="per-channel"),
    "channel": lambda m: mixed(m, switchable=False, granularity="per-channel"),
    "offset": lambda m: rules(("*", {"symmetric": False, "signed": False})),
    "offset-8": lambda m: rules(("*", {"symmetric": False, "signed": False, "bit_width": 8})),
    "offset-switchable": lambda m: rules(("*", {"symmetric": False, "signed": False, "switchable_scale": True})),
    "statsq": lambda m: rules((QKV_WEIGHTS, {"quantizer": "statsq", "granularity": "per-channel"}),
                              ("blocks.*.mlp.*.weight", {"quantizer": "statsq"}),
                              ("blocks.*.proj.weight", {"quantizer": "statsq", "bit_width": [2, 5]})),
    "irm": lambda m: rules(("blocks.*.attn.query", {"quantizer": "irm"}), ("blocks.*.attn.key", {"quantizer": "irm"})),
    "log2": lambda m: rules(("blocks.*.attn.probs", {"quantizer": "log2"})),
    "log-sqrt2": lambda m: rules(("blocks.*.attn.probs", {"quantizer": "log-sqrt2", "switchable_scale": True})),
    "twin": lambda m: rules(("blocks.*.attn.probs", {"quantizer": "twin", "switchable_scale": True}),
                            ("blocks.*.mlp.fc2.input", {"quantizer": "twin", "signed": True, "symmetric": True})),
    "patchwise": lambda m: patchwise(),
    "float-third": lambda m: rules(("blocks.*.attn.qkv.key_weight", None)),
    "float-tensors": lambda m: rules(("blocks.*.mlp.*", None), ("head.*", None), (QKV_WEIGHTS, None)),
    "activations-alone": lambda m: rules(*((p, None) for p in ("*.weight", QKV_WEIGHTS))),
}  # fmt: skip


def quantized(name: str) -> nn.Module:
    model = digits_model()
    return calibrate(quantize(model, PLANS[name](model)), digit_batches())


def packed(model: nn.Module, **changes: Any) -> Artifact:
    return Artifact.from_model(model, **({"model_name": "vit_digits", "model_kwargs": SMALL} | changes))


def without_its_model(path: Path) -> bool:
    """Whether a file is described without its model; and the same as with it."""
    expected = describe(Artifact.load(path), path.stat().st_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artifact, "load", lambda _: None)
        try:
            found = describe_file(path)
        except AttributeError:  # of None: the model was asked for
            found = None
    assert found in (expected, None) and describe_file(path) == describe_file(path, verify=True) == expected
    assert found is None or [row["site"] for row in found["sites"]] == [row["site"] for row in expected["sites"]]
    return found is not None


def answers(model: nn.Module, images: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(batch) for batch in images])


@pytest.mark.parametrize("name", PLANS)
def test_the_packed_model_answers_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    before = answers(model, digit_batches(4, seed=7))
    packed(model).save(tmp_path / "a.safetensors")
    artifact = Artifact.load(tmp_path / "a.safetensors")
    again = artifact.model()
    assert stage_of(again) is Stage.FROZEN and not again.training
    assert torch.equal(answers(again, digit_batches(4, seed=7)), before) and before.isfinite().all()
    assert artifact.plan == plan_of(model, "model", "vit_digits")
    assert without_its_model(tmp_path / "a.safetensors")
    cost = inspect_model(model)
    widths, none = artifact.plan.widths(), dict.fromkeys(cost.sites, (0,))
    theory = {site: cost.weight_bytes(none | {site: widths[site]}) for site in artifact.integers}
    assert {site: len(codes) for site, codes in artifact.packed().items()} == theory
    for site, quantizer in quantizers_of(again):
        assert quantizer.enabled == (site not in artifact.integers)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["uniform", "mixed", "switchable"])
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_other_families(name: str, kind: str, tmp_path: Path) -> None:
    architecture, kwargs = OTHERS[name]
    torch.manual_seed(1)
    model = shake(create_model(architecture, **kwargs)).eval()
    size = kwargs["img_size"]
    images = [torch.randn(3, 3, size, size)]
    model = calibrate(quantize(model, PLANS[kind](model)), images)
    artifact = Artifact.from_model(model, model_name=architecture, model_kwargs=kwargs)
    artifact.save(tmp_path / "a.safetensors")
    again = Artifact.load(tmp_path / "a.safetensors").model()
    assert torch.equal(answers(again, images), answers(model, images))
    # the few elements of a weight that mixes heads do not always follow from its bytes
    assert without_its_model(tmp_path / "a.safetensors") or name == "cait"


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_swin_with_token_groups(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = shake(create_model("swin_tiny_patch4_window7_224", **SWIN)).eval()
    images = [torch.randn(3, 3, 32, 32)]
    split = {"token_bit_width": {"share": 0.5, "low": 3}, "switchable_scale": True}
    names = ("attn.qkv.input", "attn.query", "mlp.fc1.input", "mlp.fc2.input")
    model = calibrate(quantize(model, rules(*((f"layers.*.{name}", split) for name in names))), images)
    Artifact.from_model(model, model_name="swin_tiny_patch4_window7_224", model_kwargs=SWIN).save(tmp_path / "a")
    artifact = Artifact.load(tmp_path / "a")
    spec = artifact.plan.sites["layers.0.blocks.0.attn.query"]
    assert spec is not None and spec.token_bit_width == TokenSplit(0.5, 3)
    assert artifact.extras["layers.0.blocks.0.attn.query.low_scale"].shape == (2, 1, 1)
    assert torch.equal(answers(artifact.model(), images), answers(model, images))


def test_learned_widths_are_frozen_first() -> None:
    plan = QuantPlan.preset("w4a4").with_rules(Rule("*", {"learn_bit_width": True, "switchable_scale": True}))
    model = calibrated_model(plan)
    with pytest.raises(UsageError, match=r"qvit.freeze"):
        packed(model)
    images = digit_batches(seed=3)
    freeze(model)
    assert torch.equal(answers(packed(model).model(), images), answers(model, images))


def test_earlier_stages_are_refused_with_what_to_call() -> None:
    with pytest.raises(UsageError, match=r"float model has nothing to pack: call qvit.quantize"):
        packed(digits_model())
    with pytest.raises(UsageError, match=r"qvit.calibrate"):
        packed(quantize(digits_model(), "w4a4"))


def test_statsq_is_packed_with_the_scale_of_the_present_weights() -> None:
    """Calibration notes a scale, training moves the weights: what counts is what forward would compute."""
    model = quantized("statsq")
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight").mul_(1.37)
    artifact = packed(model)
    images = digit_batches(seed=3)
    assert torch.equal(answers(artifact.model(), images), answers(model, images))
    site = "blocks.0.mlp.fc1.weight"
    assert torch.equal(artifact.offsets[site], artifact.scales[site] / 2)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for index, model in enumerate((quantized("switchable"), quantized("switchable"))):
        provenance = {"b": 1, "a": [2.5, None]} if index else {"a": (2.5, None), "b": 1}
        packed(model, provenance=provenance).save(tmp_path / str(index))
    again = Artifact.load(tmp_path / "0")
    again.save(tmp_path / "2")
    packed(again.model(), provenance=again.provenance).save(tmp_path / "3")
    assert len({(tmp_path / str(index)).read_bytes() for index in range(4)}) == 1


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    model = quantized("mixed")
    artifact = packed(model, class_names=("null", "één"))
    artifact.save(tmp_path / "a.safetensors")
    with safetensors.safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    tensors = safetensors.torch.load_file(str(tmp_path / "a.safetensors"))
    assert metadata["format"] == "qvit" and metadata["version"] == "2" and len(metadata["sha256"]) == 64
    assert json.loads(metadata["class_names"]) == ["null", "één"]
    assert keys == {f"{site}.packed" for site in artifact.integers} | {"scales"} | set(artifact.floats)
    for site, codes in artifact.integers.items():
        spec, layout = artifact.plan.sites[site], inspect_model(model).sites[site].layout
        assert spec is not None
        found = unpack_site(tensors[f"{site}.packed"], codes.shape, spec.widths, spec.signed, layout)
        assert torch.equal(found, codes)
    assert torch.equal(tensors["norm.weight"], model.get_parameter("norm.weight"))


def test_the_documents_are_read_back(tmp_path: Path) -> None:
    config = {"input_size": (1, 8, 8), "mean": (0.3,), "std": (0.4,), "crop_pct": 1.0, "interpolation": "bicubic"}
    provenance = {"method": "qvit", "accuracy": 97.5, "options": {"a": [1, 2]}, "seed": 3}
    artifact = packed(
        quantized("uniform"), data_config=config, class_names=tuple("0123456789"), provenance=provenance, plan_name="x"
    )
    artifact.save(tmp_path / "a")
    found = Artifact.load(tmp_path / "a")
    assert (found.data_config, found.class_names) == (config, tuple("0123456789"))
    assert set(found.provenance.pop("packed_by")) == {"qvit", "torch", "timm"} and found.provenance == provenance
    assert (found.model_name, found.model_kwargs, found.plan) == ("vit_digits", SMALL, artifact.plan)
    assert found.plan.name == "x"


def test_making_the_model_leaves_the_random_numbers_alone() -> None:
    artifact = packed(quantized("uniform"))
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    artifact.model()
    assert torch.equal(torch.randn(3), expected)


def test_the_model_owns_its_numbers() -> None:
    model = quantized("uniform")
    artifact, images = packed(model), digit_batches(seed=3)
    before = answers(artifact.model(), images)
    with torch.no_grad():
        for parameter in [*model.parameters(), *artifact.model().parameters()]:
            parameter.zero_()
    assert torch.equal(answers(artifact.model(), images), before)


def test_a_state_dict_of_the_packed_model_is_that_of_a_calibrated_one() -> None:
    model = quantized("switchable")
    again = packed(model).model()
    other = quantize(digits_model(3), plan_of(model))
    other.load_state_dict(again.state_dict())
    assert stage_of(other) is Stage.FROZEN
    images = digit_batches(seed=3)
    assert torch.equal(answers(other, images), answers(model, images)), "grid points are fixed points"


REFUSALS = {
    "another model": ({"model_name": "deit_tiny_patch16_224"}, "not the model to be packed"),
    "other arguments": ({"model_kwargs": {}}, "not the model to be packed"),
    "no such model": ({"model_name": "vit_digit"}, "unknown model"),
    "a path": ({"model_name": "local-dir:/etc"}, "no name of a timm model"),
    "weights from elsewhere": ({"model_kwargs": SMALL | {"checkpoint_path": "x.pth"}}, "no argument 'checkpoint_path'"),
    "too many names": ({"class_names": tuple("abcdefghijk")}, "names 11 classes"),
    "no JSON": ({"provenance": {"a": object()}}, "not plain"),
    "NaN": ({"provenance": {"a": float("nan")}}, "not plain"),
    "too deep": ({"provenance": {"a": [[[[[[[[[[1]]]]]]]]]]}}, "nested"),
    "no Unicode": ({"class_names": ("\ud800",)}, "not Unicode"),
    "a strange data configuration": ({"data_config": {"std": (0.0,)}}, "impossible: std"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_packed(case: str, tmp_path: Path) -> None:
    changes, message = REFUSALS[case]
    with pytest.raises(QvitError, match=message):
        packed(calibrated_model(), **changes).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_half_precision_nan_and_quantizers_that_are_off_are_refused() -> None:
    with pytest.raises(UsageError, match=r"not in float32"):
        packed(calibrated_model().half())
    model = calibrated_model()
    dict(quantizers_of(model))["blocks.0.attn.query"].enabled = False
    with pytest.raises(UsageError, match=r"'blocks.0.attn.query' is switched off"):
        packed(model)
    model = calibrated_model()
    dict(quantizers_of(model))["head.weight"].enabled = False
    with pytest.raises(UsageError, match=r"'head.weight' cannot be packed"):
        packed(model)
    for key in ("norm.bias", "head.weight"):
        model = calibrated_model()
        with torch.no_grad():
            model.get_parameter(key).flatten()[0] = float("nan")
        with pytest.raises(UsageError, match=key):
            packed(model)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.safetensors"
    artifact = packed(calibrated_model())
    artifact.save(target)
    before = target.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QvitError, match=r"cannot write .*a.safetensors.*No space left"):
        artifact.save(target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_every_format_are_read_for_ever(version: int) -> None:
    """files/packed-v1.safetensors was written by the first version and is never written again; v2 is that, saved anew.

    It has all that a file can have: widths per head in rows and columns, switchable and shared scales, offsets, every
    quantizer, token groups, tensors and a third of a projection in float.
    """
    folder = Path(__file__).parent / "files"
    artifact = Artifact.load(folder / f"packed-v{version}.safetensors")
    expected = torch.tensor(json.loads((folder / "packed-v1.json").read_text("utf-8"))["logits"])
    images = (torch.arange(192) * 37 % 61 / 30 - 1).reshape(3, 1, 8, 8)
    assert torch.allclose(answers(artifact.model(), [images]), expected, atol=1e-4)
    assert artifact.provenance["method"] == "lsq" and artifact.class_names == tuple("0123456789")


def test_the_size_of_deit_t_is_within_one_percent_of_its_bits(tmp_path: Path) -> None:
    """The smallest file there is: 2 bits, float tensors of 278 kB, and a header that must not be 1 % of that."""
    torch.manual_seed(0)
    model = quantize(create_model("deit_tiny_patch16_224"), "w2a2", in_place=True)
    for _, quantizer in quantizers_of(model):
        torch.nn.init.constant_(quantizer.get_parameter("scale"), 0.03)
        quantizer.calibrated = True
    artifact = Artifact.from_model(model, model_name="deit_tiny_patch16_224", provenance={"method": "lsq", "seed": 0})
    artifact.save(tmp_path / "a")
    facts = describe(artifact, (tmp_path / "a").stat().st_size)
    cost = inspect_model(model)
    leftovers = sum(value.numel() * 4 for value in artifact.floats.values())
    assert facts["payload_bytes"] == cost.weight_bytes(artifact.plan.widths()) == 1_666_560
    assert facts["float_bytes"] == leftovers == 278_176
    assert facts["file_bytes"] < 1.01 * (1_666_560 + leftovers)
    assert facts["header_bytes"] + facts["scale_bytes"] < 19_500
    length = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert facts["header_bytes"] == 8 + length
