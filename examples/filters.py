"""Do attentions lower the high frequencies of a trained network, and do MLPs and convolutions raise them?

Park & Kim (2022, arXiv 2202.06709) have it, by their figures 2a, 8 and 9, that attention lowers the
high-frequency Δ log amplitude and the variance of feature maps, except that in the first layers it raises the
former, and that MLPs and convolutions raise both. For every residual step of each network (of a ViT each
attention and each MLP, of a ResNet each block that keeps its grid) the program prints and draws how much
both change, and counts. The paper's Δ is relative to the amplitude at frequency 0, which follows the mean of
a channel; beside it is Δ relative to the lowest other frequency, which does not. Networks and images here are
small: 8×8 tokens, which the authors call too small for their plot.

    python examples/filters.py
    python examples/filters.py --data cifar10/test --images 1000 checkpoints/vit.ckpt checkpoints/cnn.ckpt
"""

from itertools import pairwise
from pathlib import Path

import click
import matplotlib
import numpy as np
from _runs import STYLE, save
from matplotlib.figure import Figure

import fourierbias
from fourierbias import FourierBiasError
from fourierbias.captured import shipped_checkpoints
from fourierbias.curves import measure_trend, response_trend
from fourierbias.training.output import write_csv

QUANTITIES = {
    "relative_log_amplitude": "Δ log amplitude at π, to DC (ln)",
    "relative_to_first": "Δ log amplitude at π, to the first bin (ln)",
    "feature_variance": "feature variance (activation²)",
}
# What the paper has: the sign of the change, by what makes it.
CLAIMED = {"attention": -1, "mlp": 1, "conv": 1}
COLORS = {"attention": "#D55E00", "mlp": "#0072B2", "conv": "#009E73", "split": "#CC79A7"}


@click.command(help=__doc__.partition("\n\n")[0])
@click.argument("checkpoints", nargs=-1)
@click.option("--data", default="photos", show_default=True, help="As for fourierbias capture.")
@click.option("--images", type=int, help="So many of them.  [default: all]")
@click.option("--output", type=click.Path(path_type=Path), default="filters", show_default=True)
def main(checkpoints, data, images, output):
    """Capture, compute, print, draw."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        rows = []
        for path in map(Path, checkpoints or shipped_checkpoints()):
            capture = fourierbias.capture(path, data, layers="sublayers", limit=images)
            name = path.stem.rpartition(".")[2]  # an agent lies beside its ViT, with a suffix
            rows += [{"model": name, **row} for row in changes(capture)]
        write_csv(output / "filters.csv", rows)
        report(rows)
        with matplotlib.rc_context(STYLE):
            save(draw(rows), output / "filters.png")
    except FourierBiasError as error:
        raise click.ClickException(str(error)) from None


def changes(capture):
    """For every step that keeps the grid: the quantities after it and before, and the errors of these."""
    first = capture.with_reference("first")
    trends = (response_trend(c, at=1.0) for c in (capture, first))
    trends = *trends, measure_trend(capture, "feature_variance", at=1.0)
    for before, after in pairwise(zip(*(trend.points for trend in trends), strict=True)):
        if any(before[0].attrs[side] != after[0].attrs[side] for side in ("height", "width", "channels")):
            continue
        place = {key: after[0].attrs[key] for key in ("depth", "kind")}
        for quantity, old, new in zip(QUANTITIES, before, after, strict=True):
            values = {"before": old.y, "after": new.y, "change": new.y - old.y}
            # As if the errors were independent: those of one image in two layers are alike, so it is less.
            values |= {"standard_error": float(np.hypot(old.error, new.error)), "images": new.count}
            yield {"layer": after[0].layer, **place, "quantity": quantity, **values}


def report(rows):
    """Print how many changes have the claimed sign, and how many the other, by two standard errors."""
    for quantity in QUANTITIES:
        print(f"{quantity}: layers after which it is")
        print(f"{'model':<18}{'by':<12}{'lower':>6}{'unclear':>9}{'higher':>8}  mean change  claimed")
        for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
            group = [r for r in rows if (r["model"], r["kind"], r["quantity"]) == (model, kind, quantity)]
            change = np.array([row["change"] for row in group])
            clear = np.abs(change) > 2 * np.array([row["standard_error"] for row in group])
            lower, higher = (clear & (change < 0)).sum(), (clear & (change > 0)).sum()
            claimed = {-1: "lower", 1: "higher"}.get(CLAIMED.get(kind), "")
            print(
                f"{model:<18}{kind:<12}{lower:>6}{(~clear).sum():>9}{higher:>8}{change.mean():>13.3f}"
                f"  {claimed}"
            )


def draw(rows):
    """The changes, step by step, a row of panels for each network."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 1.0 + 1.7 * len(models)))
    axes = figure.subplots(len(models), len(QUANTITIES), squeeze=False)
    for model, line in zip(models, axes, strict=True):
        for quantity, ax in zip(QUANTITIES, line, strict=True):
            shown = [row for row in rows if (row["model"], row["quantity"]) == (model, quantity)]
            for kind in dict.fromkeys(row["kind"] for row in shown):
                places = [i for i, row in enumerate(shown) if row["kind"] == kind]
                heights, errors = ([shown[i][key] for i in places] for key in ("change", "standard_error"))
                ax.bar(places, heights, 0.8, yerr=errors, color=COLORS.get(kind, "0.5"), label=kind)
            ax.axhline(0, color="0.3", linewidth=0.8)
            ax.set_xticks(
                range(len(shown)), [row["layer"].removeprefix("blocks.") for row in shown], rotation=60
            )
        line[0].set_ylabel(model)
    for ax, title in zip(axes[0], QUANTITIES.values(), strict=True):
        ax.set_title(f"change of\n{title}")
    handles = {h.get_label(): h for ax in axes.flat for h in ax.containers if h.get_label()[0] != "_"}
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=4, title="what the step is made of"
    )
    count = min(row["images"] for row in rows)
    figure.supxlabel(f"bars: ± 1 standard error over {count} images, at most", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
