"""The runtimes that networks are timed beside, and the fit of the convolutions' costs."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import convolution_costs, peers  # noqa: E402
from diffusion_ext.sampling.runtimes import missing  # noqa: E402


@pytest.mark.compiles
@pytest.mark.parametrize("name", peers.NAMES)
def test_a_runtime_gives_the_networks_outputs(name):
    if lacking := missing(peers.NAMES[name]):
        pytest.skip(f"wants {lacking}")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 1))
    inputs = (torch.randn(2, 3, 6, 6),)
    row = peers.peers(lambda: network, "cpu")[name]
    call = row.make(*inputs)
    for x in (*inputs, torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)):
        with torch.no_grad():
            torch.testing.assert_close(call(x), network(x), rtol=1e-4, atol=1e-5)


def test_on_a_gpu_there_are_none():
    assert peers.peers(nn.Identity, "cuda") == {}


def test_costs_are_found_again():
    shapes = list(convolution_costs.shapes())
    wanted = [0.008, 0.02, 7.0, 900.0]
    terms = [shape.of_winograd() for shape in shapes]
    times = 1e-9 * np.array([[*term, 1.0] for term in terms]) @ np.array(wanted)
    assert np.allclose(convolution_costs.fitted(terms, times), wanted, rtol=1e-6)


@pytest.mark.skipif(convolution_costs.CPU_CAPABILITY == "baseline", reason="no kernel of ours")
def test_a_sweep(monkeypatch, capsys):
    monkeypatch.setattr(convolution_costs, "CHANNEL_PAIRS", ((16, 16), (16, 32)))
    monkeypatch.setattr(convolution_costs, "IMAGES", ((1, 4), (2, 4), (1, 8), (1, 16)))
    monkeypatch.setattr(convolution_costs, "WEIGHTS", 1e5)
    monkeypatch.setattr(sys, "argv", ["convolution_costs", "--seconds", "0.001"])
    convolution_costs.main()
    said = capsys.readouterr().out
    assert "8 of 8 shapes" in said
    assert 'WINOGRAD "' in said
    assert "as they are chosen now: " in said


def test_its_help():
    command = [sys.executable, "-m", "benchmarks.convolution_costs", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "winograd_is_faster" in done.stdout
