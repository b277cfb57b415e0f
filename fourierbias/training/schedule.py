"""When each convolution becomes attention: a function of epoch and layer, fixed before training starts.

That the time a layer stays a convolution sets how much of a convolution's bias it keeps, and that on small
data the switch should come linearly earlier at later layers, is PRS (Lee et al., arXiv 2210.01370, abstract).
The formula, its ends and its rounding are ours; the paper's own epochs are not known to us. ``early-first``
is a control that the paper does not have.
"""

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import FourierBiasError

PRESETS = ("conv", "attention", "uniform:E", "late-first", "early-first")


@dataclass(frozen=True)
class Schedule:
    """Which layers are attention at which epoch; `parse` makes one from a text.

    ``switch_epochs`` holds for every layer, in the network's order, the number of epochs (of ``epochs``) that
    it stays a convolution: it is attention from that epoch on, counted from 0. None is never.

    >>> schedule = Schedule.parse("late-first", ["a", "b", "c"], epochs=6)
    >>> schedule.switch_epochs, schedule(3, "a"), schedule(3, "b")
    ({'a': 4, 'b': 2, 'c': 0}, False, True)
    """

    switch_epochs: dict[str, int | None]
    epochs: int
    text: str = ""

    def __post_init__(self) -> None:
        for layer, epoch in self.switch_epochs.items():
            if epoch is not None and not 0 <= epoch <= self.epochs:
                raise FourierBiasError(
                    f"schedule {self.text!r} switches {layer} after {epoch} epochs, "
                    f"training has {self.epochs}; give 0 to {self.epochs}"
                )

    @classmethod
    def parse(
        cls,
        text: str,
        layers: Iterable[str],
        epochs: int,
        by: Literal["layer", "stage"] = "layer",
    ) -> "Schedule":
        """Return the schedule that ``text`` describes, for ``layers`` in the network's order.

        * ``conv``: never; ``attention``: from the start; ``uniform:E``: all after E epochs.
        * ``late-first`` (PRS): linear, the last layer first; ``late-first:A-B`` from A epochs (the last
          layer) to B (the first). Left out, they are 0 and E·(L - 1)/L for L layers and E epochs, at most
          E - 1, so that every layer is attention in the end.
        * ``early-first``: its mirror, the first layer first.
        * ``layer4.*=0,layer3.*=10``: names or glob patterns, each with its epochs; a layer has the last one
          that fits it, others never switch.

        Epochs may be a share of training, ``uniform:50%``. ``by="stage"`` gives the layers of a stage one
        time: those whose names agree up to the first number.

        Raises FourierBiasError for an unknown preset or layer, and for epochs past the end of training.

        >>> Schedule.parse("uniform:50%", ["a", "b"], epochs=30).switch_epochs
        {'a': 15, 'b': 15}
        """
        layers = list(layers)
        if not layers:
            raise FourierBiasError(
                f"schedule {text!r} has no layer to switch; train prs, or another network with --recast"
            )
        if by not in ("layer", "stage"):
            raise FourierBiasError(f"cannot schedule by {by!r}; use layer or stage")
        if "=" in text:
            return cls(_named(text, layers, epochs), epochs, text)
        groups = [stage_of(layer) if by == "stage" else layer for layer in layers]
        order = list(dict.fromkeys(groups))
        times = dict(zip(order, _preset(text, len(order), epochs), strict=True))
        return cls({layer: times[group] for layer, group in zip(layers, groups, strict=True)}, epochs, text)

    @property
    def layers(self) -> list[str]:
        """The names of all layers, in the network's order."""
        return list(self.switch_epochs)

    def __call__(self, epoch: int, layer: str) -> bool:
        """Whether ``layer`` is attention in ``epoch`` (from 0); FourierBiasError for an unknown layer."""
        if layer not in self.switch_epochs:
            raise FourierBiasError(
                f"schedule {self.text!r} has no layer {layer!r}; {_nearest(layer, self.layers)}"
            )
        switch = self.switch_epochs[layer]
        return switch is not None and epoch >= switch

    def switched(self, epoch: int) -> set[str]:
        """Return the layers that are attention in ``epoch`` (from 0).

        >>> Schedule.parse("uniform:2", ["a"], epochs=3).switched(1)
        set()
        """
        return {layer for layer in self.layers if self(epoch, layer)}

    def table(self) -> str:
        """Return the schedule as text, a line for each layer.

        >>> print(Schedule.parse("late-first", ["conv1", "conv2"], epochs=4).table())
        schedule late-first: epochs as convolution (-) and as attention (#)
        conv1   2   2  ------------############
        conv2   0   4  ########################
        """
        name, count = max(map(len, self.layers)), max(3, len(str(self.epochs)))
        lines = [f"schedule {self.text}: epochs as convolution (-) and as attention (#)"]
        for layer, switch in self.switch_epochs.items():
            before = self.epochs if switch is None else switch
            dashes = round(24 * before / self.epochs)
            bar = "-" * dashes + "#" * (24 - dashes)
            lines.append(f"{layer:{name}} {before:{count}} {self.epochs - before:{count}}  {bar}")
        return "\n".join(lines)


