"""The picture of patch-wise widths, from its JSON file alone: which patches of real images got which bits.

Every image is drawn once per block, the patches with the lower width in violet. The picture itself is in the
page once: the drawings refer to it. Files of earlier versions do not tell the image's sides: it is drawn as a square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvit.documents.patches import Patches
from qvit.report.markup import Canvas, escape
from qvit.report.shell import document, write_page_of

SIDE = 140
RANKING = (
    "Patches are ranked by the attention that they received from the class token in the block before (first block, and "
    "models without one: by the mean magnitude of their activations)."
)


def write_patches_page(data: str | Path, out: str | Path, *, title: str | None = None) -> Path:
    """Writes the page of a `patches.json`. Raises QvitError if it cannot be read or written."""
    return write_page_of(data, out, lambda record: render_patches(record, title=title), Patches, "patches")


def render_patches(record: Mapping[str, Any], *, title: str | None = None) -> str:
    """The page as text."""
    heading = title or f"Patch-wise widths: {record['model']}"
    header = (
        f'<div class="verdict"><p>Plan {escape(record["plan"])}. Violet patches have the lower width of their block, '
        "all others the higher one; the widths are below each drawing.</p></div>"
    )
    parts = [(f"image-{n}", f"Image {n + 1}", draw_image(str(n), image)) for n, image in enumerate(record["images"])]
    return document(heading, header, parts, Canvas(), footer=RANKING)


def draw_image(number: str, image: Mapping[str, Any]) -> str:
    """An image, and once per block with the patches of the lower width in violet; `number` is its name in the page."""
    source = f"data:image/png;base64,{escape(image['png'])}"
    width, height = image.get("width", 1), image.get("height", 1)
    sides = tuple(max(1.0, SIDE * side / max(width, height)) for side in (width, height))
    box = 'width="{:g}" height="{:g}"'.format(*sides)
    picture = f'<image id="picture-{number}" {box} preserveAspectRatio="none" href="{source}"/>'
    drawings = [_drawing(sides, picture, "", "the image", "the image")]
    for layer in image["layers"]:
        marks = layer["important"]
        few = marks.count("1")
        text = f"{layer['layer']}: {layer['high']} or {layer['low']} bits"
        alt = f"{layer['layer']}: {few} of {len(marks)} patches have {layer['high']} bits, the others {layer['low']}"
        drawings.append(_drawing(sides, f'<use href="#picture-{number}"/>', _low(layer, marks, sides), text, alt))
    style = f"display:grid;grid-template-columns:repeat(auto-fill,minmax({SIDE + 20}px,1fr));gap:12px"
    return f'<div style="{style}">{"".join(drawings)}</div>'


def _low(layer: Mapping[str, Any], marks: str, sides: Sequence[float]) -> str:
    """The patches of the lower width, as one path."""
    columns = layer["columns"]
    width, height = sides[0] / columns, sides[1] / layer["rows"]
    steps = [
        f"M{index % columns * width:.2f} {index // columns * height:.2f}h{width:.2f}v{height:.2f}h{-width:.2f}z"
        for index, mark in enumerate(marks)
        if mark == "0"
    ]
    return f'<path d="{"".join(steps)}" fill="#6a1fb0" fill-opacity="0.7"/>'


def _drawing(sides: Sequence[float], picture: str, overlay: str, caption: str, alt: str) -> str:
    width, height = sides
    box = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    drawn = f'<svg {box} role="img" aria-label="{escape(alt)}">{picture}{overlay}</svg>'
    return f'<figure style="margin:0">{drawn}<figcaption>{escape(caption)}</figcaption></figure>'
