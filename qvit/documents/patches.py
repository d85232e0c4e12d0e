"""`patches.json`: which patches of an image got which bits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from qvit.documents.base import Document, Name, Width

_MOST_PATCHES = 2_000_000


class PatchLayer(Document):
    """Which patches of an image have the higher width in one block: `0` and `1`, row by row."""

    layer: Name
    high: Width
    low: Width
    columns: Annotated[int, Field(ge=1, le=1000)]
    rows: Annotated[int, Field(ge=1, le=1000)]
    important: Annotated[str, Field(max_length=1 << 16, pattern="^[01]*$")]

    @model_validator(mode="after")
    def _fills_the_image(self) -> PatchLayer:
        if self.rows * self.columns != len(self.important):
            raise ValueError(f"has {len(self.important)} patches, which do not fill {self.rows} × {self.columns}")
        return self


class PatchImage(Document):
    """An image and its patches."""

    png: Annotated[str, Field(max_length=1 << 22, pattern="^[A-Za-z0-9+/=]*$")]
    width: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    height: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    layers: Annotated[list[PatchLayer], Field(max_length=1000)]


class Patches(Document):
    """`patches.json`."""

    model: Name
    plan: Name
    images: Annotated[list[PatchImage], Field(max_length=1000)]

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Patches:
        if sum(len(layer.important) for image in self.images for layer in image.layers) > _MOST_PATCHES:
            raise ValueError(f"has more than {_MOST_PATCHES:,} patches in all, too many to be drawn")
        return self
