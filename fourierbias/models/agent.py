"""The agent CNN of Bootstrapping ViTs: a transformer's blocks with a convolution in place of the attention.

"Bootstrapping ViTs: Towards Liberating Vision Transformers from Pre-training" (Zhang et al., CVPR 2022, arXiv
2112.03552). One tap of the convolution stands for one head of the ViT. An agent is either stand-alone, with
weights of its own, or `share_weights` ties it to a ViT, whose attention and MLP weights it then convolves
with; `AgentCNN.standalone` makes the former out of the latter.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import FourierBiasError
from ._cfg import reference_cfg

default_cfgs = generate_default_cfgs(
    {
        "agent": reference_cfg(first_conv="stem", classifier="head"),
        "agent_res": reference_cfg(first_conv="stem.0", classifier="head"),
    }
)


def kernel_size(heads: int) -> int:
    """Side ⌈√heads⌉ of the kernel whose taps ``heads`` fill row by row (published).

    Raises FourierBiasError where that is even: such a kernel has no centre.

    >>> [kernel_size(heads) for heads in (1, 6, 9, 17)]
    [1, 3, 3, 5]
    """
    side = math.isqrt(heads - 1) + 1 if heads > 0 else 0
    if side % 2 == 0:
        raise FourierBiasError(
            f"{heads} heads do not fit the taps of an odd kernel; choose 1, 5 to 9, or 17 to 25 heads"
        )
    return side


def tap_kernel(taps: Tensor) -> Tensor:
    """Return taps (Co, Ci, heads), in row-major order, as a kernel (Co, Ci, K, K), zero beyond the last.

    With six heads these are the upper two rows of a 3×3 kernel, as in the authors' code: a one-sided field.

    >>> tap_kernel(torch.ones(1, 1, 6))[0, 0].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """
    side = kernel_size(taps.shape[-1])
    return F.pad(taps, (0, side**2 - taps.shape[-1])).unflatten(-1, (side, side))


def attention_taps(attention: Attention) -> Tensor:
    """Return W_h = W_O^h W_V^h of each head of a timm attention as taps (D, D, heads) (published).

    The bias of the values has no part in them: the authors' code leaves it out.

    >>> attention_taps(Attention(18, num_heads=9)).shape
    torch.Size([18, 18, 9])
    """
    heads = attention.num_heads
    values = attention.qkv.weight.chunk(3)[2].unflatten(0, (heads, -1))
    return torch.einsum("ohk,hki->oih", attention.proj.weight.unflatten(1, (heads, -1)), values)


class TapConv2d(nn.Module):
    """Convolution with one full (Co, Ci) matrix per tap, of as many taps as there are heads.

    Maps (B, D, H, W) to the same shape, zero-padded. ``weight`` is (D, D, heads), Xavier-uniform as in the
    authors' code.
    """

    fourierbias_kind = "conv"

    def __init__(self, dim: int, heads: int, **factory: Any) -> None:
        super().__init__()
        self.padding = kernel_size(heads) // 2
        self.weight = nn.Parameter(torch.empty(dim, dim, heads, **factory))
        self.bias = nn.Parameter(torch.zeros(dim, **factory))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, tap_kernel(self.weight), self.bias, padding=self.padding)


class SharedTapConv2d(nn.Module):
    """The convolution whose taps are W_O^h W_V^h of an attention and whose bias is that of its projection.

    It holds a reference to the attention: both train the same parameters, and the taps are multiplied out
    anew in each forward. Maps (B, D, H, W) to the same shape. Shifts are one `F.conv2d` over the stacked taps
    (derived: equal to the paper's sum over shift matrices, without its (H·W)² cost).
    """

    fourierbias_kind = "conv"

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.padding = kernel_size(attention.num_heads) // 2
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        kernel = tap_kernel(attention_taps(self.attention))
        return F.conv2d(x, kernel, self.attention.proj.bias, padding=self.padding)

    def standalone(self) -> TapConv2d:
        """Return the same convolution with its taps multiplied out."""
        taps, bias = attention_taps(self.attention).detach(), self.attention.proj.bias
        own = TapConv2d(len(taps), taps.shape[-1], device="meta").train(self.training)  # draws nothing
        own.weight = nn.Parameter(taps)
        own.bias = nn.Parameter(taps.new_zeros(len(taps)) if bias is None else bias.detach().clone())
        return own


class AgentBlock(nn.Module):
    """BatchNorm, convolution, residual; BatchNorm, MLP, residual, on maps (B, D, H, W).

    The MLP is the paper's two 1×1 convolutions, computed as linear layers with channels last: the weights
    then have the shapes of a ViT's, and it takes half the time.
    """

    fourierbias_kind = mixer_kind = "conv"

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **factory)
        self.token_mixer = TapConv2d(dim, heads, **factory)
        self.norm2 = nn.BatchNorm2d(dim, **factory)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AgentCNN(nn.Module):
    """A CNN of a ViT's width and depth: stem, `AgentBlock`, BatchNorm, GELU, global average, linear.

    Images (B, C, H, W) to logits (B, classes). ``stem`` is ``"patch"`` (base form: one convolution of
    ``patch_size`` and stride) or ``"residual"`` (that of the residual form, to half resolution);
    ``pool_after`` names the blocks after which maps are averaged 2×2, each block's output being what it is
    before. Raises FourierBiasError for a number of heads that fits no odd kernel.

    >>> AgentCNN(embed_dim=16, depth=2, num_heads=5)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 108,
        depth: int = 6,
        num_heads: int = 9,
        mlp_ratio: float = 4.0,
        stem: str = "patch",
        patch_size: int = 4,
        stem_width: int = 32,
        pool_after: Sequence[int] = (),
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_classes, self.num_heads = num_classes, num_heads
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.pool_after = frozenset(pool_after)
        if stem == "patch":
            self.stem: nn.Module = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, **factory)
        elif stem == "residual":
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False, **factory),
                nn.BatchNorm2d(stem_width, **factory),
                nn.GELU(),
                nn.Conv2d(stem_width, embed_dim, 3, stride=2, padding=1, **factory),
            )
        else:
            raise FourierBiasError(f"stem {stem!r} is not known: choose patch or residual")
        self.blocks = nn.ModuleList(
            AgentBlock(embed_dim, num_heads, mlp_ratio, **factory) for _ in range(depth)
        )
        self.norm = nn.BatchNorm2d(embed_dim, **factory)
        self.act = nn.GELU()
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = []
        reduction = patch_size if stem == "patch" else 2
        for index in range(depth):
            self.feature_info.append(
                {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": reduction}
            )
            reduction *= 2 if index in self.pool_after else 1
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place, none for 0 classes; the pooling is always the average."""
        if global_pool not in (None, "avg"):
            raise FourierBiasError(f"the agent pools by average, not {global_pool!r}")
        self.num_classes = num_classes
        like = {"device": self.norm.weight.device, "dtype": self.norm.weight.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **like) if num_classes else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return (final features, outputs of the chosen blocks), in timm's way; NCHW only.

        The output of a block is what it is before the pooling that may follow.
        """
        if output_fmt != "NCHW":
            raise FourierBiasError(f"the agent's features are NCHW, not {output_fmt}")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        x = self.stem(x)
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x)
            if index in chosen:
                intermediates.append(self.act(self.norm(x)) if norm else x)
            x = self._pool(index, x)
        return intermediates if intermediates_only else (self.act(self.norm(x)), intermediates)

    def _pool(self, index: int, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if index in self.pool_after else x

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised maps (B, D, H, W) before the average."""
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = self._pool(index, block(x))
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average maps (B, D, H, W) and classify them."""
        x = self.head_drop(x.mean((-2, -1)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def standalone(self) -> "AgentCNN":
        """Return the same function with weights of its own, shared ones multiplied out.

        An agent that shares none is returned itself. The state dict is that of the architecture as
        `timm.create_model` builds it.
        """
        shared = [m for m in self.modules() if isinstance(m, SharedTapConv2d)]
        # deepcopy takes what the memo holds for a module instead of copying it.
        return copy.deepcopy(self, {id(m): m.standalone() for m in shared}) if shared else self


def share_weights(agent: AgentCNN, vit: VisionTransformer) -> AgentCNN:
    """Make ``agent`` convolve with the attention and MLP weights of ``vit``, the same parameters; return it.

    Its own taps and MLPs are given up; stem, BatchNorm and classifier stay its own, as in the authors' code.
    Raises FourierBiasError where the two do not fit: another depth, width or number of heads, or blocks
    without a plain attention of full width.

    >>> import timm
    >>> vit = timm.create_model("test_vit", embed_dim=90, num_heads=5, depth=1)
    >>> agent = share_weights(AgentCNN(embed_dim=90, num_heads=5, depth=1), vit)
    >>> agent.blocks[0].token_mixer.attention.qkv.weight is vit.blocks[0].attn.qkv.weight
    True
    """
    blocks = getattr(vit, "blocks", ())
    if len(blocks) != len(agent.blocks):
        raise FourierBiasError(
            f"the agent has {len(agent.blocks)} blocks, the ViT {len(blocks)}: use one depth"
        )
    for index, block in enumerate(blocks):
        if not _is_plain(block, agent.embed_dim):
            raise FourierBiasError(
                f"block {index} of the ViT has no plain attention and MLP of width {agent.embed_dim}, the "
                "agent's, to share; use a plain ViT of that width"
            )
        kernel_size(block.attn.num_heads)
    for own, block in zip(agent.blocks, blocks, strict=True):
        own.token_mixer, own.mlp = SharedTapConv2d(block.attn), block.mlp
    agent.num_heads = blocks[0].attn.num_heads
    return agent


def _is_plain(block: nn.Module, width: int) -> bool:
    """Whether attention and MLP are plain, over all channels: no gate, no inner norm, no scale."""
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    return (
        type(attention) is Attention
        and type(mlp) is Mlp
        and attention.qkv.in_features == attention.proj.out_features == width
        and attention.gate is None
        and all(isinstance(m, nn.Identity) for m in (attention.norm, mlp.norm, block.ls1, block.ls2))
    )


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AgentCNN:
    return build_model_with_cfg(
        AgentCNN, variant, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs
    )


@register_model
def agent(pretrained: bool = False, **kwargs: Any) -> AgentCNN:
    """Build the base agent CNN at the size of `vit`: patch 4, width 108, depth 6, 3×3 taps, 1.2 M parameters.

    The form is the paper's (patch convolution, constant resolution); the size, for 32×32 input, is ours.
    Input (B, 3, 32, 32), 10 classes unless said otherwise; further arguments as for `AgentCNN`.

    >>> import timm
    >>> timm.create_model("agent").feature_info[-1]
    {'module': 'blocks.5', 'num_chs': 108, 'reduction': 4}
    """
    return _create("agent", pretrained, **kwargs)


@register_model
def agent_res(pretrained: bool = False, **kwargs: Any) -> AgentCNN:
    """Build the residual-stem agent CNN at the size of `vit`: grids 16, 8, 4, pooled after blocks 0 and 1.

    The paper's has a ResNet stem to twice the ViT's grid and pools after the same blocks; for 32×32 input the
    stem is ours: 3×3 to 32 channels, BatchNorm, GELU, 3×3 of stride 2, without max-pooling.
    Input (B, 3, 32, 32), 10 classes unless said otherwise; further arguments as for `AgentCNN`.

    >>> import timm
    >>> [info["reduction"] for info in timm.create_model("agent_res").feature_info]
    [2, 4, 8, 8, 8, 8]
    """
    return _create("agent_res", pretrained, **{"stem": "residual", "pool_after": (0, 1), **kwargs})