def stage_of(layer: str) -> str:
    """Return the name of a layer's stage: its name up to the first number.

    >>> stage_of("layer3.0.conv1"), stage_of("stages.2.blocks.0.conv"), stage_of("stem.conv")
    ('layer3', 'stages.2', 'stem.conv')
    """
    found = re.match(r"(.*?\d+)(\.|$)", layer)
    return found[1] if found else layer


def _preset(text: str, count: int, epochs: int) -> list[int | None]:
    """Return the times of ``count`` layers (or stages), first to last."""
    name, _, argument = text.partition(":")
    match name, bool(argument):
        case "conv", False:
            return [None] * count
        case "attention", False:
            return [0] * count
        case "uniform", True:
            return [round_half_up(_epochs(argument, text, epochs))] * count
        case "late-first" | "early-first", _:
            first, last = 0.0, min(epochs * (count - 1) / count, epochs - 1)
            if argument:
                first, last = _ends(argument, text, epochs)
            times = linear(first, last, count)
            return times if name == "early-first" else times[::-1]
    raise FourierBiasError(
        f"no schedule {text!r}; use {', '.join(PRESETS)}, or NAME=EPOCH for layers by name"
    )


def linear(first: float, last: float, count: int) -> list[int]:
    """Return ``count`` epochs evenly from ``first`` to ``last``, rounded once and never falling.

    A single layer has ``first``.

    >>> linear(0, 10, 5)
    [0, 3, 5, 8, 10]
    """
    times = [round_half_up(first + (last - first) * i / max(1, count - 1)) for i in range(count)]
    assert times == sorted(times), times
    return times


def round_half_up(value: float) -> int:
    """Round, halves up whatever comes before them, so that equal steps stay equal.

    >>> [round_half_up(value) for value in (0.5, 1.5, 2.5)]
    [1, 2, 3]
    """
    return math.floor(value + 0.5)


def _ends(argument: str, text: str, epochs: int) -> tuple[float, float]:
    first, dash, last = argument.partition("-")
    if not dash:
        raise FourierBiasError(
            f"schedule {text!r} wants the first and the last switch, as in late-first:0-24"
        )
    ends = _epochs(first, text, epochs), _epochs(last, text, epochs)
    if ends[0] > ends[1]:
        raise FourierBiasError(f"schedule {text!r} ends before it begins; give the earlier epoch first")
    return ends


def _epochs(number: str, text: str, epochs: int) -> float:
    """Return a number of epochs or a share of training ("50%") as epochs."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(%?)\s*", number)
    if not found:
        raise FourierBiasError(f"schedule {text!r}: {number!r} is no number of epochs; give 12 or 40%")
    value = float(found[1]) * (epochs / 100 if found[2] else 1)
    if value > epochs:
        raise FourierBiasError(
            f"schedule {text!r}: {number.strip()} is past the end of training, which has {epochs} epochs"
        )
    return value


def _named(text: str, layers: Sequence[str], epochs: int) -> dict[str, int | None]:
    times: dict[str, int | None] = dict.fromkeys(layers)
    for part in text.split(","):
        pattern, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise FourierBiasError(f"schedule {text!r}: {part!r} has no epoch; write NAME=EPOCH")
        names = [layer for layer in layers if fnmatch.fnmatchcase(layer, pattern)]
        if not names:
            raise FourierBiasError(
                f"schedule {text!r} names {pattern!r}, which is no reparameterizable layer; "
                f"{_nearest(pattern, layers)}"
            )
        times |= dict.fromkeys(names, round_half_up(_epochs(number, text, epochs)))
    return times


def _nearest(name: str, layers: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, layers, n=1, cutoff=0.5)
    return f"nearest is {near[0]}" if near else f"they are {layers[0]} to {layers[-1]}"
