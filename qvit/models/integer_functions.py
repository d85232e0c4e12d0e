"""LayerNorm, softmax and GELU as modules that may compute on integers: where they are, and which form each has.

A plan's `nonlinear` says it, by kind of operation or by path, where a path wins:

    {"layernorm": "i-vit", "softmax": "i-bert", "blocks.3.mlp.act": "i-vit"}      "float" leaves a place as it was

A LayerNorm and a GELU become subclasses that share all parameters; an attention module, of whatever family, gets a
submodule `softmax` without parameters, in the place of timm's where it has one. Keys of a state dict do not change.
Forms have no scales and nothing that is calibrated: their inputs are in fixed point (`qvit/nonlinear/base.py`). What
they see and what they give are the values of the model, so the quantizers around them work as they always do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from timm.layers import GELU, GELUTanh, LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.errors import UsageError, nearest
from qvit.models.layers import AttentionSites, adopt
from qvit.nonlinear import OPERATIONS, gelu, layer_norm, one_operator, softmax
from qvit.nonlinear.base import MOST_CHANNELS, Form

#: In place of the name of a form: none.
FLOAT = "float"
Forms = Mapping[str, str]


class IntegerFunction(nn.Module):
    """Base class.

    Attributes:
        form: The name of its form.
        integer: False: it computes what the float model computes.
    """

    operation: ClassVar[str]
    integer: bool = True
    _form: str

    @property
    def form(self) -> str:
        return self._form

    @form.setter
    def form(self, name: str) -> None:
        self._form, self._function = name, OPERATIONS[self.operation][name]

    def forward(self, input: Tensor) -> Tensor:
        if not self.integer:
            return self.exact(input)
        return self.values(input, self._operator if torch.compiler.is_compiling() else self._function)

    def _operator(self, codes: Tensor) -> Tensor:
        return one_operator(codes, self.operation, self._form)

    def exact(self, x: Tensor) -> Tensor:
        """The float function."""
        raise NotImplementedError

    def values(self, x: Tensor, form: Form) -> Tensor:
        """The values of a form, with the gradient of the float function."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.form if self.integer else FLOAT}"


class IntegerSoftmax(IntegerFunction):
    """Over the last axis."""

    operation = "softmax"

    def exact(self, x: Tensor) -> Tensor:
        return x.softmax(dim=-1)

    def values(self, x: Tensor, form: Form) -> Tensor:
        return softmax(form, x)


class IntegerLayerNorm(IntegerFunction, nn.LayerNorm):
    """Over the channels; same parameters."""

    operation = "layernorm"

    def exact(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def values(self, x: Tensor, form: Form) -> Tensor:
        return layer_norm(form, x, self.weight, self.bias, self.eps)


class IntegerGELU(IntegerFunction, nn.GELU):
    """For GELU and its approximation by tanh, which keeps its own gradient."""

    operation = "gelu"

    def exact(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)

    def values(self, x: Tensor, form: Form) -> Tensor:
        return gelu(form, x, self.approximate)


def places(model: nn.Module) -> dict[str, str]:
    """The operations of a quantized model that have integer forms, by path: `blocks.0.norm1` → `layernorm`."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, AttentionSites):
            found[f"{path}.softmax"] = "softmax"
        elif type(module) in (nn.LayerNorm, LayerNorm, IntegerLayerNorm):
            norm: Any = module
            if len(norm.normalized_shape) == 1 and norm.normalized_shape[0] <= MOST_CHANNELS:
                found[path] = "layernorm"
        elif type(module) in (nn.GELU, GELU, GELUTanh, IntegerGELU):
            found[path] = "gelu"
    return found


def functions_of(model: nn.Module) -> Iterator[tuple[str, IntegerFunction]]:
    """Every integer function of a model, by path."""
    for path, module in model.named_modules():
        if isinstance(module, IntegerFunction):
            yield path, module


def forms_of(model: nn.Module) -> dict[str, str]:
    """The forms of a model as a plan has them: the most frequent one of each operation, and other ones by path."""
    known, own = places(model), dict(functions_of(model))
    each = {path: own[path].form if path in own else FLOAT for path in known}
    if not own:
        return {}
    most: dict[str, str] = {}
    for operation in OPERATIONS:
        names = [each[path] for path in known if known[path] == operation]
        if names:
            most[operation] = max(sorted(set(names)), key=names.count)
    kinds = {operation: name for operation, name in most.items() if name != FLOAT}
    return kinds | {path: name for path, name in each.items() if name != most[known[path]]}


def use_forms(model: nn.Module, forms: Forms) -> None:
    """Gives the operations of a quantized model these forms, in place; a place that has one already gets the new one.

    `float` leaves a place as it is: it excepts one from the form of its operation, and takes no form away.

    Raises:
        UsageError: A kind or a path that the model does not have, or no such form.
    """
    known = places(model)
    for key, name in forms.items():
        if key not in OPERATIONS and key not in known:
            raise UsageError(f"no operation '{key}' to give an integer form to{nearest(key, [*OPERATIONS, *known])}")
        operation = known.get(key, key)
        if operation not in known.values():
            raise UsageError(f"this model has no {operation} to give the integer form '{name}' to")
        if name != FLOAT:
            _ = OPERATIONS[operation][name]
    for path, operation in known.items():
        name = forms.get(path, forms.get(operation, FLOAT))
        if name != FLOAT:
            _function_at(model, path, operation).form = name


def _function_at(model: nn.Module, path: str, operation: str) -> IntegerFunction:
    """The integer function at a place, put there if need be."""
    parent, _, leaf = path.rpartition(".")
    module: Any = model.get_submodule(parent)
    if operation == "softmax":
        if not isinstance(module._modules.get("softmax"), IntegerSoftmax):
            module.add_module("softmax", IntegerSoftmax())
        return module.softmax
    own = module.get_submodule(leaf)
    if not isinstance(own, IntegerFunction):
        new: Any = adopt(IntegerLayerNorm if operation == "layernorm" else IntegerGELU, own)
        if operation == "gelu":
            new.approximate = "tanh" if isinstance(own, GELUTanh) else getattr(own, "approximate", "none")
        setattr(module, leaf, new)
        own = new
    return own


def parse_forms(text: str, model: nn.Module) -> Forms:
    """The forms that a short text means for a quantized model.

    Args:
        text: `float`; the name of a form, for every operation that has one of that name; or
            `softmax=i-bert,gelu=i-vit`, operations or paths.
        model: Whose operations.
    """
    there = set(places(model).values())
    if text == FLOAT:
        return {}
    if "=" not in text:
        found = {operation: text for operation in OPERATIONS if operation in there and text in OPERATIONS[operation]}
        if not found:
            names = list(dict.fromkeys(name for forms in OPERATIONS.values() for name in forms))
            raise UsageError(f"no integer forms are called '{text}'{nearest(text, names)} ({', '.join(names)})")
        return found
    pairs = (part.partition("=") for part in text.split(","))
    return {key.strip(): name.strip() for key, _, name in pairs}


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Within, all integer functions compute what the float model computes."""
    before = [(function, function.integer) for _, function in functions_of(model)]
    try:
        for function, _ in before:
            function.integer = False
        yield
    finally:
        for function, integer in before:
            function.integer = integer
