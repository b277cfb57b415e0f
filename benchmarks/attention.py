"""What the attention form of a convolution costs: time and memory of one layer, forward and backward.

    python benchmarks/attention.py              the tables, float32 (two minutes on two idle cores)
    python benchmarks/attention.py --bfloat16   the same under autocast
    python benchmarks/attention.py --json       as JSON
    python benchmarks/attention.py --cpu-time   on a busy machine: one thread, its time on the CPU
    python benchmarks/attention.py --quick      two rounds, to see that it runs

All ways are measured in one process, in turn, round after round; times are medians, ratios are medians of the
per-round ratios. Memory is the peak of resident memory above the process at rest, of one way in a process of
its own. glibc's malloc moves every ratio: with its default threshold each large temporary is mapped, faulted
in and unmapped again, so both are shown, the default and the setting below, as the command line has it.

"Written out" builds the gated (B, K², N, N) attention that the others avoid, with positions known beforehand;
"written out, positions per sample" computes their softmax for every sample, as timm's GPSA does. GPSA itself
has narrow values, C / heads to a head, and cannot hold a convolution's kernel: it is another function, shown
for scale, with the heads of convit_tiny (192 channels do not divide by nine).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
BATCH, CHANNELS, GRID, KERNEL = 32, 192, 14, 3
PLAIN, BEFORE, CLOSED = "plain convolution", "ours before the switch", "ours in eval, gates at 0"
OURS, FUSED = "ours as attention", "ours as attention, fused backend"
OUT, EACH, GPSA = "written out", "written out, positions per sample", "timm GPSA"
SHARP = 46.0  # locality at which soft positions are one-hot in float32


def layers():
    """The ways by name: one set of weights, gates at 0.3 where they are open."""
    import torch
    from timm.models import convit
    from torch import nn

    from fourierbias.models.reparam import ReparamConv2d, positional_attention

    class WrittenOut(nn.Module):
        """A_pos + g (A_content - A_pos), then values, then the projection, in as many words."""

        def __init__(self, layer, per_sample):
            super().__init__()
            self.per_sample = per_sample
            self.weight, self.query, self.key, self.gate = layer.weight, layer.query, layer.key, layer.gate
            self.heads = layer.heads
            position = positional_attention(KERNEL, (GRID, GRID)).transpose(0, 1).contiguous()
            scores = positional_attention(KERNEL, (GRID, GRID), locality=SHARP).transpose(0, 1).log()
            self.register_buffer("position", scores.clamp(min=-1e4) if per_sample else position)
            self.register_buffer("inside", position.sum(-1, keepdim=True))  # 0 where the tap is on padding

        def forward(self, x):
            B, _, H, W = x.shape
            tokens = x.flatten(2).transpose(1, 2)
            q, k = (
                (tokens @ weight.T).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for weight in (self.query, self.key)
            )
            content = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            position = self.position
            if self.per_sample:
                position = position.expand(B, -1, -1, -1).softmax(-1) * self.inside
            attention = position + self.gate[:, None, None] * (content - position)
            values = (attention @ tokens[:, None]).transpose(1, 2).flatten(2)
            y = values @ self.weight.permute(2, 3, 1, 0).reshape(-1, self.weight.shape[0])
            return y.transpose(1, 2).reshape(B, -1, H, W)

    class Tokens(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])

    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, bias=False)
    closed = ReparamConv2d.from_conv(conv).reparameterize().eval()
    opened = ReparamConv2d.from_conv(conv).reparameterize(gate_init=0.3)
    with torch.no_grad():
        for weight in (opened.query, opened.key):
            weight.normal_(std=CHANNELS**-0.5)
    fused = ReparamConv2d.from_conv(conv).reparameterize()
    fused.query, fused.key, fused.gate, fused.backend = opened.query, opened.key, opened.gate, "fused"
    return {
        PLAIN: conv,
        BEFORE: ReparamConv2d.from_conv(conv),
        CLOSED: closed,
        OURS: opened,
        FUSED: fused,
        OUT: WrittenOut(opened, per_sample=False),
        EACH: WrittenOut(opened, per_sample=True),
        GPSA: Tokens(convit.GPSA(CHANNELS, 4)),
    }


def step(layer, bfloat16):
    """Return a function that runs forward and backward once and returns output and gradients."""
    import torch

    torch.manual_seed(1)
    x = torch.randn(BATCH, CHANNELS, GRID, GRID, requires_grad=True)
    weights = torch.randn(BATCH, CHANNELS, GRID, GRID)
    parameters = {"input": x, **dict(layer.named_parameters())}

    def run():
        for parameter in parameters.values():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            y = layer(x)
        y.backward(weights.to(y.dtype))
        return {"output": y.detach(), **{name: p.grad for name, p in parameters.items()}}

    return run


def measure(rounds, bfloat16, cpu_time):
    """Return seconds per round of every way, and how far ours is from the one written out."""
    import torch

    now = time.process_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
    runs = {name: step(layer, bfloat16) for name, layer in layers().items()}
    expected, found = runs[OUT](), runs[OURS]()
    difference = {
        name: ((found[name] - value).norm() / value.norm()).item() for name, value in expected.items()
    }
    seconds = {name: [] for name in runs}
    for number in range(rounds + 2):  # two to warm up
        for name, run in runs.items():
            start = now()
            run()
            if number >= 2:
                seconds[name].append(now() - start)
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "difference": difference,
        "ways": {
            name: {
                "ms": 1000 * statistics.median(seconds[name]),
                "ratio_to_convolution": ratio(seconds[name], seconds[PLAIN]),
                "ratio_to_written_out": ratio(seconds[name], seconds[OUT]),
                "ratio_to_written_out_per_sample": ratio(seconds[name], seconds[EACH]),
                "ratio_to_gpsa": ratio(seconds[name], seconds[GPSA]),
            }
            for name in seconds
        },
    }


def ratio(seconds, reference):
    """The median over rounds of the ratio to a reference measured in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def memory(name, bfloat16):
    """Peak resident memory of one way above the process at rest, in MiB."""
    run = step(layers()[name], bfloat16)
    with open("/proc/self/statm") as file:
        rest = int(file.read().split()[1]) * resource.getpagesize()
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rest) / 2**20


