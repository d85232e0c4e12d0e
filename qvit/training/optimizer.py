"""The optimizer of a quantized model: parameter groups, and the rules that scales and widths need.

    group      what                                           weight decay   learning rate
    weights    matrices and kernels                           yes            lr
    others     biases, norms, tokens, LayerScale, and what    no             lr
               the model's `no_weight_decay()` names
    scales     scales and offsets of quantizers               no             lr
    widths     learned bit-widths b̃, or what decides them     no             width_lr

Three rules apply around every step, as hooks of the optimizer, without asking the GPU anything:

* Switchable scales: the column of a width that is not in use has no gradient, yet Adam's momentum would go on moving
  it. It is put back.
* A scale changes by at most a tenth of itself in one step: Adam moves every parameter by about lr, and 8-bit attention
  probabilities have steps near 2e-4. (Ours; the Q-ViT code floors scales at 1e-4 instead.)
* A gradient of the whole batch that would push a width further beyond a limit that it has reached does not count, and
  widths are put back into their range after a step: momentum carries them across its limits otherwise.

Adam divides a width's step by its recent gradients. The first ones, far above the budget, are huge: with the usual
memory of a thousand steps (β₂ = 0.999) a short search would hardly move after them. Widths remember twenty (β₂ = 0.95).

When the widths are frozen their group is emptied; nothing else of the optimizer changes, as in the paper.

Every optimizer of timm's registry is taken, with the prefix `lookahead_` as well, but for those that need gradients of
gradients (AdaHessian): rounding has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.optim import Lookahead, create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from qvit.errors import QvitError, UsageError, nearest
from qvit.functional import inward
from qvit.quantizers import quantizers_of
from qvit.training.trees import require_alike

LARGEST_RELATIVE_STEP = 0.1
WIDTH_BETA2 = 0.95
LOOKAHEAD = "lookahead_"


def create_optimizer(
    model: nn.Module, *, opt: str, lr: float, weight_decay: float, width_lr: float
) -> torch.optim.Optimizer:
    """timm's optimizer `opt` over the four groups above, with the rules for scales and widths installed.

    Raises UsageError for an unknown name, and for an optimizer that needs what is not there: second derivatives, CUDA,
    a package.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "others": [], "scales": [], "widths": []}
    exempt = _without_decay(model)
    in_quantizer = {
        id(p): "widths" if leaf in quantizer.width_parameters else "scales"
        for _, quantizer in quantizers_of(model)
        for leaf, p in quantizer.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = in_quantizer.get(id(parameter))
        if own is not None:
            groups[own].append(parameter)
        else:
            groups["others" if parameter.dim() <= 1 or name in exempt else "weights"].append(parameter)
    settings: list[dict[str, Any]] = []
    for name, parameters in groups.items():
        decay = weight_decay if name == "weights" else 0.0
        rate = width_lr if name == "widths" else lr
        settings.append({"name": name, "params": parameters, "weight_decay": decay, "lr": rate})
    optimizer = _of_timm(opt, settings, lr)
    for group in optimizer.param_groups:
        if group["name"] == "widths" and len(group.get("betas", ())) == 2:
            group["betas"] = (group["betas"][0], WIDTH_BETA2)
    scales = {id(q.scale) for _, q in quantizers_of(model) if isinstance(q.scale, Tensor)}
    _ScaleRules(groups["scales"], scales).install(optimizer)
    learned = [q for _, q in quantizers_of(model) if isinstance(q.bit_width, nn.Parameter)]
    _WidthRule([(q.bit_width, q.spec.bit_width_range) for q in learned]).install(optimizer)
    return optimizer


def _of_timm(opt: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """timm's optimizer of that name; timm itself would take 'any_adamw' for 'adamw'."""
    name = opt.lower().removeprefix(LOOKAHEAD)
    known = [str(own) for own in list_optimizers()]
    if name not in known:
        raise UsageError(
            f"unknown optimizer '{opt}'{nearest(name, known)} (`timm.optim.list_optimizers()` lists all; "
            f"'{LOOKAHEAD}' may stand before each)"
        )
    fused: dict[str, Any] = {"fused": True} if opt in ("adam", "adamw") else {}
    try:
        optimizer = create_optimizer_v2(groups, opt=name, lr=lr, **fused)
    except (ValueError, AssertionError, ImportError, TypeError) as error:
        raise UsageError(f"optimizer '{opt}' cannot be used here: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(
            f"optimizer '{opt}' needs second derivatives, which quantized models do not have; choose another one, "
            "such as 'adamw'"
        )
    return optimizer if name == opt.lower() else _HookedLookahead(optimizer)


class _HookedLookahead(Lookahead):
    """timm's Lookahead with the hooks of a step and the state that any other optimizer has.

    timm's skips a constructor of torch, so that its first step calls no hooks, and has an empty state beside the one
    that it trains with.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base)
        self.zero_grad()  # here torch makes up for it

    @property
    def state(self) -> Any:
        return self._base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        """The state is that of the optimizer within."""


def drop_widths(optimizer: torch.optim.Optimizer) -> None:
    """Takes the widths out of the optimizer after they were frozen; every other group keeps its state."""
    for group in optimizer.param_groups:
        if group.get("name") == "widths":
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)
            group["params"] = []


def require_fitting_state(found: Any, own: Optimizer, create: Callable[[], Optimizer]) -> None:
    """Raises QvitError, naming the key, unless a state that was read is one of this optimizer.

    torch takes a state as it is, and its kernels trust the shapes. What a state looks like is known to the optimizer
    alone, and only after a step: so another one takes a step, with the same parameters, which it changes. Settings that
    a step does not change have to be the same, except the learning rate, which the schedule changes.

    Args:
        found: What was read.
        own: The optimizer that is to take it; nothing of it is changed.
        create: Makes another one like it.
    """
    other = create()
    before = [dict(group) for group in other.param_groups]
    with torch.random.fork_rng(devices=[]):
        for group in other.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 1e-3)
        other.step()
        other.zero_grad(set_to_none=True)
    changed = {
        key
        for group, old in zip(other.param_groups, before, strict=True)
        for key, value in group.items()
        if key != "params" and (key not in old or not _same(value, old[key]))
    }
    like = other.state_dict() | {"param_groups": own.state_dict()["param_groups"]}
    require_alike(_kinds(found), _kinds(like), "optimizer")
    for index, (group, expected) in enumerate(zip(found["param_groups"], like["param_groups"], strict=True)):
        path = f"optimizer/param_groups/{index}"
        stepped = {key: other.param_groups[index][key] for key in changed & set(other.param_groups[index])}
        if not isinstance(group, Mapping) or set(group) - {*expected, *stepped}:
            raise QvitError(f"'{path}' has unknown settings")
        for key, value in group.items():
            reference = stepped.get(key, expected.get(key))
            require_alike(value, reference, f"{path}/{key}", equal=key not in {"lr", *changed})
    for key, value in found["state"].items():
        if key not in like["state"]:
            raise QvitError(f"'optimizer/state/{key}' is of a parameter that there is not")
        require_alike(value, like["state"][key], f"optimizer/state/{key}")
    for key in set(like) - {"state", "param_groups"}:
        require_alike(found[key], like[key], f"optimizer/{key}")


def _kinds(state: Any) -> Any:
    """The outline of an optimizer's state: its entries, and how many groups there are."""
    if not isinstance(state, Mapping):
        return state
    outline = dict.fromkeys(state, True)
    groups, states = state.get("param_groups"), state.get("state")
    return outline | {
        "param_groups": [True] * len(groups) if isinstance(groups, list) else groups,
        "state": {} if isinstance(states, Mapping) else states,
    }


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


def _joined(rows: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Each column of a table of tensors as one flat tensor: they are hundreds of small ones."""
    return [torch.cat([part.flatten() for part in column]) for column in zip(*rows, strict=True)]


def _write(targets: list[Tensor], values: Tensor) -> None:
    """Writes a flat tensor back to those that it was joined from."""
    parts = values.split([target.numel() for target in targets])
    torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


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
        self.before = list(torch._foreach_mul([parameter.detach() for parameter in self.parameters], 1.0))

    @torch.no_grad()
    def _apply(self, *_: Any) -> None:
        pairs = list(zip(self.parameters, self.before, strict=True))
        bounded = [(p, old) for p, old in pairs if id(p) in self.scales]
        if bounded:
            now, old = ([pair[i] for pair in bounded] for i in (0, 1))
            torch._foreach_maximum_(now, torch._foreach_mul(old, 1.0 - LARGEST_RELATIVE_STEP))
            torch._foreach_minimum_(now, torch._foreach_mul(old, 1.0 + LARGEST_RELATIVE_STEP))
        banks = [(p, old, p.grad) for p, old in pairs if p.shape[-1:] != (1,) and p.grad is not None]
        if banks:
            now, old, gradients = _joined(banks)
            _write([p for p, *_ in banks], torch.where(gradients == 0, old, now))
        self.before = []


class _WidthRule:
    """Hooks that keep widths within their ranges: gradients at a limit lead inside only, and steps end there."""

    def __init__(self, widths: list[tuple[Tensor, tuple[int, int]]]) -> None:
        self.widths = widths

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        if self.widths:
            optimizer.register_step_pre_hook(self._turn_inward)
            optimizer.register_step_post_hook(self._project)

    @torch.no_grad()
    def _turn_inward(self, *_: Any) -> None:
        for limits in {limits for _, limits in self.widths}:
            own = [(width, width.grad) for width, other in self.widths if other == limits and width.grad is not None]
            if own:
                widths, gradients = _joined(own)
                _write([gradient for _, gradient in own], inward(widths, gradients, *limits))

    @torch.no_grad()
    def _project(self, *_: Any) -> None:
        for limits in {limits for _, limits in self.widths}:
            own = [width for width, other in self.widths if other == limits and width.requires_grad]
            torch._foreach_clamp_min_(own, float(limits[0]))
            torch._foreach_clamp_max_(own, float(limits[1]))


def _without_decay(model: nn.Module) -> set[str]:
    """Names of tokens, position embeddings, and what timm exempts by name, such as Swin's tables of relative positions.

    A quantized model is still of timm's class, which answers for the float parameters.
    """
    tokens = ("cls_token", "dist_token", "reg_token", "pos_embed", "relative_position_bias_table")
    named = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in tokens}
    return named | set(getattr(model, "no_weight_decay", set)())
