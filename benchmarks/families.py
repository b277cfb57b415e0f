"""Whether capture works on every family of timm, held against timm's own extraction; writes docs/families.md.

    python benchmarks/families.py                 go on where it stopped; about ten minutes on one core
    python benchmarks/families.py --seconds 240   a slice of that
    python benchmarks/families.py vit swin --redo these families again

A family is one model module of timm.  Of each the variant with the fewest parameters is built with seeded
random weights, for the smallest image that it takes.  ``blocks`` and ``stages`` are captured as a user would
capture them; the stages are compared, value by value, with `forward_intermediates`.  As timm offers no
reference for blocks, their order in space is tested: an image changed in one corner must change the maps
most in that corner.
"""

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models import list_models, list_modules

import fourierbias
from fourierbias import FourierBiasError

RESULTS = Path("runs/families.jsonl")
DOCUMENT = Path("docs/families.md")
SIZES = (64, 96, 128, 160, 192, 224, 256)

# Where the smallest variant stands badly for its family, or is too large to be tried at full depth.
VARIANTS = {
    "convnext": ("convnext_atto", {}),
    "efficientnet": ("mobilenetv2_035", {}),
    "deepseek_vit": (None, {"depth": 2}),
    "gemma4_vit": (None, {"depth": 2}),
    "qwen3_vit": (None, {"depth": 2}),
    "resnet": ("resnet10t", {}),
    "vision_transformer": ("vit_tiny_patch16_224", {}),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--redo", action="store_true", help="also where there is a result")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no family after so long")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    RESULTS.parent.mkdir(exist_ok=True)
    results = read_results()
    start = time.monotonic()
    for family in options.families or list_modules():
        if family in results and not options.redo:
            continue
        if time.monotonic() - start > options.seconds:
            print("stopped: run again to go on")
            break
        result = results[family] = examine(family)
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(row(result), flush=True)
    write_document(results)


def read_results():
    """The last result of each family: {family: result}."""
    if not RESULTS.exists():
        return {}
    lines = (json.loads(line) for line in RESULTS.read_text().splitlines())
    return {result["family"]: result for result in lines}


def examine(family):
    """Everything found out about one family, as plain values; never raises."""
    result = {"family": family}
    try:
        name, options = smallest_variant(family)
        result |= {"variant": name, "options": options}
        model, size = smallest_input(name, options)
    except Exception as error:
        return result | {"error": one_line(error)}
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "input": size}
    with tempfile.TemporaryDirectory() as folder:
        for layers in ("blocks", "stages"):
            result[layers] = captured(model, size, layers, Path(folder) / f"{layers}.h5")
        result["intermediates"] = against_timm(model, size, Path(folder) / "stages.h5")
    return result


def smallest_variant(family):
    """The name of the family's model with the fewest parameters, counted without allocating them."""
    name, options = VARIANTS.get(family, (None, {}))
    if name is None:
        counts = {}
        for candidate in list_models(module=family):
            try:
                with torch.device("meta"):
                    model = timm.create_model(candidate)
            except Exception:  # the next may build; if none does, the error of building it will be told
                continue
            counts[candidate] = sum(p.numel() for p in model.parameters())
        name = min(counts, key=counts.get) if counts else list_models(module=family)[0]
    return name, options


def smallest_input(name, options):
    """The model in evaluation mode, and the smallest (C, H, W) that leaves its maps a grid of 3×3 or more."""
    channels, *own = timm.get_pretrained_cfg(name).input_size
    error = None
    for side in sorted({size for size in SIZES if size < max(own)} | {max(own)}):
        for sized in ({"img_size": side}, {"input_size": (channels, side, side)}, {}):
            if sized and side == max(own):
                continue
            try:
                torch.manual_seed(0)
                model = timm.create_model(name, **options, **sized).eval()
                with torch.no_grad():
                    model(torch.randn(1, channels, side, side))
                    coarsest = coarsest_side(model, side)
            except Exception as failed:
                error = failed
                continue
            if coarsest < 3 and side < max(own):
                break
            return model, [channels, side, side]
    raise error


def coarsest_side(model, side):
    maps = model.forward_intermediates(torch.randn(1, 3, side, side), intermediates_only=True)
    return min(min(map_.shape[-2:]) for map_ in maps)


def images_of(size):
    """Three images (3, C, H, W): one, that with its top right changed, that with its bottom left changed."""
    channels, height, width = size
    image, other = torch.randn(2, 1, channels, height, width, generator=torch.Generator().manual_seed(0))
    images = image.repeat(3, 1, 1, 1)
    h, w = height // 4, width // 4
    images[1, :, :h, -w:] = other[0, :, :h, -w:]
    images[2, :, -h:, :w] = other[0, :, -h:, :w]
    return images


def captured(model, size, layers, file):
    """What `fourierbias.capture` makes of ``layers``: how many, which are skipped, and why it failed."""
    try:
        capture = fourierbias.capture(
            model, images_of(size), layers=layers, output=file, features=True, feature_dtype="float32"
        )
    except FourierBiasError as error:
        return {"layers": 0, "refused": one_line(error)}
    except Exception as error:
        return {"layers": 0, "crashed": one_line(error)}
    shapes = {name: list(capture.feature_maps(name).shape[1:]) for name in capture}
    return {
        "layers": len(capture),
        "skipped": capture.attrs["skipped"],
        "repeated": capture.attrs["repeated_calls"],
        "shapes": shapes,
        "in_place": {name: in_place(capture.feature_maps(name)) for name in capture},
    }


