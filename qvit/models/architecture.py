"""Which arguments of timm's models may come from a file or a command line, and how large a model may become.

`timm.create_model` takes more than an architecture: `checkpoint_path` and its like load files, some of them by
unpickling, which runs code; `pretrained_cfg` names files and addresses. Configs, recipes and packed files come from
strangers, too. So what may be given are the arguments below, which say what is built, and how its images are prepared,
and nothing else: numbers, yes or no, registered names, lists of a few numbers. Weights are read by
`models.load_weights` alone. In files, names are those of timm's registry, never of a hub or a folder.

Every number has a limit, so that a model without storage is made in a moment (`models.create_model` counts its
parameters before one with storage is made).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from qvit.documents.base import MOST_CLASSES
from qvit.errors import UsageError, nearest, shown
from qvit.plan.spec import MOST_BLOCKS, MOST_HEADS

#: The largest model of timm has 6.7 billion.
MOST_PARAMETERS = 8_000_000_000
_NAME = re.compile(r"(timm/)?\w{1,80}(\.\w{1,80})?")
_WEIGHTS = (
    *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_custom_load"),
    *("pretrained_filter_fn", "pretrained_model_args"),
)
#: What timm takes beside the architecture, and what to do instead.
_ELSEWHERE = {"pretrained": "use --pretrained", "cache_dir": "set HF_HOME", **dict.fromkeys(_WEIGHTS, "use --weights")}

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


_A_FEW, _CHANNELS = Field(min_length=1, max_length=8), Field(min_length=1, max_length=64)
Sizes = Size | Annotated[list[Size], _A_FEW]
Patches = Patch | Annotated[list[Patch], _A_FEW]
Windows = Window | Annotated[list[Window], _A_FEW]
HeadsOfStages = Heads | Annotated[list[Heads], _A_FEW]
HeadsOfBlocks = Heads | Annotated[list[Heads], Field(min_length=1, max_length=MOST_BLOCKS)]


class _Blocks(BaseModel):
    """The arguments that limit one another."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    embed_dim: Wide | None = None
    depth: Blocks | None = None
    depths: Annotated[list[Blocks], _A_FEW] | None = None

    @model_validator(mode="after")
    def _few_blocks(self) -> Self:
        if sum(self.depths or ()) > MOST_BLOCKS:
            raise ValueError(f"depths add up to {sum(self.depths or ())} blocks; at most {MOST_BLOCKS} are made")
        at_least = (self.depth or 0) * (self.embed_dim or 0) ** 2
        if at_least > MOST_PARAMETERS:
            raise ValueError(
                f"depth = {self.depth} and embed_dim = {self.embed_dim} make more than {at_least:,} parameters; "
                f"at most {MOST_PARAMETERS:,} are made"
            )
        return self


_ARGUMENTS: list[tuple[Any, str]] = [
    (Sizes, "img_size ref_feat_shape"),
    (Patches, "patch_size"),
    (Annotated[int, Field(ge=1, le=256)], "in_chans"),
    (Annotated[int, Field(ge=0, le=MOST_CLASSES)], "num_classes"),
    (Blocks, "depth_token_only"),
    (HeadsOfStages, "num_heads"),
    (Heads, "attn_pool_num_heads"),
    (HeadsOfBlocks, "num_kv_heads"),
    (Annotated[int, Field(ge=1, le=1024)], "head_dim"),
    (Windows, "window_size pretrained_window_sizes"),
    (Tokens, "reg_tokens num_reg_tokens swiglu_align_to"),
    (Annotated[list[Tokens], Field(min_length=3, max_length=3)], "rope_mrope_section"),
    (Ratio, "mlp_ratio mlp_ratio_token_only attn_pool_mlp_ratio"),
    (Rate, "drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate"),
    (Real, "init_values head_init_scale rope_grid_offset rope_temperature rope_shift_coords rope_jitter_coords"),
    (Real, "rope_rescale_coords"),
    (bool, "qkv_bias qkv_fused qk_norm proj_bias scale_attn_norm scale_mlp_norm scale_attn_inner scale_mlp swiglu_mlp"),
    (bool, "class_token no_embed_class pre_norm final_norm fc_norm use_fc_norm use_post_norm use_pre_transformer_norm"),
    (bool, "use_post_transformer_norm attn_only_layer_scale pool_include_prefix fix_init dynamic_img_size"),
    (bool, "dynamic_img_pad strict_img_size always_partition use_abs_pos_emb use_rel_pos_bias use_shared_rel_pos_bias"),
    (bool, "use_rot_pos_emb rope_rotate_half"),
    (Registered, "global_pool pos_embed weight_init act_layer norm_layer embed_norm_layer attn_layer attn_type"),
    (Registered, "rope_type rope_grid_indexing"),
    (Annotated[float, Field(gt=0, le=1)], "norm_eps"),
    (Registered, "interpolation crop_mode"),
    (Annotated[float, Field(ge=1e-3, le=10)], "crop_pct"),
    (Annotated[list[Annotated[float, Field(ge=-1e3, le=1e3)]], _CHANNELS], "mean"),
    (Annotated[list[Annotated[float, Field(ge=1e-6, le=1e3)]], _CHANNELS], "std"),
]
#: Arguments that timm's models do not take, and `models.create_model` applies: the ε of all norms, and how images are
#: prepared, in timm's words.
PREPARATION = ("interpolation", "crop_mode", "crop_pct", "mean", "std")
OWN = ("norm_eps", *PREPARATION)
_FIELDS: dict[str, Any] = {name: (kind | None, None) for kind, names in _ARGUMENTS for name in names.split()}
#: The arguments: those of VisionTransformer, Swin, Swin V2, EVA, BEiT and CaiT that plain data can be. Those that take
#: modules or functions are missing. A name of timm's registry serves for activations and norms.
Architecture = create_model("Architecture", __base__=_Blocks, **_FIELDS)


def check_name(name: str) -> None:
    """Raises UsageError for what is no name of timm's registry, such as an address or a path."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no name of timm's registry, and no folder of a model that is read")


def check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Raises UsageError for arguments that do not describe an architecture, or an impossible one.

    Args:
        kwargs: For `timm.create_model`; lists may be tuples.
    """
    for key in kwargs:
        if key == "features_only":
            raise UsageError(
                "a model takes no argument 'features_only', which wraps it in another one: num_classes=0 answers with "
                'one feature per image, global_pool="" with one per token, and `forward_intermediates` of the '
                "quantized model has those of each block"
            )
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
            raise UsageError(str(item.get("ctx", {})["error"])) from None
        key = str(item["loc"][0])
        reason = f"{item['msg'][0].lower()}{item['msg'][1:]}"
        raise UsageError(f"argument '{key}' = {shown(kwargs[key])}: {reason}") from None
