"""A hook of pytest: after a fault of a GPU no call of CUDA works any more in its process.

So the test that made one ends the process: with pytest-xdist a worker, which is named with its test
and replaced by a fresh one; without, the run.
"""

import os

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            said = f"{item.nodeid}: the GPU had a fault: {str(error).partition(chr(10))[0]}"
            if "PYTEST_XDIST_WORKER" in os.environ:
                os.write(2, f"\nE  {said}\n".encode())
                os._exit(1)
            pytest.exit(said, returncode=1)
    return report
