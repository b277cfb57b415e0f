"""What the measures beside the spectrum cost, against the bare forward without fused attention.

All variants run in one process, in turn, and medians are compared, so that the machine's mood cancels out;
on a machine busy with other work the ratio of processor times with ``--threads 1`` is the steadier one, for
threads that wait for each other burn processor time too.

    python benchmarks/measures.py --json measures.json
"""

import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import click
import timm
import torch
from timm.layers import set_fused_attn

from fourierbias import capture
from fourierbias._malloc import keep_memory
from fourierbias.capturing import MEASURES
from fourierbias.measures import ATTENTION_MEASURES
from fourierbias.models.loading import load_model

LIMIT = 1.6


def variants(model, images, batch_size, layers):
    """Name → function of no arguments; the first is what the others are held against."""
    loaded = load_model(model)
    take = partial(capture, loaded, images, layers=layers, batch_size=batch_size, device="cpu")

    @torch.no_grad()
    def bare():
        for batch in images.split(batch_size):
            loaded.module(batch)

    return {
        "bare forward, unfused attention": bare,
        "capture, spectra only": take,
        "capture, high_frequency_share": partial(take, measures=["high_frequency_share"]),
        "capture, measures of attention": partial(take, measures=ATTENTION_MEASURES),
        f"capture, all {len(MEASURES)} measures": partial(take, measures="all"),
    }


def medians(functions, repeats):
    """Median (wall, processor) seconds of each function, run in turn after one run to warm up."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function()
            if turn:
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in seconds.items()
    }


@click.command()
@click.option("--model", default="vit_small_patch16_224", show_default=True)
@click.option("--layers", default="blocks", show_default=True)
@click.option("--images", default=16, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", type=int, help="Of torch (default: its own choice).")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def main(model, layers, images, batch_size, repeats, threads, output):
    """Time captures with and without measures and print a Markdown table."""
    keep_memory()  # as the command line does
    set_fused_attn(False)
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    network = timm.create_model(model).eval()
    pictures = torch.rand(images, *network.pretrained_cfg["input_size"])
    found = medians(variants(network, pictures, batch_size, layers), repeats)
    bare = next(iter(found.values()))
    ratios = {name: [t / b for t, b in zip(times, bare, strict=True)] for name, times in found.items()}
    print(
        f"{model}, {layers}, {images} images in batches of {batch_size}, {torch.get_num_threads()} threads\n"
    )
    print("| | ms per image | × bare | × bare, processor time |\n|---|---:|---:|---:|")
    for name, (wall, processor) in ratios.items():
        print(f"| {name} | {1e3 * found[name][0] / images:.1f} | {wall:.2f} | {processor:.2f} |")
    wall, processor = ratios[f"capture, all {len(MEASURES)} measures"]
    print(f"\nAll measures: {wall:.2f} × bare ({processor:.2f} in processor time); the limit is {LIMIT}.")
    if output:
        numbers = {
            "model": model,
            "layers": layers,
            "images": images,
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "machine": platform.machine(),
            "seconds_per_image": {name: wall / images for name, (wall, _) in found.items()},
            "ratio": {name: wall for name, (wall, _) in ratios.items()},
            "processor_time_ratio": {name: processor for name, (_, processor) in ratios.items()},
        }
        output.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
