"""timm's VisionTransformer: vit_*, deit_*, deit3_*, distilled DeiT.

Prefix tokens may be any number; qk-norm, LayerScale, pre- and post-norm blocks are known. Sites of one block, in order
(Q-ViT section 3.3; H = one width per head):

    attn.qkv.input                          the normalised input of the q, k, v projections
    attn.qkv.{query,key,value}_weight  H    thirds of the fused projection
    attn.{query,key,value}             H    after bias (and qk-norm), before 1/sqrt(d)
    attn.probs                         H    softmax output, unsigned
    attn.output                        H    head outputs before concatenation: the input of proj
    attn.proj.weight                   H    blocks of input columns
    mlp.fc1.input, mlp.fc1.weight, mlp.fc2.input (the GELU's output), mlp.fc2.weight

and `patch_embed.proj.{input,weight}`, `head.{input,weight}` (`head_dist` too for distilled DeiT). LayerNorm, softmax,
GELU, residuals, biases, tokens and position embeddings stay in float. MACs for N tokens (prefix tokens included): N·C²
per projection, N²·C for q·kᵀ and for probs·v; the classifier sees one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from qvit.cost import Matmul
from qvit.errors import UsageError
from qvit.families.base import register_family
from qvit.layers import (
    QKV,
    AttentionSites,
    QuantConv2d,
    QuantLinear,
    QuantQKV,
    Specs,
    add_quantizers,
    adopt,
    apply_quantizer,
    attention_sites,
    linear_sites,
)
from qvit.spec import Site, TensorSpec


class QuantAttention(AttentionSites, Attention):
    """timm's Attention with quantized operands; same parameters, same signature."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = _additive_mask(attn_mask, is_causal, q)
        x = self.attend(q, k, v, self.scale, bias, self.attn_drop)
        norm = getattr(self, "norm", None)
        if norm is not None and not isinstance(norm, nn.Identity):
            x = norm(x.transpose(1, 2).flatten(2)).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        x = apply_quantizer(self, "output", x).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


def _additive_mask(attn_mask: Tensor | None, is_causal: bool, q: Tensor) -> Tensor | None:
    """The mask as something to add to the scores, with the meaning of `scaled_dot_product_attention`."""
    if is_causal:
        tokens = q.shape[-2]
        return q.new_full((tokens, tokens), float("-inf")).triu(1)
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))


@register_family(VisionTransformer, VisionTransformerDistilled)
class ViT:
    """Sites, matmuls and module swap of VisionTransformer."""

    def sites(self, model: nn.Module) -> list[Site]:
        _refuse_unknown(model)
        plain = TensorSpec()
        sites = linear_sites("patch_embed.proj", _patch_conv(model), plain, "first")
        for name, module in _parts(model):
            if isinstance(module, Attention):
                sites += attention_sites(name, module.qkv, module.proj, module.num_heads)
            else:
                for layer, linear in _linears(module):
                    pair = linear_sites(f"{name}.{layer}", linear, plain)
                    after_gelu = (
                        layer == "fc2"
                        and isinstance(getattr(module, "act", None), nn.GELU)
                        and isinstance(getattr(module, "norm", None), nn.Identity)
                    )
                    asymmetric = (
                        TensorSpec(signed=False, symmetric=False)
                        if after_gelu and not hasattr(module, "gate_last")
                        else plain
                    )
                    sites += [
                        Site(
                            site.name,
                            site.role,
                            site.layout,
                            asymmetric if site.role == "activation" else plain,
                            numel=site.numel,
                        )
                        for site in pair
                    ]
        for name, head in _heads(model):
            sites += linear_sites(name, head, plain, "last")
        return sites

    def matmuls(self, model: nn.Module) -> list[Matmul]:
        _refuse_unknown(model)
        vit = cast("VisionTransformer", model)
        patches: int = vit.patch_embed.num_patches
        tokens: int = patches + vit.num_prefix_tokens
        embedding = patches * _patch_conv(model).weight.numel()
        products = [Matmul(embedding, "patch_embed.proj.input", "patch_embed.proj.weight")]
        for name, module in _parts(model):
            if isinstance(module, Attention):
                width = module.num_heads * module.head_dim
                linear = tokens * module.qkv.in_features * width
                products += [Matmul(linear, f"{name}.qkv.input", f"{name}.qkv.{part}_weight") for part in QKV]
                products += [
                    Matmul(tokens**2 * width, f"{name}.query", f"{name}.key"),
                    Matmul(tokens**2 * width, f"{name}.probs", f"{name}.value"),
                ]
                products += [Matmul(tokens * module.proj.weight.numel(), f"{name}.output", f"{name}.proj.weight")]
            else:
                for layer, linear_layer in _linears(module):
                    path = f"{name}.{layer}"
                    products += [Matmul(tokens * linear_layer.weight.numel(), f"{path}.input", f"{path}.weight")]
        return products + [
            Matmul(head.weight.numel(), f"{name}.input", f"{name}.weight") for name, head in _heads(model)
        ]

    def swap(self, model: nn.Module, sites: dict[str, Site], specs: Specs) -> None:
        replacements: list[tuple[str, type[nn.Module]]] = [("patch_embed.proj", QuantConv2d)]
        for name, module in _parts(model):
            if isinstance(module, Attention):
                replacements += [(f"{name}.qkv", QuantQKV), (f"{name}.proj", QuantLinear), (name, QuantAttention)]
            else:
                replacements += [(f"{name}.{layer}", QuantLinear) for layer, _ in _linears(module)]
        replacements += [(name, QuantLinear) for name, _ in _heads(model)]
        for path, cls in replacements:
            quantized = adopt(cls, model.get_submodule(path))
            add_quantizers(quantized, path, sites, specs)
            model.set_submodule(path, quantized)


def _patch_conv(model: nn.Module) -> nn.Conv2d:
    """The convolution that embeds the patches."""
    return cast("nn.Conv2d", model.get_submodule("patch_embed.proj"))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention and feed-forward modules of all blocks, with their paths."""
    for path, module in model.get_submodule("blocks").named_modules(prefix="blocks"):
        if isinstance(module, Attention) or path.rpartition(".")[2] == "mlp":
            yield path, module


def _linears(mlp: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a feed-forward module, in the order of its definition."""
    for name, module in mlp.named_children():
        if isinstance(module, nn.Linear):
            yield name, module


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The classifiers; none for a model without."""
    for name in ("head", "head_dist"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Linear):
            yield name, module


#: Layers whose computation is known; a subclass of a float one may compute something else.
_PLAIN = (nn.Linear, nn.Conv2d, QuantLinear, QuantConv2d, QuantQKV)


def _refuse_unknown(model: nn.Module) -> None:
    """Raises UsageError if a matmul of the model would be left out."""
    known: set[nn.Module] = (
        {model.get_submodule("patch_embed.proj")} if type(getattr(model, "patch_embed", None)) is PatchEmbed else set()
    )
    for _, module in _parts(model):
        if not isinstance(module, Attention):
            known |= {linear for _, linear in _linears(module)}
        elif type(module) in (Attention, QuantAttention) and getattr(module, "gate", None) is None:
            known |= {module.qkv, module.proj}
    known |= {head for _, head in _heads(model)}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (module not in known or type(module) not in _PLAIN):
            raise UsageError(
                f"this {type(model).__name__} has a layer that qvit does not quantize yet: '{path}' "
                f"({type(module).__name__}). Supported are patch embedding by one convolution, blocks with timm's "
                "Attention and an MLP of linear layers, and a linear classifier"
            )
