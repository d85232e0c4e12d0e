"""The result of every sensitivity metric: a predicted loss increase for each site, head and width, as plain data.

    {"format": "qvit-sensitivity", "version": 1, "model": "deit_tiny_patch16_224", "metric": "fisher", "images": 32,
     "seed": 0, "seconds": 41.3, "type_normalised": false, "widths": [2, ..., 8], "plan": null,
     "sites": {"blocks.0.attn.query": {"table": [[0.31, ...], ...], "raw": [[0.31, ...], ...]}, ...}}

`raw` is what was measured, a row per head and a column per width. `table` is what allocation reads: the running maximum
of `raw` from the widest width down, so that more bits never look worse, and, on request, normalised by type.

Type normalisation follows the idea of LampQ (AAAI 2026), whose normaliser per kind of tensor is not published as code:
here each type's table is scaled so that all types have the same mean over their heads and widths, that of all. It keeps
the order inside a type and gives up the comparison between types, so a sum over types is no longer a predicted loss.

`plan` holds the grids that were measured where they are not the defaults of the model's sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvit.errors import QvitError, UsageError, nearest, shown
from qvit.files import MissingFile, read_json, write_json
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import MOST_HEADS, MOST_SITES, Site

FORMAT, VERSION = "qvit-sensitivity", 1
_LARGEST, _LONGEST_NAME = 1e30, 500  # sums of many such numbers are finite
Table = Mapping[str, NDArray[np.float64]]
_KINDS = {"model": str, "metric": str, "images": int, "seed": int, "type_normalised": bool}
_KEYS = ("format", "version", *_KINDS, "seconds", "widths", "plan", "sites")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Predicted loss increase of quantizing each site, or head of a site, alone.

    Attributes:
        model: timm's name of the model.
        metric: Name of the metric.
        images: How many images were used.
        seed: Of the random signs.
        seconds: Time of the measurement, calibration included.
        widths: Candidate widths, ascending: the columns of the tables.
        table: By site an array (heads or 1, widths), never increasing in the width.
        raw: The same as measured.
        type_normalised: Whether `table` is normalised by kind of tensor.
        plan: Resolved plan of the grids; None for the sites' defaults.
    """

    model: str
    metric: str
    images: int
    seed: int
    seconds: float
    widths: tuple[int, ...]
    table: Table
    raw: Table
    type_normalised: bool = False
    plan: QuantPlan | None = None

    @classmethod
    def from_raw(cls, raw: Table, *, type_normalised: bool = False, **fields: Any) -> Sensitivity:
        """Makes `table` of `raw`; the other attributes as they are."""
        table = {name: monotone(values) for name, values in raw.items()}
        table = normalised_by_type(table) if type_normalised else table
        return cls(table=table, raw=dict(raw), type_normalised=type_normalised, **fields)

    def damage(self, site: str, head: int, width: int) -> float:
        """The predicted increase at one width; at a width that was not measured, that of the nearest one."""
        column = min(range(len(self.widths)), key=lambda index: abs(self.widths[index] - width))
        return float(self.table[site][head, column])

    def predicted(self, widths: Mapping[str, Sequence[int]]) -> float:
        """The sum over all sites: the predicted loss increase of a plan, errors taken as independent.

        Args:
            widths: As `QuantPlan.widths` returns them; one may serve all heads. Sites without a table add nothing.
        """
        return sum(
            self.damage(name, head, own[head % len(own)])
            for name, own in widths.items()
            if name in self.table
            for head in range(len(self.table[name]))
        )

    def check(self, sites: Mapping[str, Site]) -> None:
        """Raises UsageError unless every row belongs to a site of this model, and every quantized site has its rows."""
        unknown = [name for name in self.table if name not in sites]
        if unknown:
            raise UsageError(
                f"the sensitivity names {len(unknown)} site(s) that this model does not have, first '{unknown[0]}'"
                f"{nearest(unknown[0], sites)}: it was measured on {self.model}"
            )
        specs = {} if self.plan is None else self.plan.sites
        missing = [name for name in sites if name not in self.table and specs.get(name, 0) is not None]
        if missing:
            raise UsageError(
                f"the sensitivity lacks {len(missing)} site(s) of this model, first '{missing[0]}': "
                f"it was measured on {self.model}"
            )
        for name, values in self.table.items():
            if len(values) not in (1, sites[name].layout.num_heads):
                raise UsageError(
                    f"site '{name}' has {sites[name].layout.num_heads} head(s), the sensitivity gives {len(values)}: "
                    f"it was measured on {self.model}"
                )

    def at_widths(self, widths: Iterable[int]) -> Sensitivity:
        """The same for fewer candidate widths. Raises UsageError for one that was not measured."""
        kept = check_widths(widths)
        if missing := [width for width in kept if width not in self.widths]:
            measured = ", ".join(map(str, self.widths))
            raise UsageError(f"{missing[0]} bit was not measured; this sensitivity has the widths {measured}")
        columns = [self.widths.index(width) for width in kept]
        return self._with({site: values[:, columns] for site, values in self.raw.items()}, kept)

    def scaled(self, factors: Mapping[str, float]) -> Sensitivity:
        """The same with the losses of some sites multiplied by a factor."""
        return self._with({site: values * factors.get(site, 1.0) for site, values in self.raw.items()}, self.widths)

    def scaled_by_head(self, factors: Mapping[str, NDArray[np.float64]]) -> Sensitivity:
        """The same with the losses of some sites multiplied by factors (heads,)."""
        raw = {
            site: values * factors[site][:, None] if site in factors else values for site, values in self.raw.items()
        }
        return self._with(raw, self.widths)

    def _with(self, raw: Table, widths: tuple[int, ...]) -> Sensitivity:
        names = ("model", "metric", "images", "seed", "seconds", "plan", "type_normalised")
        return Sensitivity.from_raw(raw, widths=widths, **{name: getattr(self, name) for name in names})

    def to_json(self) -> dict[str, Any]:
        """Plain data in the format above."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{key: getattr(self, key) for key in ("model", "metric", "images", "seed", "seconds", "type_normalised")},
            "widths": list(self.widths),
            "plan": None if self.plan is None else self.plan.to_json(),
            "sites": {
                name: {"table": own.tolist(), "raw": self.raw[name].tolist()} for name, own in self.table.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Sensitivity:
        """The inverse of `to_json`. Raises UsageError for anything that is not such a table, with the key named."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UsageError(f'not a sensitivity: it is a JSON object with "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise UsageError(f"sensitivity of version {shown(data.get('version'))}; this qvit reads version {VERSION}")
        for key in data:
            if key not in _KEYS:
                raise UsageError(f"unknown key {shown(key)} in a sensitivity{nearest(key, _KEYS)}")
        if missing := [key for key in _KEYS if key not in data]:
            raise UsageError(f"the sensitivity lacks the key '{missing[0]}'")
        for key, kind in _KINDS.items():
            if type(data[key]) is not kind:
                raise UsageError(f"'{key}' of a sensitivity must be {kind.__name__}, not {shown(data[key])}")
            if kind is str and len(data[key]) > _LONGEST_NAME:
                raise UsageError(f"'{key}' of a sensitivity has {len(data[key]):,} characters")
        for key in ("images", "seed"):
            if data[key] < 0:
                raise UsageError(f"'{key}' of a sensitivity must not be negative, unlike {data[key]}")
        if not _is_number(data["seconds"]) or data["seconds"] < 0:
            raise UsageError(f"'seconds' of a sensitivity must be a number of seconds, not {shown(data['seconds'])}")
        widths, sites = data["widths"], data["sites"]
        if not isinstance(widths, list):
            raise UsageError(f"'widths' of a sensitivity must be a list, not {shown(widths)}")
        widths = check_widths(widths)
        if not isinstance(sites, dict) or not sites:
            raise UsageError("'sites' of a sensitivity must be an object with at least one site")
        if len(sites) > MOST_SITES:
            raise UsageError(f"'sites' of a sensitivity has {len(sites):,} sites; at most {MOST_SITES:,} are read")
        table, raw = {}, {}
        for name, entry in sites.items():
            if not isinstance(entry, dict) or set(entry) != {"table", "raw"}:
                raise UsageError(f"site '{name}' of a sensitivity must have exactly the keys 'table' and 'raw'")
            table[name], raw[name] = (
                _array(entry[key], f"'{key}' of site '{name}'", widths) for key in ("table", "raw")
            )
            if table[name].shape != raw[name].shape:
                raise UsageError(f"'table' and 'raw' of site '{name}' have different numbers of heads")
            if (table[name] < 0).any() or (np.diff(table[name], axis=1) > 0).any():
                raise UsageError(f"'table' of site '{name}' must not be negative and must not increase with the width")
        plan = None if data["plan"] is None else QuantPlan.from_json(data["plan"])
        fields = {key: data[key] for key in _KINDS}
        return cls(**fields, seconds=float(data["seconds"]), widths=widths, table=table, raw=raw, plan=plan)

    def save(self, path: str | Path) -> None:
        """Writes JSON; a reader sees the old file or the new one, never half of it."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Reads such a file. Raises QvitError naming it."""
        try:
            return cls.from_json(read_json(path, "sensitivity"))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except MissingFile:
            raise QvitError(f"no sensitivity at {path}: measure one with `qvit sensitivity`") from None


