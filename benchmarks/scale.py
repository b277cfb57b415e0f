"""Time, memory and disk against the number of images: the numbers of docs/scale.md.

    python benchmarks/scale.py --data FOLDER       both tables; FOLDER holds ten thousand images or more
    python benchmarks/scale.py --quick             noise in place of images, and few: to see that it runs

Each capture runs in a process of its own, so that its peak memory is its own.  Time is that of the capture
alone, without imports; it is fitted by a line, the fixed cost and the cost of an image.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = str(Path(__file__).parent.parent / "checkpoints" / "cnn.ckpt")
COUNTS, ROUNDS = (100, 300, 1000, 3000, 10000), 3
STORED = {
    "ResNet-50, 16 blocks": ("resnet50", "blocks"),
    "ViT-B/16, 24 sublayers": ("vit_base_patch16_224", "sublayers"),
}


def time_and_memory(data, count):
    """Seconds of a capture of ``count`` images by the small model, and the process's peak memory in MB."""
    import torch

    import fourierbias
    from fourierbias.models.loading import load_model

    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return count

        def __getitem__(self, index):
            return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))

    model = load_model(SMALL)
    fourierbias.capture(model, torch.randn(64, 3, 32, 32))  # warms up
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fourierbias.capture(model, data or Noise(), limit=count, output=Path(folder) / "a.h5")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def bytes_stored(name, layers, count):
    """Bytes of a capture's file without maps, and bytes per image with them: as stored, and uncompressed."""
    import fourierbias

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        start = time.perf_counter()
        fourierbias.capture(name, "photos", layers=layers, limit=count, output=path)
        seconds = time.perf_counter() - start
        spectra = path.stat().st_size
        capture = fourierbias.capture(
            name, "photos", layers=layers, limit=count, output=path, features=True, overwrite=True
        )
        stored = (path.stat().st_size - spectra) / count
        raw = sum(2 * a["channels"] * a["height"] * a["width"] for a in (s.attrs for s in capture.values()))
    return {"spectra": spectra, "stored": stored, "raw": raw, "seconds": seconds / count}


def in_process(*arguments):
    """What this program prints, as JSON, when run by itself with ``arguments``."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        what, *rest = options.worker
        if what == "time":
            print(json.dumps(time_and_memory(rest[0], int(rest[1]))))
        else:
            print(json.dumps(bytes_stored(*rest[:2], int(rest[2]))))
        return
    import numpy as np

    counts, rounds = ((16, 64), 1) if options.quick else (COUNTS, ROUNDS)
    runs = [[in_process("time", options.data, count) for count in counts] for _ in range(rounds)]
    seconds = np.median([[run["seconds"] for run in row] for row in runs], axis=0)
    memory = np.median([[run["megabytes"] for run in row] for row in runs], axis=0)
    each, fixed = np.polyfit(counts, seconds, 1, w=1 / seconds)
    print("| images | seconds | ms per image beyond the fixed cost | peak memory, MB |\n|---|---|---|---|")
    for row in zip(counts, seconds, 1000 * (seconds - fixed) / counts, memory, strict=True):
        print("| {:,} | {:.2f} | {:.3f} | {:.0f} |".format(*row))
    print(f"\nFit: {fixed:.2f} s + {1000 * each:.3f} ms per image.\n", flush=True)
    print(
        "| model | file of spectra | maps, per image | uncompressed float16 | maps of 10⁶ images | of 10⁹ |"
    )
    print("|---|---|---|---|---|---|")
    for title, (name, layers) in STORED.items():
        found = in_process("bytes", name, layers, 2 if options.quick else 16)
        stored = found["stored"]
        print(
            f"| {title} | {found['spectra'] / 1e3:.0f} kB | {stored / 1e6:.2f} MB "
            f"| {found['raw'] / 1e6:.2f} MB | {stored * 1e6 / 1e12:.1f} TB | {stored * 1e9 / 1e15:.1f} PB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
