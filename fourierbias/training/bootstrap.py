"""Bootstrapping: a ViT trained together with an agent CNN that teaches it, and may share its weights.

"Bootstrapping ViTs: Towards Liberating Vision Transformers from Pre-training" (Zhang et al., CVPR 2022, arXiv
2112.03552). What is published, and where this differs from the authors' code, is said function by function.
The paper's alignment of gradients (Algorithm 1) is not in that code, and not here: losses are added.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FourierBiasError
from ..models.agent import AgentCNN, share_weights
from ..models.checkpoint import create
from .learner import Learner, batch_accuracy
from .recipe import Recipe

MODES = ("joint", "shared")
ALIGNMENTS = ("2d", "1d")
AGENTS = ("agent", "agent_res")
AGENT = "agent"  # the suffix of the agent's checkpoint


def mutual_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Distillation T² · KL(teacher ‖ student) of logits (B, classes) softened by T, mean over the batch.

    Published (paper; T = 4 in the authors' code). The teacher gets no gradient.

    >>> mutual_loss(torch.eye(2), torch.eye(2)).item()
    0.0
    """
    soft = [F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher.detach())]
    return F.kl_div(*soft, reduction="batchmean", log_target=True) * temperature**2


def align(a: Tensor, b: Tensor, alignment: str = "2d") -> tuple[Tensor, Tensor]:
    """Return two maps (B, D, H, W) of different grids as tokens (B, N, D) of one number N.

    ``"2d"`` averages both to the coarser grid (a variant in the paper's ablations; that sides need not divide
    is ours). ``"1d"`` is the authors' code: the longer raster sequence is averaged over runs of tokens, which
    pairs rows but not columns; raises FourierBiasError where the lengths do not divide.

    >>> [align(torch.rand(2, 5, 4, 4), torch.rand(2, 5, 2, 2), how)[0].shape[1] for how in ("2d", "1d")]
    [4, 4]
    """
    if alignment == "2d":
        grid = [min(sides) for sides in zip(a.shape[-2:], b.shape[-2:], strict=True)]
        pooled = [x if list(x.shape[-2:]) == grid else F.adaptive_avg_pool2d(x, grid) for x in (a, b)]
        sequences = [x.flatten(2) for x in pooled]
    else:
        sequences = [x.flatten(2) for x in (a, b)]
        longer, shorter = sorted((x.shape[-1] for x in sequences), reverse=True)
        if longer % shorter:
            raise FourierBiasError(
                f"{longer} tokens cannot be averaged to {shorter} in runs of one length; use alignment 2d"
            )
        sequences = [F.avg_pool1d(x, x.shape[-1] // shorter) for x in sequences]
    first, second = (x.transpose(1, 2) for x in sequences)
    return first, second


def hint_loss(student: Tensor, teacher: Tensor, alignment: str = "2d") -> Tensor:
    """Mean squared difference of the tokens of two maps (B, D, H, W), each token by LayerNorm without affine.

    Published (authors' code). Derived: it is 2 - 2 · corr(student, teacher) of each token, averaged over
    tokens, that is the paper's eq. 6 on centred tokens. The teacher gets no gradient.

    >>> x = torch.rand(2, 64, 4, 4)
    >>> round(hint_loss(x, 3 * x + 1).item(), 3), round(hint_loss(x, -x).item(), 2)
    (0.0, 4.0)
    """
    tokens = align(student.float(), teacher.detach().float(), alignment)
    return F.mse_loss(*(F.layer_norm(x, x.shape[-1:]) for x in tokens))


def hint_decay(progress: float, epochs: int) -> float:
    """Factor of the hint at ``progress`` = epoch / epochs: 1 in the first epoch, linearly to 0 in the last.

    Ours at its end: max(0, 1 - epoch / (epochs - 1)) with epochs counted from 0, where the authors' code has
    1 - epoch / epochs and so ends at 1 / epochs. A training of one epoch, its last, gets no hint.

    >>> [hint_decay(epoch / 5, 5) for epoch in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    epoch = int(progress * epochs + 1e-6)  # constant within an epoch, whatever the rounding of the quotient
    return max(0.0, 1 - epoch / (epochs - 1)) if epochs > 1 else 0.0


def make_agent(vit: nn.Module, arch: str = "agent") -> AgentCNN:
    """Build the agent (``agent`` or ``agent_res``) that fits a ViT: its width, depth, heads, MLP and classes.

    ``built_from`` says how to build it again. Raises FourierBiasError for an unknown name, for heads that fit
    no odd kernel, and for a network without the parts of a ViT.
    """
    if arch not in AGENTS:
        raise FourierBiasError(f"agent {arch!r} is not known: choose from {', '.join(AGENTS)}")
    try:
        block = vit.blocks[0]
        size = {
            "in_chans": vit.in_chans,
            "embed_dim": vit.embed_dim,
            "depth": len(vit.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        }
        if arch == "agent":
            size["patch_size"] = max(vit.patch_embed.patch_size)
    except (AttributeError, IndexError, TypeError) as error:
        raise FourierBiasError(
            f"no agent can be built for {type(vit).__name__}: it is no ViT ({error})"
        ) from None
    return create(arch, num_classes=vit.num_classes, **size)


class Bootstrap(Learner):
    """A ViT and its agent CNN, trained together; the ViT is the main network, the agent has suffix "agent".

    ``mode`` "joint" keeps their weights apart, "shared" makes the agent convolve with the ViT's
    (`share_weights`). ``agent`` is a network or the name of the form to build. ``epochs`` is that of the
    training, for the decay of the hint. Loss (published, authors' code): cross-entropy of each, mutual
    distillation both ways with ``mutual_weight``, feature hint from the agent to the ViT over all pairs of
    blocks with ``hint_weight``, decaying; in shared mode all halved (0.5, 0.5, 5). The authors give joint
    networks an optimiser each; one over both takes the same steps.

    Raises FourierBiasError if the two have different numbers of classes, or blocks that cannot be paired.

    >>> learner = Bootstrap(create("vit", num_classes=10, depth=1), mode="shared", epochs=2)
    >>> sorted(learner.networks)
    ['', 'agent']
    """

    def __init__(
        self,
        vit: nn.Module,
        agent: AgentCNN | str = "agent",
        *,
        mode: str = "joint",
        epochs: int,
        smoothing: float = 0.0,
        alignment: str = "2d",
        temperature: float = 4.0,
        mutual_weight: float = 1.0,
        hint_weight: float = 10.0,
    ) -> None:
        super().__init__()
        for name, value, choices in (("mode", mode, MODES), ("alignment", alignment, ALIGNMENTS)):
            if value not in choices:
                raise FourierBiasError(f"{name} {value!r} is not known: choose from {', '.join(choices)}")
        agent = make_agent(vit, agent) if isinstance(agent, str) else agent
        if agent.num_classes != vit.num_classes:
            raise FourierBiasError(
                f"the agent has {agent.num_classes} classes, the ViT {vit.num_classes}; build both with one"
            )
        widths = [[info["num_chs"] for info in network.feature_info] for network in (agent, vit)]
        if hint_weight and widths[0] != widths[1]:
            raise FourierBiasError(
                f"the agent's blocks (widths {widths[0]}) cannot be paired with the ViT's ({widths[1]}) for "
                "the feature hint; use one width and depth, or hint_weight 0"
            )
        self.vit = vit
        # Channels last is what the agent's linear layers want.
        self.agent = (share_weights(agent, vit) if mode == "shared" else agent).to(
            memory_format=torch.channels_last
        )
        self.mode, self.epochs, self.smoothing, self.alignment = mode, epochs, smoothing, alignment
        self.temperature, self.mutual_weight, self.hint_weight = temperature, mutual_weight, hint_weight
        self.form = getattr(agent, "built_from", {}).get("arch", type(agent).__name__)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The ViT under "", and under "agent" the agent as it stands alone (in shared mode a copy)."""
        return {"": self.vit, AGENT: self.agent.standalone()}

    @property
    def scale(self) -> float:
        """Factor on the whole loss: a half in shared mode, whose weights get the gradients of both."""
        return 0.5 if self.mode == "shared" else 1.0

    def loss(self, images: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a batch, its parts as they stand before weighting, and both accuracies."""
        decay = hint_decay(progress, self.epochs) if self.hint_weight else 0.0
        (vit_logits, vit_maps), (agent_logits, agent_maps) = (
            _logits_and_maps(network, images, with_maps=decay > 0) for network in (self.vit, self.agent)
        )
        entropies = [
            F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)
            for logits in (vit_logits, agent_logits)
        ]
        mutual = mutual_loss(vit_logits, agent_logits, self.temperature) + mutual_loss(
            agent_logits, vit_logits, self.temperature
        )
        loss = sum(entropies) + self.mutual_weight * mutual
        metrics = {
            "accuracy": batch_accuracy(vit_logits, targets),
            "agent_train_accuracy": batch_accuracy(agent_logits, targets),
            "vit_cross_entropy": entropies[0],
            "agent_cross_entropy": entropies[1],
            "mutual": mutual,
            "hint_weight": self.scale * self.hint_weight * decay,
        }
        if decay > 0:
            pairs = zip(vit_maps, agent_maps, strict=True)
            metrics["hint"] = sum(hint_loss(v, a, self.alignment) for v, a in pairs)
            loss = loss + self.hint_weight * decay * metrics["hint"]
        return self.scale * loss, metrics


def _logits_and_maps(network: nn.Module, images: Tensor, *, with_maps: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, classes) and, if asked for, the maps (B, D, H, W) of every block, class token dropped."""
    if not with_maps:
        return network(images), []
    features, maps = network.forward_intermediates(images)
    return network.forward_head(features), maps


def bootstrap(mode: str = "joint", **options: Any) -> Callable[[nn.Module, Recipe], Bootstrap]:
    """Return what `fourierbias.train` takes as ``learner``: a `Bootstrap` made of a ViT and its recipe.

    ``options`` are those of `Bootstrap` besides epochs and smoothing, which are the recipe's.

    >>> make = bootstrap("joint", agent="agent_res")
    >>> make(create("vit", num_classes=10), Recipe(epochs=2)).agent.num_heads
    9
    """

    def learner(vit: nn.Module, recipe: Recipe) -> Bootstrap:
        return Bootstrap(vit, mode=mode, epochs=recipe.epochs, smoothing=recipe.smoothing, **options)

    return learner
