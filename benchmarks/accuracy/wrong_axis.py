"""Q-ViT with the heads of weights along the other axis, as in the public code; an experiment, not an option.

There, blocks of *input* columns of W_q, W_k and W_v have a width of their own, and blocks of *output* rows of W_o, so
that the widths of a head's weights are learned by all heads (docs/paper-to-code.md). Only the layouts of these four
weights differ from the method; costs are the same numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qvit import layers
from qvit.jobs import work
from qvit.spec import Layout, Site


def work_on_wrong_axis(run: str, values: dict[str, Any]) -> dict[str, Any]:
    """`qvit.jobs.work` with these layouts."""
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
