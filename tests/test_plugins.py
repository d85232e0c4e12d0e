"""The examples of CONTRIBUTING.md, installed as a package beside qvit: each registers itself, and does its work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.compile(r"^```python\n# (\w+)\.py\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KINDS = ["family", "quantizer", "method", "metric", "engine", "peer", "command", "section"]

USES = """
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tiny_models import calibrated_model, digit_batches, digits_model, small_config

from qvit.deploy.bench.lineup import chosen
from qvit.deploy.bench.peers import PEERS, Material
from qvit.deploy.engines import available_engines, create_engine
from qvit.deploy.file.artifact import Artifact
from qvit.measure import METRICS, measure_sensitivity
from qvit.methods.base import METHODS, create_method
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.families import inspect_model
from qvit.models.families.base import FAMILIES
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.quantizers import quantizers_of
from qvit.report.sections.base import SECTIONS

images, model = digit_batches(1)[0], digits_model()


def family():
    TwoHeads = next(cls for cls in FAMILIES if cls.__name__ == "TwoHeads")
    sides = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=10)
    cost = inspect_model(two := TwoHeads(**sides).eval())
    assert {"head.weight", "second.weight"} <= set(cost.sites)
    assert calibrate(quantize(two, "w4a4"), [images])(images).shape == (8, 10)


def quantizer():
    plan = QuantPlan.preset("w4a4").with_rules(Rule("*.fc1.weight", {"quantizer": "shift"}))
    found = dict(quantizers_of(calibrate(quantize(model, plan), [images])))["blocks.0.mlp.fc1.weight"]
    assert type(found).__name__ == "ShiftQuantizer" and float(found.scale.log2().frac().abs().max()) == 0


def method():
    assert "sandwich" in METHODS
    plan = create_method(small_config(method="sandwich", budget="4bit")).plan(inspect_model(model))
    assert plan.sites["blocks.0.attn.query"].widths == (8,)


def metric():
    assert {"fisher", "squared-error"} < set(METRICS)
    table = measure_sensitivity(model, [images], metric="squared-error", widths=(2, 8)).table
    assert set(table) == set(inspect_model(model).sites)
    assert all((own[:, 0] > own[:, 1]).all() for own in table.values())


def engine():
    assert available_engines()[-1] == "simulated" and "qvit-simulated" in chosen(["qvit"])
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    artifact = Artifact.from_model(freeze(calibrated_model()), model_name="vit_digits", model_kwargs=small)
    answers = [create_engine(artifact, name)(images) for name in ("simulated", "reference")]
    assert torch.allclose(*answers, atol=1e-4)


def peer():
    names = list(PEERS)
    assert names.index("pytorch-bf16") < names.index("torch-export-fp32") < names.index("onnxruntime-fp32")
    ready = PEERS["torch-export-fp32"].prepare(Material(model, [images], 1, folder=None))
    assert torch.allclose(ready.start(3)(images[:3]), model(images[:3]), atol=1e-5)


def command():
    with tempfile.TemporaryDirectory() as folder:
        QuantPlan.preset("w4a4").resolve(inspect_model(model).sites).save(plan := Path(folder) / "plan.json")
        told = subprocess.check_output([sys.executable, "-m", "qvit.cli", "count", plan], text=True)
    assert told.split() == ["(4,):", "14", "(8,):", "4"]


def section():
    assert "counts" in SECTIONS and SECTIONS["counts"].order == 95
    assert SECTIONS["counts"].render([], None) == "<p>0 runs in 0 groups.</p>"
"""


def examples() -> dict[str, str]:
    return dict(EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8")))


def test_every_kind_has_a_short_example() -> None:
    assert list(examples()) == KINDS
    assert all(len(text.splitlines()) <= 22 for text in examples().values())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with one of the name `examples`, as pip would leave it."""
    folder = tmp_path_factory.mktemp("site")
    package, facts = folder / "examples", folder / "examples-1.0.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").write_text("from examples import " + ", ".join(KINDS))
    for kind, text in examples().items():
        (package / f"{kind}.py").write_text(text, "utf-8")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[qvit.plugins]\nexamples = examples\n")
    return folder


def test_each_is_found_and_used(installed: Path) -> None:
    """In one process, which knows of the package by its entry point alone."""
    lines = [USES, "torch.set_num_threads(1)", *(f"{kind}()" for kind in KINDS)]
    path = os.pathsep.join([str(installed), str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
