"""diffusion_ext on processors that are not here: `make processors`.

The kernels, compiled for ARM's Linux, and torch's own build for it run in an emulator (machine.py).
What they answer is compared with what this processor's answer, on each of its instruction sets, and
with what emulated x86 processors of old answer (answers.py); then tests of the ops run on ARM. For
macOS the kernels are only compiled (macos.py). Nothing is told of speed.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time

import machine
import macos
import numpy as np

from diffusion_ext.ops.backend import CPU_CAPABILITY

FOLDER = pathlib.Path(__file__).parent
X86 = ("baseline", "avx2", "avx512")
CAPABILITIES = X86[: X86.index(CPU_CAPABILITY) + 1]  # as far as this processor has them
OLD = ("Westmere", "Haswell")  # x86 of 2010, without AVX and FMA, and of 2013, without AVX-512
# Of the largest value: a rounding that differs, to the dtype or within.
NEAR = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 1e-5}
TESTS = ("conv2d", "conv3x3")  # where ARM has code of its own

began = time.monotonic()


def tell(what: str) -> None:
    print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)


def answers(name: str, *python, **environment: str) -> dict[str, np.ndarray]:
    """By that Python."""
    tell(f"answers of {name}")
    file = machine.HERE / f"{name}.npz"
    machine.run(*python, FOLDER / "answers.py", file, OMP_NUM_THREADS="1", **environment)
    with np.load(file) as found:
        return dict(found)


def difference(name: str, ours: np.ndarray, others: np.ndarray) -> str:
    """In words; "" where there is none that the name forbids."""
    if ours.shape != others.shape:
        return f"{name}: shapes {ours.shape} and {others.shape}"
    if name.startswith("bits/"):
        differ = int((ours.view(np.uint32) != others.view(np.uint32)).sum())
        return f"{name}: {differ} of {ours.size} differ" if differ else ""
    largest = np.abs(ours - others).max() / np.abs(others).max()
    dtype = next((dtype for dtype in NEAR if f"torch.{dtype}" in name), "float32")
    return "" if largest <= NEAR[dtype] else f"{name}: up to {largest:.2g} of the largest value"


def compare(arm: dict[str, np.ndarray], here: dict[str, np.ndarray], capability: str) -> None:
    """Raises: SystemExit."""
    found = [f"{name}: not from both" for name in arm.keys() ^ here.keys()]
    found += [difference(name, arm[name], here[name]) for name in arm.keys() & here.keys()]
    if found := [words for words in found if words]:
        sys.exit(f"ARM's answers are not those of {capability}:\n" + "\n".join(found))
    bits = [array.size for name, array in here.items() if name.startswith("bits/")]
    rounded = len(here) - len(bits)
    tell(f"as {capability}: {len(bits)} answers to the bit ({sum(bits):,} numbers), "
         f"{rounded} but for rounding")  # fmt: skip


def main() -> None:
    tell("tools")
    machine.tools()
    tell("Python and torch for ARM")
    python = machine.system()
    machine.site(python)
    machine.start(python)
    tell("the kernels, compiled for ARM")
    machine.kernels()
    tell("the same for macOS")
    macos.compiler()
    tell(f"{macos.compile_all()} files have no error and no warning there")
    arm = answers("arm", machine.PYTHON)
    for capability in CAPABILITIES:
        lowered = {"DIFFUSION_EXT_CPU_CAPABILITY": capability, "PYTHONPATH": str(machine.ROOT)}
        lowered["ATEN_CPU_CAPABILITY"] = "default"  # else torch would serve the norms of baseline
        compare(arm, answers(capability, sys.executable, **lowered), capability)
    for processor in OLD:
        python = machine.X86_EMULATOR, "-cpu", processor, sys.executable
        compare(arm, answers(processor, *python, PYTHONPATH=str(machine.ROOT)), processor)
    tell("the ops' tests on ARM")
    os.chdir(machine.ROOT)
    tests = [f"tests/ops/test_{name}.py" for name in TESTS]
    options = ("-q", "-m", "not compiles", "-p", "no:cacheprovider", "--timeout", "300")
    machine.run(
        machine.PYTHON, "-m", "pytest", *options, *tests, OMP_NUM_THREADS="1", PYTHONSAFEPATH="1"
    )
    tell("done")


if __name__ == "__main__":
    main()
