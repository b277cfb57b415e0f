"""Networks with more and less of a convolution's bias beside each other: do they do what their papers say?

A CNN, PRS (late-first), EIT, LSRA, a ViT and a bootstrapped ViT train on one data set with one budget, or are
loaded, and are compared by accuracy over epochs, high-frequency share, head diversity and Δ log amplitude.
What the papers claim is said in our words, marked [A] if known from an abstract and [P] if from a full text;
how "high-frequency share" and "head diversity" are computed is not published, the formulas are ours. The
networks are small, and so is what the figures say about those of the papers.

    python examples/inductive_bias_zoo.py --quick
    python examples/inductive_bias_zoo.py --data cifar10 --epochs 30
    python examples/inductive_bias_zoo.py --data cifar10 --checkpoints checkpoints

The second form trains six networks on 1.5 million images each; the third draws those that were trained
elsewhere: MODEL.ckpt with its log MODEL.csv beside it. All is kept in the output folder, as the other
experiments do.
"""

from pathlib import Path

import click
import numpy as np
from _runs import captured, experiment, learning_curve, save, settings, trained
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fourierbias import FourierBiasError
from fourierbias.curves import measure_trend, response_trend
from fourierbias.figures import measure_axes, response_axes
from fourierbias.training import Recipe
from fourierbias.training.output import write_csv

# The CNN, which has no attention, comes last, so that colours are the same in all panels.
MODELS = ("prs", "eit", "lsra", "vit", "vit-bootstrapped", "cnn")
FULL = {"epochs": 30}
QUICK = {"epochs": 4, "fraction": 0.1, "batch_size": 16, "gate_lr": 10.0}
MEASURES = ("high_frequency_share", "head_diversity")


@experiment
@click.option("--checkpoints", type=click.Path(path_type=Path, exists=True), help="Folder to load from.")
@click.option("--epochs", type=click.IntRange(1), help="[default: 30; quick: 4]")
@click.option("--fraction", type=float, help="Share of the training images.  [default: 1; quick: 0.1]")
def main(data, output, runs, quick, change, checkpoints, epochs, fraction):
    """Accuracy, spectra and attention of a CNN, a ViT, and four networks between them."""
    options = settings(QUICK if quick else FULL, change, epochs=epochs, fraction=fraction)
    learning, captures = {}, {}
    models = [name for name in MODELS if not checkpoints or (checkpoints / f"{name}.ckpt").exists()]
    if not models:
        raise FourierBiasError(f"{checkpoints} holds none of {', '.join(f'{name}.ckpt' for name in MODELS)}")
    for model in models:
        recipe = Recipe(**{**options, "schedule": "late-first" if model == "prs" else None})
        if checkpoints:
            path = checkpoints / f"{model}.ckpt"
        else:
            path = trained(runs, model, data, recipe)
        learning[model] = learning_curve(path)
        images = 64 if quick else 512
        captures[model] = captured(runs, path, data, recipe, images, measures=MEASURES)
    trends = by_depth(captures)
    write_csv(output / "inductive_bias_zoo.csv", list(rows(learning, trends)))
    report(learning, trends)
    save(draw(learning, captures, trends), output / "inductive_bias_zoo.png")


def by_depth(captures):
    """Quantity → model → its values by depth, for the models that have the quantity."""
    trends = {"relative_log_amplitude": {m: response_trend(c, at=1.0) for m, c in captures.items()}}
    for name in MEASURES:
        having = {m: c for m, c in captures.items() if any(name in v.measures for v in c.layers.values())}
        trends[name] = {model: measure_trend(capture, name, at=0.5) for model, capture in having.items()}
    return trends


def rows(learning, trends):
    """Every number that is drawn, as a row of the table."""
    for model, curve in learning.items():
        for epoch, accuracy in curve.T:
            yield {"model": model, "quantity": "accuracy", "epoch": int(epoch), "value": accuracy}
    for quantity, models in trends.items():
        for model, trend in models.items():
            for point in trend.points:
                place = {"layer": point.layer, "depth": point.attrs["depth"], "kind": point.attrs["kind"]}
                value = {"value": point.y, "standard_error": point.error, "images": point.count}
                yield {"model": model, "quantity": quantity, **place, **value}


