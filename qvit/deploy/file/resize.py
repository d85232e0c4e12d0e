"""A packed model for images of another size.

Nothing that is quantized depends on the size of images; a learned position embedding does, and stays in float. It is
resampled as timm does it (bicubic, antialiased), in float32, so what comes out is what a model with
`dynamic_img_size=True` computes in every call, bit for bit. Such a model without one (rotary positions, windows) is
made for the size, too, unless its windows would be others there: then it stays as it is. Biases of relative positions
belong to one size; models that have them for the whole image stay at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from qvit.data.augment import config_at
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError, UsageError
from qvit.models.sizes import check_size, require_whole_patches, resampled_positions, shown_size, takes_any_size

POSITIONS = "pos_embed"
#: Arguments that say that a model takes any size.
_ANY_SIZE = ("dynamic_img_size", "strict_img_size", "dynamic_img_pad")


def at_size(artifact: Artifact, size: Sequence[int]) -> Artifact:
    """The packed model for images of this height and width; itself where it is for them alone already.

    Raises:
        UsageError: It cannot be taken to that size.
    """
    model, (_, *own) = artifact.skeleton, artifact.data_config["input_size"]
    free, positions = takes_any_size(model), artifact.floats.get(POSITIONS)
    if not free and list(size) == own:
        return artifact
    if positions is None:
        check_size(model, size)
    require_whole_patches(model, size)
    prepared = config_at(artifact.data_config, size)
    kwargs = {key: value for key, value in artifact.model_kwargs.items() if key not in _ANY_SIZE}
    kwargs |= {"img_size": list(size)} | ({"dynamic_img_size": False} if free else {})
    floats = artifact.floats
    if positions is not None:
        embed: Any = model.get_submodule("patch_embed")
        rows, columns = (side // patch for side, patch in zip(size, embed.patch_size, strict=True))
        floats = floats | {POSITIONS: resampled_positions(positions, embed.grid_size, (rows, columns))}
    found = replace(artifact, model_kwargs=kwargs, data_config=prepared, floats=floats)
    try:
        if _windows(found.skeleton) != _windows(model):
            return replace(artifact, data_config=prepared)
        found._check(found.skeleton)
    except QvitError as error:
        raise UsageError(f"this {type(model).__name__} cannot be taken to {shown_size(size)} pixels: {error}") from None
    return found


def _windows(model: nn.Module) -> list[Any]:
    """Sides and shifts of the windows of all blocks."""
    return [(own.window_size, own.shift_size) for own in model.modules() if hasattr(own, "shift_size")]
