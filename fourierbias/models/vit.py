"""The reference vision transformer `vit`: DeiT's form at the size of `cnn`."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from ._cfg import reference_cfg

default_cfgs = generate_default_cfgs(
    {"vit": reference_cfg(fixed_input_size=True, first_conv="patch_embed.proj", classifier="head")}
)

VIT_BODY = {"patch_size": 4, "embed_dim": 108, "depth": 6, "num_heads": 9, "mlp_ratio": 4.0}


@register_model
def vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the reference ViT: patch 4, width 108, depth 6, class token, 0.86 M parameters.

    Nine heads, so that Bootstrapping's agent finds one head per tap of a 3×3 kernel. Positions are
    learned. Input (B, 3, 32, 32), 10 classes unless said otherwise; further arguments as for timm's
    VisionTransformer.

    >>> import timm
    >>> timm.create_model("vit").patch_embed.grid_size
    (8, 8)
    """
    return build_model_with_cfg(
        VisionTransformer,
        "vit",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**VIT_BODY, **kwargs},
    )
