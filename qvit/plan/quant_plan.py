"""The QuantPlan: which tensor gets how many bits, as plain data.

A plan is the result of every search and the input of every conversion. It is written in one of two forms, in one JSON
format:

    rules    ordered (pattern → changes of the spec), such as "blocks.*.attn.*" → {"bit_width": 4}; short, for any model
    sites    a TensorSpec per site of one model: what `resolve` returns; null for a tensor that stays in float

    {"format": "qvit-plan", "version": 1, "name": "w4a4", "model": null,
     "rules": [{"pattern": "*", "role": "weight", "bit_width": 4}, ...]}
    {"format": "qvit-plan", "version": 1, "name": "w4a4", "model": "deit_tiny_patch16_224",
     "sites": {"blocks.0.attn.query": {"bit_width": [3, 4, 3], ...}, ...}}

Either may say which integer form LayerNorm, softmax and GELU have, by kind or by path, where a path wins
(`models/integer_functions.py`): "nonlinear": {"layernorm": "i-vit", "softmax": "i-bert", "blocks.3.mlp.act": "i-vit"}.

Presets are rules. A later rule wins. A rule or a site that matches nothing in the model is an error that names the
nearest site: a typo must not become a silent default.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from qvit.errors import UsageError, nearest, shown
from qvit.files import read_json, write_json
from qvit.plan.cost import FLOAT_BITS, TokenWidths, Widths
from qvit.plan.spec import MOST_SITES, Site, TensorSpec

FORMAT, VERSION = "qvit-plan", 1
_MOST_RULES, _LONGEST_NAME = 1000, 500
_PRESET = re.compile(r"w(\d{1,2})a(\d{1,2})")


@dataclass(frozen=True)
class Rule:
    """Changes to the specs of all sites that match.

    Attributes:
        pattern: Shell-style pattern for the site's name.
        changes: Keys of `TensorSpec` with new values as in JSON; None leaves the tensor in float.
        role: `weight` or `activation`; None for both.
        position: `first`, `block` or `last`; None for all.
        optional: Whether the rule may match nothing (presets, on models without a classifier).
    """

    pattern: str
    changes: Mapping[str, Any] | None
    role: str | None = None
    position: str | None = None
    optional: bool = False

    def matches(self, site: Site) -> bool:
        return (
            fnmatch.fnmatchcase(site.name, self.pattern)
            and self.role in (None, site.role)
            and self.position in (None, site.position)
        )


@dataclass(frozen=True)
class QuantPlan:
    """A plan as rules, or, once resolved for a model, as a spec for each of its sites."""

    name: str
    rules: tuple[Rule, ...] = ()
    sites: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    model: str | None = None
    #: The integer form of each LayerNorm, softmax and GELU, by kind or by path; what is not named stays in float.
    nonlinear: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def preset(cls, name: str, *, boundary_bits: int = 8) -> QuantPlan:
        """`w4a4`: weights and activations of 4 bits, 8 in the first and the last layer, as papers count them."""
        match = _PRESET.fullmatch(name.lower())
        if match is None or not all(2 <= int(bits) <= 16 for bits in match.groups()):
            raise UsageError(
                f"unknown preset '{name}': give wXaY with 2 to 16 bits, such as w8a8, w4a4, w3a3, w2a2 or w4a8"
            )
        weight, activation = (int(bits) for bits in match.groups())
        rules = [
            Rule("*", {"bit_width": weight}, role="weight"),
            Rule("*", {"bit_width": activation}, role="activation"),
        ]
        rules += [
            Rule("*", {"bit_width": boundary_bits}, position=position, optional=True) for position in ("first", "last")
        ]
        return cls(name.lower(), tuple(rules))

    @classmethod
    def any_width(cls, sites: Mapping[str, Site], *, low: int = 2, high: int = 8) -> QuantPlan:
        """The plan to measure with: every site has a scale for each width, every head a width of its own, `high` bits.

        A model so calibrated takes any widths from `low` to `high` (`qvit.freeze`) without being calibrated again.
        """
        changes = {"bit_width_range": [low, high], "switchable_scale": True, "learn_bit_width": False}
        specs: dict[str, TensorSpec | None] = {}
        for name, site in sites.items():
            heads = site.layout.num_heads
            specs[name] = site.default.changed({**changes, "bit_width": [high] * heads if heads > 1 else high})
        return cls("any-width", (), specs)

    def with_rules(self, *rules: Rule, name: str | None = None) -> QuantPlan:
        """A copy with more rules, which win over the present ones."""
        return replace(self, rules=(*self.rules, *rules), name=name or self.name)

    def resolve(self, sites: Mapping[str, Site] | Iterable[Site], model: str | None = None) -> QuantPlan:
        """The plan with one spec per site of a model.

        Raises:
            UsageError: If a rule matches no site, a site of the plan does not exist, or one of the model's is missing.
        """
        by_name = sites if isinstance(sites, Mapping) else {site.name: site for site in sites}
        known = dict(cast("Mapping[str, Site]", by_name))
        specs: dict[str, TensorSpec | None] = {name: site.default for name, site in known.items()}
        if self.sites:
            self._check_names(known)
            specs = {name: self.sites[name] for name in known}
        for rule in self.rules:
            matching = [name for name, site in known.items() if rule.matches(site)]
            if not matching and not rule.optional:
                raise UsageError(
                    f"rule '{rule.pattern}' matches no site{nearest(rule.pattern, known)} "
                    "(`qvit cost MODEL` lists all sites)"
                )
            for name in matching:
                base = specs[name] or known[name].default
                specs[name] = None if rule.changes is None else base.changed(rule.changes)
        for name, spec in specs.items():
            heads = known[name].layout.num_heads
            if spec is not None and len(spec.widths) not in (1, heads):
                raise UsageError(f"site '{name}' has {heads} head(s), the plan gives {len(spec.widths)} bit-widths")
            if spec is not None and spec.token_bit_width is not None and not known[name].tokens:
                with_tokens = [other for other, site in known.items() if site.tokens]
                offered = nearest(name, with_tokens) or ("" if with_tokens else "; no site of this model can")
                raise UsageError(f"the tokens of site '{name}' cannot differ in width{offered}")
        return QuantPlan(self.name, (), specs, model or self.model, self.nonlinear)

    def _check_names(self, known: Mapping[str, Site]) -> None:
        unknown = [name for name in self.sites if name not in known]
        if unknown:
            raise UsageError(
                f"plan '{self.name}' names {len(unknown)} site(s) that this model does not have, "
                f"first '{unknown[0]}'{nearest(unknown[0], known)}"
            )
        missing = [name for name in known if name not in self.sites]
        if missing:
            raise UsageError(
                f"plan '{self.name}' lacks {len(missing)} site(s) of this model, first '{missing[0]}': "
                f"it was made for {self.model or 'another model'}"
            )

    def quantized(self, sites: Mapping[str, Site]) -> list[Site]:
        """Those of a model's sites that this plan, resolved for it, does not leave in float."""
        return [site for name, site in sites.items() if self.sites[name] is not None]

    def widths(self) -> dict[str, Sequence[int]]:
        """Widths per site as `cost.CostModel` takes them; 32 for float."""
        return {name: (FLOAT_BITS,) if spec is None else _widths_of(spec) for name, spec in self.sites.items()}

    def with_widths(self, widths: Widths, name: str | None = None) -> QuantPlan:
        """A copy of a resolved plan with other, fixed widths."""
        sites = dict(self.sites)
        for site, own in widths.items():
            spec = sites[site]
            if spec is not None:
                bit_width = list(own) if len(own) > 1 else own[0]
                sites[site] = spec.changed({"bit_width": bit_width, "learn_bit_width": False})
        return replace(self, name=name or self.name, sites=sites)

    def diff(self, other: QuantPlan) -> list[dict[str, Any]]:
        """Where two resolved plans differ: rows of site, key, and the value here and there.

        One width for a tensor and the same width for each of its heads are no difference.
        """
        rows: list[dict[str, Any]] = []
        for site in dict.fromkeys([*self.sites, *other.sites]):
            here, there = (
                {"present": False}
                if site not in plan.sites
                else {"float": True}
                if (spec := plan.sites[site]) is None
                else spec.to_json()
                for plan in (self, other)
            )
            for key in dict.fromkeys([*here, *there]):
                if not _equal(here.get(key), there.get(key)):
                    rows.append({"site": site, "key": key, "here": here.get(key), "there": there.get(key)})
        for place in dict.fromkeys([*self.nonlinear, *other.nonlinear]):
            own, its = (plan.nonlinear.get(place) for plan in (self, other))
            if own != its:
                rows.append({"site": place, "key": "nonlinear", "here": own, "there": its})
        return rows

    def to_json(self) -> dict[str, Any]:
        """Plain data in the format above."""
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": self.name, "model": self.model}
        if self.rules:
            data["rules"] = [_rule_to_json(rule) for rule in self.rules]
        if self.sites:
            data["sites"] = {name: None if spec is None else spec.to_json() for name, spec in self.sites.items()}
        if self.nonlinear:  # left out otherwise: plans of before read as they always did
            data["nonlinear"] = dict(self.nonlinear)
        return data

    @classmethod
    def from_json(cls, data: Any) -> QuantPlan:
        """The inverse of `to_json`. Raises UsageError for anything that is not such a plan, with the key named."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UsageError(f'not a plan: a plan is a JSON object with "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise UsageError(f"plan of version {shown(data.get('version'))}; this qvit reads version {VERSION}")
        allowed = {"format", "version", "name", "model", "rules", "sites", "nonlinear"}
        for key in data:
            if key not in allowed:
                raise UsageError(f"unknown key {shown(key)} in a plan{nearest(key, allowed)}")
        rules, sites = data.get("rules", []), data.get("sites", {})
        if not isinstance(rules, list) or not isinstance(sites, dict) or not (rules or sites):
            raise UsageError('a plan has "rules" (a list) or "sites" (an object), and at least one entry')
        if len(rules) > _MOST_RULES or len(sites) > MOST_SITES:
            raise UsageError(
                f"the plan has {len(rules):,} rules and {len(sites):,} sites; at most {_MOST_RULES:,} and "
                f"{MOST_SITES:,} are read"
            )
        name, model = (_checked_name(data.get(key), key) for key in ("name", "model"))
        parsed: dict[str, TensorSpec | None] = {}
        for site, value in sites.items():
            _checked_name(site, "site")
            if value is not None and not isinstance(value, dict):
                raise UsageError(f"site '{site}' of a plan must be an object or null, not {shown(value)}")
            try:
                parsed[site] = None if value is None else TensorSpec().changed(value)
            except UsageError as error:
                raise UsageError(f"site '{site}' of the plan: {error}") from None
        parsed_rules = tuple(_rule_from_json(rule) for rule in rules)
        return cls(
            "plan" if name is None else name, parsed_rules, parsed, model, checked_forms(data.get("nonlinear", {}))
        )

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; a reader sees the old file or the new one, never half of it."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> QuantPlan:
        """Reads a plan file, or the plan of a run directory. Raises QvitError naming the file."""
        file = Path(path) / "plan.json" if Path(path).is_dir() else Path(path)
        try:
            return cls.from_json(read_json(file, "plan"))
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from None


def checked_forms(value: Any) -> dict[str, str]:
    """The integer forms of a plan in JSON. Raises UsageError for anything but names by names."""
    if not isinstance(value, dict) or len(value) > MOST_SITES:
        raise UsageError('"nonlinear" of a plan is an object such as {"softmax": "i-bert"}, not ' + shown(value))
    for key, name in value.items():
        if not isinstance(name, str) or max(len(key), len(name)) > _LONGEST_NAME:
            raise UsageError(f'"nonlinear" of a plan names the form of {shown(key)} by a text, not by {shown(name)}')
    return dict(value)


def _checked_name(value: Any, key: str) -> str | None:
    """A name of a plan, or None. Raises UsageError for anything but a text of moderate length."""
    if value is not None and not (isinstance(value, str) and len(value) <= _LONGEST_NAME):
        raise UsageError(f"'{key}' of a plan must be a text of at most {_LONGEST_NAME} characters, not {shown(value)}")
    return value


def _widths_of(spec: TensorSpec) -> Sequence[int]:
    return spec.widths if spec.token_bit_width is None else TokenWidths(spec.widths, spec.token_bit_width)


def _equal(here: Any, there: Any) -> bool:
    if isinstance(here, list) != isinstance(there, list) and None not in (here, there):
        many, one = (here, there) if isinstance(here, list) else (there, here)
        return set(many) == {one}
    return here == there


def _rule_to_json(rule: Rule) -> dict[str, Any]:
    head = {key: value for key in ("pattern", "role", "position") if (value := getattr(rule, key)) is not None}
    head |= {"optional": True} if rule.optional else {}
    return head | ({"float": True} if rule.changes is None else dict(rule.changes))


def _rule_from_json(data: Any) -> Rule:
    if not isinstance(data, dict) or not isinstance(data.get("pattern"), str):
        raise UsageError(f'a rule is an object with a "pattern", not {shown(data)}')
    _checked_name(data["pattern"], "pattern")
    for key in ("optional", "float"):
        if not isinstance(data.get(key, False), bool):
            raise UsageError(f"{key} of rule '{data['pattern']}' must be true or false, not {shown(data[key])}")
    changes = {
        key: value for key, value in data.items() if key not in ("pattern", "role", "position", "optional", "float")
    }
    _check_changes(data["pattern"], changes)
    for key, allowed in (("role", ("weight", "activation")), ("position", ("first", "block", "last"))):
        if data.get(key) is not None and data[key] not in allowed:
            raise UsageError(
                f"{key} {shown(data[key])} of rule '{data['pattern']}' must be one of {', '.join(allowed)}"
            )
    return Rule(
        data["pattern"],
        None if data.get("float") else changes,
        data.get("role"),
        data.get("position"),
        bool(data.get("optional")),
    )


def _check_changes(pattern: str, changes: dict[str, Any]) -> None:
    """Refuses changes that no spec could take, one by one: what they need beside them may come from another rule."""
    needed = {"bit_width": 4, "bit_width_range": [1, 16], "signed": False}
    for key, value in changes.items():
        try:
            if key == "token_bit_width":
                TensorSpec().changed({"switchable_scale": True, key: value})
            elif key == "bit_width_range":
                TensorSpec().changed({"bit_width": 1, "signed": False, key: value})
            else:
                TensorSpec().changed(needed | {key: value} if key != "signed" else {key: value})
        except UsageError as error:
            raise UsageError(f"rule '{pattern}' of the plan: {error}") from None


def plan_from(value: QuantPlan | str | Path) -> QuantPlan:
    """A plan from itself, a preset's name, or a file."""
    if isinstance(value, QuantPlan):
        return value
    if isinstance(value, str) and _PRESET.fullmatch(value.lower()):
        return QuantPlan.preset(value)
    if Path(value).exists():
        return QuantPlan.load(value)
    raise UsageError(f"'{value}' is neither a preset (w8a8, w4a4, w3a3, w2a2, ...) nor a plan file")
