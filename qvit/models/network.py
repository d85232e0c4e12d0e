"""How a model is built, as plain data for runtimes that know nothing of PyTorch and timm.

A packed file holds this document (docs/packed-files.md), and the native engine builds its network from it. It describes
timm's VisionTransformer with plain pre-norm blocks (any number of prefix tokens, LayerScale, qk-norm, gated MLPs,
LayerNorm or RmsNorm, any pooling) and SwinTransformer, each with a classifier or without. Names of tensors are timm's
and are not repeated; whether a bias, a norm or a LayerScale is there, the tensors of the file say. Where LayerNorm,
softmax or GELU have integer forms, `nonlinear` says which, as the plan does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import GELU, AttentionPoolLatent, GELUTanh, GluMlp, Mlp, QuickGELU, RmsNorm, SwiGLU
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import nn

from qvit.errors import UsageError
from qvit.models.integer_functions import forms_of

Network = dict[str, Any]
_ACTIVATIONS = {GELUTanh: "gelu-tanh", QuickGELU: "quick-gelu", nn.SiLU: "silu", nn.ReLU: "relu"}
#: By timm's `global_pool`.
_POOLS = {"token": "token", "avg": "avg", "max": "max", "avgmax": "avgmax", "map": "map", "": "none"}


def network_of(model: nn.Module) -> Network:
    """The document of a model, float or quantized, with storage or without. Raises UsageError with the first reason."""
    if reason := next(differences(model), None):
        raise UsageError(reason)
    vit: Any = model
    swin = isinstance(model, SwinTransformer)
    norm = _norms(model)[0][1]
    pool = _POOLS[vit.global_pool]
    if pool == "avg" and (swin or vit.pool_include_prefix):
        pool = "all"
    head = vit.head.fc if swin else vit.head
    embed = vit.patch_embed
    return {
        "kind": "swin" if swin else "vit",
        "image": [embed.proj.in_channels, *embed.img_size],
        "patch": list(embed.patch_size),
        "prefix": 0 if swin else vit.num_prefix_tokens,
        "pool": pool,
        "classes": head.out_features if isinstance(head, nn.Linear) else 0,
        "activation": activation_name(_blocks(model)[0][1].mlp.act),
        "norm": "rms" if isinstance(norm, RmsNorm) else "layer",
        "epsilon": norm.eps,
        "mlp": _mlp(_blocks(model)[0][1].mlp),
        "stages": [_stage(stage.blocks) for stage in vit.layers] if swin else [_stage(vit.blocks)],
        **({"map": _map(vit)} if pool == "map" else {}),
        **({"nonlinear": forms} if (forms := forms_of(model)) else {}),
    }


def _map(vit: Any) -> dict[str, Any]:
    """Of attention pooling: `skip` leading tokens are not seen."""
    pool = vit.attn_pool
    skip = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
    return {"heads": pool.num_heads, "hidden": pool.mlp.fc2.in_features, "skip": skip}


def _stage(blocks: Any) -> dict[str, Any]:
    block = blocks[0]
    found = {
        "depth": len(blocks),
        "dim": block.attn.qkv.in_features,
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc2.in_features,
    }
    if isinstance(block, SwinTransformerBlock):
        found |= {"window": list(block.window_size), "shift": list(blocks[1].shift_size if len(blocks) > 1 else (0, 0))}
    return found


def differences(model: nn.Module) -> Iterator[str]:
    """Why a model has no such document: every reason, or nothing."""
    if type(model) is SwinTransformer:
        own = _of_swin(model)
    elif type(model) is VisionTransformer:
        own = _of_vit(model)
    else:
        yield f"it is a {type(model).__name__}, neither timm's VisionTransformer nor its SwinTransformer"
        return
    reasons = list(own)
    yield from reasons
    if reasons:
        return
    blocks = _blocks(model)
    for path, block in blocks:
        yield from _of_mlp(path, block.mlp, blocks[0][1].mlp)
    if getattr(model, "attn_pool", None) is not None:
        yield from _of_mlp("attn_pool", model.get_submodule("attn_pool.mlp"), blocks[0][1].mlp)
    norms = _norms(model)
    for path, norm in norms:
        plain = isinstance(norm, (nn.LayerNorm, RmsNorm)) and norm.weight is not None and norm.eps is not None
        if not plain or (norm_kind(norm), norm.eps) != (norm_kind(norms[0][1]), norms[0][1].eps):
            yield f"{path} is a {type(norm).__name__}, or differs from other norms"


def _of_vit(model: Any) -> Iterator[str]:
    pool = model.attn_pool
    if model.global_pool not in _POOLS or (model.global_pool == "map") != (pool is not None):
        yield f"it pools tokens by '{model.global_pool}'"
    elif model.global_pool in ("max", "avgmax") and model.pool_include_prefix:
        yield f"it pools prefix tokens by '{model.global_pool}'"
    elif pool is not None and not _is_plain(pool, model.embed_dim):
        yield "it pools by attention with other parts than timm's VisionTransformer has"
    if not len(model.blocks):
        yield "it has no blocks"
    if model.dynamic_img_size:
        yield "its image size is not fixed"
    if not isinstance(model.head, (nn.Linear, nn.Identity)):
        yield "it has no linear classifier"
    for path, block in _blocks(model):
        attention = getattr(block, "attn", None)
        if type(block) is not Block or not isinstance(attention, Attention):
            yield f"{path} is not one of timm's plain blocks"
        elif not isinstance(attention.norm, nn.Identity) or getattr(attention, "gate", None) is not None:
            yield f"{path} has a norm or a gate in its attention"
        elif not all(isinstance(scale, (LayerScale, nn.Identity)) for scale in (block.ls1, block.ls2)):
            yield f"{path} scales its outputs in a way of its own"


def _is_plain(pool: Any, dim: int) -> bool:
    """Whether attention pooling has one query, a square projection and an MLP."""
    layers = isinstance(pool, AttentionPoolLatent) and isinstance(pool.proj, nn.Linear) and type(pool.mlp) is Mlp
    if not layers or pool.pos_embed is not None or pool.latent_len != 1:
        return False
    return (pool.latent_dim, pool.kv.out_features, pool.proj.out_features) == (dim, 2 * dim, dim)


def _of_swin(model: Any) -> Iterator[str]:
    if model.global_pool not in ("avg", ""):
        yield f"it pools tokens by '{model.global_pool}'"
    if model.dynamic_img_size:
        yield "its image size is not fixed"
    if not isinstance(model.head.fc, (nn.Linear, nn.Identity)):
        yield "it has no linear classifier"
    for index, stage in enumerate(model.layers):
        if not len(stage.blocks):
            yield f"layers.{index} has no blocks"
            return
        first = stage.blocks[0]
        sides = list(zip(first.input_resolution, first.window_size, strict=True))
        if any(side % window for side, window in sides):
            yield f"layers.{index} has windows that do not divide its {sides[0][0]}x{sides[1][0]} tokens"
        if index + 1 < len(model.layers) and any(side % 2 for side, _ in sides):
            yield f"layers.{index} has an odd number of tokens to merge"
        for number, block in enumerate(stage.blocks):
            path, shift = f"layers.{index}.blocks.{number}", stage.blocks[number % 2].shift_size
            if type(block) is not SwinTransformerBlock or not isinstance(block.attn, WindowAttention):
                yield f"{path} is not one of timm's plain blocks"
            elif (block.window_size, block.shift_size) != (first.window_size, shift) or any(first.shift_size):
                yield f"{path} has windows of another kind than the block before it"


def _of_mlp(path: str, mlp: Any, first: Any) -> Iterator[str]:
    kind = _mlp(mlp)
    if kind is None:
        yield f"{path} has an MLP of another kind: {type(mlp).__name__}"
    elif activation_name(mlp.act) is None or (kind, activation_name(mlp.act)) != (
        _mlp(first),
        activation_name(first.act),
    ):
        yield f"{path} has the activation {type(mlp.act).__name__}"


def _mlp(mlp: Any) -> str | None:
    if type(mlp) is Mlp:
        return "plain"
    if type(mlp) is SwiGLU:
        return "swiglu"
    return ("glu-last" if mlp.gate_last else "glu") if type(mlp) is GluMlp else None


def activation_name(module: nn.Module) -> str | None:
    """The name of an activation in the document; None for one that it has no name for."""
    if isinstance(module, (nn.GELU, GELU)):
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu-tanh"
    return next((name for kind, name in _ACTIVATIONS.items() if type(module) is kind), None)


def _blocks(model: Any) -> list[tuple[str, Any]]:
    if isinstance(model, VisionTransformer):
        return [(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
    stages = enumerate(model.layers)
    return [(f"layers.{i}.blocks.{j}", block) for i, stage in stages for j, block in enumerate(stage.blocks)]


def norm_kind(module: nn.Module) -> str | None:
    """`layer` for a LayerNorm, `rms` for an RmsNorm, None for what is neither or has no weight."""
    if not isinstance(module, (nn.LayerNorm, RmsNorm)) or module.weight is None or module.eps is None:
        return None
    return "rms" if isinstance(module, RmsNorm) else "layer"


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether a module is fc1, an activation and fc2, and nothing else."""
    return type(module) is Mlp and isinstance(module.norm, nn.Identity)


def is_plain_block(module: nn.Module) -> bool:
    """Whether a module is a ViT's pre-norm block with attention and an MLP, and LayerScale or none."""
    if type(module) is not Block or not isinstance(module.attn, Attention):
        return False
    return all(isinstance(scale, (LayerScale, nn.Identity)) for scale in (module.ls1, module.ls2))


def _norms(model: nn.Module) -> list[tuple[str, Any]]:
    """All modules at the places of norms, in the order of the model."""
    places = ("norm", "norm1", "norm2", "norm_pre", "fc_norm", "q_norm", "k_norm")
    named = ((path, module) for path, module in model.named_modules() if path.rpartition(".")[2] in places)
    return [(path, module) for path, module in named if not isinstance(module, nn.Identity)]
