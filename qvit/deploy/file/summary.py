"""What a packed model takes, in bytes: per tensor and in all, beside what its widths alone would take.

    file = header + packed integers + scales + float leftovers
    theory = Σ over weight sites of ceil(Σ bits / 8) + float leftovers

The packed integers are exactly their part of the theory. What a file has beyond it are scales and the header: names,
places and the documents.

`describe_file` reads all of that off the file itself, without torch and without making the model. It checks the
checksum, the header, the documents, that each quantized weight and all scales are there and are numbers, and that no
float tensor has NaN or infinite values. That the tensors are those of the timm model that the file names, only
`Artifact.load` can say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.deploy.file import container
from qvit.deploy.file.documents import LARGEST, PACKED, SCALES, Documents, computed_order
from qvit.deploy.file.versions import VERSION, upgraded
from qvit.errors import QvitError
from qvit.plan.cost import FLOAT_BITS
from qvit.tensors import Contents, Entry, total_bytes

if TYPE_CHECKING:
    from qvit.deploy.file.artifact import Artifact
    from qvit.plan.spec import TensorSpec

_FLOAT32 = 4
#: That of `qvit.functional`, which imports torch.
SMALLEST_SCALE = 1e-8


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
    return _facts(artifact, site_rows(artifact), total_bytes(artifact.floats.values()), file_bytes)


def describe_file(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """The same of a file.

    Args:
        path: The file.
        verify: Loads the whole model, too, which compares every tensor with the timm model that the file names.

    Raises:
        QvitError: It is no packed model, or a damaged one.
    """
    if not verify:
        with container.opened(path) as contents:
            facts = _read(contents)
        if facts is not None:
            return facts
    from qvit.deploy.file.artifact import Artifact

    return describe(Artifact.load(path), Path(path).stat().st_size)


def _facts(
    source: Artifact | Documents, rows: list[dict[str, Any]], float_bytes: int, file_bytes: int
) -> dict[str, Any]:
    payload, scales = sum(row["bytes"] for row in rows), sum(row["scale_bytes"] for row in rows)
    theory = payload + float_bytes
    return {
        "format_version": VERSION,
        "model": source.model_name,
        "model_kwargs": source.model_kwargs,
        "plan": source.plan.name,
        "file_bytes": file_bytes,
        "header_bytes": file_bytes - payload - scales - float_bytes,
        "payload_bytes": payload,
        "scale_bytes": scales,
        "float_bytes": float_bytes,
        "theory_bytes": theory,
        "overhead": file_bytes / theory - 1,
        "sites": rows,
        "data_config": source.data_config,
        "class_names": list(source.class_names),
        "provenance": source.provenance,
    }


def site_rows(artifact: Artifact) -> list[dict[str, Any]]:
    """One row per site, in the order of the computation.

    Keys: site, role, quantizer, bit_width (a number or one per head; 32 for float), granularity, numel (elements of a
    weight; 0 for activations), bytes (packed integers), scale_bytes (all numbers of its grid); token_bit_width where
    tokens differ in width.
    """
    numbers: dict[str, int] = {}
    own = [*artifact.scales.items(), *artifact.offsets.items()]
    own += [(key.rpartition(".")[0], value) for key, value in artifact.extras.items()]
    for site, value in own:
        numbers[site] = numbers.get(site, 0) + value.numel()
    elements = {site: codes.numel() for site, codes in artifact.integers.items()}
    return [_row(site, spec, elements.get(site, 0), numbers.get(site, 0)) for site, spec in artifact.plan.sites.items()]


def _row(site: str, spec: TensorSpec | None, elements: int, numbers: int) -> dict[str, Any]:
    widths = (FLOAT_BITS,) if spec is None else spec.widths
    return {
        "site": site,
        "role": "weight" if site.endswith("weight") else "activation",
        "quantizer": None if spec is None else spec.quantizer,
        "bit_width": widths[0] if len(widths) == 1 else list(widths),
        "granularity": None if spec is None else spec.to_json()["granularity"],
        "numel": elements,
        "bytes": math.ceil(_bits(elements, widths) / 8),
        "scale_bytes": numbers * _FLOAT32,
    } | ({} if spec is None or spec.token_bit_width is None else {"token_bit_width": spec.token_bit_width.to_json()})


def _bits(elements: int, widths: tuple[int, ...]) -> int:
    return elements // len(widths) * sum(widths)


def _read(contents: Contents) -> dict[str, Any] | None:
    """The facts of a file; None where they need its model: another version, or bytes that several shapes would take."""
    if contents.metadata.get("version") not in ("1", str(VERSION)):  # 1 has the same tensors
        return None
    texts, entries = upgraded(contents.metadata, dict(contents.entries))
    words = Documents.from_texts(texts)
    scales = entries.pop(SCALES, None)
    numbers = {site: sum(math.prod(shape) for shape in shapes.values()) for site, shapes in words.shapes.items()}
    _check_scales(scales, words)
    floats = {name: entry for name, entry in entries.items() if not name.endswith(PACKED)}
    rows = []
    for site in computed_order(words.plan.sites):
        spec, elements = words.plan.sites[site], 0
        if spec is not None and site.endswith("weight"):
            entry = entries.pop(site + PACKED, None)
            if entry is None:
                raise QvitError(f"it lacks the tensor {site + PACKED!r}")
            found = _elements(site, spec, entry, floats)
            if found is None:
                return None
            elements = found
        rows.append(_row(site, spec, elements, numbers[site]))
    unknown = sorted(set(entries) - set(floats))
    if unknown:
        raise QvitError(f"it has the unknown tensor '{unknown[0]}'")
    for name, entry in floats.items():
        if not (np.abs(entry.floats()) <= LARGEST).all():
            raise QvitError(f"tensor '{name}' has NaN or infinite values, or some beyond {LARGEST:,.0f}")
    return _facts(words, rows, sum(len(entry.data) for entry in floats.values()), contents.file_bytes)


def _check_scales(entry: Entry | None, words: Documents) -> None:
    """Raises QvitError where the numbers of a grid are missing, not finite, too large, or not positive."""
    places = [
        (site, name, math.prod(shape)) for site, own in sorted(words.shapes.items()) for name, shape in own.items()
    ]
    total = sum(count for *_, count in places)
    if entry is None or (entry.dtype, entry.shape) != ("F32", (total,)):
        raise QvitError(f"it lacks the tensor 'scales' of {total} float32 numbers")
    values, position = np.frombuffer(entry.data, "<f4"), 0
    for site, name, count in places:
        own, position = values[position : position + count], position + count
        if not (np.abs(own) <= LARGEST).all():
            raise QvitError(f"site '{site}': its {name} is not finite, or beyond {LARGEST:,.0f}")
        if name.endswith("scale") and not (own >= SMALLEST_SCALE).all():
            raise QvitError(f"site '{site}': its {name} is not positive")


def _elements(site: str, spec: TensorSpec, entry: Entry, floats: Mapping[str, Entry]) -> int | None:
    """How many codes a packed weight has; None if its bytes and the layer's other tensors leave several numbers.

    n bytes hold the codes of 8·n - 7 to 8·n bits, in equal parts of each width; and the weight's elements are a
    multiple of its layer's outputs, or for projections inside attention of its inputs.
    """
    if entry.dtype != "U8" or len(entry.shape) != 1:
        raise QvitError(f"packed codes are bytes (uint8), not {entry.shape} of {entry.dtype}, as at site '{site}'")
    heads, bits, size = len(spec.widths), sum(spec.widths), len(entry.data)
    step = math.lcm(heads, _side(site, floats))
    lowest, highest = (math.ceil((8 * size - 7) / bits) * heads, 8 * size // bits * heads) if size else (0, 0)
    first = math.ceil(lowest / step) * step
    if not first <= highest < first + step:
        return None
    used = _bits(first, spec.widths) % 8
    if used and entry.data[-1] >> used:
        raise QvitError(f"site '{site}': the bits after the last packed code are not zero")
    return first


def _side(site: str, floats: Mapping[str, Entry]) -> int:
    """A number that divides the elements of a weight, from the tensors beside it."""
    layer, _, leaf = site.rpartition(".")
    around, _, name = layer.rpartition(".")
    beside = f"{layer}.bias"
    if leaf != "weight" or (beside not in floats and name in ("q", "k", "v", "q_proj", "k_proj", "v_proj", "qkv")):
        beside = f"{around}.proj.bias"
    elif beside not in floats and name == "reduction":
        beside = f"{around}.norm.weight"
    return max(1, math.prod(floats[beside].shape)) if beside in floats else 1


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
