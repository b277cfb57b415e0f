"""Feature maps to log-amplitude spectra: the definition of Park & Kim (2022), exact and fast.

For a feature map z of shape (H, W) with two-dimensional DFT F, the *log amplitude* is A = log(|F| + eps)
(natural logarithm), averaged over channels and images, read along a line of frequencies from 0 to π.
The *relative* log amplitude is A minus its value at a reference frequency (DC in the paper).  Source:
N. Park and S. Kim, "How Do Vision Transformers Work?", ICLR 2022 (arXiv 2202.06709), figures 2a and 8, and
the notebook published with it.  The reference ``"first"``, the treatment of dead channels, every path but
the diagonal, the standard errors, and `high_frequency_share` are ours.

One line of frequencies of a DFT is a matrix product, so no FFT of the whole map is needed for it: with
E[(y, x), k] = exp(-iπ f_k (y + x)) the diagonal of all maps at once is X E.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .accumulate import Moments
from .errors import FourierBiasError

if TYPE_CHECKING:
    from torch import Tensor

LINES = ("diagonal", "horizontal", "vertical")
PATHS = (*LINES, "radial", "2d")
CUTOFFS = np.linspace(0.0, 1.0, 21)

# Of `spectrum()` on an array: bounds the float64 copy, not the result.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Spectrum:
    """Mean log-amplitude spectrum of feature maps along one path, with its uncertainty over images.

    ``frequency`` (F,) is in units of π radians per step of the grid, 0…1; ``log_amplitude`` (F,) is in
    natural-log units; ``variance`` (F,) and ``covariance`` (F, F) are those of the per-image values (the
    mean over channels of one image).  ``count`` images went in, ``rejected`` were left out for holding a
    NaN or an infinity, ``dead_share`` is the share of (image, channel) maps without any
    amplitude: zero everywhere.
    For ``path="2d"`` the arrays are (H, W) with DC at [H // 2, W // 2], ``frequency`` is (H, W, 2), the
    signed (vertical, horizontal) frequencies, and there is no covariance.

    >>> import numpy as np
    >>> s = spectrum(np.random.default_rng(0).normal(size=(4, 8, 14, 14)))
    >>> s.frequency[-1], s.relative[0], s.log_amplitude.shape
    (np.float64(1.0), np.float64(0.0), (8,))
    """

    frequency: np.ndarray
    log_amplitude: np.ndarray
    variance: np.ndarray
    covariance: np.ndarray | None
    count: int
    path: str = "diagonal"
    reference: str = "dc"
    eps: float = 1e-6
    rejected: int = 0
    dead_share: float = 0.0
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error over images of ``log_amplitude``, same shape; NaN below two images."""
        return np.sqrt(self.variance / self.count)

    @property
    def relative(self) -> np.ndarray:
        """Δ log amplitude: ``log_amplitude`` minus its value at the reference frequency, same shape.

        Park & Kim's quantity with ``reference="dc"``; NaN throughout when the reference is ``"first"``
        and the grid has no frequency but 0.
        """
        return self.log_amplitude - self._reference_value

    @property
    def relative_standard_error(self) -> np.ndarray:
        """Standard error over images of `relative`, (F,), with its correlation to the reference taken in.

        For ``path="2d"``, where no covariance is kept, the standard error of ``log_amplitude``.
        """
        if self.covariance is None:
            return self.standard_error
        return np.array([self._error_of(row) for row in np.eye(len(self.frequency))])

    @property
    def highest(self) -> float:
        """Highest frequency of the path, in units of π."""
        return float(np.max(self.frequency))

    def at(self, frequency: float) -> float:
        """Δ log amplitude at ``frequency`` (units of π), linear between bins.

        A grid whose highest bin lies below ``frequency`` (an odd grid has none at 1) is read at that
        bin; compare with `highest`.  Raises `FourierBiasError` outside [0, 1] and for 2-D maps.

        >>> import numpy as np
        >>> flat = spectrum(np.eye(1, 64).reshape(1, 1, 8, 8))  # a delta has a flat spectrum
        >>> round(flat.at(0.6), 6)
        0.0
        """
        return float(self._weights_at(frequency) @ self.relative)

    def standard_error_at(self, frequency: float) -> float:
        """Standard error over images of ``at(frequency)``."""
        return self._error_of(self._weights_at(frequency))

    def with_reference(self, reference: str) -> Spectrum:
        """The same spectrum relative to another reference, ``"dc"`` or ``"first"`` (lowest non-zero bin)."""
        return dataclasses.replace(self, reference=_choice("reference", reference, ("dc", "first")))

    def park_kim(self) -> Spectrum:
        """The same numbers as the notebook of Park & Kim prints them: values, length and axis.

        The notebook takes ``diag()[n // 2:]`` after a roll by n // 2, which on an even grid leaves out the
        bin at π, and labels what is left from 0 to 1.  For matching published figures only: its axis is
        not the true frequency.  Raises `FourierBiasError` unless the path is the diagonal of a square map.
        """
        side = self.attrs.get("height"), self.attrs.get("width")
        if self.path != "diagonal" or side[0] != side[1]:
            raise FourierBiasError(
                f"compat='park-kim' is defined for the diagonal of square maps, not the {self.path} of "
                f"{side[0]}×{side[1]}: leave compat out"
            )
        kept = slice(math.ceil(side[0] / 2))
        frequency = np.linspace(0.0, 1.0, len(self.frequency[kept]))
        return dataclasses.replace(
            self,
            frequency=frequency,
            log_amplitude=self.log_amplitude[kept],
            variance=self.variance[kept],
            covariance=self.covariance[kept, kept],
            attrs={**self.attrs, "compat": "park-kim"},
        )

    @property
    def _reference_index(self) -> int | None:
        index = 0 if self.reference == "dc" else 1
        return index if index < len(self.frequency) else None

    @property
    def _reference_value(self) -> float:
        if self.path == "2d":
            height, width = self.log_amplitude.shape
            return self.log_amplitude[height // 2, width // 2]
        return np.nan if self._reference_index is None else self.log_amplitude[self._reference_index]

    def _weights_at(self, frequency: float) -> np.ndarray:
        if self.path == "2d":
            raise FourierBiasError("a 2-D spectrum has no single frequency axis: use path='radial' or a line")
        if not 0 <= frequency <= 1:
            raise FourierBiasError(f"frequency {frequency} is outside 0…1 (units of π)")
        return np.array([np.interp(frequency, self.frequency, row) for row in np.eye(len(self.frequency))])

    def _error_of(self, weights: np.ndarray) -> float:
        if self._reference_index is None:
            return math.nan
        weights = weights.copy()
        weights[self._reference_index] -= weights.sum()  # weights @ relative == this @ log_amplitude
        return (
            math.sqrt(max(weights @ self.covariance @ weights, 0.0) / self.count)
            if self.count > 1
            else math.nan
        )


def spectrum(
    x: Tensor | np.ndarray,
    *,
    path: str = "diagonal",
    grid: tuple[int, int] | None = None,
    layout: str | None = None,
    eps: float = 1e-6,
    reference: str = "dc",
    dead_channels: str = "keep",
    compat: str | None = None,
) -> Spectrum:
    """Log-amplitude spectrum of feature maps, averaged over images and channels.

    ``x`` is a torch tensor or numpy array of feature maps (B, C, H, W), of tokens (B, N, C) with
    ``grid=(H, W)`` and N = H·W (class tokens already dropped), or channels-last (B, H, W, C) with
    ``layout="NHWC"``; any float dtype, any device.  Arithmetic is float64 (float32 on devices without it).

    ``path``: ``"diagonal"`` (f_y = f_x, the paper's; one bin per frequency of the shorter side),
    ``"horizontal"`` (f_y = 0), ``"vertical"`` (f_x = 0), ``"radial"`` (mean over annuli of
    √(f_y² + f_x²) up to 1), ``"2d"`` (the whole map).  Frequencies are in units of π, 0…1, and reach 1
    where the grid has that bin.  ``reference``: ``"dc"`` or ``"first"``, the lowest non-zero bin (the DC
    amplitude follows the mean of a channel, not its smoothness).  ``dead_channels="drop"`` leaves maps
    that are zero everywhere out of the channel mean.  ``compat="park-kim"`` gives the published
    notebook's values and axis.

    Raises `FourierBiasError` for shapes, dtypes or options that do not fit.  Images holding a NaN or an
    infinity are left out, with a warning.  Source: Park & Kim 2022 (arXiv 2202.06709), figure 2a.

    >>> import numpy as np
    >>> y, x = np.mgrid[:14, :14]
    >>> checkerboard = ((-1.0) ** (y + x))[None, None]
    >>> s = spectrum(checkerboard)
    >>> round(float(np.exp(s.log_amplitude[-1]))), float(s.frequency[-1])  # all 196 at π
    (196, 1.0)
    """
    if compat not in (None, "park-kim"):
        raise FourierBiasError(f"compat={compat!r} is not known: use 'park-kim' or leave it out")
    reducer = MapReducer((path,), eps=eps, dead_channels=dead_channels)
    _choice("reference", reference, ("dc", "first"))
    maps = as_maps(x, grid=grid, layout=layout)
    precision = torch.float32 if maps.device.type == "mps" else torch.float64
    grid = tuple(maps.shape[-2:])
    sums = reducer.moments(*grid)
    step = max(1, _CHUNK_ELEMENTS // max(1, maps[0].numel()))
    for start in range(0, len(maps), step):
        projection = reducer.project(maps[start : start + step].to(precision))
        for name, values in reducer.finish([projection])[0].items():
            sums[name].update(values.detach().numpy())
    moments = reducer.quantities(sums, *grid)
    rejected = moments[path].rejected
    if rejected:
        warnings.warn(f"{rejected} of {len(maps)} images hold NaN or Inf and are left out", stacklevel=2)
    result = make_spectrum(moments, path, grid, eps=eps, reference=reference)
    return result.park_kim() if compat else result


def as_maps(
    x: Tensor | np.ndarray, *, grid: tuple[int, int] | None = None, layout: str | None = None
) -> Tensor:
    """A view of ``x`` as feature maps (B, C, H, W); see `spectrum` for what ``x`` may be."""
    x = torch.as_tensor(x) if isinstance(x, np.ndarray | torch.Tensor) else _refuse_type(x)
    if not x.is_floating_point():
        raise FourierBiasError(f"feature maps must be of a float dtype, not {x.dtype}: convert with .float()")
    shape = tuple(x.shape)
    if layout not in (None, "NCHW", "NHWC", "NLC"):
        raise FourierBiasError(f"layout={layout!r} is not known: use 'NCHW', 'NHWC' or 'NLC' (tokens)")
    if x.ndim == 3:
        if grid is None:
            raise FourierBiasError(f"tokens of shape {shape} need grid=(H, W)")
        if grid[0] * grid[1] != shape[1]:
            raise FourierBiasError(
                f"grid {grid[0]}×{grid[1]} has {grid[0] * grid[1]} positions, not {shape[1]}: "
                "drop class and register tokens first"
            )
        x = tokens_to_maps(x, tuple(grid))
    elif x.ndim == 4:
        x = x.permute(0, 3, 1, 2) if layout == "NHWC" else x
    else:
        raise FourierBiasError(f"feature maps must be (B, C, H, W) or tokens (B, N, C), not of shape {shape}")
    if 0 in x.shape:
        raise FourierBiasError(f"feature maps of shape {shape} hold no values")
    return x


def tokens_to_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, H·W, C) in raster order as a (B, C, H, W) view, without a copy."""
    batch, _, channels = tokens.shape
    return tokens.view(batch, *grid, channels).permute(0, 3, 1, 2)


def line_frequencies(height: int, width: int, path: str) -> np.ndarray:
    """Frequencies of a line through the DFT of an (H, W) map, (F,), in units of π.

    These are the bins 2k/n, k = 0…⌊n/2⌋, of the side the line runs along; the diagonal of a map that is
    not square takes those of its shorter side.

    >>> line_frequencies(7, 7, "diagonal").round(3).tolist()
    [0.0, 0.286, 0.571, 0.857]
    """
    side = _line_side(height, width, path)
    return 2 * np.arange(side // 2 + 1) / side


def _line_side(height: int, width: int, path: str) -> int:
    return {"horizontal": width, "vertical": height}.get(path, min(height, width))


@lru_cache(maxsize=64)
def _lines_basis(
    height: int, width: int, paths: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """exp(-iπ f (y + x)) as a real matrix (H·W, 2ΣF): the cosines of all paths, then the sines."""
    y, x = np.mgrid[:height, :width]
    turns = []
    for path in paths:
        side = _line_side(height, width, path)
        along = {"horizontal": x, "vertical": y}.get(path, y + x).reshape(-1, 1)
        turns.append((along * np.arange(side // 2 + 1)) % side / side)  # reduced: exact at any size
    angles = 2 * np.pi * np.concatenate(turns, axis=1)
    basis = np.concatenate([np.cos(angles), -np.sin(angles)], axis=1)
    # A product with an inference tensor would poison later autograd; this outlives the capture that made it.
    with torch.inference_mode(False):
        return torch.as_tensor(basis).to(device=device, dtype=dtype)


def line_transform(x: Tensor, paths: Sequence[str]) -> Tensor:
    """DFT of maps (B, C, H, W) on several lines of frequencies: (B, 2ΣF, C), real parts then imaginary ones.

    The memory order decides the product: channels innermost (tokens, channels-last) is Eᵀ X per image,
    else X E over all maps at once; neither copies the maps.
    """
    basis = _lines_basis(*x.shape[-2:], tuple(paths), x.dtype, x.device)
    if _channels_innermost(x):
        return torch.bmm(basis.T.expand(len(x), -1, -1), _tokens(x))  # matmul comes to it, by five calls more
    return (x.flatten(2) @ basis).mT


def _channels_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


@lru_cache(maxsize=64)
def _half_plane(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Radius (units of π) and multiplicity in the whole plane of the bins (H, W//2+1) of `rfft2`."""
    fy, fx = np.fft.fftfreq(height) * 2, np.fft.rfftfreq(width) * 2
    radius = np.hypot(fy[:, None], fx[None, :])
    multiplicity = np.full(radius.shape, 2.0)
    multiplicity[:, 0] = 1
    if width % 2 == 0:
        multiplicity[:, -1] = 1
    return radius, multiplicity


@lru_cache(maxsize=64)
def _annuli(height: int, width: int) -> np.ndarray:
    """Averaging matrix (H·(W//2+1), F) over annuli of width 2/n centred on the bins of the shorter side."""
    radius, multiplicity = _half_plane(height, width)
    side = min(height, width)
    ring = np.floor(radius * side / 2 + 0.5).astype(int)
    members = (ring[..., None] == np.arange(side // 2 + 1)) * multiplicity[..., None]
    members = members.reshape(-1, side // 2 + 1)
    return members / members.sum(axis=0)


@lru_cache(maxsize=64)
def _energy_above(height: int, width: int, cutoffs: tuple[float, ...]) -> np.ndarray:
    """0/multiplicity matrix (H·(W//2+1), K + 1): bins beyond each cut-off radius, then all but DC."""
    radius, multiplicity = _half_plane(height, width)
    beyond = [(radius > cutoff + 1e-12) & (radius > 0) for cutoff in (*cutoffs, 0.0)]
    return np.stack([(mask * multiplicity).ravel() for mask in beyond], axis=1)


def _whole_plane(half: np.ndarray, height: int, width: int) -> np.ndarray:
    """A real even quantity on `rfft2`'s half plane as the whole (H, W) plane, DC at the centre."""
    rows, columns = -np.arange(height)[:, None] % height, np.arange(width // 2 + 1, width)[None, :]
    half = half.reshape(height, width // 2 + 1)
    mirrored = half[rows, width - columns]
    return np.fft.fftshift(np.concatenate([half, mirrored], axis=1))


class Projection(NamedTuple):
    """What `MapReducer.project` keeps of maps (B, C, H, W): small, and none of it a view of them."""

    grid: tuple[int, int]
    power: Tensor  # (B, ΣF, C): |F|² on the lines
    norm: Tensor  # (B,): √Σz² over channels and positions
    plane: Tensor | None  # (B, H·(W//2+1), C): amplitudes of the half plane, where asked for


class MapReducer:
    """Feature maps (B, C, H, W) to one short vector per image: the work of the capture hook.

    Quantities: each path asked for (log amplitude, mean over channels), ``dead_share``,
    ``feature_variance`` (unbiased spatial variance, mean over channels; Park & Kim's figure 9) and, when
    asked for, ``high_frequency_share`` at ``cutoffs``.  A pure function of the maps, in two steps: `project`
    reads them once, inside a hook; `finish` does the rest for all layers of a batch together.  `moments`
    makes the accumulators that the results go into, `quantities` takes them apart.

    >>> import torch
    >>> reduce = MapReducer(("diagonal",))
    >>> {name: tuple(v.shape) for name, v in reduce(torch.rand(2, 3, 8, 8)).items()}
    {'feature_variance': (2, 1), 'dead_share': (2, 1), 'diagonal': (2, 5)}
    """

    def __init__(
        self,
        paths: Sequence[str] = ("diagonal",),
        *,
        eps: float = 1e-6,
        dead_channels: str = "keep",
        high_frequency_share: bool = False,
        cutoffs: Sequence[float] = tuple(CUTOFFS),
    ) -> None:
        self.paths = tuple(dict.fromkeys(_choice("path", path, PATHS) for path in paths))
        self.dead_channels = _choice("dead_channels", dead_channels, ("keep", "drop"))
        if not eps >= 0:
            raise FourierBiasError(f"eps={eps} must not be negative")
        self.eps = float(eps)
        self.cutoffs = tuple(float(c) for c in cutoffs) if high_frequency_share else ()
        self._lines = tuple(path for path in self.paths if path in LINES)

    def sizes(self, height: int, width: int) -> dict[str, int]:
        """Length of each quantity in the vector of an image, in order; ``2d`` has a vector of its own."""
        sizes = {"feature_variance": 1, "dead_share": 1}
        for path in (*self._lines, *(("radial",) if "radial" in self.paths else ())):
            sizes[path] = len(line_frequencies(height, width, path))
        return sizes | ({"high_frequency_share": len(self.cutoffs)} if self.cutoffs else {})

    def moments(self, height: int, width: int) -> dict[str, Moments]:
        """Empty accumulators for maps of this grid, one for each vector that `finish` gives."""
        moments = {"joint": Moments(sum(self.sizes(height, width).values()))}
        if "2d" in self.paths:
            moments["2d"] = Moments(height * (width // 2 + 1), covariance=False)
        return moments

    def quantities(self, moments: Mapping[str, Moments], height: int, width: int) -> dict[str, Moments]:
        """Accumulators made by `moments` as one for each quantity; others among them as they are."""
        sizes = self.sizes(height, width)
        stops = np.cumsum(list(sizes.values()))
        joint = {
            name: moments["joint"].columns(slice(stop - size, stop))
            for (name, size), stop in zip(sizes.items(), stops, strict=True)
        }
        return joint | {name: sums for name, sums in moments.items() if name != "joint"}

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Per-image values of maps (B, C, H, W) by quantity, each (B, K) float64 on the CPU."""
        values = self.finish([self.project(x)])[0]
        sizes = self.sizes(*x.shape[-2:])
        joint = values.pop("joint").split(list(sizes.values()), dim=1)
        return dict(zip(sizes, joint, strict=True)) | values

    def project(self, x: Tensor) -> Projection:
        """The part of the work that reads the maps, for a hook: a few numbers per channel."""
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        with _without_autocast(x.device.type):
            # The variance needs the sum of each map, the DC bin of any line: ask for one at least.
            line = line_transform(x, self._lines or ("diagonal",)).square_()
            power = torch.add(*line.chunk(2, dim=1))  # here, while all of it is in the cache
            plane = torch.fft.rfft2(x).abs().flatten(2).mT if self._needs_plane else None
            return Projection(x.shape[-2:], power, torch.linalg.vector_norm(x, dim=(1, 2, 3)), plane)

    def finish(self, projections: Sequence[Projection]) -> list[dict[str, Tensor]]:
        """Per-image vectors of each projection; the layers of one shape are worked on together.

        ``joint`` (B, K) holds all quantities of `sizes` side by side, so that one accumulator takes them.
        """
        groups: dict[Any, list[int]] = {}
        for index, projection in enumerate(projections):
            groups.setdefault((projection.grid, projection.power.shape), []).append(index)
        results: list[dict[str, Tensor]] = [{} for _ in projections]
        for (grid, _), members in groups.items():
            group = [projections[index] for index in members]
            for name, values in self._values(grid, group).items():
                for index, rows in zip(members, values.cpu().double().chunk(len(members)), strict=True):
                    results[index][name] = rows
        return results

    @property
    def _needs_plane(self) -> bool:
        return bool({"radial", "2d"} & set(self.paths) or self.cutoffs)

    def _values(self, grid: tuple[int, int], group: Sequence[Projection]) -> dict[str, Tensor]:
        power = torch.cat([p.power for p in group])
        norm = torch.cat([p.norm for p in group])
        dead = power.amax(dim=1) == 0
        joint = [
            _mean_variance(norm, power[:, 0], grid),
            dead.to(norm.dtype).mean(dim=1, keepdim=True),
        ]
        if self._lines:
            joint.append(self._over_channels((power.sqrt() + self.eps).log(), dead))
        whole = {}
        if self._needs_plane:
            half = torch.cat([p.plane for p in group])
            if {"radial", "2d"} & set(self.paths):
                logs = self._over_channels((half + self.eps).log(), dead)
                if "radial" in self.paths:
                    joint.append(logs @ torch.as_tensor(_annuli(*grid)).to(logs))
                if "2d" in self.paths:
                    whole["2d"] = logs
            if self.cutoffs:
                joint.append(self._high_frequency_share(grid, half))
        return {"joint": torch.cat(joint, dim=1), **whole}

    def _high_frequency_share(self, grid: tuple[int, int], amplitude: Tensor) -> Tensor:
        power = amplitude.square().mean(dim=2)
        energy = power @ torch.as_tensor(_energy_above(*grid, self.cutoffs)).to(power)
        # A constant map has no energy beyond DC, so no share of it is high: 0, not 0/0.
        above, total = energy[:, :-1], energy[:, -1:]
        return torch.where(total == 0, above, above / total)

    def _over_channels(self, logs: Tensor, dead: Tensor) -> Tensor:
        """Mean over channels, (B, K, C) -> (B, K); without the dead ones if they are to be dropped."""
        if self.dead_channels == "keep":
            return logs.mean(dim=2)
        alive = (~dead).to(logs.dtype).unsqueeze(1)
        return (logs * alive).sum(dim=2) / alive.sum(dim=2)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context in which products are in the precision of what is multiplied; free where they are already."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _mean_variance(norm: Tensor, squared_sums: Tensor, grid: tuple[int, int]) -> Tensor:
    """Unbiased variance over positions, mean over channels, (B, 1); from the norm (B,) and |Σz|² (B, C)."""
    channels, positions = squared_sums.shape[1], grid[0] * grid[1]
    deviations = norm.square() - squared_sums.sum(dim=1) / positions
    return (deviations / (channels * max(positions - 1, 1))).clamp_min(0).unsqueeze(1)


def make_spectrum(
    moments: dict[str, Moments],
    path: str,
    grid: tuple[int, int],
    *,
    eps: float = 1e-6,
    reference: str = "dc",
    attrs: dict[str, Any] | None = None,
) -> Spectrum:
    """The `Spectrum` of one path from the accumulators of `MapReducer.quantities`."""
    height, width = int(grid[0]), int(grid[1])
    sums = moments[path]
    if path == "2d":
        fy, fx = (np.fft.fftshift(np.fft.fftfreq(n)) * 2 for n in (height, width))
        frequency = np.stack(np.meshgrid(fy, fx, indexing="ij"), axis=-1)
        mean, variance = (_whole_plane(half, height, width) for half in (sums.mean, sums.variance))
        covariance = None
    else:
        frequency = line_frequencies(height, width, path)
        mean, variance, covariance = sums.mean, sums.variance, sums.covariance
    return Spectrum(
        frequency=frequency,
        log_amplitude=mean,
        variance=variance,
        covariance=covariance,
        count=sums.count,
        path=path,
        reference=reference,
        eps=eps,
        rejected=sums.rejected,
        dead_share=float(moments["dead_share"].mean[0]),
        attrs={"height": height, "width": width, **(attrs or {})},
    )


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise FourierBiasError(f"{name}={value!r} is not known: choose from {', '.join(choices)}")
    return value


def _refuse_type(x: object) -> Tensor:
    raise FourierBiasError(f"feature maps must be a torch tensor or a numpy array, not {type(x).__name__}")