def monotone(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The running maximum from the widest width down, at least 0: (heads, widths) with ascending widths."""
    return np.maximum.accumulate(np.maximum(values, 0.0)[:, ::-1], axis=1)[:, ::-1]


def site_type(name: str) -> str:
    """The kind of tensor a site is: its name without layer numbers, with W_q, W_k and W_v as one.

    `blocks.3.attn.qkv.key_weight` is of type `blocks.attn.qkv.weight`.
    """
    name = re.sub(r"\.\d+(?=\.)", "", name)
    return re.sub(r"\.(query|key|value)_weight$", ".weight", name)


def normalised_by_type(table: Table) -> dict[str, NDArray[np.float64]]:
    """The table with the same mean for all types; a type that is zero everywhere stays so."""
    members: dict[str, list[str]] = {}
    for name in table:
        members.setdefault(site_type(name), []).append(name)
    means = {kind: np.concatenate([table[name] for name in names]).mean() for kind, names in members.items()}
    target = float(np.mean(list(means.values())))
    return {name: values * (target / (means[site_type(name)] or 1.0)) for name, values in table.items()}


def check_widths(widths: Any) -> tuple[int, ...]:
    """Candidate widths as an ascending tuple. Raises UsageError for anything but different integers from 2 to 16."""
    given = list(widths)
    if not given or any(isinstance(width, bool) or not isinstance(width, int) for width in given):
        raise UsageError(f"'widths' must be integers such as 2, 3, 4, 6, 8, not {shown(given)}")
    if len(set(given)) < len(given) or not 2 <= min(given) <= max(given) <= 16:
        raise UsageError(f"'widths' must be different and lie between 2 and 16, unlike {shown(given)}")
    return tuple(sorted(given))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _array(value: Any, what: str, widths: tuple[int, ...]) -> NDArray[np.float64]:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise UsageError(f"{what} must be a list of rows, one per head")
    if len(value) > MOST_HEADS:
        raise UsageError(f"{what} has {len(value):,} rows; a tensor has at most {MOST_HEADS:,} heads")
    for row in value:
        if len(row) != len(widths):
            raise UsageError(f"{what} has a row of {len(row)} numbers; there are {len(widths)} widths")
        if wrong := [number for number in row if not _is_number(number)]:
            raise UsageError(f"{what} holds {shown(wrong[0])}, which is not a finite number of moderate size")
    return np.array(value, dtype=np.float64)
