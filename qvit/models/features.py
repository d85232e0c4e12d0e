"""Features of a model: what its classifier sees, or its answer where it has none; and what their rows are called.

A model without classes (`num_classes=0`) or without pooling (`global_pool=""`) answers with features: one vector per
image (B, C), a row per token (B, N, C) or per place (B, rows, columns, C). Of others they are the input of the (first)
classifier. timm's `forward_intermediates` and `features_only` models call the same blocks, so that a quantized model
has them, too: quantize the model itself, in place where a wrapper holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Features = Callable[[Tensor], Tensor]
CLASS_TOKEN = "class token"


def answers_with_features(model: nn.Module) -> bool:
    """Whether a model's answer is features, which neither labels nor a softmax can judge."""
    return getattr(model, "num_classes", None) == 0 or getattr(model, "global_pool", None) == ""


@contextmanager
def classifier_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Within the block, what the (first) classifier of a timm model gets in every call; nothing where there is none."""
    heads = model.get_classifier()
    first = heads[0] if isinstance(heads, tuple) else heads
    seen: list[Tensor] = []
    with ExitStack() as stack:
        if isinstance(first, nn.Linear):
            stack.enter_context(first.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])))
        yield seen


@contextmanager
def feature_function(model: nn.Module) -> Iterator[Features]:
    """Within the block, a function from images to the features of a timm model: see the first lines of this file."""
    with classifier_inputs(model) as seen:

        def run(images: Tensor) -> Tensor:
            answer = model(images)
            return seen.pop() if seen else answer

        yield run


def token_rows(features: Tensor) -> Tensor:
    """Features of any shape as rows, one per token: (B, N, C); N is 1 for one vector per image."""
    return features.unsqueeze(1) if features.dim() == 2 else features.flatten(1, -2)


def token_names(model: nn.Module, shape: Sequence[int]) -> list[str]:
    """What the rows of features are called: `class token`, `register 2`, `patch (0, 13)` (row, column), or `image`.

    Args:
        model: The model that answers.
        shape: Of its features for a batch, (B, C), (B, N, C) or (B, rows, columns, C).

    Returns:
        N names; `token 7` where the model does not tell what its tokens are.
    """
    own: Any = model
    if len(shape) == 2:
        return ["image"]
    if len(shape) == 4:
        return _patches(shape[1], shape[2])
    prefix = [
        *([CLASS_TOKEN] if getattr(own, "cls_token", None) is not None else []),
        *(["distillation token"] if getattr(own, "dist_token", None) is not None else []),
    ]
    registers = int(getattr(own, "num_prefix_tokens", len(prefix))) - len(prefix)
    prefix += [f"register {number}" for number in range(1, registers + 1)]
    rows, columns = getattr(getattr(own, "patch_embed", None), "grid_size", None) or (0, 0)
    names = prefix + _patches(rows, columns)
    return names if len(names) == shape[1] else [f"token {number}" for number in range(shape[1])]


def _patches(rows: int, columns: int) -> list[str]:
    return [f"patch ({row}, {column})" for row in range(rows) for column in range(columns)]
