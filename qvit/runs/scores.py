"""What `qvit evaluate --out` has counted so far, so that a call that was ended goes on where it was.

The file is one of `measure/partial.py`. It holds for a call with the same models, images by name, classes, transform
and batch size; another call begins anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qvit.data.labels.store import digest_of_images
from qvit.data.open import ShardSource, Source
from qvit.measure.partial import NOTHING_KEPT, Partial


def counted_so_far(
    path: Path | None,
    source: Source,
    data_config: Mapping[str, Any],
    batch_size: int,
    *key: object,
    file: str | Path | None = None,
    models: Iterable[nn.Module] = (),
) -> Partial:
    """The file of one evaluation.

    Args:
        path: Where; None keeps nothing.
        source: The images.
        data_config: Their transform.
        batch_size: Images at a time.
        key: What else the scores depend on, such as the engine.
        file: A packed model that is scored.
        models: Models that are scored, or that answers are compared with.
    """
    if path is None:
        return NOTHING_KEPT
    images: tuple[object, ...] = (source.name, len(source))
    if isinstance(source, ShardSource):
        images += (source.shards, source.lengths)
    else:
        images += (digest_of_images(source), source.targets.tolist())
    content = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    tensors = (value for model in models for value in model.state_dict().values())
    return Partial(path, tensors, images, sorted(data_config.items()), batch_size, content, key)
