"""The public API: one list, loaded on first use; what it no longer names still works, and says where it went."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tiny_models import SMALL, digit_batches, small_config

import qvit
from qvit.models.convert import Stage, stage_of
from qvit.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
STUB = ast.parse((ROOT / "qvit" / "__init__.pyi").read_text("utf-8"))
#: The names of the public API of 0.1.0.
BEFORE = """
Artifact CostModel LabelRequest PerChannel PerHead PerTensor Probe QuantPlan QvitError ReconstructOptions Request Rule
Sensitivity SoftLabelStore Stage TensorSpec TrainConfig UsageError allocate_plan analyze analyze_heads analyze_parts
analyze_widths calibrate calibration_batches config_from_recipe correct_biases create_engine create_model data_config_of
eval_loader evaluate evaluate_run export_onnx export_openvino freeze frontier inspect_model load load_run
measure_sensitivity open_data pack_run parse_budget plan_of plan_run post_training_quantize ptq quantize
quantizers_disabled quantizers_of reconstruct reparameterize resume round_to_budget stage_of train train_loader
write_labels
""".split()


def test_the_stub_is_the_list() -> None:
    imports = [node for node in STUB.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(STUB.body) - 1, "the stub holds a docstring and imports"
    names = [(node.module, alias.name, alias.asname) for node in imports for alias in node.names]
    assert all(name == again for _, name, again in names), "`as` the same name makes a name of a stub public"
    assert qvit.__all__ == dir(qvit) == sorted(name for _, name, _ in names) and len(names) <= 30
    for module, name, _ in names:
        assert name == "ptq" or getattr(qvit, name) is getattr(importlib.import_module(str(module)), name)


def test_the_documentation_lists_the_api() -> None:
    rows = re.findall(r"^\| \[?`(\w+)`", (ROOT / "docs" / "api" / "qvit.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == [name for name in qvit.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", BEFORE)
def test_names_of_the_previous_version_work(name: str) -> None:
    if name in qvit.__all__:
        assert getattr(qvit, name)
        return
    with pytest.warns(DeprecationWarning, match=rf"qvit\.{name} goes with the next version: use `(.*)`") as caught:
        found = getattr(qvit, name)
    assert all(warning.filename == __file__ for warning in caught)
    module = next(module for module, names in MOVED.items() if name in names)
    assert found is getattr(importlib.import_module(module), MOVED[module][name])


def test_what_the_warning_says_can_be_typed() -> None:
    for name in set(BEFORE) - set(qvit.__all__):
        with pytest.warns(DeprecationWarning) as caught:
            getattr(qvit, name)
        advice = str(caught[0].message).split("`")[1]
        exec(advice if advice.startswith("from ") else f"import qvit; {advice}", {})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qvit' has no attribute 'quantise'"):
        _ = qvit.quantise  # type: ignore[attr-defined]
    assert not hasattr(qvit, "_private")


def test_ptq_quantizes_a_model_and_still_makes_a_run_of_a_config(tmp_path: Path) -> None:
    model = qvit.create_model("vit_digits", **SMALL)
    assert stage_of(qvit.ptq(model, "w8a8", digit_batches())) is Stage.FROZEN
    qvit.train(small_config(method="float", epochs=1), tmp_path / "float", quiet=True)
    config = small_config(method="ptq", budget="w8a8", weights=str(tmp_path / "float"), calibration_images=32)
    with pytest.warns(DeprecationWarning, match=r"qvit\.ptq\(config, out\) goes .* `from qvit\.runs"):
        result = qvit.ptq(config, tmp_path / "ptq")  # type: ignore[arg-type]
    assert result["method"] == "ptq" and (tmp_path / "ptq" / "result.json").is_file()


def test_the_new_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(qvit, name) is not None for name in qvit.__all__)


def test_the_package_alone_needs_no_torch() -> None:
    code = (
        "import qvit, sys; dir(qvit), qvit.QvitError, qvit.QuantPlan; assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