def in_place(maps):
    """Whether the two changed corners change the maps most there; None where a change spreads everywhere."""
    changes = np.abs(maps[1:] - maps[:1]).mean(axis=1)  # (2, H, W)
    changes /= np.maximum(changes.mean(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)
    if changes.max(axis=(1, 2)).min() < 2:
        return None
    height, width = changes.shape[1:]
    contrast = changes[0] - changes[1]
    (top, right), (bottom, left) = (
        np.unravel_index(at, contrast.shape) for at in (contrast.argmax(), contrast.argmin())
    )
    return bool(top < height / 2 <= bottom + 0.5 and left < width / 2 <= right + 0.5)


def against_timm(model, size, file):
    """How many maps of `forward_intermediates` are among the captured stages, and the largest difference.

    The difference is relative to the largest value of the map.
    """
    with torch.no_grad():
        expected = model.forward_intermediates(images_of(size), intermediates_only=True)
    if not file.exists():
        return {"maps": len(expected), "equal": 0}
    capture = fourierbias.load(file)
    captured = [torch.from_numpy(capture.feature_maps(name)) for name in capture]
    differences = []
    for reference in expected:
        alike = [maps for maps in captured if maps.shape == reference.shape]
        found = [((maps - reference).abs().max() / reference.abs().max()).item() for maps in alike]
        differences.append(min(found, default=math.inf))
    equal = [difference for difference in differences if difference < 1e-4]
    return {"maps": len(expected), "equal": len(equal), "largest": max(equal, default=None)}


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def is_captured(result):
    """Whether both choices of layers gave maps, and timm's own are among them."""
    if not all(result.get(layers, {}).get("layers") for layers in ("blocks", "stages")):
        return False
    return result["intermediates"]["equal"] > 0


def notes(result):
    """What a reader must know of one family beside the numbers."""
    if "error" in result:
        yield result["error"]
        return
    for layers in ("blocks", "stages"):
        found = result[layers]
        yield from (f"{layers}: {found[key]}" for key in ("crashed", "refused") if key in found)
        for reason, count in Counter(found.get("skipped", {}).values()).items():
            yield f"{layers}: {count} skipped, {reason}"
    if result["options"]:
        yield "built with " + ", ".join(f"{key}={value}" for key, value in result["options"].items())
    elsewhere = [name for name, place in result["blocks"].get("in_place", {}).items() if place is False]
    if elsewhere:
        yield f"{len(elsewhere)} blocks out of place, first {elsewhere[0]}"
    branches = any("[" in name for name in result["stages"].get("shapes", {}))
    if branches:
        yield "a module gives several maps, on different grids: each is a layer"
    maps, equal = result["intermediates"]["maps"], result["intermediates"]["equal"]
    if equal < maps:
        yield f"timm's other {maps - equal}: the output of no module that it names"


def row(result):
    compared = result.get("intermediates", {})
    difference = compared.get("largest")
    cells = [
        result["family"],
        f"`{result.get('variant', '')}`",
        "×".join(map(str, result.get("input", []))),
        str(result.get("blocks", {}).get("layers", 0)),
        str(result.get("stages", {}).get("layers", 0)),
        f"{compared.get('equal', 0)} of {compared.get('maps', 0)}",
        "" if difference is None else "0" if difference == 0 else f"{difference:.0e}",
        "; ".join(notes(result)).replace("|", "\\|"),
    ]
    return "| " + " | ".join(cells) + " |"


def write_document(results):
    rows = [row(results[family]) for family in list_modules() if family in results]
    captured = [result for result in results.values() if is_captured(result)]
    places = [place for result in captured for place in result["blocks"]["in_place"].values()]
    text = TEXT.format(
        families=len(results),
        captured=len(captured),
        share=len(captured) / max(len(results), 1),
        blocks=len(places),
        clear=len(places) - places.count(None),
        elsewhere=places.count(False),
        timm=version("timm"),
        rows="\n".join(rows),
    )
    partial = DOCUMENT.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(DOCUMENT)


TEXT = """\
# The model families of timm

Made by `python benchmarks/families.py` with timm {timm}; do not edit.

Of each of timm's {families} model modules one small variant was built with seeded random weights and captured
by `fourierbias.capture` with `layers="blocks"` and with `layers="stages"`, for the smallest square input that
it takes and that leaves its coarsest map a grid of 3×3 or more. **{captured} of {families} families
({share:.0%}) are captured**; none ends in an exception.

* *blocks*, *stages*: layers with maps.
* *timm's maps found*: how many maps of timm's own `forward_intermediates` are among those of the stages,
  value by value (float32, all images), and the largest difference relative to the largest value of the map.
* timm has no reference for the blocks between stages.  There the order in space was tested: an image changed
  in its top right corner, and one changed in its bottom left, must change the maps most there.  In {clear} of
  {blocks} blocks the changes have a clear place, and it is the wrong one in {elsewhere}; in the others random
  weights or a wide receptive field spread them over the whole map.

Models that take packed patches of images of many sizes (NaFlex: naflexvit, gemma4_vit, qwen3_vit) are
captured on ordinary images of one size; a dictionary of patches is not an input of `capture`.

| family | variant | input | blocks | stages | timm's maps found | largest difference | note |
|---|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
