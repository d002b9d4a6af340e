"""Builds diffusion_ext's C++ library; pyproject.toml has the rest.

Environment:
    DIFFUSION_EXT_NATIVE   1: fail where the C++ library cannot be built; 0: do not build it.
                           By default a failure leaves a pure-Python install that says why.
    MAX_JOBS               parallel compilations; by default the cores, at most one per 2 GB free.
"""

import json
import os
import pathlib
import shlex
import sys

from setuptools import setup

ROOT = pathlib.Path(__file__).resolve().parent
CXX_FLAGS = shlex.split((ROOT / "csrc" / "flags.txt").read_text())


def say(message: str) -> None:
    print(f"diffusion_ext: {message}", file=sys.stderr, flush=True)


def write_record(facts: dict, root: str | pathlib.Path = ROOT) -> None:
    """What `diffusion-ext info` reports of this build: a file of the package, carried by wheels."""
    record = pathlib.Path(root) / "diffusion_ext" / "_build.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(facts, indent=1) + "\n")


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def free_memory_gb() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        return 8.0


def cpu_extension():
    """diffusion_ext._C: the pybind11 module and the CPU ops."""
    import pybind11
    from setuptools import Extension
    from torch.utils import cpp_extension

    return Extension(
        "diffusion_ext._C",
        sources("", ".cpp") + sources("cpu", ".cpp"),
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args={"cxx": CXX_FLAGS},
        language="c++",
    )


def build_command():
    """torch's BuildExtension; a failure is recorded and the install goes on without the library."""
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        def run(self):
            self.facts = {"flags": " ".join(CXX_FLAGS)}
            super().run()
            write_record(self.facts, ROOT if self.inplace else self.build_lib)

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if os.environ.get("DIFFUSION_EXT_NATIVE") == "1":
                    raise
                self.extensions.clear()
                reason = " ".join(str(error).split()) or type(error).__name__
                self.facts = {"not built": reason[:300]}
                say(f"THE C++ LIBRARY WAS NOT BUILT; installing pure Python. {reason}")

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    return Build.with_options(use_ninja=True)


def native_build() -> dict:
    """setup()'s arguments for the libraries: none where they are not wanted or torch is missing."""
    wanted = os.environ.get("DIFFUSION_EXT_NATIVE")
    if wanted == "0":
        write_record({"not built": "DIFFUSION_EXT_NATIVE=0"})
        return {}
    jobs = min(os.cpu_count() or 1, max(1, int(free_memory_gb() // 2)))
    os.environ.setdefault("MAX_JOBS", str(jobs))
    try:
        return {"ext_modules": [cpu_extension()], "cmdclass": {"build_ext": build_command()}}
    except ImportError as error:
        if wanted == "1":
            raise
        say(
            f"installing pure Python: {error} (install torch and pybind11 first, then "
            "pip install --no-build-isolation)"
        )
        write_record({"not built": str(error)})
        return {}


setup(**native_build())
