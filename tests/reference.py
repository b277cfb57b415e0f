"""The definitions once more, in plain float64 numpy, slow and obvious, to hold the fast paths against."""

import numpy as np


def log_amplitude_map(maps, eps=1e-6):
    """Mean over images and channels of log(|FFT2| + eps), (H, W), bin [0, 0] at DC."""
    maps = np.asarray(maps, dtype=np.float64)
    return np.log(np.abs(np.fft.fft2(maps)) + eps).mean(axis=(0, 1))


def along(maps, path, eps=1e-6):
    """(frequency, log amplitude) along a path, each value by its own sum over the definition of the DFT."""
    maps = np.asarray(maps, dtype=np.float64)
    height, width = maps.shape[-2:]
    if path == "radial":
        return _radial(maps, eps)
    side = {"diagonal": min(height, width), "horizontal": width, "vertical": height}[path]
    frequencies, values = [], []
    for k in range(side // 2 + 1):
        f = 2 * k / side
        fy, fx = {"diagonal": (f, f), "horizontal": (0, f), "vertical": (f, 0)}[path]
        wave = np.array(
            [[np.exp(-1j * np.pi * (fy * y + fx * x)) for x in range(width)] for y in range(height)]
        )
        amplitude = np.abs((maps * wave).sum(axis=(-2, -1)))
        frequencies.append(f)
        values.append(np.log(amplitude + eps).mean())
    return np.array(frequencies), np.array(values)


def _radial(maps, eps):
    height, width = maps.shape[-2:]
    side = min(height, width)
    plane = log_amplitude_map(maps, eps)
    rings = {k: [] for k in range(side // 2 + 1)}
    for i in range(height):
        for j in range(width):
            fy = 2 * min(i, height - i) / height
            fx = 2 * min(j, width - j) / width
            ring = int(np.floor(np.sqrt(fy**2 + fx**2) * side / 2 + 0.5))
            if ring in rings:
                rings[ring].append(plane[i, j])
    return 2 * np.arange(side // 2 + 1) / side, np.array([np.mean(values) for values in rings.values()])


def notebook(maps):
    """What the published notebook of Park & Kim draws: its relative values and its axis."""
    n = maps.shape[-1]
    rolled = np.roll(log_amplitude_map(maps), (n // 2, n // 2), axis=(0, 1))
    line = np.diag(rolled)[n // 2 :]
    return np.linspace(0, 1, len(line)), line - line[0]


def feature_variance(maps):
    """Unbiased variance over positions, mean over channels, per image."""
    maps = np.asarray(maps, dtype=np.float64)
    return maps.reshape(*maps.shape[:2], -1).var(axis=-1, ddof=1).mean(axis=1)


def high_frequency_share(maps, cutoff):
    """Share of non-DC energy beyond a radius in units of π, per image, energies averaged over channels."""
    power = (np.abs(np.fft.fft2(np.asarray(maps, dtype=np.float64))) ** 2).mean(axis=1)
    height, width = power.shape[-2:]
    fy, fx = np.abs(np.fft.fftfreq(height)) * 2, np.abs(np.fft.fftfreq(width)) * 2
    radius = np.sqrt(fy[:, None] ** 2 + fx[None, :] ** 2)
    power[:, 0, 0] = 0
    return power[:, radius > cutoff + 1e-12].sum(axis=-1) / power.sum(axis=(-2, -1))
