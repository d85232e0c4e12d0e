"""Which arguments of timm's models may come from a file or a command line, and how large a model may become.

`timm.create_model` takes more than an architecture: `checkpoint_path` and its like load files, some of them by
unpickling, which runs code; `pretrained_cfg` names files and addresses. Configs, recipes and packed files come from
strangers, too. So what may be given are the arguments below, which say what is built and nothing else: numbers, yes or
no, registered names, lists of a few numbers. Weights are read by `models.load_weights` alone, and names are those of
timm's registry, never of a hub or a folder.

Every number has a limit, so that a model without storage is made in a moment (`models.create_model` counts its
parameters before one with storage is made).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qvit.documents import MOST_CLASSES
from qvit.errors import UsageError, nearest, shown
from qvit.plan.spec import MOST_BLOCKS, MOST_HEADS

#: The largest model of timm has 6.7 billion.
MOST_PARAMETERS = 8_000_000_000
_NAME = re.compile(r"(timm/)?\w{1,80}(\.\w{1,80})?")
#: What timm takes beside the architecture, and what to do instead.
_ELSEWHERE = {
    "checkpoint_path": "use --weights",
    "pretrained": "use --pretrained",
    "pretrained_cfg": "use --weights",
    "pretrained_cfg_overlay": "use --weights",
    "pretrained_strict": "use --weights",
    "pretrained_custom_load": "use --weights",
    "pretrained_filter_fn": "use --weights",
    "pretrained_model_args": "use --weights",
    "cache_dir": "set HF_HOME",
}

Size = Annotated[int, Field(ge=1, le=4096)]
Patch = Annotated[int, Field(ge=1, le=512)]
Wide = Annotated[int, Field(ge=1, le=8192)]
Blocks = Annotated[int, Field(ge=0, le=MOST_BLOCKS)]
Heads = Annotated[int, Field(ge=1, le=MOST_HEADS)]
Window = Annotated[int, Field(ge=0, le=1024)]
Tokens = Annotated[int, Field(ge=0, le=1024)]
Ratio = Annotated[float, Field(gt=0, le=64)]
Rate = Annotated[float, Field(ge=0, le=1)]
Real = Annotated[float, Field(ge=-1e6, le=1e6)]
Registered = Annotated[str, Field(max_length=40, pattern=r"^\w*$")]


_A_FEW = Field(min_length=1, max_length=8)
Sizes = Size | Annotated[list[Size], _A_FEW]
Patches = Patch | Annotated[list[Patch], _A_FEW]
Windows = Window | Annotated[list[Window], _A_FEW]
HeadsOfStages = Heads | Annotated[list[Heads], _A_FEW]


class Architecture(BaseModel):
    """The arguments: those of VisionTransformer, Swin, Swin V2, EVA, BEiT and CaiT that plain data can be.

    Those that take modules or functions are missing. A name of timm's registry serves for activations and norms.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    img_size: Sizes | None = None
    patch_size: Patches | None = None
    in_chans: Annotated[int, Field(ge=1, le=256)] | None = None
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)] | None = None
    embed_dim: Wide | None = None
    depth: Blocks | None = None
    depths: Annotated[list[Blocks], _A_FEW] | None = None
    depth_token_only: Blocks | None = None
    num_heads: HeadsOfStages | None = None
    num_kv_heads: Heads | None = None
    attn_pool_num_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=1, le=1024)] | None = None
    window_size: Windows | None = None
    pretrained_window_sizes: Windows | None = None
    ref_feat_shape: Sizes | None = None
    reg_tokens: Tokens | None = None
    num_reg_tokens: Tokens | None = None
    swiglu_align_to: Tokens | None = None
    rope_mrope_section: Annotated[list[Tokens], Field(min_length=3, max_length=3)] | None = None

    mlp_ratio: Ratio | None = None
    mlp_ratio_token_only: Ratio | None = None
    attn_pool_mlp_ratio: Ratio | None = None
    drop_rate: Rate | None = None
    pos_drop_rate: Rate | None = None
    patch_drop_rate: Rate | None = None
    proj_drop_rate: Rate | None = None
    attn_drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None
    init_values: Real | None = None
    head_init_scale: Real | None = None
    rope_grid_offset: Real | None = None
    rope_temperature: Real | None = None
    rope_shift_coords: Real | None = None
    rope_jitter_coords: Real | None = None
    rope_rescale_coords: Real | None = None

    qkv_bias: bool | None = None
    qkv_fused: bool | None = None
    qk_norm: bool | None = None
    proj_bias: bool | None = None
    scale_attn_norm: bool | None = None
    scale_mlp_norm: bool | None = None
    scale_attn_inner: bool | None = None
    scale_mlp: bool | None = None
    swiglu_mlp: bool | None = None
    class_token: bool | None = None
    no_embed_class: bool | None = None
    pre_norm: bool | None = None
    final_norm: bool | None = None
    fc_norm: bool | None = None
    use_fc_norm: bool | None = None
    use_post_norm: bool | None = None
    use_pre_transformer_norm: bool | None = None
    use_post_transformer_norm: bool | None = None
    attn_only_layer_scale: bool | None = None
    pool_include_prefix: bool | None = None
    fix_init: bool | None = None
    dynamic_img_size: bool | None = None
    dynamic_img_pad: bool | None = None
    strict_img_size: bool | None = None
    always_partition: bool | None = None
    use_abs_pos_emb: bool | None = None
    use_rel_pos_bias: bool | None = None
    use_shared_rel_pos_bias: bool | None = None
    use_rot_pos_emb: bool | None = None
    rope_rotate_half: bool | None = None

    global_pool: Registered | None = None
    pos_embed: Registered | None = None
    weight_init: Registered | None = None
    act_layer: Registered | None = None
    norm_layer: Registered | None = None
    embed_norm_layer: Registered | None = None
    attn_layer: Registered | None = None
    attn_type: Registered | None = None
    rope_type: Registered | None = None
    rope_grid_indexing: Registered | None = None

    @model_validator(mode="after")
    def _few_blocks(self) -> Architecture:
        if sum(self.depths or ()) > MOST_BLOCKS:
            raise ValueError(f"depths add up to {sum(self.depths or ())} blocks; at most {MOST_BLOCKS} are made")
        at_least = (self.depth or 0) * (self.embed_dim or 0) ** 2
        if at_least > MOST_PARAMETERS:
            raise ValueError(
                f"depth = {self.depth} and embed_dim = {self.embed_dim} make more than {at_least:,} parameters; "
                f"at most {MOST_PARAMETERS:,} are made"
            )
        return self


