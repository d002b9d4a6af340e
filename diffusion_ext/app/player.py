"""A page's player of the denoising: it plays, stops, and lets one drag through the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ..sampling.pictures import to_levels
from .page import embedded

CELL = 48  # least side of a sample on the page, in CSS pixels
MILLISECONDS, LAST_MILLISECONDS = 80, 2500  # that a frame, and the last one, is shown

STYLE = """
  .player canvas { max-width: 100%; display: block; }
  .player div { display: flex; gap: .8em; align-items: center; margin: .8em 0; flex-wrap: wrap; }
  .player input { flex: 1 1 12em; accent-color: var(--ours); }
  .player button { font: inherit; width: 5em; padding: .3em; }
  .player output { min-width: 11em; font-variant-numeric: tabular-nums; }
"""

MARKUP = """<div class="player"><canvas role="img" aria-label="the samples"></canvas>
<div><button type="button">play</button>
<input type="range" min="0" value="0" aria-label="step of the denoising"><output></output></div>
</div>
<script>
(() => {
  const about = ABOUT, sheet = new Image();
  const player = document.querySelector(".player"), canvas = player.querySelector("canvas");
  const button = player.querySelector("button"), slider = player.querySelector("input");
  const context = canvas.getContext("2d"), last = about.timesteps.length - 1;
  const scale = Math.ceil(about.cell / about.height) * Math.ceil(window.devicePixelRatio || 1);
  const gap = 4 * scale * about.height / about.cell;
  const cell = [about.width * scale + gap, about.height * scale + gap];
  const size = Math.min(cell[1] * 0.4, 40), font = size + "px system-ui, sans-serif";
  context.font = font;
  const left = Math.max(0, ...about.labels.map(text => context.measureText(text).width + size));
  const rows = Math.ceil(about.count / about.columns);
  canvas.width = left + about.columns * cell[0] - gap;
  canvas.height = rows * cell[1] - gap;
  canvas.style.width = canvas.width * about.cell / (about.height * scale) + "px";
  slider.max = last;

  function draw() {
    const frame = Number(slider.value), sx = frame % about.across * about.columns * about.width;
    const sy = Math.floor(frame / about.across) * rows * about.height;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.font = font;
    context.textBaseline = "middle";
    context.fillStyle = getComputedStyle(document.body).color;
    about.labels.forEach((text, row) => context.fillText(text, 0, (row + 0.5) * cell[1] - gap / 2));
    context.imageSmoothingQuality = "high";
    for (let i = 0; i < about.count; i++) {
      const column = i % about.columns, row = Math.floor(i / about.columns);
      context.drawImage(sheet, sx + column * about.width, sy + row * about.height, about.width,
        about.height, left + column * cell[0], row * cell[1], cell[0] - gap, cell[1] - gap);
    }
    player.querySelector("output").textContent =
      `step ${frame + 1} of ${last + 1}, t = ${about.timesteps[frame]}`;
  }

  let timer = null;
  function stop() { clearTimeout(timer); timer = null; button.textContent = "play"; }
  function next() {
    slider.value = Number(slider.value) === last ? 0 : Number(slider.value) + 1;
    draw();
    timer = setTimeout(next, Number(slider.value) === last ? about.pause : about.milliseconds);
  }
  button.onclick = () => {
    if (timer !== null) return stop();
    button.textContent = "stop";
    next();
  };
  slider.oninput = () => { stop(); draw(); };
  matchMedia("(prefers-color-scheme: dark)").onchange = draw;
  sheet.onload = () => {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) slider.value = last;
    else button.onclick();
    draw();
  };
  sheet.src = about.sheet;
})();
</script>"""


def player(
    frames: Tensor, timesteps: Sequence[int], columns: int, row_labels: Sequence[str] = ()
) -> str:
    """The player as HTML, with its pictures in it. `STYLE` goes with it.

    Args:
        frames: [F, B, C, H, W] in [-1, 1] (clipped), C 1 or 3, from noise to images.
        timesteps: [F], which are shown. columns: samples in a row. row_labels: one for each row.
    """
    count, (height, width) = frames.shape[1], frames.shape[-2:]
    sheet, across = _sheet(frames, columns)
    about = {
        "sheet": embedded(sheet), "across": across, "count": count, "columns": columns,
        "height": height, "width": width, "labels": list(row_labels), "cell": max(CELL, height),
        "timesteps": [int(t) for t in timesteps],
        "milliseconds": MILLISECONDS, "pause": LAST_MILLISECONDS,
    }  # fmt: skip
    return MARKUP.replace("ABOUT", json.dumps(about).replace("<", "\\u003c"))


def _sheet(frames: Tensor, columns: int) -> tuple[Image.Image, int]:
    """(every frame in one picture, the frames in a row of it)"""
    levels = np.stack([to_levels(frame) for frame in frames])  # [F, B, H, W, C]
    number, count, height, width, channels = levels.shape
    rows, across = -(-count // columns), math.ceil(math.sqrt(number))
    down = -(-number // across)
    whole = np.zeros((down * across, rows * columns, height, width, channels), np.uint8)
    whole[:number, :count] = levels
    whole = whole.reshape(down, across, rows, columns, height, width, channels)
    pixels = whole.transpose(0, 2, 4, 1, 3, 5, 6).reshape(
        down * rows * height, across * columns * width, channels
    )
    return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels), across
