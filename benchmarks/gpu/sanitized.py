"""Every op once on small tensors, for compute-sanitizer to watch: see gpu_check.py, which runs it.

Inputs are drawn on the CPU and little of torch's own runs on the GPU, so that what a sanitizer says
is about our kernels. Each result is read as a whole, which is how initcheck notices an element that
was never written.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from calls import NORMS, every_call

from diffusion_ext import _C

from ..device import limits

# (1, 7, 5, 3): no vector fits. The other two have channels and pixels that vectors divide.
SHAPES = [(2, 8, 9, 4), (2, 4, 8, 8), (1, 7, 5, 3)]
# Copying to a misaligned view is torch's work: contiguous, so that no vector fits.
LAYOUTS = ("contiguous", "channels_last", "misaligned contiguous", "misaligned channels_last")
DTYPES = (torch.float32, torch.bfloat16)


def kernels_reached(device: str) -> set[tuple]:
    """(kind, several parts, vectors, channels_last, backward) of NORMS on this device."""
    reached, flags = set(), (False, True)
    for (shape, groups), size, last, backward in itertools.product(NORMS, (2, 4), flags, flags):
        options = {"channels_last": last, "backward": backward, **limits(device)}
        plan = _C.group_norm_plan(shape, groups, size, **options)
        reached.add((plan["kind"], plan["parts"] > 1, plan["vector"] > 1, last, backward))
    return reached


def wanted(device: str) -> set[tuple]:
    """On chip in a block, in a cluster where there are any, split; each in every way."""
    kinds = [("on chip", False), ("split", True)]
    if limits(device).get("max_cluster", 8) > 1:
        kinds.append(("on chip", True))
    return {(*kind, *rest) for kind in kinds for rest in itertools.product((False, True), repeat=3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    if missing := wanted(device) - kernels_reached(device):
        print(f"no shape reaches these kernels of group_norm_act here: {sorted(missing)}")
        return 1
    count = 0
    with torch.device(device):
        for dtype, layout, shape in itertools.product(DTYPES, LAYOUTS, SHAPES):
            norms = shape == SHAPES[0]  # they have shapes of their own
            for name, call in every_call(dtype, layout, shape).items():
                if norms or not name.startswith("group_norm_act"):
                    for result in call.run(**call.draw()):
                        result + 0
                    count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{count} calls on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
