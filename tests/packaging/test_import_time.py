"""What starts quickly: the import of the package, and the commands that only tell something."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from diffusion_ext.ops.backend import constant_to_compile

PACKAGES = {"diffusion_ext", "numpy", "safetensors", "torch"}
OF_COMMANDS = PACKAGES | {"PIL", "docstring_parser", "tqdm", "tyro"}
HEAVY = [  # of torch's own: 0.1 s to 1 s each
    "_dynamo", "_inductor", "_functorch._aot_autograd", "distributed.checkpoint",
    "distributed.fsdp", "distributed.tensor", "fx.experimental.symbolic_shapes", "onnx._internal",
    "utils.tensorboard",
]  # fmt: skip
NEW = """
import json, sys, torch
before = set(sys.modules)
{code}
print(json.dumps([name for name in sys.modules if name not in before]))
"""
SAMPLED = """
import diffusion_ext as dx
table = dx.ddim(dx.NoiseSchedule.linear(10), 2)
dx.sample(dx.nn.ContextUnet(3, 8, 2, 8).eval(), (1, 3, 8, 8), table, progress=False)
"""
# A command's seconds over those of `import torch`, as a share of them: 0.2 s of 1.1 s, and a
# quarter more for what a busy machine adds.
MOST = 0.25
ROUNDS = 3


@pytest.mark.parametrize(
    ("code", "packages"),
    [
        ("import diffusion_ext", PACKAGES),
        ("import diffusion_ext.training", PACKAGES | {"PIL", "tqdm"}),
        ("import diffusion_ext.__main__", OF_COMMANDS),
        (SAMPLED, PACKAGES | {"tqdm"}),
    ],
)
def test_what_is_imported(code, packages):
    new = json.loads(run("-c", NEW.format(code=code)).splitlines()[-1])
    assert {name for name in HEAVY if f"torch.{name}" in new} == set()
    others = {name.partition(".")[0] for name in new} - packages - sys.stdlib_module_names
    # Compiled modules of numpy's put small ones of their own beside it.
    assert {name for name in others if "cython" not in name} == set()


@pytest.mark.parametrize("command", [["info"], ["--help"], ["-c", "import diffusion_ext"]], ids=str)
def test_seconds_over_torchs(command, tmp_path):
    """Of the processor, not of the clock, in turns, the least of some."""
    ours = command if command[0] == "-c" else ["-m", "diffusion_ext", *command]
    for arguments in (ours, ["-c", "import torch"]):  # which leave compiled modules
        seconds(arguments, tmp_path)
    pairs = [
        (seconds(ours, tmp_path), seconds(["-c", "import torch"], tmp_path)) for _ in range(ROUNDS)
    ]
    least, of_torch = map(min, zip(*pairs, strict=True))
    assert least - of_torch < MOST * of_torch


def seconds(arguments, cache) -> float:
    """Of the processor, that Python takes for them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("-X", f"pycache_prefix={cache}", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(*arguments) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_constants_are_marked_as_torch_marks_them():
    def ours(): ...

    def torchs(): ...

    assert vars(constant_to_compile(ours)) == vars(torch.compiler.assume_constant_result(torchs))
