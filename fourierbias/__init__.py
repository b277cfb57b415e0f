"""Fourier analysis of the feature maps of vision models.

>>> import numpy as np, fourierbias
>>> fourierbias.spectrum(np.random.default_rng(0).normal(size=(4, 8, 14, 14))).count
4
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import FourierBiasError

if TYPE_CHECKING:
    from .capturing import capture, merge
    from .figures import plot
    from .models.reparam import recast
    from .spectra import Spectrum, spectrum
    from .store import Capture, load

# Each name is imported when first used: `import fourierbias` must not cost the seconds of torch and timm. No
# module may bear the name of one of these, or importing it would put the module in its place.
_HOMES = {
    "Capture": "store",
    "Spectrum": "spectra",
    "capture": "capturing",
    "load": "store",
    "merge": "capturing",
    "plot": "figures",
    "recast": "models.reparam",
    "spectrum": "spectra",
}

__all__ = [
    "Capture",
    "FourierBiasError",
    "Spectrum",
    "__version__",
    "capture",
    "load",
    "merge",
    "plot",
    "recast",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fourierbias' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
