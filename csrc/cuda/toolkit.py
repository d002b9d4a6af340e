"""setup.py's questions about CUDA, asked of nvcc and nvidia-smi: images are built without a GPU."""

import os
import pathlib
import re
import shutil
import subprocess

PROGRAM, RUNTIME = ("nvcc.exe", "cudart.lib") if os.name == "nt" else ("nvcc", "libcudart.so")
PORTABLE = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def ask(*command: str | pathlib.Path) -> str:
    """What a command prints."""
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, check=True, encoding="utf-8", errors="replace", **out).stdout


class Toolkit:
    """The one of CUDA_HOME, else of the nvcc on PATH, else in /usr/local/cuda.

    Attributes:
        home: its folder, by nvcc's own word: what is on PATH may be a wrapper.
        nvcc: the compiler.
        libraries: the folders of libcudart.
        runtime: libcudart itself (on Windows what stands for it in a link); that of a wheel on a
            package index has its version in the name.
        release: such as "13.0".

    Raises: FileNotFoundError where there is none.
    """

    def __init__(self):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        found = None if home else shutil.which("nvcc")
        nvcc = pathlib.Path(found or f"{home or '/usr/local/cuda'}/bin/{PROGRAM}")
        if not nvcc.exists():
            raise FileNotFoundError(f"no CUDA toolkit: {nvcc} does not exist (set CUDA_HOME)")
        plan = ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
        self.home = pathlib.Path(re.search(r"TOP=(.*)", plan)[1].strip()).resolve()
        self.nvcc = self.home / "bin" / PROGRAM
        named = re.findall(r'"(?:-L|/LIBPATH:)(.*?)"', re.search(r"LIBRARIES=(.*)", plan)[1])
        self.libraries = [*named, str(self.home / "lib"), str(self.home / "lib" / "x64")]
        found = (p for at in self.libraries for p in sorted(pathlib.Path(at).glob(f"{RUNTIME}*")))
        self.runtime = next(found, None)
        if self.runtime is None:
            raise FileNotFoundError(f"no CUDA toolkit: no {RUNTIME} in {self.libraries}")
        self.release = re.search(r"release ([\d.]+)", ask(nvcc, "--version"))[1]

    def check_serves(self, torch) -> None:
        """Raises RuntimeError where no library of this toolkit can be of use to that torch."""
        has = torch.version.cuda
        if torch.version.hip:
            raise RuntimeError(f"torch {torch.__version__} is a build for ROCm")
        if has and has.split(".")[0] != self.release.split(".")[0]:  # each has its own libcudart
            raise RuntimeError(
                f"nvcc is of CUDA {self.release}, torch {torch.__version__} of CUDA {has}: "
                "the major versions have to agree"
            )

    def architectures(self) -> str:
        """TORCH_CUDA_ARCH_LIST, else the GPUs that are here, else PORTABLE with PTX."""
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if wanted not in ("", "native"):
            return wanted
        codes = re.findall(r"\bsm_(\d+)(\d)\b", ask(self.nvcc, "--list-gpu-code"))
        known = {f"{major}.{minor}" for major, minor in codes}
        try:
            smi = ask("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        except (OSError, subprocess.CalledProcessError):
            smi = ""
        here = set(smi.split())
        if here and here <= known:
            return " ".join(sorted(here))
        return " ".join(arch for arch in PORTABLE if arch in known) + "+PTX"
