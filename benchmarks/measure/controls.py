"""Controls: runs that differ from a method in one thing that no option of it says.

`on_wrong_axis`: Q-ViT with the heads of weights along the other axis, as in the public code. There, blocks of *input*
columns of W_q, W_k and W_v have a width of their own, and blocks of *output* rows of W_o, so that the widths of the
weights of a head are learned by all heads (docs/paper-to-code.md). Only the layouts of these four weights differ; costs
are the same numbers.

`with_blocks_reversed`: a plan whose blocks stand in the reversed order: the same widths at the same cost, in the wrong
place.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvit.files import write_json
from qvit.models import layers
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import Layout, Site
from qvit.runs.directory import CONFIG
from qvit.runs.jobs import work


def on_wrong_axis(run: str, values: dict[str, Any]) -> dict[str, Any]:
    """`qvit.runs.jobs.work` with these layouts."""
    rows, head_sites = layers._rows, layers._head_sites

    def columns_of_inputs(heads: int, dim: int, inputs: int) -> Layout:
        outputs = heads * dim
        return Layout(view=(outputs, heads, inputs // heads), heads=(heads, 1), channels=(outputs, 1, 1))

    def with_rows_of_outputs(name: str, proj: Any, heads: Any, dim: int) -> list[Site]:
        count, outputs, inputs = heads["query"], proj.out_features, proj.in_features
        view = (count, outputs // count, inputs)
        turned = Layout(view=view, heads=(count, 1, 1), channels=(*view[:2], 1))
        sites = head_sites(name, proj, heads, dim)
        return [replace(site, layout=turned) if site.name == f"{name}.proj.weight" else site for site in sites]

    layers._rows, layers._head_sites = columns_of_inputs, with_rows_of_outputs
    try:
        return work(run, values)
    finally:
        layers._rows, layers._head_sites = rows, head_sites


def with_blocks_reversed(run: str, values: dict[str, Any]) -> dict[str, Any]:
    """`qvit.runs.jobs.work` with the blocks of the plan reversed; the plan is kept beside the run."""
    plan = QuantPlan.load(values["plan"])
    number = re.compile(r"blocks\.(\d+)\.")
    last = max(int(found[1]) for site in plan.sites if (found := number.match(site)))

    def other(site: str) -> str:
        return number.sub(lambda found: f"blocks.{last - int(found[1])}.", site)

    sites = {site: plan.sites[other(site)] for site in plan.sites}
    file = Path(run).with_suffix(".plan.json")
    replace(plan, sites=sites, rules=()).save(file)
    result = work(run, values | {"plan": str(file)})
    config = Path(run) / CONFIG  # the run is the one that was asked for
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"plan": values["plan"]})
    return result
