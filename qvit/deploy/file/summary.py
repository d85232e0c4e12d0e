"""What a packed model takes, in bytes: per tensor and in all, beside what its widths alone would take.

    file = header + packed integers + scales + float leftovers
    theory = Σ over weight sites of ceil(Σ bits / 8) + float leftovers

The packed integers are exactly their part of the theory. What a file has beyond it are scales and the header: names,
places and the documents.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.container import total_bytes
from qvit.deploy.file.packing import site_size
from qvit.deploy.file.versions import VERSION
from qvit.plan.cost import FLOAT_BITS


def describe(artifact: Artifact, file_bytes: int) -> dict[str, Any]:
    """Sizes and contents as plain data.

    Args:
        artifact: The model.
        file_bytes: Bytes of its file.

    Returns:
        `{"file_bytes", "header_bytes", "payload_bytes", "scale_bytes", "float_bytes", "theory_bytes", "overhead",
        "sites": [...], ...}`. `payload_bytes` are those of the packed integers, `overhead` is the file's excess over
        `theory_bytes`, as a share. Sites have the keys of `site_rows`.
    """
    rows = site_rows(artifact)
    payload, scales = sum(row["bytes"] for row in rows), sum(row["scale_bytes"] for row in rows)
    floats = total_bytes(artifact.floats.values())
    theory = payload + floats
    return {
        "format_version": VERSION,
        "model": artifact.model_name,
        "model_kwargs": artifact.model_kwargs,
        "plan": artifact.plan.name,
        "file_bytes": file_bytes,
        "header_bytes": file_bytes - payload - scales - floats,
        "payload_bytes": payload,
        "scale_bytes": scales,
        "float_bytes": floats,
        "theory_bytes": theory,
        "overhead": file_bytes / theory - 1,
        "sites": rows,
        "data_config": artifact.data_config,
        "class_names": list(artifact.class_names),
        "provenance": artifact.provenance,
    }


def site_rows(artifact: Artifact) -> list[dict[str, Any]]:
    """One row per site, in the order of the computation.

    Keys: site, role, quantizer, bit_width (a number or one per head; 32 for float), granularity, numel (elements of a
    weight; 0 for activations), bytes (packed integers), scale_bytes (all numbers of its grid).
    """
    extras: dict[str, list[Tensor]] = {}
    for key, value in artifact.extras.items():
        extras.setdefault(key.rpartition(".")[0], []).append(value)
    rows = []
    for site, spec in artifact.plan.sites.items():
        codes = artifact.integers.get(site)
        own = [*extras.get(site, []), *(d[site] for d in (artifact.scales, artifact.offsets) if site in d)]
        widths = (FLOAT_BITS,) if spec is None else spec.widths
        rows.append(
            {
                "site": site,
                "role": "weight" if site.endswith("weight") else "activation",
                "quantizer": None if spec is None else spec.quantizer,
                "bit_width": widths[0] if len(widths) == 1 else list(widths),
                "granularity": None if spec is None else spec.to_json()["granularity"],
                "numel": 0 if codes is None else codes.numel(),
                "bytes": 0 if codes is None else site_size(codes.numel(), widths),
                "scale_bytes": total_bytes(own),
            }
        )
    return rows


def widths_by_kind(artifact: Artifact) -> list[tuple[str, int, str]]:
    """Kind of tensor (block numbers as stars), how many sites, and their smallest and largest width as text."""
    found: dict[str, list[int]] = {}
    sites: dict[str, int] = {}
    for row in site_rows(artifact):
        kind = re.sub(r"\.\d+(?=\.)", ".*", row["site"])
        widths = row["bit_width"] if isinstance(row["bit_width"], list) else [row["bit_width"]]
        found.setdefault(kind, []).extend(widths)
        sites[kind] = sites.get(kind, 0) + 1
    return [
        (kind, sites[kind], str(min(widths)) if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}")
        for kind, widths in found.items()
    ]
