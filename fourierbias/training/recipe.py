"""How a network is trained: one frozen record, the same for every reference model."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import FourierBiasError

AMP_CHOICES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training; the defaults are those of the reference checkpoints.

    ``lr`` rises linearly over ``warmup_epochs`` (at most a fifth of the training) and falls by a cosine to
    ``min_lr``, at every update. ``fraction`` takes that share of the training images (class-balanced, always
    the same ones), ``holdout`` takes so many of them out and evaluates on these in place of the test images.
    ``mixup`` and ``cutmix`` are the α of timm's Mixup, 0 for none. ``ema`` is the final decay of the
    average of the weights, which is what is evaluated and saved; it warms up, so short runs are sane.
    ``evaluate_every`` is in epochs (the last epoch is always evaluated), ``save_every`` in seconds.
    ``opt`` is any optimiser of timm's that needs first derivatives only; ``nmuon`` is Muon with Nesterov
    momentum and steps of the size of AdamW's for matrices and convolutions, and NAdamW for everything else.
    ``schedule``, ``schedule_by``, ``gate``, ``gate_lr`` (a factor on ``lr`` for gates) and ``locality`` are
    for networks with reparameterizable convolutions.

    Raises FourierBiasError for values out of range.

    >>> Recipe(epochs=2).batch_size
    128
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 1.5e-2
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    min_lr: float = 1e-5
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    flip: bool = True
    ema: float = 0.999
    opt: str = "nmuon"
    amp: str = "auto"
    seed: int = 0
    fraction: float = 1.0
    holdout: int = 0
    image_size: int | None = None
    drop_path: float = 0.0
    schedule: str | None = None
    schedule_by: str = "layer"
    gate: str = "linear"
    gate_lr: float = 1.0
    locality: float | None = None
    evaluate_every: int = 1
    save_every: float = 300.0

    def __post_init__(self) -> None:
        mixes = self.mixup > 0 or self.cutmix > 0
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2, for batch statistics"),
            "lr": (self.lr > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup_epochs": (0 <= self.warmup_epochs < math.inf, "at least 0, and finite"),
            "min_lr": (0 <= self.min_lr <= self.lr, "between 0 and lr"),
            "smoothing": (0 <= self.smoothing < 1, "in [0, 1)"),
            "mixup": (self.mixup >= 0, "at least 0"),
            "cutmix": (self.cutmix >= 0, "at least 0"),
            "ema": (0 <= self.ema < 1, "in [0, 1)"),
            "amp": (self.amp in AMP_CHOICES, "one of " + ", ".join(AMP_CHOICES)),
            "seed": (self.seed >= 0, "at least 0"),
            "fraction": (0 < self.fraction <= 1, "in (0, 1]"),
            "holdout": (self.holdout >= 0, "at least 0"),
            "image_size": (self.image_size is None or self.image_size >= 8, "at least 8 pixels"),
            "drop_path": (0 <= self.drop_path < 1, "in [0, 1)"),
            "schedule_by": (self.schedule_by in ("layer", "stage"), "layer or stage"),
            "gate": (self.gate in ("linear", "sigmoid"), "linear or sigmoid"),
            "gate_lr": (self.gate_lr > 0, "above 0"),
            "locality": (self.locality is None or self.locality > 0, "above 0, or None for exact"),
            "evaluate_every": (self.evaluate_every >= 1, "at least 1"),
            "save_every": (self.save_every >= 0, "at least 0"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise FourierBiasError(f"{name} must be {wanted}, got {getattr(self, name)}")
        if mixes and self.batch_size % 2:
            raise FourierBiasError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, as checkpoints keep them."""
        return asdict(self)

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """Return the dtype to autocast to, None for float32: bfloat16 where that is faster."""
        if self.amp == "float32":
            return None
        if self.amp == "bfloat16" or multiplies_bfloat16(device):
            return torch.bfloat16
        return None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware of ``device`` multiplies matrices in bfloat16, faster than in float32.

    A fact of the processor, not timed, so that a training that is resumed goes on in the same arithmetic.

    >>> multiplies_bfloat16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities().get
        # Xeons since Sapphire Rapids (told by avx512_fp16) have AMX for it; where that is switched off, their
        # AVX-512 instructions do a product in 1.7 times float32's time.
        return bool(has("amx_bf16") or has("bf16") or (has("avx512_bf16") and not has("avx512_fp16")))
    return False
