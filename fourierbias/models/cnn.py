"""The reference convolutional network `cnn`: a timm ResNet for 32×32 input."""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from ._cfg import reference_cfg

default_cfgs = generate_default_cfgs({"cnn": reference_cfg(first_conv="conv1", classifier="fc")})

CNN_BODY = {"block": BasicBlock, "layers": (2, 2, 4, 2), "channels": (16, 32, 64, 128)}


class SmallResNet(ResNet):
    """timm's ResNet with the stem of He et al. (2016, sec. 4.2) for small images.

    The stem is one 3×3 convolution of stride 1 with no pooling, so that the stages of a (B, 3, 32, 32)
    input have grids 32, 16, 8 and 4; its width is that of the first stage. Other arguments are those of
    `timm.models.resnet.ResNet`.

    >>> SmallResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8)).feature_info[-1]["reduction"]
    8
    """

    def __init__(self, *args: Any, channels: Sequence[int] = (64, 128, 256, 512), **kwargs: Any) -> None:
        # timm's deep stem is the one whose width can be chosen; one convolution then takes its place.
        super().__init__(*args, channels=channels, stem_type="deep", stem_width=channels[0] // 2, **kwargs)
        first = self.conv1[0].weight
        factory = {"device": first.device, "dtype": first.dtype}
        self.conv1 = nn.Conv2d(first.shape[1], self.bn1.num_features, 3, padding=1, bias=False, **factory)
        if not first.is_meta:
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info in self.feature_info:  # timm counts the halvings of the stem it built
            info["reduction"] //= 2 if info["module"] == "act1" else 4


@register_model
def cnn(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Build the reference CNN: ResNet basic blocks 2-2-4-2 of 16/32/64/128 channels, 0.85 M parameters.

    Input (B, 3, 32, 32), 10 classes unless said otherwise; further arguments as for timm's ResNet.

    >>> import timm
    >>> sum(p.numel() for p in timm.create_model("cnn").parameters())
    849434
    """
    return build_model_with_cfg(SmallResNet, "cnn", pretrained, **{**CNN_BODY, **kwargs})
