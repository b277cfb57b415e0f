"""What is trained and how it is measured: networks and their loss, averaged weights, accuracy."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import FourierBiasError
from .data import Data, Split, evaluation_batches


class Learner(nn.Module):
    """What is trained: one network or several, and their loss.

    ``networks`` maps a suffix to each network that is to be evaluated, averaged and saved; the main one has
    the suffix "". Networks may share parameters.
    """

    networks: dict[str, nn.Module]

    def loss(self, images: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a batch, and scalars to log (``accuracy`` among them).

        ``images`` are (B, C, H, W), ``targets`` (B,) labels or (B, classes) shares, ``progress`` is
        epoch / epochs, in [0, 1). All are means over the batch: several processes each see a part of it.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that their own networks exempt from weight decay, for timm's optimisers."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if module is not self and hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }


class Classifier(Learner):
    """One network, trained by cross-entropy with label smoothing."""

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The network itself, under the empty suffix."""
        return {"": self.model}

    def loss(self, images: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, dict[str, Any]]:
        """Return the smoothed cross-entropy of a batch and its accuracy."""
        logits = self.model(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)
        return loss, {"accuracy": batch_accuracy(logits, targets)}


def batch_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of logits (B, classes) whose largest is the target's (a label, or the largest share).

    >>> batch_accuracy(torch.eye(2), torch.tensor([0, 0])).item()
    0.5
    """
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.detach().argmax(1) == labels).float().mean()


class LearnerEma(ModelEmaV3):
    """timm's average of the weights, where networks may share parameters (each is averaged once)."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move every parameter and buffer towards the model's."""
        average, current = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        floating = [i for i, tensor in enumerate(average) if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [average[i] for i in floating], [current[i] for i in floating], weight=1.0 - decay
        )
        for i in set(range(len(average))) - set(floating):
            average[i].copy_(current[i])


def evaluate(
    network: nn.Module,
    data: Data | Split,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 500,
) -> dict[str, float]:
    """Return ``accuracy`` (a share) and ``loss`` (cross-entropy, nats) of a network on the evaluation images.

    Computed in float32, or autocast to ``dtype``. The network's mode is left as it was. Raises
    FourierBiasError if it has fewer outputs than there are classes.
    """
    split = data.evaluation if isinstance(data, Data) else data
    device = torch.device(device or next(network.parameters()).device)
    return means(evaluation_sums(network, split, device, dtype=dtype, batch_size=batch_size))


def means(sums: Tensor) -> dict[str, float]:
    """Return what `evaluate` does, from the sums (correct, loss, images) over all of the images."""
    correct, loss, count = sums.tolist()
    return {"accuracy": correct / count, "loss": loss / count}


@torch.no_grad()
def evaluation_sums(
    network: nn.Module,
    split: Split,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 500,
) -> Tensor:
    """Return the number of correct answers, the sum of losses and the number of images, (3,) in float64.

    Those of parts of a split add up to those of the whole; computed as `evaluate` says.
    """
    training = network.training
    network.to(device).eval()
    correct = loss = count = 0.0
    try:
        for images, labels in evaluation_batches(split, batch_size, device) if len(split) else ():
            with autocast(device, dtype):
                logits = network(images).float()
            if logits.shape[1] <= int(labels.max()):
                raise FourierBiasError(
                    f"the network has {logits.shape[1]} classes, the images more; evaluate on its own data"
                )
            correct += float((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    finally:
        network.train(training)
    return torch.tensor([correct, loss, count], dtype=torch.float64)


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the context in which a forward pass runs: autocast to ``dtype``, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def fit_machine(learner: Learner, device: torch.device, dtype: torch.dtype | None) -> None:
    """Choose memory format and attention kernel for speed; neither changes what is computed."""
    for network in learner.networks.values():
        if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            network.to(memory_format=torch.channels_last)
    if device.type == "cpu" and dtype is torch.bfloat16:
        # The fused kernel is half as fast as products and a softmax written out, in bfloat16 on CPUs.
        for module in learner.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return float32 logits (B, classes) in evaluation mode, and leave the mode as it was."""
    training = network.training
    logits = network.eval()(images).float()
    network.train(training)
    return logits
