"""How much memory there is: of the machine, of a container, of a process with a limit."""

import sys

import pytest
import torch

from diffusion_ext.nn.kept_weights import kept_of
from diffusion_ext.nn.winograd_conv2d import WinogradConv2d
from diffusion_ext.ops import memory
from diffusion_ext.ops.conv2d import TIMED

pytestmark = pytest.mark.backends("cpu")
GIB = 2**30


@pytest.fixture
def container(monkeypatch, tmp_path):
    """container(most, used, files): the control group's files say so."""

    def of(most, used, files):
        for name, text in {
            "memory.max": most,
            "memory.current": used,
            "memory.stat": f"anon {used - files}\ninactive_file {files}\nactive_file 0",
        }.items():
            (tmp_path / name).write_text(f"{text}\n")
        monkeypatch.setattr(memory, "GROUP", tmp_path)

    return of


def test_of_this_machine():
    assert 0 < memory.memory_available() < memory.memory_in_all() < sys.maxsize


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells")
def test_the_most_that_this_process_has_held():
    block = torch.ones(1 << 22)  # 16 MB
    peak = memory.peak_memory()
    assert block.nbytes < peak < memory.memory_in_all()
    del block
    assert memory.peak_memory() > 0.95 * peak  # Linux counts in portions


def test_of_a_container(container):
    container(GIB // 4, GIB // 8, GIB // 16)
    assert memory.memory_in_all() == GIB // 4
    assert memory.memory_available() == GIB // 4 - GIB // 16  # files are given up when asked
    container("max", GIB, 0)
    assert memory.memory_in_all() > GIB // 4
    container(GIB // 4, GIB // 2, 0)
    assert memory.memory_available() == 0


def test_where_nothing_tells(monkeypatch):
    def silent():
        raise FileNotFoundError

    for name in ("_of_process", "_of_machine", "_of_group"):
        monkeypatch.setattr(memory, name, silent)
    assert memory.memory_in_all() == memory.memory_available() == sys.maxsize


@pytest.mark.skipif(not TIMED, reason="no kernel of ours")
@pytest.mark.parametrize(("used", "laid_out"), [(GIB // 64, True), (GIB // 16 * 3, False)])
def test_filters_are_laid_out_in_a_container_too(container, used, laid_out):
    """A quarter of its memory, not of the machine's, has to stay free."""
    container(GIB // 4, used, 0)
    conv = WinogradConv2d(16, 16, 3, padding=1)
    with torch.no_grad():
        conv(torch.randn(1, 16, 32, 32).to(memory_format=torch.channels_last))
    kept = kept_of(conv)
    assert (kept is not None) == laid_out
