"""Options of quantizers: checked by name and value in a spec, flat in JSON, declared by whoever brings a quantizer."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from qvit.errors import UsageError
from qvit.plan import options
from qvit.plan.options import Options, ScaleOptions, declare_options
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers import create_quantizer
from qvit.quantizers.base import QUANTIZERS, register_quantizer
from qvit.quantizers.lsq import LSQQuantizer

#: A site as qvit 0.1.0 wrote it.
WRITTEN = {
    "bit_width": 4,
    "bit_width_range": [2, 8],
    "learn_bit_width": False,
    "signed": True,
    "symmetric": True,
    "granularity": "per-tensor",
    "switchable_scale": True,
    "width_gradient": "clipping",
    "scale_gradient": "norm",
    "quantizer": "lsq",
}


@pytest.fixture
def ternary() -> Iterator[None]:
    """A quantizer of another package, with an option of its own."""
    before, known = dict(options._DECLARED), len(QUANTIZERS)

    @declare_options
    @dataclass(frozen=True)
    class TernaryOptions(Options):
        threshold: float = 0.7

    @register_quantizer("ternary")
    class Ternary(LSQQuantizer):
        Options = TernaryOptions

    assert len(QUANTIZERS) == known + 1 and Ternary.Options is TernaryOptions
    yield
    options._DECLARED.clear()
    options._DECLARED.update(before)
    del QUANTIZERS._found["ternary"]


def test_json_is_flat_and_as_it_was_before_options_left_the_spec() -> None:
    spec = TensorSpec().changed(WRITTEN)
    assert spec.options == {"switchable_scale": True, "scale_gradient": "norm"}
    assert list(spec.to_json().items()) == list(WRITTEN.items())


def test_a_default_that_is_given_is_no_difference() -> None:
    assert (
        TensorSpec(options={"switchable_scale": False})
        == TensorSpec()
        == TensorSpec().changed({"width_gradient": "clipping"})
    )
    assert hash(TensorSpec(options={"switchable_scale": True})) is not None


def test_a_spec_has_no_field_of_one_quantizer() -> None:
    assert not {field.name for field in fields(ScaleOptions)} & {field.name for field in fields(TensorSpec)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"switchable": True}, "no quantizer has an option 'switchable'"),
        ({"switchable_scale": 1}, "'switchable_scale' of a tensor spec must be bool, not 1"),
        ({"scale_gradient": []}, "must be one of count, norm"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TensorSpec(options=given)


def test_a_misspelt_option_is_an_unknown_key_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'switchable_scal' in a tensor spec.*switchable_scale"):
        TensorSpec().changed({"switchable_scal": True})
    with pytest.raises(UsageError, match="unknown key 'options'"):
        TensorSpec().changed({"options": {"switchable_scale": True}})


@pytest.mark.usefixtures("ternary")
def test_a_quantizer_brings_its_own_options() -> None:
    spec = TensorSpec().changed({"quantizer": "ternary", "threshold": 0.5})
    written = spec.to_json()
    assert written["threshold"] == 0.5 and TensorSpec().changed(written) == spec
    assert "threshold" not in TensorSpec().to_json()


def test_a_quantizer_reads_its_own_options() -> None:
    quantizer: Any = create_quantizer(TensorSpec(options={"switchable_scale": True}), Layout())
    assert quantizer.options == ScaleOptions(switchable_scale=True) and quantizer.scale.shape == (7,)
    others = create_quantizer(TensorSpec(quantizer="statsq", options={"scale_gradient": "norm"}), Layout())
    assert others.options == Options()


def test_plans_with_options_are_read_without_torch(tmp_path: Path) -> None:
    QuantPlan("p", (), {"a": TensorSpec().changed(WRITTEN)}).save(tmp_path / "plan.json")
    code = (
        "import sys; from qvit.plan.quant_plan import QuantPlan; import json;"
        f"print(json.dumps(QuantPlan.load({str(tmp_path / 'plan.json')!r}).to_json()), 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    data, torch_there = found.rsplit(maxsplit=1)
    assert json.loads(data)["sites"]["a"] == WRITTEN and torch_there == "False"


@pytest.mark.parametrize("name", ["dq", "edmips", "irm", "log2", "statsq"])
def test_only_plain_lsq_has_fused_forms_and_row_codes(name: str) -> None:
    changes: dict[str, Any] = {"quantizer": name, "bit_width": 4}
    changes |= {"learn_bit_width": True} if name in ("dq", "edmips") else {}
    changes |= {"switchable_scale": True} if name == "edmips" else {"signed": False} if name == "log2" else {}
    quantizer = create_quantizer(TensorSpec().changed(changes), Layout())
    quantizer.calibrated = True
    x = torch.randn(3, 4)
    assert quantizer.fused(12, x) is None and quantizer.row_codes(x) is None and not quantizer.rounds_only


def test_no_layer_takes_a_ranking_but_those_of_ranked_tokens() -> None:
    from qvit.models import layers

    found = [thing for _, thing in inspect.getmembers(layers, inspect.isclass) if thing.__module__ == layers.__name__]
    for thing in [*found, *(function for _, function in inspect.getmembers(layers, inspect.isfunction))]:
        members = [thing] if inspect.isfunction(thing) else [m for m in vars(thing).values() if inspect.isfunction(m)]
        assert not any("rank" in inspect.signature(member).parameters for member in members), thing
