"""Builds diffusion_ext's two libraries; pyproject.toml has the rest.

Environment:
    DIFFUSION_EXT_NATIVE   1: fail where the C++ library cannot be built; 0: build no library.
                           By default a failure leaves a pure-Python install that says why.
    DIFFUSION_EXT_CUDA     1: fail where the CUDA library cannot be built; 0: do not build it.
                           By default it is built where a toolkit is found and torch has CUDA: a
                           torch without could not load it, and nvcc takes minutes. A failure leaves
                           the C++ library and says why. 1 builds it with any torch, for wheels that
                           serve elsewhere.
    CXX                    the C++ compiler; by default c++, g++ or clang++, the first on PATH.
    CUDA_HOME              the toolkit; by default that of the nvcc on PATH.
    TORCH_CUDA_ARCH_LIST   what the kernels are compiled for, such as "8.0 9.0+PTX"; by default the
                           GPUs of this machine, else 7.5 to 12.0 as far as nvcc goes, with PTX.
    MAX_JOBS               parallel compilations; by default the cores, at most one per 2 GB free.
"""

import contextlib
import copy
import json
import os
import pathlib
import shlex
import shutil
import sys
import sysconfig

from setuptools import setup

ROOT = pathlib.Path(__file__).resolve().parent
WINDOWS = sys.platform == "win32"

sys.path[:0] = [str(ROOT / "csrc" / "cpu"), str(ROOT / "csrc" / "cuda")]
import compiler  # noqa: E402
import compiler_log  # noqa: E402
from toolkit import Toolkit  # noqa: E402


def nvcc_flags() -> list[str]:
    """The last one is a list for the compiler that nvcc calls."""
    found = compiler.read("flags_cuda.txt")
    if WINDOWS:  # torch adds a -std there, and what else MSVC is to be told
        found.remove("-std=c++20")
        found[-1] = "/fp:precise,/Zc:__cplusplus,/Zc:preprocessor,/bigobj"
    return found


NVCC_FLAGS = nvcc_flags()
facts = {}  # what `diffusion-ext info` will say of this build


def say(message: str) -> None:
    print(f"diffusion_ext: {message}", file=sys.stderr, flush=True)


def one_line(error: BaseException, said: list[str] = ()) -> str:
    """The first error that a compiler said, else the exception's own words."""
    said = said or (getattr(error, "output", None) or "").splitlines()  # what `ask` was told
    why = compiler_log.first_error(said) or " ".join(str(error).split()) or type(error).__name__
    return why.replace(f"{ROOT}{os.sep}", "")[:300]


def without_native(reason: str) -> None:
    facts.clear()
    facts["not built"] = reason


def without_cuda(reason: str) -> None:
    facts["cuda"] = f"not built: {reason}"
    say(f"THE CUDA LIBRARY WAS NOT BUILT; torch will serve CUDA tensors. {reason}")


def write_facts(root: pathlib.Path = ROOT) -> None:
    """Into a file of the package, which wheels carry."""
    record = root / "diffusion_ext" / "_build.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


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
        sources("", ".cpp") + sources("cpu", ".cpp") + sources("cpu/instances", ".cpp"),
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args={},  # build_extensions has its compiler's
        language="c++",
    )


def cuda_extension():
    """diffusion_ext._cuda: the CUDA kernels, a library for torch.ops.load_library."""
    import torch
    from setuptools import Extension
    from torch.utils import cpp_extension

    # nvcc asks for gcc, where it is not told of another compiler.
    if shutil.which("gcc") is None and not WINDOWS:
        os.environ.setdefault("NVCC_CCBIN", compiler.command()[0])
    toolkit = Toolkit()
    toolkit.check_serves(torch)
    # A torch without CUDA knows of no toolkit. Told of this one, BuildExtension checks the host
    # compiler, and ninja follows the headers, as under a torch with CUDA.
    cpp_extension.CUDA_HOME = str(toolkit.home)
    torch.version.cuda = torch.version.cuda or toolkit.release
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.architectures()
    facts["cuda"] = f"nvcc {toolkit.release} for {architectures}: {' '.join(NVCC_FLAGS)}"
    any_torch = [] if WINDOWS else ["-Wl,--no-as-needed", "-ltorch"]
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return Extension(
        "diffusion_ext._cuda",
        sources("cuda", ".cu") + sources("cuda/instances", ".cu"),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", *(["torch_cuda"] if WINDOWS else [])],
        extra_compile_args={"nvcc": NVCC_FLAGS + headers},
        # The current stream is libtorch_cuda.so's to tell, which a torch without CUDA has not got
        # to link. import torch loads its libraries for itself (RTLD_LOCAL), so ours finds only what
        # it names, and what that names in turn: libtorch.so, which every torch has, and which names
        # libtorch_cuda.so where there is one. No symbol is its own: hence --no-as-needed. No rpath:
        # torch has loaded all of them before us, libcudart too. Windows' linker has to be told
        # of the library of each symbol, and so needs a torch with CUDA.
        extra_link_args=[*any_torch, str(toolkit.runtime)],
        language="c++",
    )


