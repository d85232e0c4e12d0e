"""The words of a packed file: its JSON documents, written briefly, and read without trusting them.

    plan         {"name", "kinds": [...], "sites": {...}}: see below; "nonlinear" where functions have integer forms
    model        {"name": timm's name, "kwargs": {...}}
    data_config  timm's: input_size, interpolation, mean, std, crop_pct, crop_mode
    class_names  a list
    provenance   plain JSON
    network      how the model is built (`models/network.py`); null where no document describes it

A plan of DeiT-T written site by site is 45 kB, more than 2 % of the whole model at 2 bits. Most sites are alike, so
`kinds` lists the different ones: what differs from a default `TensorSpec`, and beside it the shapes of the numbers of
its grid (`grids.py`); null for a tensor that stays in float. `sites` names the kind of each site. Those that differ
only in the last number of their names have one entry, with `#` for the numbers 0, 1, 2, ...: a list of kinds, or
"12*3" for twelve of kind 3.

    {"kinds": [{"bit_width": 2, "scale": []}, {"bit_width": [2, 3, 2], "granularity": "per-head", "scale": [3, 1, 1]}],
     "sites": {"blocks.#.attn.query": [1, 1, 0], "blocks.#.attn.key": "3*1", "head.weight": 0}}

What is read is plain data of bounded depth with finite numbers. What the words mean for a model is checked in
`skeleton.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qvit.errors import QvitError, UsageError
from qvit.plan.quant_plan import FORMAT as PLAN_FORMAT
from qvit.plan.quant_plan import VERSION as PLAN_VERSION
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import TensorSpec, spec_keys
from qvit.tensors import compact, parse

if TYPE_CHECKING:
    from torch import Tensor

#: Names of tensors in a file: SITE.packed, and one of all numbers of grids.
PACKED, SCALES = ".packed", "scales"
#: The largest number of a packed model, in size. Trained ones stay below 10⁵; up to here, products of two values on
#: grids of 16 bits, summed over a layer, are far from the end of float32.
LARGEST = 2.0**24
KEYS = {"format", "version", "plan", "model", "data_config", "class_names", "provenance", "network"}
_LAST_NUMBER = re.compile(r"(?P<before>.*\.)(?P<number>0|[1-9]\d{0,5})(?P<after>\..*)")
_TIMES = re.compile(r"([1-9]\d{0,3})\*(0|[1-9]\d{0,4})")
_MAX_DEPTH, _LARGEST, _LONGEST, _MOST_SITES = 8, 1 << 53, 1 << 24, 20_000
_DATA_KEYS = {
    "input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode", "test_input_size", "test_crop_pct",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Documents:
    """All documents of a file, read.

    Attributes:
        model_name, model_kwargs: What `timm.create_model` makes the float model from.
        plan: Its plan; the sites in the order of the file.
        shapes: The shapes of the numbers of each site's grid.
        data_config, class_names, provenance, network: See above.
    """

    model_name: str
    model_kwargs: dict[str, Any]
    plan: QuantPlan
    shapes: dict[str, dict[str, tuple[int, ...]]]
    data_config: dict[str, Any]
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    network: dict[str, Any] | None

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Documents:
        """Reads the metadata of a file of the present version. Raises QvitError."""
        if set(texts) != KEYS:
            odd = sorted(set(texts) ^ KEYS)[0]
            raise QvitError(f"its metadata {'have an unknown' if odd in texts else 'lack the'} key {odd!r}")
        name, kwargs = model_from_text(texts["model"])
        return cls(
            name,
            kwargs,
            *plan_from_text(texts["plan"], name),
            data_config_from_text(texts["data_config"]),
            class_names_from_text(texts["class_names"]),
            provenance_from_text(texts["provenance"]),
            network_from_text(texts["network"]),
        )


def plan_to_text(plan: QuantPlan, values: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A resolved plan, and the shapes of the numbers of each site's grid, as compact JSON."""
    default = TensorSpec().to_json()
    kinds: dict[str, int] = {}
    indices: dict[str, int] = {}
    for site, spec in plan.sites.items():
        kind = None
        if spec is not None:
            own = spec.to_json()
            kind = {key: own[key] for key in own if key not in default or own[key] != default[key]}
            kind |= {name: list(value.shape) for name, value in values[site].items()}
        indices[site] = kinds.setdefault(compact(kind), len(kinds))
    document = {
        "name": plan.name,
        "kinds": [parse(text) for text in kinds],
        "sites": _grouped(indices),
        **({"nonlinear": dict(plan.nonlinear)} if plan.nonlinear else {}),
    }
    return compact(document)


