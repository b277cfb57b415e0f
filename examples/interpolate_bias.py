"""Does the time that layers stay convolutions set where a network lies between a CNN and a ViT?

PRS (Lee et al., arXiv 2210.01370, abstract) has it that switching convolutions to self-attention in training
interpolates the bias: the Fourier pattern moves from the ViT's to the CNN's with the number of epochs before
the switch. Here `prs` switches all its layers at once, after 0, 1/4, 1/2, 3/4 and all of training; the last
never switches and so is the CNN, to the bit. For every layer the program prints the rank correlation between
the time of the switch and Δ log amplitude at π, within a seed and averaged over seeds, and whether the sign
is that of CNN minus ViT at that depth; and how far all curves lie from the CNN's and the ViT's. The p of the
correlations (Page's trend test) takes the trainings of a seed as exchangeable, but if made on one machine
they share all that comes before the switch. Which network, data and epochs the paper has there is not known
to us: ours are our own.

    python examples/interpolate_bias.py --quick
    python examples/interpolate_bias.py --data cifar10 --fraction 0.1 --epochs 60 --seeds 3

The second, full form is 18 trainings of 300,000 images each. Everything is kept in the output folder: a
program that was stopped goes on, and one that is done only draws again. How far attention leaves the
convolution depends on the gates too, which `--change gate_lr=10` makes learn ten times as fast.
"""

from collections import defaultdict
from functools import partial

import click
import numpy as np
from _runs import (
    Table,
    captured,
    experiment,
    mean_and_spread,
    outcome,
    over_updates,
    run_name,
    save,
    settings,
    trained,
)
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.stats import page_trend_test, spearmanr

from fourierbias.training import Recipe
from fourierbias.training.output import write_csv

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the training, before the switch
# In so few steps gates would hardly open at the common learning rate.
QUICK = {"fraction": 0.2, "batch_size": 32, "gate_lr": 10.0}


@experiment
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Trainings of each kind.")
@click.option("--epochs", type=click.IntRange(1), help="[default: 20; quick: 4]")
@click.option("--fraction", type=float, help="Share of the training images.  [default: 1; quick: 0.2]")
def main(data, output, runs, quick, seeds, change, epochs, fraction):
    """Spectra of a network that switches earlier or later, between those of a CNN and a ViT."""
    same = over_updates(epochs or (4 if quick else 20))
    own = ("schedule", "seed", "epochs", "fraction")
    options = settings({**same, **(QUICK if quick else {})}, change, own, fraction=fraction)

    def measured(about, arch, recipe):
        path = trained(runs, arch, data, recipe)
        capture = captured(runs, path, data, recipe, images=64 if quick else 512)
        about = about | outcome(path)
        return [about | row for row in response_rows(capture)]

    rows, kept = [], Table(output / "interpolate_bias.csv")
    for seed in range(seeds):
        for share in (*SHARES, None):
            # At the ends these are the schedules by which other experiments know the same trainings.
            schedule = {0.0: "attention", 1.0: "conv"}.get(share, share and f"uniform:{share:.0%}")
            recipe = Recipe(**{**options, "seed": seed, "schedule": schedule})
            arch = "vit" if share is None else "prs"
            about = {"model": arch if share is None else f"prs-{share:.0%}", "switch": share, "seed": seed}
            make = partial(measured, about, arch, recipe)
            rows += kept.of(run_name(arch, data, recipe), make)
    found = correlations(rows)
    write_csv(output / "interpolate_bias-correlations.csv", found)
    far = list(distances(rows))
    write_csv(output / "interpolate_bias-distances.csv", far)
    report(rows, found, far)
    save(draw(rows, found), output / "interpolate_bias.png")


def response_rows(capture):
    """Δ log amplitude at π of every layer, with its place and its standard error over images."""
    for layer, spectrum in capture.items():
        place = {key: capture.layers[layer].attrs[key] for key in ("index", "depth", "kind")}
        response = {"response": spectrum.at(1.0), "standard_error": spectrum.standard_error_at(1.0)}
        yield {"layer": layer, **place, **response, "images": spectrum.count}


def table(rows, model):
    """Depths (L,) of a model's layers, and its responses and their standard errors (L, seeds)."""
    layers = defaultdict(list)
    for row in rows:
        if row["model"] == model:
            layers[row["depth"]].append((row["response"], row["standard_error"]))
    return np.array(list(layers)), *np.moveaxis(np.array(list(layers.values())), 2, 0)


def correlations(rows):
    """For every layer: rank correlation of switch and response, and whether it leads from ViT to CNN."""
    depths, *_ = table(rows, "prs-100%")
    values = np.array([table(rows, f"prs-{100 * share:.0f}%")[1] for share in SHARES])
    means = values.mean(axis=2)
    places, vits, _ = table(rows, "vit")
    vit, cnn = np.interp(depths, places, vits.mean(axis=1)), means[-1]
    found = []
    for i, depth in enumerate(depths):
        layer = [row for row in rows if row["switch"] is not None and row["depth"] == depth]
        rho, p = within_seeds(values[:, i].T)
        towards = np.sign(cnn[i] - vit[i])
        steps = np.diff(means[:, i]) * towards
        verdict = {"towards_cnn": bool(rho * towards > 0), "every_step": bool((steps > 0).all())}
        switched = {f"after_{share:.0%}": mean for share, mean in zip(SHARES, means[:, i], strict=True)}
        numbers = {"vit": vit[i], **switched, "rank_correlation": rho, "p_value": p}
        place = {key: layer[0][key] for key in ("layer", "depth", "kind")}
        found.append({**place, **numbers, "runs": len(layer), **verdict})
    return found


