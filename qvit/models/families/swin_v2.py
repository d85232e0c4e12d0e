"""timm's SwinTransformerV2: swinv2_* without `cr` (Swin v2, Liu et al. 2022).

Sites and MACs are those of Swin (`swin.py`), with two differences inside attention:

    cosine attention    q and k are normalised to length 1, then quantized; the product is multiplied by a learned
                        number per head (at most 100), in float
    position bias       an MLP (`cpb_mlp`: 2 → 512 → H) of the logarithm of relative coordinates. Its input is a fixed
                        table, so the bias is the same for every image, whatever the batch: a deployed model keeps the
                        result, one number per head and relative position. Its two layers stay in float, and their
                        multiplications are not counted, as those of nothing that only depends on parameters.

Channels of normalised q and k are small: the values lie within [-1, 1] and mostly near 1/sqrt(d), and scores are
multiplied by up to 100. Expect these two sites to need more bits than in Swin.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from timm.models.swin_transformer_v2 import SwinTransformerV2, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.models.families.base import register_family
from qvit.models.families.parts import Family, Part, classifiers, patch_embedding
from qvit.models.families.swin import stages, windows_bias
from qvit.models.layers import AttentionSites

LARGEST_LOGIT_SCALE = math.log(1.0 / 0.01)


class QuantCosineWindowAttention(AttentionSites, WindowAttention):
    """timm's WindowAttention of Swin v2 with quantized operands; same parameters, same signature."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.fused_projection(x)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scale = self.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()
        x = self.attend(q, k, v, scale, windows_bias(self.position_bias(), mask, x.shape[0]), self.attn_drop)
        return self.proj_drop(self.project(x))

    def position_bias(self) -> Tensor:
        """The continuous relative position bias (1, H, M, M), between 0 and 16."""
        area = self.window_size[0] * self.window_size[1]
        table = self.get_submodule("cpb_mlp")(self.relative_coords_table).view(-1, self.num_heads)
        index = self.get_buffer("relative_position_index").view(-1)
        bias = table[index].view(area, area, -1).permute(2, 0, 1)
        return 16 * bias.sigmoid().unsqueeze(0)


@register_family(SwinTransformerV2)
class SwinV2(Family):
    """The parts of SwinTransformerV2."""

    supported = "patch embedding by one convolution, blocks with timm's WindowAttention and MLP, and patch merging"

    def parts(self, model: nn.Module) -> Iterator[Part]:
        yield from patch_embedding(model)
        yield from stages(model, (WindowAttention, QuantCosineWindowAttention), QuantCosineWindowAttention)
        yield from classifiers(model, 1, "head.fc")

    def float_modules(self, model: nn.Module) -> Collection[nn.Module]:
        attentions = [module for module in model.modules() if isinstance(module, WindowAttention)]
        return {layer for attention in attentions for layer in attention.cpb_mlp if isinstance(layer, nn.Linear)}
