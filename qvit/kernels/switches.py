"""Which fused forms of training run on a GPU though none has timed them: `QVIT_GPU_FUSED`.

    QVIT_GPU_FUSED=attention,norm      these two
    QVIT_GPU_FUSED=all                 all of them

    attention    scores, softmax and weighted values in one kernel (`gpu_attention.py`)
    norm         a LayerNorm and the quantizer behind it in one kernel (`gpu_norm.py`)
    weights      the weights of all layers quantized in one launch per step (`gpu_weights.py`)

`QVIT_GPU_ATTENTION=1` is the older way to name the first. Without the variables none runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from qvit.errors import UsageError

FORMS = ("attention", "norm", "weights")


def forms_on(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """The forms that the environment names. Raises UsageError for a name that is none of them."""
    named = {name.strip() for name in environment.get("QVIT_GPU_FUSED", "").split(",")} - {""}
    if unknown := sorted(named - {*FORMS, "all"}):
        raise UsageError(f"QVIT_GPU_FUSED names '{unknown[0]}': give some of {', '.join(FORMS)}, or 'all'")
    if environment.get("QVIT_GPU_ATTENTION") == "1":
        named.add("attention")
    return frozenset(FORMS) if "all" in named else frozenset(named)
