"""What capture costs, as ratios to the bare forward pass of the same batches in the same process.

    python benchmarks/capture.py            the table of the README (about ten minutes on two cores)
    python benchmarks/capture.py --memory   peak memory of 64 and then 512 images, malloc set
    python benchmarks/capture.py --quick    one round, to see that it runs

Rows are measured in turn, round after round, and the medians of the per-round ratios are printed, so that a
machine that slows down slows all of them.  The rows "with malloc set" run in a second process that sets
glibc's allocator as the command line does, before anything is allocated; their ratio is to the bare
forward of the first process, which is what a loop written by hand would cost.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

CASES = {
    "ResNet-50, 16 blocks": ("resnet50", "blocks"),
    "ViT-Tiny, 24 sublayers": ("vit_tiny_patch16_224", "sublayers"),
}
IMAGES, BATCH = 64, 16


def notebook(model, probes, batches):
    """The published notebook's analysis, batch by batch: keep the maps, FFT, log, roll, mean, diagonal."""
    import torch

    from fourierbias.probes import Recorder

    kept = []
    with Recorder(model, probes, lambda _, maps: maps.clone(), input_size=(224, 224)) as recorder:
        for batch in batches:
            for maps in recorder.forward(batch).values():
                amplitude = torch.log(torch.fft.fft2(maps).abs() + 1e-6)
                n = maps.shape[-1]
                rolled = torch.roll(amplitude, (n // 2, n // 2), dims=(2, 3)).mean(dim=(0, 1))
                kept.append(rolled.diag()[n // 2 :])
    return kept


def measure(case, rounds):
    """Seconds of each way, per round: {way: [seconds]}."""
    import timm
    import torch

    import fourierbias
    from fourierbias.probes import choose_probes

    name, layers = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(IMAGES, 3, 224, 224)
    batches = images.split(BATCH)
    probes = choose_probes(model, layers)

    def bare():
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    def spectra():
        fourierbias.capture(model, images, layers=layers, batch_size=BATCH)

    def by_notebook():
        with torch.inference_mode():
            notebook(model, probes, batches)

    ways = {"bare forward": bare, "fourierbias.capture": spectra, "the notebook's way": by_notebook}
    seconds = {way: [] for way in ways}
    for index in range(rounds + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if index:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
    return seconds


def peak_memory(case):
    """Peak memory (MB) of this process after capturing 64 images, made batch by batch, and then 512."""
    import timm
    import torch

    import fourierbias

    class Noise(torch.utils.data.Dataset):
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index))

    name, layers = CASES[case]
    model, peaks = timm.create_model(name), []
    for count in (64, 512):
        fourierbias.capture(model, Noise(count), layers=layers, batch_size=BATCH)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


def in_process(*arguments):
    """What this program prints, as JSON, when run by itself with ``arguments``."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", nargs="+", metavar="WHAT CASE ROUNDS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    if options.worker:
        what, case, *count = options.worker
        if what in ("memory", "malloc"):
            from fourierbias._malloc import keep_memory

            keep_memory()
        if what == "memory":
            result = peak_memory(case)
        else:
            result = measure(case, int(*count))
        print(json.dumps(result))
        return
    if options.memory:
        print("| model | peak at 64 images, MB | at 512 | ratio |\n|---|---|---|---|")
        for case in CASES:
            pairs = [in_process("--worker", "memory", case) for _ in range(1 if options.quick else 3)]
            few, many = sorted(pairs, key=lambda pair: pair[1] / pair[0])[len(pairs) // 2]
            print(f"| {case} | {few:.0f} | {many:.0f} | {many / few:.3f} |", flush=True)
        return
    print("| model | way | seconds | × the bare forward |\n|---|---|---|---|")
    for case in CASES:
        plain = in_process("--worker", "time", case, str(rounds))
        tuned = in_process("--worker", "malloc", case, str(rounds))
        bare = plain["bare forward"]
        for way, seconds in plain.items():
            ratio = statistics.median(s / b for s, b in zip(seconds, bare, strict=True))
            print(f"| {case} | {way} | {statistics.median(seconds):.2f} | {ratio:.2f} |")
        for way in ("bare forward", "fourierbias.capture"):
            median = statistics.median(tuned[way])
            ratio = median / statistics.median(bare)
            print(f"| {case} | {way}, malloc set | {median:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
