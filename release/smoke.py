"""What an installed diffusion_ext must do, without tests' tools: native kernels against torch's.

Run it outside the source tree. Where the install has the CUDA library and torch the CUDA of its
major version, that library has to load too, for which no GPU is needed. Ends with status 1 and the
reason.
"""

import importlib.metadata
import pathlib
import sys

import torch

import diffusion_ext as dx
from diffusion_ext.ops import backend


def both(call):
    """(by the native kernels, by the reference)"""
    with dx.use_backend("reference"):
        reference = call()
    return call(), reference


def loaded() -> list[str]:
    """The devices whose library is there."""
    package = pathlib.Path(dx.__file__).parent
    if (package.parent / "setup.py").exists():
        sys.exit(f"this is the source tree, not an install: {package}")
    if not (package / "py.typed").exists():
        sys.exit("py.typed is not installed")
    wanted, release = ["cpu"], backend.build_record().get("cuda", "")
    if torch.version.cuda and release.startswith(f"nvcc {torch.version.cuda.split('.')[0]}."):
        wanted.append("cuda")
    for device in wanted:
        if device in backend.missing:
            sys.exit(f"the {device} library is not there: {backend.missing[device]}")
    return wanted


def check_kernels() -> None:
    schedule = dx.NoiseSchedule.linear()
    torch.manual_seed(0)
    x, t = torch.randn(3, 8, 16, 16), torch.tensor([1, 250, 500])
    model = dx.nn.ContextUnet(3, n_feat=16, n_cfeat=4, height=16).eval()
    context = torch.eye(4)[:2]
    calls = {
        "philox_normal": lambda: dx.philox_normal(7, (3, 8, 16, 16)),
        "perturb": lambda: dx.perturb(x, t, schedule, seeds=7)[0],
        "denoising_loss": lambda: dx.denoising_loss(x, x, t, schedule, seeds=torch.arange(3)),
        "group_norm_act": lambda: dx.group_norm_act(x, 4),
        "sampler_step": lambda: dx.ddpm_step(x, x, 250, schedule, seeds=7),
        "sample": lambda: (
            dx.sample(
                model, (2, 3, 16, 16), dx.dpmpp_2m(schedule, 5), context, 2.0, progress=False
            ).images
        ),
    }
    for name, call in calls.items():
        ours, reference = both(call)
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, msg=f"{name} differs")
    with torch.no_grad():
        fast = dx.optimize_for_sampling(model, batch=2)
        noised = torch.randn(2, 3, 16, 16)
        expected = model(noised, torch.tensor([0.5, 1.0]), context)
        ours = fast(noised, torch.tensor([0.5, 1.0]), context)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def check_compile() -> None:
    """The ops inside a graph of torch.compile, as its tracing takes them."""
    x = torch.randn(2, 8, 4, 4)
    compiled = torch.compile(lambda x: dx.group_norm_act(x, 4), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), dx.group_norm_act(x, 4))


def main() -> None:
    devices = loaded()
    check_kernels()
    check_compile()
    version, python = importlib.metadata.version("diffusion_ext"), sys.version.split()[0]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    served = dx.info().backends["perturb"]["cpu"]
    print(f"diffusion_ext {version}, torch {torch.__version__} ({cuda}), Python {python}: "
          f"{' and '.join(devices)} loaded, results right; CPU {served}")  # fmt: skip


if __name__ == "__main__":
    main()
