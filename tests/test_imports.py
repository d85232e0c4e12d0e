"""The architecture, as far as imports show it: which part of qvit may use which, and which may use which other package.

A *part* is a file or folder directly in `qvit/`. Imports are read from the source, those inside functions and under
`TYPE_CHECKING` included: an import that is late or for types alone is still knowledge about the other part.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qvit"

# From the bottom up. A part may import from the layers below its own, and from its own layer as long as nothing goes in
# a circle. The package itself (`qvit/__init__.py`, which re-exports the public API) is above all of them.
LAYERS: list[set[str]] = [
    {"version", "errors", "files", "locks", "tensors", "functional", "registry"},
    {"plan", "kernels"},
    {"documents"},
    {"data", "report"},
    {"quantizers", "nonlinear"},
    {"models"},
    {"measure", "training", "deploy"},
    {"allocate"},
    {"methods"},
    {"runs"},
    {"cli"},
    {"moved"},  # names of the previous version, wherever they are now
]

# Parts that get along with less than their layer allows, and why that is worth keeping.
NARROWER: dict[str, set[str]] = {
    "plan": {"errors", "files", "registry"},  # plain data, and arithmetic on it: no torch
    "quantizers": {"errors", "plan", "functional", "kernels", "registry"},
    "nonlinear": {"functional", "registry"},
    "report": {"errors", "files", "documents", "registry", "plan"},  # reads JSON only: runs can be looked at anywhere
}

# (file, imported module) → why this one import against the direction is right.
EXCEPTIONS: dict[tuple[str, str], str] = {}

# Other packages that only some parts may import, so that a change of theirs is met in one place.
THIRD_PARTY: dict[str, set[str]] = {
    "timm": {"models", "data", "training", "runs"},  # the runs only note its version
    "accelerate": {"training"},
    "webdataset": {"data"},
    "plotly": {"report"},
    "onnx": {"deploy"},
    "onnxscript": {"deploy"},
    "onnxruntime": {"deploy"},
    "openvino": {"deploy"},
    "nncf": {"deploy"},
    "huggingface_hub": {"deploy", "models"},
}

# Library code logs; only the command line prints.
MAY_PRINT = {"cli/console.py"}


@dataclass(frozen=True)
class Source:
    """A file of the package: its path relative to `qvit/`, and its text."""

    path: str
    text: str

    @property
    def part(self) -> str:
        """`cost` for cost.py, `report` for report/page.py, the empty string for the package's own `__init__.py`."""
        first = self.path.split("/")[0].removesuffix(".py")
        return "" if first == "__init__" else "cli" if first == "__main__" else first

    @property
    def module(self) -> str:
        """`qvit.plan.cost` for plan/cost.py, `qvit.plan` for plan/__init__.py."""
        return ".".join(["qvit", *self.path.removesuffix(".py").split("/")]).removesuffix(".__init__")

    def at_import(self) -> Iterator[tuple[str, str]]:
        """Modules of this package that are imported with the file, as (module, name imported from it or nothing)."""
        waiting: list[ast.AST] = list(ast.parse(self.text, self.path).body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qvit"):
                yield from ((str(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                waiting += node.body
            elif isinstance(node, (ast.ClassDef, ast.Try)):
                waiting += node.body

    def imports(self) -> Iterator[tuple[str, str | None, int]]:
        """Every import as (module, name imported from it or None, line), relative ones made absolute."""
        package = ["qvit", *self.path.split("/")[:-1]]
        for node in ast.walk(ast.parse(self.text, self.path)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, None, node.lineno
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield module, alias.name, node.lineno

    def internal(self) -> Iterator[tuple[str, str, int]]:
        """Imports of other parts as (part, module, line); the part is the empty string for the package itself."""
        for module, name, line in self.imports():
            if module.split(".")[0] != "qvit":
                continue
            if module == "qvit" and name is not None and (name in ALL_PARTS or name in EXISTING_PARTS):
                module = f"qvit.{name}"
            part = module.removeprefix("qvit").lstrip(".").split(".")[0]
            if part != self.part:
                yield part, module, line


def rank(part: str) -> int:
    """Layer of a part, counted from the bottom; the package itself is on top."""
    return next((i for i, layer in enumerate(LAYERS) if part in layer), len(LAYERS))


def wrong_imports(source: Source) -> list[str]:
    """One message for each import of a file that breaks a rule."""
    messages = []
    for part, module, line in source.internal():
        where = f"qvit/{source.path}:{line} imports {module}"
        if (source.path, module) in EXCEPTIONS or source.part == "":
            continue
        if part == "":
            messages.append(f"{where}: import from the module that defines the name, the package itself is for users")
        elif source.part in NARROWER and part not in NARROWER[source.part]:
            messages.append(f"{where}: {source.part} may import only {', '.join(sorted(NARROWER[source.part]))}")
        elif rank(part) > rank(source.part):
            messages.append(f"{where}: {part} is above {source.part}")
    for module, _, line in source.imports():
        allowed = THIRD_PARTY.get(module.split(".")[0])
        if allowed is not None and source.part not in allowed:
            messages.append(f"qvit/{source.path}:{line} imports {module}: only {', '.join(sorted(allowed))} may")
    return messages


def prints(source: Source) -> list[str]:
    """Places where a file calls `print`."""
    calls = (node for node in ast.walk(ast.parse(source.text)) if isinstance(node, ast.Call))
    return [f"qvit/{source.path}:{n.lineno}" for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


ALL_PARTS = set().union(*LAYERS)
SOURCES = [Source(p.relative_to(PACKAGE).as_posix(), p.read_text("utf-8")) for p in sorted(PACKAGE.rglob("*.py"))]
EXISTING_PARTS = {source.part for source in SOURCES} - {""}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_imports_point_one_way(source: Source) -> None:
    assert not (messages := wrong_imports(source)), "\n".join(messages)


def test_every_part_has_its_layer() -> None:
    unknown = sorted(EXISTING_PARTS - ALL_PARTS)
    assert not unknown, f"not in LAYERS: {', '.join(unknown)}; say there what each may import"


def test_no_circles_between_parts() -> None:
    graph: dict[str, set[str]] = {}
    for source in SOURCES:
        if source.part:
            graph.setdefault(source.part, set()).update(part for part, _, _ in source.internal() if part)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("parts import each other: " + " → ".join(error.args[1]))


def test_exceptions_are_still_needed() -> None:
    there = {(source.path, module) for source in SOURCES for _, module, _ in source.internal()}
    assert not (stale := sorted(set(EXCEPTIONS) - there)), f"no longer imported, remove from EXCEPTIONS: {stale}"


def test_no_catch_all_module() -> None:
    found = [source.path for source in SOURCES if {"utils", "util", "helpers"} & set(source.path[:-3].split("/"))]
    assert not found, f"{', '.join(found)}: name a file after the one concept it holds"


@pytest.mark.parametrize("source", [s for s in SOURCES if s.path not in MAY_PRINT], ids=lambda source: source.path)
def test_library_does_not_print(source: Source) -> None:
    assert not (places := prints(source)), f"print in {', '.join(places)}; use logging, or print in {sorted(MAY_PRINT)}"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("plan/spec.py", "from qvit.models.convert import quantize"),
        ("plan/spec.py", "from qvit import kernels"),
        ("plan/spec.py", "def f():\n    from ..models.convert import quantize"),
        ("quantizers/lsq.py", "from ..models import layers"),
        ("quantizers/lsq.py", "import qvit.data"),
        ("training/loop.py", "from qvit.methods.qvit import QViT"),
        ("models/layers.py", "from qvit import quantize"),
        ("runs/run.py", "from qvit import __version__"),
        ("report/page.py", "from qvit.data.open import open_data"),
        ("measure/probe.py", "import timm.models"),
        ("methods/qvit.py", "from accelerate import Accelerator"),
        ("cli/training.py", "import plotly"),
    ],
)
def test_the_rules_catch(path: str, text: str) -> None:
    assert wrong_imports(Source(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("models/convert.py", "from qvit.plan.spec import TensorSpec\nfrom qvit.plan.cost import Cost"),
        ("quantizers/lsq.py", "from .base import Quantizer\nfrom .. import functional\nimport qvit.plan.spec as spec"),
        ("training/loop.py", "from qvit.models import convert\nfrom qvit.version import x\nimport accelerate, timm"),
        ("report/page.py", "from qvit.errors import QvitError\nimport plotly.graph_objects as go"),
        ("__init__.py", "from qvit.training import train\nfrom qvit.cli import main"),
    ],
)
def test_the_rules_allow(path: str, text: str) -> None:
    assert wrong_imports(Source(path, text)) == []


def test_plans_need_no_torch() -> None:
    code = "import qvit.plan.quant_plan, qvit.plan.budget, sys; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_circles_between_files() -> None:
    """What is imported when a file is; an import inside a function is late on purpose."""
    modules = {source.module for source in SOURCES}
    graph: dict[str, set[str]] = {}
    for source in SOURCES:
        known = graph.setdefault(source.module, set())
        for module, name in source.at_import():
            full = f"{module}.{name}" if f"{module}.{name}" in modules else module
            if full in modules and full != source.module and not source.module.startswith(f"{full}."):
                known.add(full)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("files import each other: " + " → ".join(error.args[1]))


def test_the_root_holds_little() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 12


def test_the_rules_see_print() -> None:
    assert prints(Source("a.py", "def f():\n    print('x')")) == ["qvit/a.py:2"]
    assert prints(Source("a.py", "console.print('x')  # print(x)\npprint(x)")) == []
