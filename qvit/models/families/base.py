"""The registry of model families: float class → sites, matmuls, and the swap of modules that puts quantizers there.

A family is one file with one class decorated by `register_family(ModelClass, ...)`. It answers three questions about a
float model (and, because quantized classes are subclasses, about a quantized one): which tensors are quantized, which
products are computed, and which module is replaced by which. What it does not know, it refuses by name: a model half of
which stays in float silently is worse than none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from qvit.errors import UsageError
from qvit.models.families.parts import Family
from qvit.plan.cost import CostModel
from qvit.registry import Registry

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
