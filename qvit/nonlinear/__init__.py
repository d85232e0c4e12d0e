"""LayerNorm, softmax and GELU on integers, as papers define them: a file per paper, each form chosen by its name."""

from qvit.nonlinear.base import OPERATIONS
from qvit.nonlinear.values import gelu, layer_norm, one_operator, softmax

__all__ = ["OPERATIONS", "gelu", "layer_norm", "one_operator", "softmax"]
