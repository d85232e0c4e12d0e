"""What a quantizer takes beside the fields of a `TensorSpec`: one class of options each, named by its `Options`.

In a spec they are one mapping, `TensorSpec.options`; in JSON they stand beside its fields, as they did when they were
fields. Plans are read, checked and shown without torch, so the options of qvit's own quantizers are declared here and
not in the files of the quantizers, which need it. A quantizer of another package declares its own where it is defined:

    @declare_options
    @dataclass(frozen=True)
    class TernaryOptions(Options):
        threshold: float = 0.7

    @register_quantizer("ternary")
    class TernaryQuantizer(Quantizer):
        Options = TernaryOptions

Values are plain: true or false, numbers, text. Rules give options to sites of any quantizer; each reads its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, get_args

from qvit.errors import UsageError, shown
from qvit.registry import import_files, import_plugins

if TYPE_CHECKING:
    from qvit.plan.spec import TensorSpec

C = TypeVar("C", bound="type[Options]")
ScaleGradient = Literal["count", "norm", "norm-squared", "count-linear"]
_DECLARED: dict[str, type[Options]] = {}


@dataclass(frozen=True)
class Options:
    """Base class: no options."""

    #: Names of the options that JSON always has; the others are left out where they have their default.
    ALWAYS_WRITTEN: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, spec: TensorSpec) -> Self:
        """The options of this class that a spec has, with defaults for the others."""
        own = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in spec.options.items() if name in own})

    def check(self, spec: TensorSpec) -> None:
        """Raises UsageError for a spec that does not go with them."""


def declare_options(cls: C) -> C:
    """Class decorator: makes the options known by name to every spec."""
    _DECLARED.update({field.name: cls for field in dataclasses.fields(cls)})
    return cls


@declare_options
@dataclass(frozen=True)
class ScaleOptions(Options):
    """Options of quantizers with a bank of scales: LSQ, its relatives, logarithmic ones.

    Attributes:
        switchable_scale: One scale per width of `bit_width_range` (Q-ViT, section 3.3) instead of one for all widths.
        width_gradient: How the task's gradient reaches a learned width: through the clipping limits (Q-ViT), by the
            difference that a bit more or less would make to every element, or by interpolation between the two
            neighbouring widths (FracBits, Yang and Jin 2021). See `quantizers/lsq.py`.
        scale_gradient: n of the factor 1/sqrt(n·quant_max) on the gradient of an LSQ scale (`quantizers/lsq.py`): the
            `count` of the elements, the `norm` Σ|x| of what is quantized or its square (VVTQ), or `count-linear`.
    """

    ALWAYS_WRITTEN: ClassVar[tuple[str, ...]] = ("switchable_scale", "width_gradient")

    switchable_scale: bool = False
    width_gradient: Literal["clipping", "interpolation", "difference"] = "clipping"
    scale_gradient: ScaleGradient = "count"

    def __post_init__(self) -> None:
        if not isinstance(self.switchable_scale, bool):
            raise UsageError(f"'switchable_scale' of a tensor spec must be bool, not {shown(self.switchable_scale)}")
        if self.width_gradient not in ("clipping", "interpolation", "difference"):
            raise UsageError(
                f"width_gradient {shown(self.width_gradient)} must be 'clipping', 'interpolation' or 'difference'"
            )
        if self.scale_gradient not in get_args(ScaleGradient):
            raise UsageError(
                f"scale_gradient {shown(self.scale_gradient)} must be one of {', '.join(get_args(ScaleGradient))}"
            )

    def check(self, spec: TensorSpec) -> None:
        low, high = spec.bit_width_range
        for width in spec.widths:
            if self.switchable_scale and not low <= width <= high:
                raise UsageError(
                    f"bit_width {width} has no scale: switchable scales are kept for widths {low} to {high}"
                )
        if spec.token_bit_width is not None and (not self.switchable_scale or spec.learn_bit_width):
            raise UsageError("two widths in a tensor need a scale for each: set switchable_scale and fixed widths")


def declares(name: str) -> bool:
    """Whether some quantizer has an option of this name. Only one that is new here takes a look at all quantizers."""
    if name not in _DECLARED:
        import_files("qvit.quantizers")
        import_plugins()
    return name in _DECLARED


def option_names() -> tuple[str, ...]:
    """The names of all options that are declared."""
    return tuple(_DECLARED)


def checked(spec: TensorSpec) -> dict[str, Any]:
    """The options of a spec without those that have their default, in the order of their declaration.

    Raises UsageError for options that there are not, for their values, and where they and the spec do not go together.
    """
    unknown = [name for name in spec.options if not declares(name)]
    if unknown:
        raise UsageError(f"no quantizer has an option {shown(unknown[0])} (options: {', '.join(sorted(_DECLARED))})")
    found: dict[str, Any] = {}
    for cls in dict.fromkeys(_DECLARED.values()):
        options = cls.of(spec)
        options.check(spec)
        for field in dataclasses.fields(cls):
            value = getattr(options, field.name)
            if value != field.default:
                found[field.name] = value
    return found


def written(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON has them."""
    found: dict[str, Any] = {}
    for cls in dict.fromkeys(_DECLARED.values()):
        for field in dataclasses.fields(cls):
            if field.name in options or field.name in cls.ALWAYS_WRITTEN:
                found[field.name] = options.get(field.name, field.default)
    return found
