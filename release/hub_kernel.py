"""The folder that Hugging Face's `kernels` library loads, made of wheels.

    python release/hub_kernel.py dist/cuda/*.whl [--out dist/kernel]

    import kernels
    dx = kernels.get_local_kernel(pathlib.Path("dist/kernel"))

There is a folder for each backend that the wheels are built for. Wheels of several Pythons go into
the same one, since their modules have other names. docs/install.md says what the hub asks for
beyond that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import re
import zipfile

PACKAGE = "diffusion_ext/"
ABI = "torch-stable-abi210"  # csrc/common.h: TORCH_TARGET_VERSION
PLATFORM = "x86_64-linux"


def backend_of(wheel: zipfile.ZipFile) -> str:
    """As the hub names it: cpu, or cu130."""
    facts = json.loads(wheel.read(f"{PACKAGE}_build.json"))
    built = re.match(r"nvcc (\d+)\.(\d+)", facts.get("cuda", ""))
    return f"cu{built[1]}{built[2]}" if built else "cpu"


def add(path: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A wheel's package into the folder of its backend, which is returned."""
    version = path.name.split("-")[1]
    with zipfile.ZipFile(path) as wheel:
        backend = backend_of(wheel)
        folder = out / "build" / f"{ABI}-{backend}-{PLATFORM}"
        for name in wheel.namelist():
            if name.startswith(PACKAGE) and not name.endswith("/"):
                file = folder / name.removeprefix(PACKAGE)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(wheel.read(name))
    # Nothing is installed whose version could be asked for.
    (folder / "version.py").write_text(
        f'"""The version of the package."""\n\n__version__ = "{version}"\n'
    )
    of = hashlib.sha256((folder / "_build.json").read_bytes() + version.encode()).hexdigest()[:12]
    about = {
        "id": f"diffusion_ext_{backend}_{of}",  # what Python has the module as
        "name": "diffusion-ext",
        "version": int(version.partition(".")[0]),
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cpu" if backend == "cpu" else "cuda"},
    }
    (folder / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", type=pathlib.Path, nargs="+")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("dist/kernel"))
    options = parser.parse_args()
    for wheel in options.wheels:
        print(add(wheel, options.out))


if __name__ == "__main__":
    main()