def report(learning, trends):
    """Print what agrees with the papers' claims and what does not."""
    for model, (epochs, accuracy) in learning.items():
        print(f"{model:<17} test accuracy {100 * accuracy[-1]:5.1f} % after {epochs[-1]:.0f} epochs")
    for quantity, said in (
        ("high_frequency_share", "raises the share of high frequencies in each layer"),
        ("head_diversity", "makes heads look at more diverse distances"),
    ):
        if {"eit", "lsra", "vit"} <= set(learning):
            pairs = [exceeds(trends[quantity], *pair) for pair in (("eit", "lsra"), ("lsra", "vit"))]
            claim(f"[A] EIT: convolution-like bias {said}, EIT's most, then LSRA's.", *pairs)
    if {"vit", "vit-bootstrapped"} <= set(learning):
        (_, plain), (epochs, taught) = learning["vit"], learning["vit-bootstrapped"]
        when = next((e for e, value in zip(epochs, taught, strict=True) if value >= plain[-1]), np.inf)
        reached = f"it has the plain ViT's final accuracy after {when:.0f} epochs of {epochs[-1]:.0f}"
        claim(
            "[P] Bootstrapping: taught by an agent CNN, a ViT converges faster than alone and ends higher.",
            (reached if when < np.inf else "it never has the plain ViT's final accuracy", when < epochs[-1]),
            (f"it ends {100 * (taught[-1] - plain[-1]):+.1f} points from it", taught[-1] > plain[-1]),
        )
    if {"cnn", "prs", "vit"} <= set(learning):
        models = trends["relative_log_amplitude"]
        depth, value, *_ = models["prs"].columns()
        ends = [np.interp(depth, *models[model].columns()[:2]) for model in ("cnn", "vit")]
        between = (np.min(ends, axis=0) <= value) & (value <= np.max(ends, axis=0))
        said = f"Δ log amplitude at π lies between them at {between.sum()} of {len(depth)} depths"
        claim("[A] PRS: a switch in training moves the spectrum between CNN and ViT.", (said, between.mean()))


def exceeds(models, more, less):
    """At how many depths a model's values are at least another's, in words and as a share."""
    depth, value, error, _ = models[more].columns()
    places, *other, _ = models[less].columns()
    other, doubt = (np.interp(depth, places, line) for line in other)
    gain = value - other
    clear = (gain > 2 * np.hypot(error, doubt)).sum()
    said = (
        f"{more} ≥ {less} at {(gain >= 0).sum()} of {len(depth)} depths (by two standard errors at {clear})"
    )
    return f"{said}, by {gain.mean():+.3f} on average", np.mean(gain >= 0)


def claim(text, *evidence):
    """Print a claim, what was found, and whether that agrees: evidence is words and a share, 1 for yes."""
    shares = [share for _, share in evidence]
    verdict = "agrees" if min(shares) == 1 else "agrees in part" if min(shares) > 0.5 else "does not agree"
    print("\n    ".join([text, *(said for said, _ in evidence), f"-> {verdict}"]))


def draw(learning, captures, trends):
    """Accuracy over epochs; high-frequency share, head diversity and Δ log amplitude by depth."""
    figure = Figure(figsize=(9, 6.6))
    axes = figure.subplots(2, 2).flat
    response_axes(list(captures.values()), axes[3], names=list(captures))
    for ax, measure in zip(axes[1:3], MEASURES, strict=True):
        names = list(trends[measure])
        measure_axes([captures[name] for name in names], measure, ax, names=names)
    lines = {line.get_label(): line for line in axes[3].lines}
    for model, (epochs, accuracy) in learning.items():
        style = {key: lines[model].properties()[key] for key in ("color", "marker", "markersize")}
        axes[0].plot(epochs, 100 * accuracy, label=model, **style)
    axes[0].set(xlabel="epoch", ylabel="test accuracy (%)")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes[1:]:
        ax.get_legend().remove()
        for line in ax.lines:
            line.set_linestyle("-")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    images = next(iter(trends["relative_log_amplitude"].values())).count
    figure.supxlabel(
        f"bands: ± 1 standard error over {images} images; patches: of each layer's grid", fontsize=8
    )
    return figure


if __name__ == "__main__":
    main()
