"""The README's plot: what `diffusion-ext bench` finds on this machine, of each built-in model.

python -m benchmarks.gains [--seconds 600]     docs/images/gains.png, and the figures in results/
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

from matplotlib.figure import Figure

from diffusion_ext.app.bench.report import written
from diffusion_ext.app.bench.subject import WAYS

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path(__file__).with_name("results") / "gains.json"
PLOT = ROOT / "docs" / "images" / "gains.png"
# What people read -> the arguments of `bench`
MODELS = {
    "ContextUnet\n16×16, 25 steps": ["context-unet"],
    "DDPM of CIFAR-10\n32×32, 25 steps": ["ddpm-cifar10"],
    "Stable Diffusion 1.5\n256×256, 25 steps": ["stable-diffusion", "--size", "256"],
}
INKS = {"eager": "#c9d1db", "compile": "#8b98a9", "ours": "#2a6fdb"}


def measure(folder: pathlib.Path, seconds: float) -> dict[str, dict]:
    """Model -> the record of its `bench`."""
    found = {}
    for name, arguments in MODELS.items():
        out = folder / f"{arguments[0]}.html"
        command = [sys.executable, "-m", "diffusion_ext", "bench", *arguments]
        subprocess.run([*command, "--seconds", str(seconds), "--out", str(out)], check=True)
        found[name] = json.loads(out.with_suffix(".json").read_text())
    return found


def plot(found: dict[str, dict], path: pathlib.Path) -> None:
    """A bar for each way: its time for a picture, as a share of eager's."""
    figure = Figure(figsize=(8, 3.3), layout="constrained")
    axes = figure.subplots()
    for i, record in enumerate(found.values()):
        times = {way: of["picture"] for way, of in record["seconds"].items()}
        for j, way in enumerate(WAYS):
            if way not in times:
                continue
            y, share = i + 0.26 * (j - 1), times[way] / times["eager"]
            axes.barh(y, share, 0.24, color=INKS[way], label=WAYS[way] if i == 0 else None)
            gain = f", {1 / share:.1f}x as fast" if way == "ours" else ""
            axes.text(share + 0.01, y, f"{written(times[way])}{gain}", va="center", fontsize=9)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] + 0.3)  # the words beside the bars
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle("Time of a picture, guidance and decoder included", fontsize=11)
    axes.legend(
        frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(WAYS), fontsize=9
    )
    machine = next(iter(found.values()))["machine"]
    axes.set_xlabel(machine, fontsize=8, loc="left", color="#555555")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="for each model")
    found = measure(ROOT / "build" / "gains", parser.parse_args().seconds)
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    plot(found, PLOT)
    print(PLOT)


if __name__ == "__main__":
    main()
