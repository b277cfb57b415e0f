"""LSRA for vision: in each block half the channels attend and half convolve."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..errors import FourierBiasError
from ._cfg import reference_cfg
from .eit import SplitTransformer

default_cfgs = generate_default_cfgs(
    {"lsra": reference_cfg(fixed_input_size=True, first_conv="patch_embed.proj", classifier="head")}
)

LSRA_BODY = {"patch_size": 4, "embed_dim": 126, "depth": 6, "num_heads": 9}


class LSRA(SplitTransformer):
    """A vision transformer of long-short range attention: the first half attends, the second convolves.

    Lite Transformer (Wu et al., 2020, arXiv 2004.11886) splits the channels of a language model's blocks so,
    equally in every layer, attention half first, mixed by the MLP alone. How the EIT paper carried that over
    to images is not published: patch tokens, a class token, learned positions and one 3×3 depthwise
    convolution on the convolving half are our reading. Arguments as for `SplitTransformer`.

    >>> LSRA(img_size=32, patch_size=4, embed_dim=36, depth=2, num_heads=9).blocks[1].conv_width
    18
    """

    def __init__(self, *, embed_dim: int, depth: int, num_heads: int, **kwargs: Any) -> None:
        if embed_dim % (2 * num_heads):
            raise FourierBiasError(
                f"half of {embed_dim} channels cannot be shared by {num_heads} heads; choose a multiple of "
                f"{2 * num_heads}"
            )
        widths = [embed_dim // 2] * depth
        super().__init__(
            widths, conv_first=False, embed_dim=embed_dim, depth=depth, num_heads=num_heads, **kwargs
        )


@register_model
def lsra(pretrained: bool = False, **kwargs: Any) -> LSRA:
    """Build the reference LSRA: patch 4, width 126 (63 attend, 63 convolve), depth 6, 9 heads.

    Ours, at the size of `vit` (0.86 M parameters). Input (B, 3, 32, 32), 10 classes unless said otherwise.

    >>> import timm
    >>> timm.create_model("lsra").patch_embed.grid_size
    (8, 8)
    """
    return build_model_with_cfg(
        LSRA,
        "lsra",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**LSRA_BODY, **kwargs},
    )
