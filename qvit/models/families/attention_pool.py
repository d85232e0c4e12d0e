"""timm's AttentionPoolLatent: the pooling of SigLIP (`global_pool="map"`) and of PE-Core.

Learned queries (the latent, usually one) attend to all N tokens; an MLP behind a norm follows. Sites, below
`attn_pool`, with H = one width per head:

    kv.{input,weight}                   the fused projection to keys and values
    {query,key,value}, probs, output H  as in a block (`vit.py`)
    proj.weight                      H  blocks of input columns
    mlp.*                               as in a block

The projection `q` of the latent depends on parameters alone: it is the same for every image, stays in float and is not
counted. MACs: 2·N·C² for keys and values, L·N·C for each of the two products of L queries, L·C² for `proj`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from timm.layers import AttentionPoolLatent, Mlp
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.models.families.parts import Part, head_matmuls, linear_part, mlp_parts
from qvit.models.layers import QKV, AttentionSites, QuantLinear, additive_mask, head_sites

_NO_DROPOUT = nn.Identity()


class QuantAttentionPool(AttentionSites, AttentionPoolLatent):
    """timm's AttentionPoolLatent with quantized operands; same parameters, same signature."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        latent = self.q(self.latent.expand(x.shape[0], -1, -1))
        q = latent.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = self.attend(q, k, v, self.scale, additive_mask(attn_mask, False, q), _NO_DROPOUT)
        x = self.proj_drop(self.project(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x

    def _head_norm(self) -> None:
        """`norm` stands behind the projection here, not before it."""
        return None


def pooling_parts(model: nn.Module, tokens: int) -> Iterator[Part]:
    """The attention pooling of a model of `tokens` tokens; nothing where it pools without attention.

    Raises UsageError for attention pooling of another kind.
    """
    pool: Any = getattr(model, "attn_pool", None)
    if pool is None:
        return
    if type(pool) not in (AttentionPoolLatent, QuantAttentionPool) or not isinstance(pool.proj, nn.Linear):
        raise UsageError(
            f"this {type(model).__name__} pools by attention in a way that qvit does not quantize yet: 'attn_pool' "
            f"({type(pool).__name__}). Supported is timm's AttentionPoolLatent with its projection"
        )
    path, heads = "attn_pool", {part: pool.num_heads for part in QKV}
    own = linear_part(f"{path}.kv", pool.kv, tokens)
    yield replace(
        own,
        sites=own.sites + head_sites(path, pool.proj, heads, pool.head_dim),
        matmuls=own.matmuls + head_matmuls(path, pool.proj, pool.kv.out_features // 2, pool.latent_len, tokens),
        replacements=[*own.replacements, (f"{path}.proj", QuantLinear), (path, QuantAttentionPool)],
    )
    if type(pool.mlp) is Mlp:
        yield from mlp_parts(f"{path}.mlp", pool.mlp, pool.latent_len)


def constant_projections(model: nn.Module) -> list[nn.Module]:
    """The layer of the latent, which sees no image."""
    pool: Any = getattr(model, "attn_pool", None)
    return [pool.q] if isinstance(pool, AttentionPoolLatent) else []
