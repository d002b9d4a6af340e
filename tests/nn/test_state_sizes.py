"""Weights that do not fit a ContextUnet: one line says whose they are, and what would fit."""

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.nn.state_sizes import arguments_of, call_of


def refusal(network, state):
    """The message, after which the network has the weights that it had before."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        network.load_state_dict(state)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    return str(raised.value)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("sizes", [(1, 8, 2, 4), (3, 16, 5, 20)])
def test_a_state_dict_tells_its_network(norm, sizes):
    state = dx.nn.ContextUnet(*sizes, norm=norm).state_dict()
    expected = dict(zip(("in_channels", "n_feat", "n_cfeat", "height"), sizes, strict=True))
    assert arguments_of(state) == expected | {"norm": norm}
    assert dx.nn.ContextUnet(**arguments_of(state)).load_state_dict(state)


def test_another_norm():
    """The command line's default beside the class's."""
    state = dx.nn.ContextUnet(3, 32, 3, 16, norm="group").state_dict()
    assert refusal(dx.nn.ContextUnet(3, 32, 3, 16), state) == (
        "state_dict: the weights are of ContextUnet(3, 32, 3, 16, norm='group'); this network has "
        "norm='batch'; dx.nn.load_context_unet(path) builds the one that fits"
    )


def test_other_sizes():
    state = dx.nn.ContextUnet(1, 8, 2, 4).state_dict()
    assert refusal(dx.nn.ContextUnet(1, 16, 3, 8), state) == (
        "state_dict: the weights are of ContextUnet(1, 8, 2, 4, norm='batch'); this network has "
        "n_feat=16, n_cfeat=3, height=8; dx.nn.load_context_unet(path) builds the one that fits"
    )


@pytest.mark.parametrize("prefix", ["module.", "ema."])
def test_names_of_another_kind(prefix):
    network = dx.nn.ContextUnet(1, 8, 2, 4)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    message = refusal(network, state)
    first = "init_conv.conv1.0.weight"
    assert f"wanted names such as {first}, got others, such as {prefix}{first}; dx.load(" in message
    assert "\n" not in message


def test_what_torch_says_itself():
    network = dx.nn.ContextUnet(1, 8, 2, 4)
    state = network.state_dict()
    del state["out.3.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"out.3.bias\""):
        network.load_state_dict(state)
    assert network.load_state_dict(state, strict=False).missing_keys == ["out.3.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict({})
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like"):
        network.load_state_dict([1])


def test_a_parameter_of_another_shape_tells_nothing():
    state = dx.nn.ContextUnet(1, 8, 2, 4).state_dict()
    for value in (torch.zeros(3), "text"):
        with pytest.raises(KeyError, match=r"up0\.0\.weight"):
            arguments_of({**state, "up0.0.weight": value})


def test_the_call_that_builds_a_network():
    network = dx.nn.ContextUnet(3, 16, 5, 20, pool_window=4, shortcut="zero")
    call = call_of(network.configuration)
    assert call == "ContextUnet(3, 16, 5, 20, norm='batch', shortcut='zero', pool_window=4)"
    assert eval(call, vars(dx.nn)).configuration == network.configuration
