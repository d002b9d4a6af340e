"""The README's plot: what `diffusion-ext bench` finds on this machine, of each built-in model.

python -m benchmarks.gains [--seconds 600] [--only WORD] [--draw]
    docs/images/gains.png, and the figures in results/gains.json, which keeps those of this machine
    that are not measured anew

Stable Diffusion at 512 pixels wants 1800 seconds; with --draw the picture is drawn of what is kept.
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
    "Stable Diffusion 1.5\n512×512, 25 steps": ["stable-diffusion", "--size", "512"],
}
INKS = {
    "eager": "#dde2e9", "compile": "#bcc5d0", "openvino": "#93a0b0", "onnxruntime": "#667385",
    "ours": "#2a6fdb",
}  # fmt: skip
BAR = 0.17  # of the height that a model has


def measure(name: str, folder: pathlib.Path, seconds: float) -> dict:
    """The record of a model's `bench`."""
    out = folder / f"{'-'.join(word.strip('-') for word in MODELS[name])}.html"
    command = [sys.executable, "-m", "diffusion_ext", "bench", *MODELS[name]]
    subprocess.run([*command, "--seconds", str(seconds), "--out", str(out)], check=True)
    return json.loads(out.with_suffix(".json").read_text())


def kept() -> dict[str, dict]:
    """What was measured before, in the models' order."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return {name: found[name] for name in MODELS if name in found}


def plot(found: dict[str, dict], path: pathlib.Path) -> None:
    """A bar for each way that was timed: its time for a picture, as a share of eager's."""
    figure = Figure(figsize=(8, 0.6 + 1.1 * len(found)), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        axes.barh(0, 0, 0, color=INKS[way], label=WAYS[way])  # for the legend
    for i, record in enumerate(found.values()):
        times = {way: record["seconds"][way]["picture"] for way in WAYS if way in record["seconds"]}
        for j, (way, seconds) in enumerate(times.items()):
            y, share = i + BAR * (j - (len(times) - 1) / 2), seconds / times["eager"]
            axes.barh(y, share, 0.9 * BAR, color=INKS[way])
            gain = f", {1 / share:.1f}x as fast as eager" if way == "ours" else ""
            axes.text(share + 0.01, y, f"{written(seconds)}{gain}", va="center", fontsize=8)
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
    parser.add_argument("--only", default="", help="models whose arguments have this word")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for name, arguments in MODELS.items():
        if options.draw or options.only not in " ".join(arguments):
            continue
        new = measure(name, ROOT / "build" / "gains", options.seconds)
        found = {n: r for n, r in kept().items() if r["machine"] == new["machine"]} | {name: new}
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")  # so far
    plot(kept(), PLOT)
    print(PLOT)


if __name__ == "__main__":
    main()
