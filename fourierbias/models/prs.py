"""The reference network `prs`: the CNN `cnn` with convolutions that can become attention in training."""

from collections.abc import Iterable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ._cfg import reference_cfg
from .cnn import CNN_BODY, SmallResNet
from .reparam import make_reparameterizable

default_cfgs = generate_default_cfgs({"prs": reference_cfg(first_conv="conv1", classifier="fc")})


class ReparamResNet(SmallResNet):
    """`SmallResNet` whose convolutions named by ``reparam_layers`` are `ReparamConv2d`, not switched yet.

    ``reparam_layers`` are names or glob patterns as for `fourierbias.recast`, which says what it raises.
    """

    def __init__(self, *args: Any, reparam_layers: str | Iterable[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_reparameterizable(self, reparam_layers)


@register_model
def prs(pretrained: bool = False, **kwargs: Any) -> ReparamResNet:
    """Build the reference network for Progressive Reparameterization Scheduling: `cnn`, but for the schedule.

    Body, parameters and state dict are those of `cnn` as long as nothing has switched. The twelve 3×3
    convolutions of its last two stages can become attention: on 32×32 images these have grids of 8×8 and 4×4,
    while the earlier ones, of up to 1024 tokens, are too costly for nine heads on a CPU; ``reparam_layers``
    (names or glob patterns) chooses others. Which base network and layers the paper (Lee et al., arXiv
    2210.01370) uses is not known to us: this choice is ours.

    >>> import timm
    >>> from fourierbias.models.reparam import reparam_layers
    >>> len(reparam_layers(timm.create_model("prs")))
    12
    """
    options = {"reparam_layers": ("layer3.*", "layer4.*"), **CNN_BODY, **kwargs}
    return build_model_with_cfg(ReparamResNet, "prs", pretrained, **options)
