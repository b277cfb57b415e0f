"""The whole path from Python: train two small networks, capture both, compare them.

python examples/quickstart.py        # about two minutes on two cores; writes into quickstart/
"""

from pathlib import Path

import fourierbias
from fourierbias.training import Recipe, train

folder = Path("quickstart")
folder.mkdir(exist_ok=True)

captures = []
for name in ("cnn", "vit"):
    # Patches of the photographs that scikit-image ships; the class of a patch is its photograph.
    result = train(name, "photos", folder / f"{name}.ckpt", Recipe(epochs=2), overwrite=True)
    capture = fourierbias.capture(
        result.path, "photos", layers="blocks", limit=64, output=folder / f"{name}.h5", overwrite=True
    )
    for layer, spectrum in capture.items():
        high, error = spectrum.at(1.0), spectrum.standard_error_at(1.0)
        print(f"{name} {layer:<12} Δ log amplitude at π: {high:6.2f} ± {error:.2f}")
    captures.append(capture)

fourierbias.plot(captures, compare=True, output=folder / "compare.png", csv=folder / "compare.csv")
print(f"Wrote {folder / 'compare.png'} and the numbers in it, {folder / 'compare.csv'}.")
