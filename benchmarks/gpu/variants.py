"""Builds what `tune` times: the CUDA kernels with other constants in csrc/cuda/tuning.h.

    python -m benchmarks.gpu.variants

Each is a library of its own, build/variants/<GPU>/<name>.so, whose ops are in a namespace of its
own. Ninja compiles again only what has changed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

from .stand_in import STAND_IN

ROOT = pathlib.Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HEADER = CSRC / "cuda" / "tuning.h"

NORM, ELEMENTWISE = "group_norm_act", "elementwise"
SOURCES = {
    NORM: ("group_norm_act", "group_norm_act_backward"),
    ELEMENTWISE: ("sampler_step", "perturb", "philox_normal", "denoising_loss"),
}
# The kernels themselves are compiled with these; with the others, only what launches them.
IN_KERNELS = ("kForward", "kBackward", "kOverlapLaunches")


@dataclass(frozen=True)
class Variant:
    """The kernels of an op with other constants. `changes`: (constant, value) as in C++."""

    op: str
    name: str
    changes: tuple[tuple[str, str], ...] = ()

    @property
    def library(self) -> str:
        return f"{self.op}_{self.name}"

    @property
    def namespace(self) -> str:
        return f"diffusion_ext_{self.library}"

    @property
    def of_kernels(self) -> bool:
        return any(constant.startswith(IN_KERNELS) for constant, _ in self.changes)


def norm(name: str, forward: str, backward: str, last: str) -> Variant:
    """One way to compile all kernels of group_norm_act: threads, blocks, loads in flight.

    The backward of channels_last needs twice the registers of the others.
    """
    values = {"kForward": forward, "kForwardLast": forward, "kForwardSplit": forward}
    values |= {"kBackward": backward, "kBackwardLast": last, "kBackwardSplit": last}
    return Variant(NORM, name, tuple((k, f"{{{v}}}") for k, v in values.items()))


def one(op: str, name: str, constant: str, value: object) -> Variant:
    return Variant(op, name, ((constant, str(value)),))


VARIANTS = (
    Variant(NORM, "as_it_is"),
    norm("512x1", "512, 1, 4", "512, 1, 2", "512, 1, 1"),
    norm("256x1", "256, 1, 4", "256, 1, 2", "256, 1, 2"),
    norm("256x1_more_loads", "256, 1, 8", "256, 1, 4", "256, 1, 4"),
    norm("256x2_fewer_loads", "256, 2, 2", "256, 2, 1", "256, 2, 1"),
    norm("256x3", "256, 3, 2", "256, 3, 1", "128, 4, 1"),
    norm("128x4", "128, 4, 4", "128, 4, 2", "128, 3, 1"),
    one(NORM, "overlap", "kOverlapLaunches", "true"),
    one(NORM, "cluster_1", "kMostCluster", 1),
    one(NORM, "cluster_2", "kMostCluster", 2),
    one(NORM, "cluster_4", "kMostCluster", 4),
    one(NORM, "lanes_2", "kLeastLanes", 2),
    one(NORM, "lanes_32", "kLeastLanes", 32),
    one(NORM, "busy_512", "kBusyThreads", 512),
    one(NORM, "busy_2048", "kBusyThreads", 2048),
    one(NORM, "parts_8", "kPartsPerMultiprocessor", 8),
    one(NORM, "parts_32", "kPartsPerMultiprocessor", 32),
    one(NORM, "on_chip_where_it_fits", "kLaunchBytes", 10**12),
    one(NORM, "split_always", "kLaunchBytes", -(10**12)),
    Variant(ELEMENTWISE, "as_it_is"),
    one(ELEMENTWISE, "vectors_2", "kElementVectors", 2),
    one(ELEMENTWISE, "vectors_4", "kElementVectors", 4),
    one(ELEMENTWISE, "grid_4", "kElementBlocks", 4),
    one(ELEMENTWISE, "grid_16", "kElementBlocks", 16),
    one(ELEMENTWISE, "streaming", "kStreaming", "true"),
    one(ELEMENTWISE, "threads_128", "kElementThreads", 128),
    one(ELEMENTWISE, "threads_512", "kElementThreads", 512),
    one(ELEMENTWISE, "pixels_64", "kPixelThreads", 64),
    one(ELEMENTWISE, "pixels_256", "kPixelThreads", 256),
)  # fmt: skip

# Compiling them all for the emulated GPU takes a quarter of an hour.
CHOSEN = tuple(v for v in VARIANTS if not STAND_IN or v.name in ("as_it_is", "vectors_2"))


def header_with(changes: dict[str, str]) -> str:
    """The text of tuning.h with other values of some constants.

    Raises: ValueError where it has no such constant.
    """
    text = HEADER.read_text()
    for constant, value in changes.items():
        text, found = re.subn(
            rf"\b{constant} = (?:{{[^}}]*}}|[^;,]+)", f"{constant} = {value}", text
        )
        if found != 1:
            raise ValueError(f"{HEADER.name} has {found} constants {constant}")
    return text


# --- building them --------------------------------------------------------------------------------


def torch_flags() -> tuple[list[str], list[str]]:
    """(for compiling, for linking)"""
    from torch.utils.cpp_extension import include_paths, library_paths

    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    libraries = [f"-L{path}" for path in library_paths()]
    return headers, [*libraries, "-ltorch_cpu"]


class Rules:
    """The two ways to compile and link: nvcc for the GPU at hand, or the host's compiler and the
    emulation."""

    def __init__(self, emulated: bool):
        self.headers, self.link = torch_flags()
        sys.path[:0] = [str(CSRC / "cpu"), str(CSRC / "cuda")]
        import compiler
        from toolkit import Toolkit

        self.cxx = compiler.command()
        self.host = [*self.cxx, *compiler.flags(self.cxx), "-fPIC", *self.headers]
        if emulated:
            quiet = ["-Wno-unknown-pragmas"]
            if compiler.is_gcc(self.cxx):  # clang knows no such warning
                quiet.append("-Wno-maybe-uninitialized")
            self.cuda = [*self.host, *quiet, "-DDX_DISPATCH_KEY=CUDA", "-x", "c++"]
            self.also = [CSRC / "emulation" / "configure.cpp"]
            self.also += [CSRC / "cpu" / name for name in ("simd.cpp", "exact_fma.cpp")]
            self.shared = [CSRC / "emulation" / name for name in ("fiber.cpp", "machine.cpp")]
            return
        toolkit = Toolkit()
        codes = []
        for arch in toolkit.architectures().replace("+PTX", "").split():
            number = arch.replace(".", "")
            codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        self.cuda = [str(toolkit.nvcc), *shlex.split((CSRC / "flags_cuda.txt").read_text())]
        self.cuda += [*codes, "-Xcompiler", "-fPIC"]
        self.cuda += [*self.headers, "-Xptxas", "-v"]
        self.also, self.shared = [], []
        folders = [f"-L{path}" for path in toolkit.libraries]
        self.link += [*folders, "-lcudart", "-Wl,--no-as-needed", "-ltorch"]


class Ninja:
    """A build.ninja: each object once, however many libraries it is in."""

    def __init__(self, folder: pathlib.Path, rules: Rules):
        self.folder, self.rules, self.lines, self.objects = folder, rules, [], set()
        for rule, command in (("cuda", rules.cuda), ("host", rules.host)):
            depends = "-MD -MF $out.d"
            line = f"{shlex.join(command)} $flags {depends} -c $in -o $out"
            self.lines += [
                f"rule {rule}",
                f"  command = {line} > $out.log 2>&1 || (cat $out.log; exit 1)",
            ]
            self.lines += ["  depfile = $out.d", "  deps = gcc", "  description = $out"]
        link = f"{shlex.join(rules.cxx)} -shared -o $out $in {shlex.join(rules.link)}"
        self.lines += ["rule link", f"  command = {link}", "  description = $out"]

    def compile(self, source: pathlib.Path, into: str, options: list[str]) -> str:
        object_ = f"{into}/{source.stem}.o"
        if object_ not in self.objects:
            self.objects.add(object_)
            rule = "cuda" if source.suffix == ".cu" else "host"
            self.lines += [f"build {object_}: {rule} {source}", f"  flags = {shlex.join(options)}"]
        return object_

    def library(self, variant: Variant) -> None:
        header = self.folder / variant.library / "tuning.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        write_if_new(header, header_with(dict(variant.changes)))
        own = ["-include", str(header), "-DDX_ONLY_BFLOAT16"]
        names = SOURCES[variant.op]
        launchers = [CSRC / "cuda" / f"{name}.cu" for name in names]
        launchers += [CSRC / "registration.cpp", *self.rules.also]
        named = [*own, f"-DDX_NAMESPACE={variant.namespace}"]
        objects = [self.compile(source, variant.library, named) for source in launchers]
        objects += [self.compile(source, "shared", []) for source in self.rules.shared]
        kernels = variant if variant.of_kernels else Variant(variant.op, "as_it_is")
        header = self.folder / kernels.library / "tuning.h"
        for name in names:
            for source in sorted((CSRC / "cuda" / "instances").glob(f"{name}*_bfloat16.cu")):
                options = ["-include", str(header), "-DDX_ONLY_BFLOAT16"]
                objects.append(self.compile(source, kernels.library, options))
        built = " ".join(dict.fromkeys(objects))
        self.lines.append(f"build {variant.library}.so: link {built}")


def write_if_new(path: pathlib.Path, text: str) -> None:
    """Leaves the file's time alone where it has the text."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def folder_of(emulated: bool) -> pathlib.Path:
    return ROOT / "build" / "variants" / ("emulated" if emulated else "cuda")


def build(emulated: bool, variants: tuple[Variant, ...] = CHOSEN) -> int:
    """ninja's exit status. One that does not compile stops none of the others."""
    folder = folder_of(emulated)
    folder.mkdir(parents=True, exist_ok=True)
    ninja = Ninja(folder, Rules(emulated))
    for variant in variants:
        ninja.library(variant)
    (folder / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-k", "0"]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    return build(STAND_IN)


if __name__ == "__main__":
    sys.exit(main())
