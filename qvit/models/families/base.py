"""The registry of model families: float class → sites, matmuls, and the swap of modules that puts quantizers there.

A family is one file with one class decorated by `register_family(ModelClass, ...)`. It answers three questions about a
float model (and, because quantized classes are subclasses, about a quantized one): which tensors are quantized, which
products are computed, and which module is replaced by which. What it does not know, it refuses by name: a model half of
which stays in float silently is worse than none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Protocol

from torch import nn

from qvit.errors import UsageError
from qvit.models.layers import Specs
from qvit.plan.cost import CostModel, Matmul
from qvit.plan.spec import Site
from qvit.registry import Registry


class Family(Protocol):
    """What a family's file defines."""

    def sites(self, model: nn.Module) -> list[Site]:
        """All tensors that get quantized, in the order of the computation."""
        ...

    def matmuls(self, model: nn.Module) -> list[Matmul]:
        """All products of quantized tensors, with MACs for one image of the model's configured size."""
        ...

    def swap(self, model: nn.Module, sites: dict[str, Site], specs: Specs) -> None:
        """Replaces float modules by quantized ones, in place; parameters are shared, keys are kept."""
        ...


FAMILIES: Registry[type[nn.Module], Family] = Registry("family", "qvit.models.families")


def register_family(*classes: type[nn.Module]) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: makes one instance of the family responsible for models of exactly these classes."""

    def register(cls: type[Family]) -> type[Family]:
        FAMILIES.register(*classes)(cls())
        return cls

    return register


def family_of(model: nn.Module) -> Family:
    """The family of a model. Raises UsageError for a class that no family knows."""
    if type(model) not in FAMILIES:
        known = ", ".join(sorted(model_class.__name__ for model_class in FAMILIES))
        raise UsageError(
            f"models of class {type(model).__name__} are not supported "
            f"(supported: {known}; a new family is one file in qvit/models/families)"
        )
    return FAMILIES[type(model)]


def inspect_model(model: nn.Module) -> CostModel:
    """Sites and matmuls of a float or quantized model, as its cost model.

    `inspect_model(model).sites` lists every site.
    """
    family = family_of(model)
    return CostModel({site.name: site for site in family.sites(model)}, family.matmuls(model))


def constructor_arguments() -> set[str]:
    """The names of all arguments that the classes of supported models take."""
    return {name for cls in FAMILIES for name in inspect.signature(cls.__init__).parameters} - {"self", "kwargs"}
