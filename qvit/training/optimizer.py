"""The optimizer of a quantized model: parameter groups, and the rules that scales and widths need.

    group      what                                           weight decay   learning rate
    weights    matrices and kernels                           yes            lr
    others     biases, norms, tokens, LayerScale              no             lr
    scales     scales and offsets of quantizers               no             lr
    widths     learned bit-widths b̃                           no             width_lr

Two rules apply to scales around every step, as hooks of the optimizer, without asking the GPU anything:

* Switchable scales: the column of a width that is not in use has a gradient of exactly zero, yet Adam's momentum would
  go on moving it. It is put back.
* A scale changes by at most a tenth of itself in one step. Adam moves every parameter by about lr, whatever its size;
  the step size of attention probabilities at 8 bits is near 2e-4, so an unbounded step would throw it across zero.
  (Ours; the Q-ViT code floors scales at 1e-4 instead.)

When the widths are frozen their group is emptied; nothing else of the optimizer changes, as in the paper's diving
stage.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.quantizers import quantizers_of

LARGEST_RELATIVE_STEP = 0.1


def create_optimizer(
    model: nn.Module, *, opt: str, lr: float, weight_decay: float, width_lr: float
) -> torch.optim.Optimizer:
    """timm's optimizer `opt` over the four groups above, with the rules for scales installed. Raises UsageError for an
    unknown name.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "others": [], "scales": [], "widths": []}
    in_quantizer = {id(p): leaf for _, quantizer in quantizers_of(model) for leaf, p in quantizer.named_parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = in_quantizer.get(id(parameter))
        if leaf is not None:
            groups["widths" if leaf == "bit_width" else "scales"].append(parameter)
        else:
            groups["others" if parameter.dim() <= 1 or _is_token(name) else "weights"].append(parameter)
    settings: list[dict[str, Any]] = []
    for name, parameters in groups.items():
        decay = weight_decay if name == "weights" else 0.0
        settings.append(
            {
                "name": name,
                "params": parameters,
                "weight_decay": decay,
                "lr_scale": width_lr / lr if name == "widths" else 1.0,
            }
        )
    fused = {"fused": True} if opt in ("adam", "adamw") else {}
    try:
        optimizer = create_optimizer_v2(settings, opt=opt, lr=lr, **fused)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"optimizer '{opt}': {error}") from None
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    _ScaleRules(
        groups["scales"], {id(q.scale) for _, q in quantizers_of(model) if isinstance(q.scale, Tensor)}
    ).install(optimizer)
    return optimizer


def drop_widths(optimizer: torch.optim.Optimizer) -> None:
    """Takes the widths out of the optimizer after they were frozen; every other group keeps its state."""
    for group in optimizer.param_groups:
        if group.get("name") == "widths":
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)
            group["params"] = []


class _ScaleRules:
    """Hooks that bound the relative step of scales and hold the columns that are not in use."""

    def __init__(self, parameters: list[nn.Parameter], scales: set[int]) -> None:
        self.parameters, self.scales = parameters, scales
        self.before: list[Tensor] = []

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        if self.parameters:
            optimizer.register_step_pre_hook(self._remember)
            optimizer.register_step_post_hook(self._apply)

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self.before = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _apply(self, *_: Any) -> None:
        bounded = [(p, old) for p, old in zip(self.parameters, self.before, strict=True) if id(p) in self.scales]
        if bounded:
            now, old = ([pair[i] for pair in bounded] for i in (0, 1))
            torch._foreach_maximum_(now, torch._foreach_mul(old, 1.0 - LARGEST_RELATIVE_STEP))
            torch._foreach_minimum_(now, torch._foreach_mul(old, 1.0 + LARGEST_RELATIVE_STEP))
        for parameter, old in zip(self.parameters, self.before, strict=True):
            if parameter.shape[-1:] != (1,) and parameter.grad is not None:
                parameter.copy_(torch.where(parameter.grad == 0, old, parameter))
        self.before = []


def _is_token(name: str) -> bool:
    return name.rpartition(".")[2] in ("cls_token", "dist_token", "reg_token", "pos_embed")
