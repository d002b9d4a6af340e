"""Whether the types of every public name are known: parameters, results, attributes.

Public is what a module of PUBLIC names in its __all__, and what is in it. pyright's completeness
report tells what a program that uses it would see. An attribute whose type follows from its value
needs no annotation.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PUBLIC = (
    "diffusion_ext",
    "diffusion_ext.nn",
    "diffusion_ext.training",
    "diffusion_ext.training.evaluation",
    "diffusion_ext.integrations.adapters",
    "diffusion_ext.integrations.diffusers",
    "diffusion_ext.integrations.k_diffusion",
)
# Of a symbol that is fine but for another one, which is told of itself, or that is inferred.
FOLLOWS = ("partially unknown", "could be inferred differently")


def public_names() -> set[str]:
    """Where each is defined, such as diffusion_ext.samplers.first_order.ddim."""
    names = set()
    for module in map(importlib.import_module, PUBLIC):
        for value in (getattr(module, name) for name in module.__all__):
            if getattr(value, "__module__", "").startswith("diffusion_ext"):
                names.add(f"{value.__module__}.{value.__qualname__}")
    return names


def report() -> dict[str, list[str]]:
    """Symbol -> what is wrong with it, of the whole package."""
    # pyright finds torch by the python on PATH, and the package, installed to be edited, by ours.
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["basedpyright", "--verifytypes", "diffusion_ext", "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    return {
        s["name"]: [] if s["isTypeKnown"] else [d["message"] for d in s["diagnostics"]]
        for s in symbols
    }


def main() -> int:
    sys.path.insert(0, str(ROOT))
    public, found = public_names(), report()
    unseen = sorted(public - found.keys())
    wrong = {
        name: message
        for name, messages in found.items()
        if any(name == of or name.startswith(f"{of}.") for of in public)
        for message in messages
        if not any(words in message for words in FOLLOWS)
    }
    for name, message in wrong.items():
        print(f"{name}: {message}")
    for name in unseen:
        print(f"{name}: pyright does not find it")
    print(f"types of {len(public)} public names: {len(wrong) + len(unseen)} to mend")
    return bool(wrong or unseen)


if __name__ == "__main__":
    sys.exit(main())