def extensions() -> list:
    """_C and, where it is wanted and possible, _cuda, whose kernels are of _C's ops."""
    import torch

    found, wanted = [cpu_extension()], os.environ.get("DIFFUSION_EXT_CUDA")
    if wanted == "0":
        facts["cuda"] = "not built: DIFFUSION_EXT_CUDA=0"
    elif wanted != "1" and torch.version.cuda is None:
        facts["cuda"] = f"not built: torch {torch.__version__} is a build without CUDA"
    else:
        try:
            found.append(cuda_extension())
        except Exception as error:
            if wanted == "1":
                raise
            without_cuda(one_line(error))
    return found


def compiler_flags() -> list[str]:
    """Says what compiles the C++ library, and returns that compiler's flags."""
    if WINDOWS:  # where setuptools finds MSVC
        flags = compiler.read("flags_msvc.txt")
    else:
        cxx = compiler.command()
        say(f"{shutil.which(cxx[0])} compiles: {compiler.release(cxx)}")
        flags = compiler.flags(cxx)
    facts["flags"] = " ".join(flags)
    return flags


def build_command():
    """torch's BuildExtension, one library at a time: a failure leaves what came before it."""
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            """Objects stay where other builds leave them, for an editable install too, whose own
            folder is a temporary one: ninja then compiles again only what has changed."""
            if self.editable_mode:
                platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = str(ROOT / "build" / f"temp.{platform}")
            super().finalize_options()

        def run(self):
            root = ROOT if self.inplace else pathlib.Path(self.build_lib)
            for suffix in (".so", ".pyd"):
                for stale in root.glob(f"diffusion_ext/_cuda*{suffix}"):
                    stale.unlink()  # its kernels are of another _C
            if not WINDOWS:
                # Left alone, setuptools would take the compiler that Python was built with.
                with contextlib.suppress(FileNotFoundError):  # build_extensions meets it again
                    os.environ["CXX"] = shlex.join(compiler.command())
            super().run()
            write_facts(root)

        def build_extensions(self):
            every, built, said = self.extensions, [], []
            try:
                flags = compiler_flags()
                for extension in every:
                    # torch adds flags to what it is given: in a second run (build, bdist_wheel) it
                    # would add them again, and ninja compile everything anew.
                    self.extensions = [copy.deepcopy(extension)]
                    self.extensions[0].extra_compile_args["cxx"] = list(flags)
                    with compiler_log.remembered(said):
                        super().build_extensions()
                    built.append(extension)
            except Exception as error:
                wanted = os.environ.get("DIFFUSION_EXT_CUDA") == "1"
                if wanted or (not built and os.environ.get("DIFFUSION_EXT_NATIVE") == "1"):
                    raise
                reason = one_line(error, said)
                if built:
                    without_cuda(reason)
                else:
                    without_native(reason)
                    say(f"THE C++ LIBRARY WAS NOT BUILT; installing pure Python. {reason}")
            every[:] = built
            self.extensions = every

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    return Build.with_options(use_ninja=True)


def native_build() -> dict:
    """setup()'s arguments for the libraries: none where they are not wanted or torch is missing."""
    wanted = os.environ.get("DIFFUSION_EXT_NATIVE")
    if wanted == "0":
        without_native("DIFFUSION_EXT_NATIVE=0")
        write_facts()
        return {}
    jobs = min(os.cpu_count() or 1, max(1, int(free_memory_gb() // 2)))
    os.environ.setdefault("MAX_JOBS", str(jobs))
    try:
        return {"ext_modules": extensions(), "cmdclass": {"build_ext": build_command()}}
    except ImportError as error:
        if "1" in (wanted, os.environ.get("DIFFUSION_EXT_CUDA")):
            raise
        say(
            f"installing pure Python: {error} (install torch and pybind11 first, then "
            "pip install --no-build-isolation)"
        )
        without_native(str(error))
        write_facts()
        return {}


setup(**native_build())
