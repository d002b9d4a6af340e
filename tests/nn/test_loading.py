"""A ContextUnet from a file of its parameters."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

import diffusion_ext as dx


@pytest.fixture(scope="module")
def model():
    return dx.nn.ContextUnet(3, 16, 5, 20, pool_window=4, shortcut="zero").eval()


def save_pickled(state, path):
    torch.save(state, path)


@pytest.mark.parametrize(
    ("name", "save"), [("model.pth", save_pickled), ("model.safetensors", save_file)]
)
def test_the_sizes_are_those_of_the_file(model, tmp_path, name, save):
    path = tmp_path / name
    save(model.state_dict(), path)
    loaded = dx.nn.load_context_unet(path, pool_window=4, shortcut="zero")
    assert loaded.configuration == model.configuration
    assert not loaded.training
    x, t, c = torch.randn(2, 3, 20, 20), torch.rand(2), torch.randn(2, 5)
    with torch.no_grad():
        assert torch.equal(loaded(x, t, c), model(x, t, c))


class Payload:
    pass


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"weight": torch.zeros(1)}, ValueError, "has no init_conv.conv1.0.weight"),
        ([torch.zeros(1)], ValueError, "wanted a state dict in model.pth, got list"),
        (Payload(), pickle.UnpicklingError, "Weights only load failed"),
    ],
)
def test_other_files(content, error, message, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(error, match=message):
        dx.nn.load_context_unet(path)


def test_a_parameter_that_is_missing(model, tmp_path):
    state = model.state_dict()
    del state["out.3.bias"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth is not a ContextUnet's [\s\S]*out.3.bias"):
        dx.nn.load_context_unet(tmp_path / "model.pth")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        dx.nn.load_context_unet(tmp_path / "none.pth")
