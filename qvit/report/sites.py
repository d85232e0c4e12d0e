"""Where a site lies, from its name alone: which layer, which tensor.

So the report can draw any family, also ones it has never seen.

    blocks.3.attn.qkv.query_weight   →  layer "blocks.3",           tensor "W_q"
    layers.0.blocks.1.mlp.fc2.input  →  layer "layers.0.blocks.1",  tensor "GELU out"
    stages.2.conv.weight             →  layer "stages.2",           tensor "conv.weight" (not known: its own name)
    patch_embed.proj.weight          →  no layer: first and last layers are shown apart

A layer is the longest beginning of the name made of pairs (word, number); from the second pair on, the word must be a
plural (`blocks`, `stages`), because `blocks.3.mlp.0` is the first part of an MLP and not another layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from qvit.errors import QvitError

TENSORS = {
    "attn.qkv.input": "qkv in",
    "attn.qkv.query_weight": "W_q",
    "attn.qkv.key_weight": "W_k",
    "attn.qkv.value_weight": "W_v",
    "attn.query": "q",
    "attn.key": "k",
    "attn.value": "v",
    "attn.probs": "probs",
    "attn.output": "output",
    "attn.proj.weight": "W_o",
    "mlp.fc1.input": "fc1 in",
    "mlp.fc1.weight": "W_fc1",
    "mlp.fc2.input": "GELU out",
    "mlp.fc2.weight": "W_fc2",
    "attn.q_proj.weight": "W_q",
    "attn.k_proj.weight": "W_k",
    "attn.v_proj.weight": "W_v",
    "attn.q.weight": "W_q",
    "attn.k.weight": "W_k",
    "attn.v.weight": "W_v",
}
GELU = "GELU out"
#: What a page is drawn for, see `require_few`.
MOST = {"layers": 512, "kinds of tensors": 200, "widths": 250_000}
ATTENTION_PANELS = {"q": "q (queries)", "k": "k (keys)", "v": "v (values)", "probs": "A (attention probabilities)"}

_LAYER = re.compile(r"[^.]+\.\d+(?:\.[^.]*s\.\d+)*(?=\.)")


@dataclass(frozen=True)
class Place:
    """The layer of a site ("" for first and last layers) and its tensor, as the report calls it."""

    layer: str
    tensor: str


@lru_cache(maxsize=1 << 16)
def locate(site: str) -> Place:
    """Splits the name of a site into layer and tensor."""
    match = _LAYER.match(site)
    if match is None:
        return Place("", site)
    rest = site[match.end() + 1 :]
    return Place(match.group(), TENSORS.get(rest, rest))


def require_few(file: Path, sites: Mapping[str, int]) -> None:
    """Raises QvitError if the sites in a file, given with their numbers of widths, are too many to be drawn.

    A page takes time and space for the product of layers, kinds of tensors and heads. The limits are some times those
    of the largest models.
    """
    places = [locate(site) for site in sites]
    counts = {
        "layers": len({place.layer for place in places}),
        "kinds of tensors": len({place.tensor for place in places}),
        "widths": sum(sites.values()),
    }
    for what, count in counts.items():
        if count > MOST[what]:
            raise QvitError(f"{file} has {count:,} {what}; at most {MOST[what]:,} are drawn")


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts `blocks.2` before `blocks.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def layers_of(sites: Iterable[str]) -> list[str]:
    """The layers that the sites lie in, from first to last."""
    return sorted({place.layer for place in map(locate, sites) if place.layer}, key=natural_key)


def layer_labels(layers: Iterable[str]) -> list[str]:
    """Short labels: the numbers alone (`3`, `0.1`) if all layers are called alike, else the whole names."""
    names = list(layers)
    numbers = [[part for part in name.split(".") if part.isdecimal()] for name in names]
    words = {tuple(part for part in name.split(".") if not part.isdecimal()) for name in names}
    return [".".join(parts) for parts in numbers] if len(words) == 1 else names


def tensors_of(sites: Iterable[str]) -> list[str]:
    """The tensors that occur in layers: known ones in the order of the data flow, then the others as they come."""
    found = dict.fromkeys(place.tensor for place in map(locate, sites) if place.layer)
    return [name for name in dict.fromkeys(TENSORS.values()) if name in found] + [
        name for name in found if name not in TENSORS.values()
    ]
