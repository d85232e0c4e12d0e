"""What a plan may say, what it must not, and that it means the same after a trip through a file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvit.errors import QvitError, UsageError, nearest
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan, Rule, plan_from
from qvit.plan.spec import GRANULARITIES, Layout, PerChannel, PerHead, PerTensor, Site, TensorSpec

HEADS = 3


def small_sites() -> dict[str, Site]:
    """A made-up model: first layer, two attention tensors with three heads, a GELU output, classifier."""
    heads = Layout(heads=(HEADS, 1, 1))
    gelu = TensorSpec(signed=False, symmetric=False)
    sites = [
        Site("patch_embed.proj.weight", "weight", Layout(), TensorSpec(), "first", 48),
        Site("blocks.0.attn.query", "activation", heads, TensorSpec(granularity=PerHead())),
        Site("blocks.0.attn.probs", "activation", heads, TensorSpec(granularity=PerHead(), signed=False)),
        Site("blocks.0.mlp.fc1.weight", "weight", Layout(channels=(8, 1)), TensorSpec(), numel=64),
        Site("blocks.0.mlp.fc2.input", "activation", Layout(channels=(8,)), gelu),
        Site("head.weight", "weight", Layout(), TensorSpec(), "last", 80),
    ]
    return {site.name: site for site in sites}


def resolved(**bits: Any) -> QuantPlan:
    """A resolved plan of the made-up model with other widths at some sites."""
    rules = [Rule(f"*{name}*", {"bit_width": value}) for name, value in bits.items()]
    return QuantPlan("test", tuple(rules)).resolve(small_sites(), "made-up")


# ---- TensorSpec ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bit_width": 0}, "bit_width 0 must be an integer between 1 and 16"),
        ({"bit_width": 17}, "bit_width 17 must be an integer between 1 and 16"),
        ({"bit_width": 3.0}, r"bit_width 3\.0 must be an integer"),
        ({"bit_width": True}, "bit_width True must be an integer"),
        ({"bit_width": "4"}, "bit_width '4' must be an integer"),
        ({"bit_width": None}, "bit_width None must be an integer"),
        ({"bit_width": [4, 3.5, 2]}, r"bit_width 3\.5 must be an integer"),
        ({"bit_width": [[4]]}, r"bit_width \[4\] must be an integer"),
        ({"bit_width": []}, "bit_width"),
        ({"bit_width": 1}, "bit_width 1 on a signed grid has no positive level; use an unsigned grid or 2 bits"),
        ({"bit_width_range": [8, 2]}, r"bit_width_range \(8, 2\) must be two integers between 1 and 16"),
        ({"bit_width_range": [0, 8]}, "must be two integers between 1 and 16, the smaller first"),
        ({"bit_width_range": [2, 17]}, "must be two integers between 1 and 16, the smaller first"),
        ({"bit_width_range": [2.0, 8]}, "must be two integers"),
        ({"bit_width_range": [2, 4, 8]}, "bit_width_range"),
        ({"bit_width_range": [2]}, "bit_width_range"),
        ({"bit_width_range": 8}, "bit_width_range"),
        ({"bit_width_range": None}, "bit_width_range"),
        ({"bit_width": 8, "bit_width_range": [2, 6], "learn_bit_width": True}, "8 lies outside of the range 2 to 6"),
        (
            {"bit_width": 9, "switchable_scale": True},
            "bit_width 9 has no scale: switchable scales are kept for widths 2",
        ),
        ({"symmetric": False}, "an asymmetric spec has an unsigned grid and an offset: set signed=False"),
        ({"width_gradient": "clip"}, "width_gradient 'clip' must be 'clipping', 'interpolation' or 'difference'"),
        (
            {"granularity": "per_head"},
            r"unknown granularity 'per_head'; did you mean 'per-head'.*\(per-tensor, per-channel",
        ),
        ({"granularity": 3}, "granularity"),
        ({"granularity": None}, "granularity"),
        ({"learn_bit_width": 1}, "'learn_bit_width' of a tensor spec must be bool, not 1"),
        ({"signed": "yes"}, "'signed' of a tensor spec must be bool, not 'yes'"),
        ({"quantizer": 5}, "'quantizer' of a tensor spec must be str, not 5"),
        ({"bitwidth": 4}, r"unknown key 'bitwidth' in a tensor spec; did you mean 'bit_width'.*keys: bit_width, "),
    ],
)
def test_specs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TensorSpec().changed(changes)


def test_specs_that_make_sense() -> None:
    assert TensorSpec(bit_width=(4, 3, 2)).widths == (4, 3, 2)
    assert TensorSpec(bit_width=5).widths == (5,)
    assert TensorSpec(bit_width=1, signed=False).widths == (1,)
    assert TensorSpec(bit_width=16).widths == (16,)  # outside of the range, but not learned
    changed = TensorSpec().changed({"granularity": "per-channel", "bit_width": [4, 3], "bit_width_range": [3, 6]})
    assert changed.granularity == PerChannel() and changed.bit_width == (4, 3) and changed.bit_width_range == (3, 6)
    assert TensorSpec() == TensorSpec(granularity=PerTensor())
    assert Layout().num_heads == 1 and Layout(heads=(5, 1)).num_heads == 5


def valid_specs() -> st.SearchStrategy[TensorSpec]:
    @st.composite
    def spec(draw: st.DrawFn) -> TensorSpec:
        low = draw(st.integers(2, 8))
        high = draw(st.integers(low, 16))
        width = st.integers(low, high)
        symmetric = draw(st.booleans())
        return TensorSpec(
            bit_width=draw(st.one_of(width, st.lists(width, min_size=2, max_size=6).map(tuple))),
            bit_width_range=(low, high),
            learn_bit_width=draw(st.booleans()),
            signed=draw(st.booleans()) if symmetric else False,
            symmetric=symmetric,
            granularity=draw(st.sampled_from(list(GRANULARITIES.values()))),
            options={
                "switchable_scale": draw(st.booleans()),
                "width_gradient": draw(st.sampled_from(["clipping", "interpolation"])),
            },
            quantizer=draw(st.text(max_size=5)),
        )

    return spec()


@given(spec=valid_specs())
def test_spec_round_trip(spec: TensorSpec) -> None:
    assert TensorSpec().changed(json.loads(json.dumps(spec.to_json()))) == spec


# ---- Presets ----


def test_preset_sets_weights_activations_and_boundary_layers() -> None:
    plan = QuantPlan.preset("W4A3").resolve(small_sites())
    assert plan.name == "w4a3"
    assert plan.widths() == {
        "patch_embed.proj.weight": (8,),
        "blocks.0.attn.query": (3,),
        "blocks.0.attn.probs": (3,),
        "blocks.0.mlp.fc1.weight": (4,),
        "blocks.0.mlp.fc2.input": (3,),
        "head.weight": (8,),
    }
    for name, site in small_sites().items():
        spec = plan.sites[name]
        assert spec is not None and spec == site.default.changed({"bit_width": spec.bit_width})  # nothing but the width
    everywhere = QuantPlan.preset("w2a2", boundary_bits=2).resolve(small_sites()).widths()
    assert set(everywhere.values()) == {(2,)}


def test_preset_needs_no_classifier() -> None:
    sites = {name: site for name, site in small_sites().items() if site.position != "last"}
    assert QuantPlan.preset("w4a4").resolve(sites).widths()["patch_embed.proj.weight"] == (8,)


@pytest.mark.parametrize("name", ["w4", "a4w4", "w1a4", "w4a17", "w4a4x", "w0a0", "", "w004a4", "w4a4.json"])
def test_unknown_presets_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="give wXaY with 2 to 16 bits, such as w8a8"):
        QuantPlan.preset(name)


# ---- Rules ----


def test_the_later_rule_wins() -> None:
    plan = QuantPlan("x", (Rule("*", {"bit_width": 4}), Rule("*query", {"bit_width": 3})))
    assert plan.resolve(small_sites()).widths()["blocks.0.attn.query"] == (3,)
    reversed_plan = QuantPlan("x", tuple(reversed(plan.rules)))
    assert reversed_plan.resolve(small_sites()).widths()["blocks.0.attn.query"] == (4,)
    more = plan.with_rules(Rule("*query", {"bit_width": 6}), name="y")
    assert more.resolve(small_sites()).widths()["blocks.0.attn.query"] == (6,)
    assert (more.name, plan.name, len(plan.rules)) == ("y", "x", 2)


def test_rules_change_only_what_they_name_and_add_up() -> None:
    plan = QuantPlan(
        "x",
        (
            Rule("blocks.*", {"bit_width": 4}),
            Rule("*", {"switchable_scale": True}, role="activation"),
            Rule("*", {"bit_width": 6}, position="last"),
            Rule("*query", {"bit_width": [2, 3, 4]}),
        ),
    ).resolve(small_sites())
    query, weight, head = (
        plan.sites[name] for name in ("blocks.0.attn.query", "blocks.0.mlp.fc1.weight", "head.weight")
    )
    assert query == TensorSpec(bit_width=(2, 3, 4), options={"switchable_scale": True}, granularity=PerHead())
    assert weight == TensorSpec(bit_width=4)
    assert head == TensorSpec(bit_width=6)
    assert plan.rules == () and plan.name == "x"


def test_rules_are_for_a_role_and_a_position() -> None:
    site = small_sites()["head.weight"]
    assert Rule("head.*", {}).matches(site)
    assert Rule("head.*", {}, role="weight", position="last").matches(site)
    assert not Rule("head.*", {}, role="activation").matches(site)
    assert not Rule("head.*", {}, position="block").matches(site)
    assert not Rule("HEAD.*", {}).matches(site)  # case counts
    assert Rule("he?d.[w]eight", {}).matches(site)


def test_a_rule_leaves_tensors_in_float_and_a_later_one_takes_them_back() -> None:
    plan = QuantPlan("x", (Rule("*", {"bit_width": 4}), Rule("*attn*", None), Rule("*probs", {"bit_width": 5})))
    done = plan.resolve(small_sites())
    assert done.sites["blocks.0.attn.query"] is None
    assert done.widths()["blocks.0.attn.query"] == (32,)
    assert done.sites["blocks.0.attn.probs"] == TensorSpec(bit_width=5, signed=False, granularity=PerHead())


def test_a_rule_that_matches_nothing_names_the_nearest_site() -> None:
    with pytest.raises(
        UsageError, match=r"rule 'blocks\.0\.attn\.qury' matches no site; did you mean 'blocks\.0\.attn\.query'"
    ):
        QuantPlan("x", (Rule("blocks.0.attn.qury", {"bit_width": 4}),)).resolve(small_sites())
    with pytest.raises(UsageError, match="matches no site"):
        QuantPlan("x", (Rule("*query", {"bit_width": 4}, role="weight"),)).resolve(small_sites())
    QuantPlan("x", (Rule("zzz", {"bit_width": 4}, optional=True),)).resolve(small_sites())


def test_widths_per_head_must_be_as_many_as_heads() -> None:
    with pytest.raises(UsageError, match=r"site 'blocks\.0\.attn\.query' has 3 head\(s\), the plan gives 2 bit-widths"):
        QuantPlan("x", (Rule("*query", {"bit_width": [4, 4]}),)).resolve(small_sites())
    with pytest.raises(UsageError, match=r"site 'head\.weight' has 1 head\(s\), the plan gives 3"):
        QuantPlan("x", (Rule("head*", {"bit_width": [4, 4, 4]}),)).resolve(small_sites())


def test_rules_with_impossible_changes_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown key 'bits'"):
        QuantPlan("x", (Rule("*", {"bits": 4}),)).resolve(small_sites())
    with pytest.raises(UsageError, match="bit_width 40 must be"):
        QuantPlan("x", (Rule("*", {"bit_width": 40}),)).resolve(small_sites())


# ---- Plans of one model ----


def test_the_plan_of_another_model_is_refused() -> None:
    plan = resolved()
    foreign = {name.replace("blocks.0", "stages.0"): site for name, site in small_sites().items()}
    with pytest.raises(
        UsageError, match=r"plan 'test' names 4 site\(s\) that this model does not have, first 'blocks\.0"
    ):
        plan.resolve(foreign)
    larger = small_sites() | {"blocks.1.attn.query": small_sites()["blocks.0.attn.query"]}
    with pytest.raises(
        UsageError, match=r"lacks 1 site\(s\) of this model, first 'blocks\.1\.attn\.query': it was made for made-up"
    ):
        plan.resolve(larger)
    misspelt = dict(plan.sites)
    misspelt["head.wieght"] = misspelt.pop("head.weight")
    with pytest.raises(UsageError, match=r"first 'head\.wieght'; did you mean 'head\.weight'\?"):
        QuantPlan("x", sites=misspelt).resolve(small_sites())


def test_resolving_twice_changes_nothing() -> None:
    plan = resolved(query=[4, 3, 2], head=5)
    again = plan.resolve(small_sites().values())
    assert again == plan and again.model == "made-up"
    assert list(again.sites) == list(small_sites())
    assert plan.with_rules(Rule("head*", {"bit_width": 7})).resolve(small_sites()).widths()["head.weight"] == (7,)


def test_with_widths_fixes_widths_and_leaves_float_sites_alone() -> None:
    learned = Rule("*", {"learn_bit_width": True, "bit_width": 4})
    plan = QuantPlan("x", (learned, Rule("*fc1*", None))).resolve(small_sites())
    fixed = plan.with_widths(
        {"blocks.0.attn.query": (2, 3, 4), "head.weight": (6,), "blocks.0.mlp.fc1.weight": (2,)}, "y"
    )
    query, head = fixed.sites["blocks.0.attn.query"], fixed.sites["head.weight"]
    assert query is not None and query.bit_width == (2, 3, 4) and not query.learn_bit_width
    assert head is not None and head.bit_width == 6 and not head.learn_bit_width
    assert fixed.sites["blocks.0.mlp.fc1.weight"] is None
    untouched = fixed.sites["blocks.0.attn.probs"]
    assert untouched is not None and untouched.learn_bit_width
    assert (fixed.name, plan.name) == ("y", "x")


def test_diff_lists_every_difference_and_nothing_else() -> None:
    plan = resolved()
    assert plan.diff(plan) == []
    other = plan.with_rules(
        Rule("*query", {"bit_width": [4, 3, 2]}), Rule("head*", {"bit_width": 4, "switchable_scale": True})
    ).resolve(small_sites())
    assert plan.diff(other) == [
        {"site": "blocks.0.attn.query", "key": "bit_width", "here": 8, "there": [4, 3, 2]},
        {"site": "head.weight", "key": "bit_width", "here": 8, "there": 4},
        {"site": "head.weight", "key": "switchable_scale", "here": False, "there": True},
    ]
    assert [(row["there"], row["here"]) for row in other.diff(plan)] == [
        (row["here"], row["there"]) for row in plan.diff(other)
    ]
    in_float = plan.with_rules(Rule("head*", None)).resolve(small_sites())
    assert {"site": "head.weight", "key": "float", "here": None, "there": True} in plan.diff(in_float)
    shorter = QuantPlan("s", sites={name: spec for name, spec in plan.sites.items() if name != "head.weight"})
    assert {"site": "head.weight", "key": "present", "here": None, "there": False} in plan.diff(shorter)
    assert {row["site"] for row in plan.diff(shorter)} == {"head.weight"}


def test_diff_does_not_mind_how_equal_widths_of_heads_are_written() -> None:
    single, each = resolved(query=4), resolved(query=[4, 4, 4])
    assert single.diff(each) == each.diff(single) == []
    assert single.diff(resolved(query=[4, 4, 3])) == [
        {"site": "blocks.0.attn.query", "key": "bit_width", "here": 4, "there": [4, 4, 3]}
    ]


# ---- JSON ----

rule_changes = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "bit_width": st.one_of(st.integers(2, 16), st.lists(st.integers(2, 16), min_size=2, max_size=4)),
            "learn_bit_width": st.booleans(),
            "granularity": st.sampled_from(list(GRANULARITIES)),
            "switchable_scale": st.booleans(),
            "width_gradient": st.sampled_from(["clipping", "interpolation"]),
        },
    ),
)
rules = st.builds(
    Rule,
    pattern=st.text(max_size=12),
    changes=rule_changes,
    role=st.sampled_from([None, "weight", "activation"]),
    position=st.sampled_from([None, "first", "block", "last"]),
    optional=st.booleans(),
)
plans = st.builds(
    QuantPlan,
    name=st.text(max_size=12),
    rules=st.lists(rules, max_size=3).map(tuple),
    sites=st.dictionaries(st.text(max_size=12), st.one_of(st.none(), valid_specs()), min_size=1, max_size=4),
    model=st.one_of(st.none(), st.text(max_size=12)),
)


@given(plan=plans)
def test_json_round_trip(plan: QuantPlan) -> None:
    assert QuantPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_rules_about_a_narrow_range_survive_json() -> None:
    """A rule is only a part of a spec: alone, its range does not contain the default width of 8."""
    narrow = Rule(
        "blocks.*", {"bit_width": 3, "bit_width_range": [2, 4], "switchable_scale": True, "learn_bit_width": True}
    )
    asymmetric = Rule("*query", {"symmetric": False, "signed": False})
    plan = QuantPlan("x", (narrow, asymmetric))
    back = QuantPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.resolve(small_sites()) == plan.resolve(small_sites())


def test_json_has_the_documented_form() -> None:
    rules_form = QuantPlan.preset("w4a4").to_json()
    assert rules_form == {
        "format": "qvit-plan",
        "version": 1,
        "name": "w4a4",
        "model": None,
        "rules": [
            {"pattern": "*", "role": "weight", "bit_width": 4},
            {"pattern": "*", "role": "activation", "bit_width": 4},
            {"pattern": "*", "position": "first", "optional": True, "bit_width": 8},
            {"pattern": "*", "position": "last", "optional": True, "bit_width": 8},
        ],
    }
    sites_form = (
        QuantPlan("x", (Rule("*fc1*", None), Rule("*query", {"bit_width": [4, 3, 2]}))).resolve(small_sites()).to_json()
    )
    assert sites_form["sites"]["blocks.0.mlp.fc1.weight"] is None
    assert sites_form["sites"]["blocks.0.attn.query"] == {
        "bit_width": [4, 3, 2],
        "bit_width_range": [2, 8],
        "learn_bit_width": False,
        "signed": True,
        "symmetric": True,
        "granularity": "per-head",
        "switchable_scale": False,
        "width_gradient": "clipping",
        "quantizer": "lsq",
    }
    assert "rules" not in sites_form


GOOD: dict[str, Any] = {"format": "qvit-plan", "version": 1, "name": "x", "rules": [{"pattern": "*", "bit_width": 4}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a plan: a plan is a JSON object"),
        (None, "not a plan"),
        ("w4a4", "not a plan"),
        ({}, 'with "format": "qvit-plan"'),
        (GOOD | {"format": "other"}, "not a plan"),
        (GOOD | {"version": 2}, "plan of version 2; this qvit reads version 1"),
        (GOOD | {"version": None}, "plan of version None"),
        (GOOD | {"sties": {}}, r"unknown key 'sties' in a plan; did you mean 'sites'\?"),
        (GOOD | {"rules": []}, "at least one entry"),
        (GOOD | {"rules": {}}, '"rules" \\(a list\\)'),
        (GOOD | {"rules": "*"}, '"rules" \\(a list\\)'),
        (GOOD | {"sites": []}, '"sites" \\(an object\\)'),
        (GOOD | {"rules": [7]}, 'a rule is an object with a "pattern", not 7'),
        (GOOD | {"rules": [{"bit_width": 4}]}, 'a rule is an object with a "pattern"'),
        (GOOD | {"rules": [{"pattern": 4}]}, 'a rule is an object with a "pattern"'),
        (GOOD | {"rules": [{"pattern": "*", "bitwidth": 4}]}, "unknown key 'bitwidth' in a tensor spec; did you mean"),
        (GOOD | {"rules": [{"pattern": "*", "role": "wieght"}]}, r"role 'wieght' of rule '\*' must be one of weight"),
        (GOOD | {"rules": [{"pattern": "*", "position": 1}]}, r"position 1 of rule '\*' must be one of first"),
        (GOOD | {"rules": [{"pattern": "*", "granularity": "per-row"}]}, "unknown granularity 'per-row'"),
        (GOOD | {"rules": [{"pattern": "*", "granularity": 1}]}, "granularity"),
        (GOOD | {"rules": [{"pattern": "*", "bit_width_range": 8}]}, "bit_width_range"),
        (GOOD | {"rules": [{"pattern": "*", "bit_width_range": [2, 4, 8]}]}, "bit_width_range"),
        (GOOD | {"sites": {"a": 4}}, "site 'a' of a plan must be an object or null, not 4"),
        (GOOD | {"sites": {"a": {"bits": 4}}}, "site 'a' of the plan: unknown key 'bits'"),
        (GOOD | {"sites": {"a": {"bit_width": 99}}}, "site 'a' of the plan: bit_width 99"),
        (GOOD | {"sites": {"a": {"bit_width_range": 3}}}, "site 'a' of the plan: .*bit_width_range"),
        (GOOD | {"sites": {"a": {"bit_width_range": [2, 4, 8]}}}, "site 'a' of the plan: .*bit_width_range"),
        (GOOD | {"sites": {"a": {"granularity": ["per-head"]}}}, "site 'a' of the plan: .*granularity"),
        (GOOD | {"sites": {"a": {"symmetric": False}}}, "site 'a' of the plan: an asymmetric spec"),
    ],
)
def test_malformed_plans_are_refused(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        QuantPlan.from_json(data)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=rf"plan\.json: .*{message}"):
        QuantPlan.load(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"format": "qvit-plan", "version": 1, "sites": {"a": ',
        b"\xff\xfe\x00nonsense",
        b"\xef\xbb\xbf{}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"format": "qvit-plan", "version": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "brace", "cut", "binary", "bom", "deep list", "deep object", "huge number"],
)
def test_files_that_are_no_json_give_one_clear_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(QvitError, match=r"broken\.json(: |\b.* UTF-8)") as caught:
        QuantPlan.load(file)
    assert "\n" not in str(caught.value)


def test_deep_but_readable_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text(json.dumps(GOOD | {"sites": {"a": "X"}}).replace('"X"', "[" * 900 + "]" * 900))
    with pytest.raises(QvitError, match=r"deep\.json"):
        QuantPlan.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QvitError, match=r"no plan at .*nothing\.json"):
        QuantPlan.load(tmp_path / "nothing.json")
    with pytest.raises(QvitError, match=r"no plan at .*plan\.json"):
        QuantPlan.load(tmp_path)


# ---- Files ----


def test_save_and_load(tmp_path: Path) -> None:
    plan = resolved(query=[4, 3, 2], head=5)
    plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == plan
    assert QuantPlan.load(str(tmp_path)) == plan  # a run directory
    assert os.listdir(tmp_path) == ["plan.json"]
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o644


@pytest.mark.parametrize(("failure", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError("full"), QvitError)])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_plan_and_nothing_else(
    step: str, failure: Any, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    resolved().save(file)
    before = file.read_bytes()

    def interrupted(*_: Any) -> None:
        raise failure

    with monkeypatch.context() as patched, pytest.raises(raised):
        patched.setattr(os, step, interrupted)
        resolved(head=3).save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_save_that_cannot_replace_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(QvitError, match=r"cannot write .*plan\.json"):
        resolved().save(tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_save_makes_the_folders_above_it(tmp_path: Path) -> None:
    resolved().save(tmp_path / "a" / "b" / "plan.json")
    assert QuantPlan.load(tmp_path / "a" / "b") == resolved()


def test_plan_from_takes_plans_presets_and_files(tmp_path: Path) -> None:
    plan = resolved(query=[4, 3, 2])
    plan.save(tmp_path / "plan.json")
    assert plan_from(plan) is plan
    assert plan_from("w3a3") == QuantPlan.preset("w3a3")
    assert plan_from(tmp_path / "plan.json") == plan_from(str(tmp_path)) == plan
    with pytest.raises(
        UsageError, match=r"'w4' is neither a preset \(w8a8, w4a4, w3a3, w2a2, \.\.\.\) nor a plan file"
    ):
        plan_from("w4")


# ---- A real model, and the names in messages ----


def test_a_real_model_takes_a_plan_through_a_file(tmp_path: Path) -> None:
    sites = inspect_model(create_model("vit_digits")).sites
    rules = (Rule("blocks.*.attn.query", {"bit_width": [4, 3, 2, 8]}), Rule("blocks.0.mlp.fc1.*", None))
    plan = QuantPlan.preset("w4a4").with_rules(*rules, name="mixed").resolve(sites, "vit_digits")
    plan.save(tmp_path / "plan.json")
    back = QuantPlan.load(tmp_path / "plan.json").resolve(sites)
    assert back == plan and back.diff(plan) == []
    with pytest.raises(UsageError, match=r"did you mean 'blocks\.2\.attn\.query'"):
        plan.with_rules(Rule("blocks.2.attn.queri", {"bit_width": 3})).resolve(sites)


def test_nearest_names() -> None:
    names = ["per-tensor", "per-channel", "per-head"]
    assert nearest("per_head", names).startswith("; did you mean 'per-head'")
    assert nearest("PER-HEAD", names).startswith("; did you mean 'per-head'")
    assert nearest("xyzzy", names) == ""
    assert nearest("anything", []) == ""
    assert nearest("aaa", ["aaab", "aaac", "aaad", "aaae"], count=2).count(" or ") == 1
