"""One training on several processes: gradients and batch statistics are those of the global batch.

Each process has a share of every batch. Its loss is a mean over that share, so shares of unequal size are
weighted (`Run.update`), and what a network computes over a batch, in batch normalisation, is computed over
all shares (`GlobalBatchNorm`): a training then is the same, but for rounding, on any number of processes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from .. import distributed
from .learner import Learner

LossFunction = Callable[[Tensor, Tensor, float], tuple[Tensor, dict[str, Any]]]


class _Loss(nn.Module):
    """A learner's loss as the forward pass that DistributedDataParallel takes part in."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner
        # Unused itself, for where all others are used DistributedDataParallel warns that it need not look.
        self.unused = nn.Parameter(next(learner.parameters()).new_zeros(()))

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, dict[str, Any]]:
        loss, metrics = self.learner.loss(images, targets, progress)
        # DistributedDataParallel expects a gradient for all that its outputs depend on.
        return loss, {
            key: value.detach() if torch.is_tensor(value) else value for key, value in metrics.items()
        }


def global_loss(learner: Learner) -> LossFunction:
    """Return ``learner.loss``, with gradients averaged over processes if there are several.

    All processes must call it at the same time: parameters become those of the first. It is for the learner
    as it stands; after parameters have been added, ask for another.
    """
    if distributed.world_size() == 1:
        return learner.loss
    # Which parameters have a part in the loss is the network's affair.
    return DistributedDataParallel(_Loss(learner), find_unused_parameters=True)


def global_batch_norm() -> Any:
    """Return the context in which batch normalisation is that of the global batch (`GlobalBatchNorm`)."""
    return GlobalBatchNorm() if distributed.world_size() > 1 else nullcontext()


class GlobalBatchNorm(TorchFunctionMode):
    """Within this context `F.batch_norm` takes its statistics in training over the batches of all processes.

    The modules stay what they are, whatever subclass of BatchNorm, and so do their copies and their files.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm and kwargs.get("training"):
            return _batch_norm(*args, **kwargs)
        return function(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalise x (B, C, …) by the statistics of all processes, and move the running ones (C,) to them."""
    mean, var, count = global_moments(x)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * (count / (count - 1).clamp(min=1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return _Normalise.apply(x, weight, bias, mean, var, count, eps)


@torch.no_grad()
def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased variance (C,) and number of values () of the channels of x (B, C, …).

    They are those of all processes' x together, whose batches may differ in size.

    >>> mean, var, count = global_moments(torch.tensor([[1.0], [3.0]]))
    >>> mean.item(), var.item(), count.item()
    (2.0, 1.0, 2.0)
    """
    # Channels are few: in float64 their moments can be added up as they are, without loss.
    exact = torch.promote_types(x.dtype, torch.float32)
    mean, var = (moment.double() for moment in torch.batch_norm_update_stats(x.to(exact), None, None, 0.0))
    count = torch.full_like(mean, x.numel() // x.shape[1])
    sums = distributed.total(torch.stack([count, count * mean, count * (var + mean**2)]))
    count, mean, square = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    var = (square - mean**2).clamp(min=0)
    return mean.to(exact), var.to(exact), count[0]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) · weight + bias, where mean and var are functions of all processes' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        # As if mean and var were constants. d_weight and d_bias are Σ dy x̂ and Σ dy over this process's x.
        inverse = (var + ctx.eps).rsqrt()
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, mean, inverse, False, ctx.eps, [True, True, True]
        )
        # Through mean and var, every x̂ has a part in every dx: weight / σ · (-mean(dy) - x̂ mean(dy x̂)).
        means = distributed.total(torch.stack([d_weight, d_bias]).double()) / count
        factor = -inverse * (1 if weight is None else weight)
        scale, shift = (factor * means).to(mean.dtype)
        dx += F.batch_norm(x, mean, var, scale, shift, eps=ctx.eps)
        return dx, None if weight is None else d_weight, None if weight is None else d_bias, *4 * [None]
