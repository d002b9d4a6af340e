"""nvcc, for test_cuda_build.py: with ptxas's report, and all that it says kept beside the object.

PYTORCH_NVCC names this program, NVCC the compiler. The log of an object that is up to date is that
of the compilation that made it.
"""

import os
import pathlib
import subprocess
import sys
import time

start = time.monotonic()
command = [os.environ["NVCC"], *sys.argv[1:], "-Xptxas", "-v"]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
target = pathlib.Path(command[command.index("-o") + 1])
target.with_suffix(".log").write_text(done.stdout)
if done.returncode:
    print(done.stdout)
print(f"nvcc: {target.stem}.cu, {time.monotonic() - start:.0f} s", flush=True)
sys.exit(done.returncode)