def child(arguments, malloc):
    """Run this program in a process of its own, with malloc as asked, and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in MALLOC}
    command = [sys.executable, __file__, *arguments]
    environment |= MALLOC if malloc == "set" else {}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed)


def table(result):
    """The result as a Markdown table."""
    lines = [
        f"forward + backward, {result['dtype']}, ({BATCH}, {CHANNELS}, {GRID}, {GRID}), K = {KERNEL}, "
        f"{result['default']['threads']} threads, torch {result['default']['torch']}",
        "",
        "| way | malloc default: ms | × conv | × written out | × GPSA "
        "| malloc set: ms | × conv | × written out | × GPSA | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, peak in result["peak_mib"].items():
        cells = []
        for malloc in ("default", "set"):
            way = result[malloc]["ways"][name]
            ratios = (way[f"ratio_to_{of}"] for of in ("convolution", "written_out", "gpsa"))
            cells += [f"{way['ms']:.0f}", *(f"{r:.2f}" for r in ratios)]
        lines.append(f"| {name} | {' | '.join(cells)} | {peak:.0f} |")
    for malloc in ("default", "set"):
        ways, peak = result[malloc]["ways"], result["peak_mib"]
        for other, key in ((OUT, "ratio_to_written_out"), (EACH, "ratio_to_written_out_per_sample")):
            lines += [
                "",
                f"malloc {malloc}: ours as attention is {1 / ways[OURS][key]:.2f} × as fast as {other!r}, "
                f"with {peak[OURS] / peak[other]:.2f} of its memory",
            ]
    differences = ", ".join(f"{key} {value:.0e}" for key, value in result["default"]["difference"].items())
    return "\n".join([*lines, "", f"ours against the one written out, relative: {differences}"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--bfloat16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, time on the CPU")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (15)")
    parser.add_argument("--child", choices=("time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    if arguments.child == "time":
        print(json.dumps(measure(rounds, arguments.bfloat16, arguments.cpu_time)))
        return
    if arguments.child == "memory":
        print(json.dumps(memory(arguments.way, arguments.bfloat16)))
        return
    passed = ["--rounds", str(rounds)]
    passed += [flag for flag in ("--bfloat16", "--cpu-time") if flag in sys.argv]
    result = {"dtype": "bfloat16" if arguments.bfloat16 else "float32", "malloc": MALLOC}
    for malloc in ("default", "set"):
        print(f"timing, malloc {malloc} …", file=sys.stderr)
        result[malloc] = child(["--child", "time", *passed], malloc)
    print("memory …", file=sys.stderr)
    result["peak_mib"] = {
        name: child(["--child", "memory", "--way", name, *passed], "default")
        for name in result["default"]["ways"]
    }
    print(json.dumps(result, indent=1) if arguments.json else table(result))


if __name__ == "__main__":
    main()