def within_seeds(values):
    """Mean over seeds of the rank correlation along ``values`` (seeds, switches), and Page's two-sided p.

    Seeds lie apart by more than the switch moves most layers: ranked all together they would hide it.  The
    test needs two seeds: nan with one.
    """
    rho = np.mean([spearmanr(SHARES, one).statistic for one in values])
    if len(values) < 2:
        return float(rho), np.nan
    return float(rho), min(1, 2 * min(page_trend_test(sign * values).pvalue for sign in (1, -1)))


def distances(rows):
    """For every training of `prs`: mean |Δ - Δ'| over depths to CNNs, and to the ViTs read between layers.

    The CNN of the same seed shares the training before the switch if one machine made both; those of other
    seeds share nothing, and are as far from each other as chance has it (nan with one seed).
    """
    depths, cnn, _ = table(rows, "prs-100%")
    places, vits, _ = table(rows, "vit")
    vit = np.array([np.interp(depths, places, one) for one in vits.T]).T
    for share in SHARES:
        for seed, values in enumerate(table(rows, f"prs-{100 * share:.0f}%")[1].T):
            cnns, to_vit = np.abs(values[:, None] - cnn).mean(axis=0), np.abs(values[:, None] - vit).mean()
            others = np.delete(cnns, seed)
            far = {"own_cnn": cnns[seed], "other_cnns": others.mean() if len(others) else np.nan}
            yield {"switch": share, "seed": seed, **far, "vit": to_vit}


def report(rows, found, far):
    """Print the accuracies, of every depth what the correlation says, and how far curves lie apart."""
    for model in dict.fromkeys(row["model"] for row in rows):
        values = {row["seed"]: row["accuracy"] for row in rows if row["model"] == model}.values()
        print(f"{model:<9} accuracy {100 * np.mean(list(values)):5.1f} %")
    print("Δ log amplitude at π, and its rank correlation with the epochs before the switch")
    print(f"{'layer':<10} depth    ViT  attention from the start    CNN  correlation")
    for row in found:
        said = "towards the CNN" if row["towards_cnn"] else "not towards the CNN"
        said += ", at every step" if row["every_step"] else ""
        print(
            f"{row['layer']:<10} {row['depth']:5.2f} {row['vit']:6.2f} {row['after_0%']:25.2f} "
            f"{row['after_100%']:6.2f} {row['rank_correlation']:12.2f}  {said}"
        )
    towards, every = (sum(row[key] for row in found) for key in ("towards_cnn", "every_step"))
    clear = [row["towards_cnn"] for row in found if row["p_value"] < 0.05]
    said = f", at {sum(clear)} of the {len(clear)} with p < 0.05" if clear else ""
    print(f"Towards the CNN at {towards} of {len(found)} depths{said}, at every step at {every}.")
    print("Mean distance of the curves over depths, to the CNN of the same seed, of others, and to the ViT")
    for share in SHARES:
        means = (
            np.mean([row[key] for row in far if row["switch"] == share])
            for key in ("own_cnn", "other_cnns", "vit")
        )
        print(f"prs-{share:<5.0%}" + "".join(f"{mean:8.3f}" for mean in means))


def draw(rows, found):
    """Responses by depth for every time of the switch, their differences, and the rank correlations."""
    figure = Figure(figsize=(7, 8))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1.4, 1])
    cnn = table(rows, "prs-100%")[1]
    for share in SHARES:
        depths, values, errors = table(rows, f"prs-{100 * share:.0f}%")
        label = {0.0: "at the start", 1.0: "never: the CNN"}.get(share, f"after {share:.0%} of training")
        style = {"color": colormaps["viridis"](0.9 * share), "label": label}
        draw_band(axes[0], depths, values, errors, **style)
        draw_band(axes[1], depths, values - cnn, np.zeros_like(errors), **style)
    draw_band(axes[0], *table(rows, "vit"), color="black", linestyle="--", label="ViT")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, title="prs switches"
    )
    for towards, color in ((True, "#0072B2"), (False, "#D55E00")):
        chosen = [row for row in found if row["towards_cnn"] == towards]
        bars = [row["rank_correlation"] for row in chosen]
        label = "towards the CNN, from the ViT" if towards else "not so"
        axes[2].bar([row["depth"] for row in chosen], bars, 0.05, color=color, label=label)
    axes[2].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes[0].set_ylabel("Δ log amplitude at π (ln)")
    axes[1].set_ylabel("the same, minus the CNN's")
    axes[2].set(ylim=(-1.05, 1.05), ylabel="rank correlation\nwith the switch")
    axes[2].set_xlabel("normalised depth (0: first layer, 1: last); grey: layers that switch")
    seeds = cnn.shape[1]
    one = f"bands: standard error over {rows[0]['images']} images (of the values, not of the differences)"
    several = f"bands: standard deviation over {seeds} seeds; correlations: within a seed, averaged over them"
    figure.supxlabel(several if seeds > 1 else one, fontsize=8)
    switching = [row["depth"] for row in rows if row["switch"] == 0 and row["kind"] == "attention"]
    for ax in axes:
        ax.axvspan(min(switching) - 0.055, 1.055, color="0.93", zorder=0)
    for ax in axes[1:]:
        ax.axhline(0, color="0.5", linewidth=0.8, zorder=1)
    return figure


def draw_band(ax, depths, values, errors, **style):
    """A line of means over seeds in a band of their standard deviation, or of the one seed's error."""
    mean, spread = mean_and_spread(values, alone=errors[:, 0])
    ax.plot(depths, mean, marker="o", markersize=4, **style)
    ax.fill_between(depths, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


if __name__ == "__main__":
    main()
