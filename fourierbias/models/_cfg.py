"""What the reference architectures have in common: their input, as timm's registry wants it."""

from typing import Any

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def reference_cfg(**overrides: Any) -> dict[str, Any]:
    """Return timm's default configuration of a reference architecture: 10 classes, (3, 32, 32) input.

    ``overrides`` replace or add entries (``classifier="fc"``). Mean and standard deviation are those of
    CIFAR-10's training images.

    >>> reference_cfg(classifier="fc")["input_size"]
    (3, 32, 32)
    """
    cfg = {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": None,
        "classifier": None,
    }
    unknown = set(overrides) - set(cfg) - {"fixed_input_size", "license", "origin_url", "paper_name"}
    if unknown:
        raise TypeError(f"reference_cfg got unknown entries {sorted(unknown)}")
    return {**cfg, **overrides}