def check_name(name: str) -> None:
    """Raises UsageError for what is no name of timm's registry, such as an address or a path."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no name of timm's registry; models of a hub or a folder are not loaded")


def check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Raises UsageError for arguments that do not describe an architecture, or an impossible one.

    Args:
        kwargs: For `timm.create_model`; lists may be tuples.
    """
    for key in kwargs:
        if key in _ELSEWHERE:
            raise UsageError(f"a model takes no argument '{key}', which does not say what it is: {_ELSEWHERE[key]}")
        if key not in Architecture.model_fields:
            close = nearest(key[:80], Architecture.model_fields)
            known = "" if close else f" (known: {', '.join(Architecture.model_fields)})"
            raise UsageError(f"a model takes no argument '{key[:80]}'{close}{known}")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    try:
        Architecture.model_validate(plain)
    except ValidationError as error:
        items = error.errors(include_url=False)  # of a number or a list of them, the one that says more
        item = next((item for item in items if not item["type"].endswith("_type")), items[0])
        if item["type"] == "value_error":
            raise UsageError(str(item["ctx"]["error"])) from None
        key = str(item["loc"][0])
        reason = f"{item['msg'][0].lower()}{item['msg'][1:]}"
        raise UsageError(f"argument '{key}' = {shown(kwargs[key])}: {reason}") from None