def _grouped(indices: Mapping[str, int]) -> dict[str, Any]:
    """Sites that differ in the last number of their names under one key, where the numbers are 0, 1, 2, ..."""
    groups: dict[str, dict[int, str]] = {}
    for site in indices:
        match = _LAST_NUMBER.fullmatch(site)
        if match is not None and "#" not in site:
            groups.setdefault(f"{match['before']}#{match['after']}", {})[int(match["number"])] = site
    template_of = {
        site: template
        for template, members in groups.items()
        if set(members) == set(range(len(members)))
        for site in members.values()
    }
    found: dict[str, Any] = {}
    for site, index in indices.items():
        template = template_of.get(site)
        if template is None:
            found[site] = index
        elif template not in found:
            own = [indices[groups[template][number]] for number in range(len(groups[template]))]
            found[template] = f"{len(own)}*{own[0]}" if len(set(own)) == 1 else own
    return found


def plan_from_text(text: str, model: str) -> tuple[QuantPlan, dict[str, dict[str, tuple[int, ...]]]]:
    """The inverse of `plan_to_text`: the plan of `model`, and the shapes of the numbers of each site's grid.

    Raises QvitError for anything that is not such a document.
    """
    found = parse(text)
    forms = {"nonlinear"} if isinstance(found, dict) and "nonlinear" in found else set()
    document = _object(found, "plan", {"name", "kinds", "sites"} | forms)
    if not isinstance(document["name"], str):
        raise QvitError("the plan's name is no text")
    kinds = document["kinds"]
    if not isinstance(kinds, list) or not isinstance(document["sites"], dict):
        raise QvitError("the plan has no list of kinds and no object of sites")
    shapes = [_shapes(kind) for kind in kinds]
    specs = [None if kind is None else {k: v for k, v in kind.items() if not _is_shape(k, v)} for kind in kinds]
    indices = _expanded(document["sites"], len(kinds))
    written = {
        "format": PLAN_FORMAT,
        "version": PLAN_VERSION,
        "name": document["name"],
        "model": model,
        "sites": {site: specs[index] for site, index in indices.items()},
        **{key: document[key] for key in forms},
    }
    plan = QuantPlan.from_json(written)
    learned = [site for site, spec in plan.sites.items() if spec is not None and spec.learn_bit_width]
    if learned:
        raise QvitError(f"the width of site {learned[0]!r} is still to be learned")
    return plan, {site: shapes[index] for site, index in indices.items()}


def _is_shape(key: str, value: Any) -> bool:
    """Whether an entry of a kind is the shape of a number of its grid, not a part of its spec."""
    return key not in spec_keys() and isinstance(value, list)


def _shapes(kind: Any) -> dict[str, tuple[int, ...]]:
    if kind is None:
        return {}
    if not isinstance(kind, dict) or not isinstance(kind.get("scale"), list):
        raise QvitError("a kind of site in the plan has no scale")
    shapes = {key: value for key, value in kind.items() if _is_shape(key, value)}
    for key, shape in shapes.items():
        if not all(type(size) is int and 0 <= size <= _LONGEST for size in shape):
            raise QvitError(f"the {key} of a kind of site in the plan has no shape")
    return {key: tuple(shape) for key, shape in shapes.items()}


def computed_order(sites: Iterable[str]) -> list[str]:
    """The sites of a document as the model computes them: block by block, where `#` put equal ones of all together."""

    def block(site: str) -> str:
        match = _LAST_NUMBER.fullmatch(site)
        return match["before"] if match else site

    def number(site: str) -> int:
        match = _LAST_NUMBER.fullmatch(site)
        return int(match["number"]) if match else 0

    return [site for _, run in itertools.groupby(sites, block) for site in sorted(run, key=number)]


def _expanded(sites: Mapping[str, Any], kinds: int) -> dict[str, int]:
    """The kind of each site by its full name."""
    found: dict[str, int] = {}
    for key, value in sites.items():
        times = _TIMES.fullmatch(value) if isinstance(value, str) else None
        indices = [int(times[2])] * int(times[1]) if times else value if isinstance(value, list) else [value]
        single = times is None and not isinstance(value, list)
        names = [key] if single else [key.replace("#", str(number)) for number in range(len(indices))]
        if not single and key.count("#") != 1:
            raise QvitError(f"the sites {key!r} of the plan have no place for a number")
        if len(found) + len(names) > _MOST_SITES:
            raise QvitError(f"the plan has more than {_MOST_SITES} sites")
        for name, index in zip(names, indices, strict=True):
            if type(index) is not int or not 0 <= index < kinds:
                raise QvitError(f"site {name!r} of the plan is of no kind that is listed")
            if name in found:
                raise QvitError(f"site {name!r} is in the plan twice")
            found[name] = index
    return found


