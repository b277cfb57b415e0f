"""EIT, a vision transformer whose blocks convolve a share of their channels that falls with depth.

Four presets of the authors (224×224, published weights load as they are) and `eit`, a port to 32×32. The
blocks are also those of `lsra`: which share of the channels attends in each block, and on which side of the
others it lies, is all that differs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..errors import FourierBiasError
from ._cfg import reference_cfg

# What a narrower attention takes over from the options of timm's Block.
_ATTENTION_OPTIONS = (
    *("qkv_bias", "qk_norm", "proj_bias", "attn_drop", "proj_drop", "norm_layer", "device", "dtype"),
)


class TokenConv(nn.Module):
    """Depthwise convolution of the patch tokens on their grid; prefix tokens pass unchanged.

    EIT_T of the authors' code: no bias, no activation. Tokens (B, P + H·W, C) to the same shape, where
    ``grid`` (H, W) and ``prefix`` P are set by the network that holds it.
    """

    fourierbias_kind = "conv"

    def __init__(self, width: int, kernel_size: int = 3, drop: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.grid, self.prefix = (1, 1), 0
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(
            width, width, kernel_size, padding=padding, groups=width, bias=False, **factory
        )
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        maps = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        tokens = self.drop(self.conv1(maps)).flatten(2).transpose(1, 2)
        return torch.cat((x[:, : self.prefix], tokens), dim=1)


class SplitBlock(Block):
    """timm's pre-norm block where ``attention_width`` of the channels attend and the others convolve.

    Each mixer sees its own channels only and writes them back in place; ``conv_first`` puts the convolution
    on the first channels (EIT), otherwise attention has them (LSRA). Further options are those of timm's
    Block. Its children bear the names of the authors' weight files: norm1, attn, eit_t, norm2, mlp.
    """

    def __init__(
        self, dim: int, num_heads: int, *, attention_width: int, conv_first: bool, **options: Any
    ) -> None:
        attn_layer = options.pop("attn_layer", Attention)
        super().__init__(dim, num_heads, attn_layer=nn.Identity, **options)  # its attention is of full width
        chosen = {name: options[name] for name in _ATTENTION_OPTIONS if name in options}
        scale_norm = options.get("scale_attn_norm", False)
        self.attn = attn_layer(attention_width, num_heads=num_heads, scale_norm=scale_norm, **chosen)
        self.attention_width, self.conv_width = attention_width, dim - attention_width
        self.conv_first = conv_first
        self.fourierbias_kind = self.mixer_kind = "split" if self.conv_width else "attention"
        if self.conv_width:
            factory = {name: options.get(name) for name in ("device", "dtype")}
            self.eit_t = TokenConv(self.conv_width, drop=options.get("attn_drop", 0.0), **factory)

    def mix(self, x: Tensor) -> Tensor:
        """Apply both mixers to normalised tokens (B, N, C), each to its share of the channels."""
        if not self.conv_width:
            return self.attn(x)
        if self.conv_first:
            convolved, attending = x.split((self.conv_width, self.attention_width), dim=-1)
            return torch.cat((self.eit_t(convolved), self.attn(attending)), dim=-1)
        attending, convolved = x.split((self.attention_width, self.conv_width), dim=-1)
        return torch.cat((self.attn(attending), self.eit_t(convolved)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.mix(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SplitTransformer(VisionTransformer):
    """timm's VisionTransformer built of `SplitBlock`, ``attention_widths`` naming the share of each block.

    Images (B, C, H, W) to logits (B, classes); other arguments are those of timm's VisionTransformer, except
    that the grid is fixed: for other images build it with another ``img_size``, or call ``set_input_size``.
    Raises FourierBiasError for a width that is no whole number of channels per head.

    >>> size = {"img_size": 32, "patch_size": 4, "embed_dim": 72, "num_heads": 9, "depth": 2}
    >>> model = SplitTransformer([36, 72], conv_first=True, **size)
    >>> [block.conv_width for block in model.blocks]
    [36, 0]
    """

    def __init__(
        self, attention_widths: Sequence[int], conv_first: bool, *, num_heads: int, **kwargs: Any
    ) -> None:
        if kwargs.get("dynamic_img_size"):
            raise FourierBiasError(
                "split blocks convolve on a fixed grid: give img_size, not dynamic_img_size"
            )
        for width in attention_widths:
            if width <= 0 or width % num_heads:
                raise FourierBiasError(
                    f"{width} attention channels cannot be shared by {num_heads} heads; choose embed_dim, "
                    "depth and num_heads so that each head gets a whole number, at least 1, in each block"
                )

        def block(depth: int, **options: Any) -> SplitBlock:
            width = attention_widths[depth]
            return SplitBlock(attention_width=width, conv_first=conv_first, depth=depth, **options)

        super().__init__(num_heads=num_heads, block_fn=block, **kwargs)
        self._tell_grid()

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size from now on."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._tell_grid()

    def _tell_grid(self) -> None:
        for module in self.modules():
            if isinstance(module, TokenConv):
                module.grid, module.prefix = self.patch_embed.grid_size, self.num_prefix_tokens


class OverlapPatchEmbed(nn.Module):
    """Patch embedding of overlapping fields: a strided convolution, then max-pooling (EIT_P).

    (B, C, H, W) to tokens (B, N, D). ``grid_size`` is the grid there is: the authors' attribute of that name
    is one short where the kernel is even, because their padding of half a kernel adds a position (224 px:
    19×19, not 18×18).

    >>> OverlapPatchEmbed(224, kernel_size=16, stride=4, pool=3, embed_dim=8).grid_size
    (19, 19)
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        *,
        kernel_size: int,
        stride: int,
        pool: int,
        in_chans: int = 3,
        embed_dim: int = 250,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_2tuple(stride * pool)
        factory = {"device": device, "dtype": dtype}
        self.eit_p = nn.Sequential()
        self.eit_p.conv = nn.Conv2d(
            in_chans, embed_dim, kernel_size, stride, padding=kernel_size // 2, bias=bias, **factory
        )
        self.eit_p.pool = nn.MaxPool2d(pool, stride=pool)
        self.set_input_size(img_size)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size from now on; FourierBiasError for another patch size or no token."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise FourierBiasError("EIT's patch size is its stride times its pooling; give those")
        self.img_size = to_2tuple(img_size or self.img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if not self.num_patches:
            height, width = self.img_size
            raise FourierBiasError(
                f"{height}×{width} images are too small for patches {self.patch_size[0]} apart"
            )

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Distance of neighbouring fields in pixels."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Token grid of images of ``img_size`` (H, W)."""
        conv, pool = self.eit_p.conv, self.eit_p.pool.kernel_size
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        height, width = (((side + 2 * padding - kernel) // stride + 1) // pool for side in img_size)
        return height, width

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.img_size
        torch._assert(x.shape[-2] == height, f"the model is built for images {height} px high")
        torch._assert(x.shape[-1] == width, f"the model is built for images {width} px wide")
        return self.eit_p(x).flatten(2).transpose(1, 2)


class EIT(SplitTransformer):
    """EIT: overlapping patch embedding, class token, no positions, convolution that decreases with depth.

    After the authors' code ("EIT: Efficiently Lead Inductive Biases to ViT", arXiv 2203.07116). The channels
    that attend grow by `attention_width`, the first ones convolve. Of the published defaults, drop rates 0
    and no layer before the logits are those of all four presets. Other arguments as for `SplitTransformer`.
    """

    def __init__(
        self,
        *,
        kernel_size: int,
        stride: int,
        pool: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        pos_embed: str = "none",
        **kwargs: Any,
    ) -> None:
        widths = [attention_width(layer, depth, embed_dim, num_heads) for layer in range(depth)]
        embed = {"kernel_size": kernel_size, "stride": stride, "pool": pool}
        super().__init__(
            widths,
            conv_first=True,
            embed_layer=partial(_embed, **embed),
            patch_size=stride * pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            pos_embed=pos_embed,
            **kwargs,
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as the authors do: linear truncated normal 0.01, convolution Kaiming over fan-out."""
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.01)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _embed(*, patch_size: int, dynamic_img_pad: bool, **kwargs: Any) -> OverlapPatchEmbed:
    """The patch embedding, from the arguments timm's VisionTransformer gives to one."""
    return OverlapPatchEmbed(**kwargs)


def attention_width(layer: int, depth: int, dim: int, heads: int) -> int:
    """Channels that attend in block ``layer`` of ``depth`` (from 0); the other ``dim`` - width convolve.

    Published (authors' code): heads · ⌊(dim / heads) · (layer + 1) / depth⌋, so that every head has the same
    whole number of channels; all channels in the last block.

    >>> [attention_width(layer, 8, 330, 10) for layer in range(8)]
    [40, 80, 120, 160, 200, 240, 280, 330]
    """
    if dim % heads:
        raise FourierBiasError(f"{dim} channels cannot be shared by {heads} heads; choose a multiple")
    return dim // heads * (layer + 1) // depth * heads


_PUBLISHED = {"kernel_size": 16, "stride": 4, "pool": 3}
_PRESETS = {
    "eit_mini": {**_PUBLISHED, "embed_dim": 250, "depth": 5, "num_heads": 10},
    "eit_tiny": {**_PUBLISHED, "embed_dim": 330, "depth": 8, "num_heads": 10},
    "eit_base": {**_PUBLISHED, "embed_dim": 400, "depth": 10, "num_heads": 16},
    "eit_large": {**_PUBLISHED, "embed_dim": 464, "depth": 12, "num_heads": 16},
    "eit": {"kernel_size": 3, "stride": 1, "pool": 4, "embed_dim": 120, "depth": 6, "num_heads": 10},
}

_HEADS = {"first_conv": "patch_embed.eit_p.conv", "classifier": "head", "fixed_input_size": True}

default_cfgs = generate_default_cfgs(
    {
        # DeiT's preprocessing, on whose training script the authors' is built.
        name: reference_cfg(
            num_classes=1000,
            input_size=(3, 224, 224),
            crop_pct=0.875,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            **_HEADS,
        )
        for name in ("eit_mini", "eit_tiny", "eit_base", "eit_large")
    }
    | {"eit": reference_cfg(**_HEADS)}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> EIT:
    return build_model_with_cfg(
        EIT,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**_PRESETS[variant], **kwargs},
    )


@register_model
def eit_mini(pretrained: bool = False, **kwargs: Any) -> EIT:
    """Build EIT-Mini: width 250, depth 5, 10 heads; 3 512 750 parameters at 1000 classes (published).

    Input (B, 3, 224, 224). No weights are downloaded: the authors' files load by name.
    """
    return _create("eit_mini", pretrained, **kwargs)


@register_model
def eit_tiny(pretrained: bool = False, **kwargs: Any) -> EIT:
    """Build EIT-Tiny: width 330, depth 8, 10 heads; 8 927 230 parameters at 1000 classes (published).

    Input (B, 3, 224, 224). No weights are downloaded: the authors' files load by name.
    """
    return _create("eit_tiny", pretrained, **kwargs)


@register_model
def eit_base(pretrained: bool = False, **kwargs: Any) -> EIT:
    """Build EIT-Base: width 400, depth 10, 16 heads; 15 972 280 parameters at 1000 classes (published).

    Input (B, 3, 224, 224). No weights are downloaded: the authors' files load by name.
    """
    return _create("eit_base", pretrained, **kwargs)


@register_model
def eit_large(pretrained: bool = False, **kwargs: Any) -> EIT:
    """Build EIT-Large: width 464, depth 12, 16 heads; 25 305 592 parameters at 1000 classes (published).

    Input (B, 3, 224, 224). No weights are downloaded: the authors' files load by name.
    """
    return _create("eit_large", pretrained, **kwargs)


@register_model
def eit(pretrained: bool = False, **kwargs: Any) -> EIT:
    """Build the reference EIT: 8×8 tokens of a 32×32 image, width 120, depth 6, 10 heads.

    The port is ours: width, depth and heads are chosen for the size of `vit` (0.86 M parameters) and for
    shares that fall by the same 20 channels in each block. Patch embedding 3/1/4 (kernel, stride, pooling) is
    the default of the authors' class, meant for 32×32; whether they trained it so is not known. Input
    (B, 3, 32, 32), 10 classes unless said otherwise.

    >>> import timm
    >>> model = timm.create_model("eit")
    >>> [block.attention_width for block in model.blocks], model.patch_embed.grid_size
    ([20, 40, 60, 80, 100, 120], (8, 8))
    """
    return _create("eit", pretrained, **kwargs)
