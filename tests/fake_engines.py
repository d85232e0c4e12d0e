"""Stand-ins for artifacts and engines, with which benchmarks are tested without kernels."""

from __future__ import annotations

import copy
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvit.data.open import data_config_of
from qvit.errors import QvitError
from qvit.models.convert import plan_of
from qvit.plan.quant_plan import QuantPlan


@dataclass
class FakeArtifact:
    """Keeps the quantized model as it is; a file is a pickle of all that."""

    quantized: nn.Module
    model_name: str = "vit_digits"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    data_config: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    plan_name: str = "model"

    @classmethod
    def from_model(cls, model: nn.Module, **facts: Any) -> FakeArtifact:
        return cls(copy.deepcopy(model), **facts)

    @classmethod
    def load(cls, path: str | Path) -> FakeArtifact:
        try:
            with Path(path).open("rb") as file:
                return torch.load(file, weights_only=False)
        except Exception as error:
            raise QvitError(f"cannot read the artifact {path}") from error

    @property
    def plan(self) -> QuantPlan:
        return plan_of(self.quantized, self.plan_name)

    def model(self) -> nn.Module:
        return copy.deepcopy(self.quantized)

    def save(self, path: str | Path) -> None:
        self.data_config = self.data_config or data_config_of(self.quantized)
        with Path(path).open("wb") as file:
            torch.save(self, file)


class FakeEngine:
    """Answers as the simulated model; `wrong` with the opposite."""

    def __init__(self, name: str, artifact: FakeArtifact) -> None:
        self.name, self.model = name, artifact.model().eval()
        self.arithmetic = "nothing in integers: a stand-in"

    def __call__(self, images: Tensor) -> Tensor:
        return -self.model(images) if self.name == "wrong" else self.model(images)


class ToldEngine(FakeEngine):
    """Says where its time goes: an eighth of a millisecond into each of its kernels."""

    def profile(self, images: Tensor) -> dict[str, float]:
        return dict.fromkeys(("layernorm", "qkv", "attention", "proj", "fc1+gelu", "fc2"), len(images) / 8)


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> type[FakeArtifact]:
    """Puts engines `torch` and `wrong` in the place of ours.

    Others are there, too, by their names: `told` has a profile, `broken` says that it cannot run.
    """

    def create_engine(artifact: Any, name: str, *, threads: int | None = None) -> FakeEngine:
        assert threads == torch.get_num_threads()
        if name == "broken":
            raise QvitError("this CPU lacks what it needs")
        return ToldEngine(name, artifact) if name == "told" else FakeEngine(name, artifact)

    engines = types.ModuleType("qvit.deploy.engines")
    vars(engines).update(available_engines=lambda device="cpu": ["torch", "wrong"], create_engine=create_engine)
    artifacts = types.ModuleType("qvit.deploy.file.artifact")
    vars(artifacts).update(Artifact=FakeArtifact)
    monkeypatch.setitem(sys.modules, "qvit.deploy.engines", engines)
    monkeypatch.setitem(sys.modules, "qvit.deploy.file.artifact", artifacts)
    return FakeArtifact