def model_from_text(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model."""
    document = _object(parse(text), "model", {"name", "kwargs"})
    name, kwargs = document["name"], document["kwargs"]
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise QvitError("the model has no name and no arguments")
    check_plain(kwargs, "the model's arguments")
    return name, kwargs


def data_config_from_text(text: str) -> dict[str, Any]:
    """timm's data configuration, with tuples as timm has them."""
    config = parse(text)
    if not isinstance(config, dict) or not set(config) <= _DATA_KEYS:
        raise QvitError("its data configuration has keys that are none")
    return check_data_config({key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})


def check_data_config(config: dict[str, Any]) -> dict[str, Any]:
    """Raises QvitError for a data configuration that no images can be prepared by."""
    checks = {
        "input_size": lambda v: _numbers(v, int, 1, 1 << 14) and len(v) == 3,
        "interpolation": lambda v: isinstance(v, str),
        "mean": lambda v: _numbers(v, (int, float), -1e3, 1e3),
        "std": lambda v: _numbers(v, (int, float), 1e-6, 1e3),
        "crop_pct": lambda v: _numbers((v,), (int, float), 1e-3, 10),
        "crop_mode": lambda v: isinstance(v, str),
    }
    checks |= {f"test_{key}": checks[key] for key in ("input_size", "crop_pct")}
    for key, value in config.items():
        if key not in checks or not checks[key](value):
            raise QvitError(f"its data configuration is impossible: {key} = {value!r}")
    check_plain(config, "the data configuration")
    return config


def _numbers(values: Any, kind: Any, low: float, high: float) -> bool:
    return (
        isinstance(values, tuple)
        and 0 < len(values) <= 64
        and all(isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high for v in values)
    )


def class_names_from_text(text: str) -> tuple[str, ...]:
    """The names of the classes, in order."""
    names = parse(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise QvitError("its class names are no list of texts")
    check_plain(names, "the class names")
    return tuple(names)


def provenance_from_text(text: str) -> dict[str, Any]:
    """Where the model comes from; plain data that nothing depends on."""
    found = parse(text)
    if not isinstance(found, dict):
        raise QvitError("its provenance is no object")
    check_plain(found, "the provenance")
    return found


def network_from_text(text: str) -> dict[str, Any] | None:
    """How the model is built, as the file says it; what it says is compared with the model itself."""
    found = parse(text)
    if found is not None and not isinstance(found, dict):
        raise QvitError("its network is no object")
    check_plain(found, "the network")
    return found


def to_text(data: Any, what: str) -> str:
    """Plain data as compact JSON with sorted keys. Raises UsageError for what JSON cannot hold."""
    try:
        check_plain(data, what)
    except QvitError as error:
        raise UsageError(str(error)) from None
    return compact(_sorted(data))


def _sorted(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _sorted(data[key]) for key in sorted(data)}
    return [_sorted(item) for item in data] if isinstance(data, (list, tuple)) else data


def check_plain(data: Any, what: str, depth: int = 0) -> None:
    """Raises QvitError for what is not plain, finite data of texts, numbers, lists and objects."""
    if depth > _MAX_DEPTH:
        raise QvitError(f"{what} are nested more than {_MAX_DEPTH} deep")
    if isinstance(data, Mapping):
        for key, value in data.items():
            if not isinstance(key, str):
                raise QvitError(f"a key of {what} is no text: {key!r}")
            check_plain(key, what, depth + 1)
            check_plain(value, what, depth + 1)
    elif isinstance(data, (list, tuple)):
        for item in data:
            check_plain(item, what, depth + 1)
    elif isinstance(data, str):
        if any("\ud800" <= character <= "\udfff" for character in data):
            raise QvitError(f"a text of {what} is not Unicode: {data!r}")
    elif isinstance(data, bool) or data is None:
        pass
    elif isinstance(data, int):
        if abs(data) > _LARGEST:
            raise QvitError(f"a number of {what} is too large")
    elif not isinstance(data, float) or not math.isfinite(data):
        raise QvitError(f"{what} hold something that is not plain: {data!r}")


def _object(data: Any, what: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != keys:
        raise QvitError(f"its {what} is not an object of {', '.join(sorted(keys))}")
    check_plain(data, f"the {what}")
    return data
