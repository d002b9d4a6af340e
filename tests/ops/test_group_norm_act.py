"""group_norm_act: forward and backward against the float64 reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICES, DTYPES, KERNELS, LAYOUTS, assert_close, lay

import diffusion_ext as dx
from diffusion_ext import _C
from diffusion_ext.ops import reference
from diffusion_ext.ops.group_norm_act import ACTIVATIONS

# (shape, groups): powers of two, odd sizes, groups of 1 and C, a few pixels, more channels than a
# block, 3-D and 5-D.
CASES = [
    ((2, 8, 4, 4), 2),
    ((3, 6, 7, 5), 3),
    ((2, 6, 3, 3), 1),
    ((2, 5, 3, 2), 5),
    ((2, 9, 7), 3),
    ((2, 640, 2, 2), 32),
    ((2, 1100, 1, 3), 11),
    ((1, 40, 9, 9), 8),
    ((2, 4, 3, 5, 2), 2),
]
# Of the CPU's work: in turn, shared by the threads, and that with channels beyond a whole column, a
# whole panel.
MANY_CHUNKS = [
    ((1, 3, 160, 160), 1),
    ((1, 3, 210, 210), 1),
    ((1, 40, 60, 60), 8),
    ((1, 520, 20, 20), 8),
]
# What one of DEVICES holds on chip, another in a cluster, a third not at all.
SLABS = [((1, 16, 23, 20), 1), ((1, 32, 24, 24), 1)]
MODULATIONS = ("scale", "shift", "post_scale", "post_shift", "pre_shift")


@pytest.mark.backends("cpu")
def test_the_slabs_reach_every_cuda_kernel():
    """On DEVICES together: on chip and split, by parts and not, vectors and not, each layout."""
    flags, reached = (False, True), set()
    for (shape, groups), device, size, aligned, channels_last, backward in itertools.product(
        SLABS, DEVICES.values(), (2, 4), flags, flags, flags
    ):
        options = {"aligned": aligned, "channels_last": channels_last, "backward": backward}
        limits = dict(zip(("multiprocessors", "shared_bytes", "max_cluster"), device, strict=True))
        p = _C.group_norm_plan(shape, groups, size, **options, **limits)
        reached.add((p["kind"], p["parts"] > 1, p["vector"] > 1, channels_last, backward))
    assert reached == set(itertools.product(("on chip", "split"), *[flags] * 4))


def inputs_for(shape, layout, dtype, parameters):
    x = lay((2 * torch.randn(shape) + 3).to(dtype), layout)
    sizes = {"weight": shape[1:2], "bias": shape[1:2]}
    inputs = {name: torch.randn(sizes.get(name, shape[:2])).to(dtype) for name in parameters}
    return {"x": x, **inputs}


def run(inputs, groups, act, dy):
    """y and the gradient of every input."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y = dx.group_norm_act(num_groups=groups, act=act, **leaves)
    y.backward(dy.to(y.dtype))
    return y.detach(), {k: v.grad for k, v in leaves.items()}


def check_agreement(dtype, shape, groups, layout, share=3):
    sets = [(), ("weight", "bias"), ("pre_shift",), ("weight", "bias", *MODULATIONS)]
    for i, (act, parameters) in enumerate(itertools.product(ACTIVATIONS, sets)):
        if (i + len(shape) + groups) % share:  # that of the product, another one for each case
            continue
        inputs = inputs_for(shape, layout, dtype, parameters)
        dy = torch.randn(shape).to(dtype)
        y, gradients = run(inputs, groups, act, lay(dy, layout))
        wide = {k: v.double() for k, v in inputs.items()}
        expected, expected_gradients = run(wide, groups, act, lay(dy, layout).double())
        assert_close(y, expected, dtype)
        on_cpu = torch.group_norm(inputs["x"].cpu(), groups)  # on a GPU torch's is contiguous
        assert y.stride() == reference.ACTIVATIONS[act](on_cpu).stride()
        for name, gradient in gradients.items():
            assert_close(gradient, expected_gradients[name], dtype, factor=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference(dtype, shape, groups, layout):
    check_agreement(dtype, shape, groups, layout)


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), MANY_CHUNKS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_agrees_with_reference_over_many_chunks(dtype, shape, groups, layout):
    check_agreement(dtype, shape, groups, layout)


@pytest.mark.every_device
@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), SLABS)
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_agrees_with_reference_wherever_a_slab_is(dtype, shape, groups, layout):
    check_agreement(dtype, shape, groups, layout, share=7)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_agrees_with_reference_off_chip(backend, dtype, layout):
    """A slab beyond any cluster: the only kind that a real GPU with clusters splits."""
    check_agreement(dtype, (1, 64, 160, 160), 1, layout, share=7)


def test_default_is_torch_group_norm_and_silu():
    x, weight, bias = torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(8)
    expected = F.silu(F.group_norm(x.double(), 4, weight.double(), bias.double()))
    assert_close(dx.group_norm_act(x, 4, weight, bias), expected, torch.float32)


@pytest.mark.every_device
@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 8, 20, 20), (1, 64, 24, 24)])
@pytest.mark.parametrize("pre_shift", [False, True])
@pytest.mark.parametrize(
    ("mean", "std", "dtype"),
    [(1e4, 0.1, torch.float32), (-3e4, 30.0, torch.float16), (1e4, 100.0, torch.bfloat16)],
)
def test_large_mean_costs_no_accuracy(layout, shape, pre_shift, mean, std, dtype):
    x = lay((mean + std * torch.randn(shape)).to(dtype), layout)
    options = {"pre_shift": torch.randn(shape[:2]).to(dtype)} if pre_shift else {}
    wide = {k: v.double() for k, v in options.items()}
    expected = reference.group_norm_act(x.double(), 2, act="identity", **wide)
    assert_close(dx.group_norm_act(x, 2, act="identity", **options), expected, dtype)


@pytest.mark.every_device
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 2, 64, 64), (1, 4096, 1, 1), (1, 512, 2, 2)])
def test_an_outlier_at_the_start(layout, shape):
    """The shift of the statistics is a mean of several elements: one outlier does not spoil it."""
    x = 0.1 * torch.randn(shape)
    x[0, :2, 0, 0] = 1e4
    expected = reference.group_norm_act(x.double(), 1, act="identity")
    assert_close(dx.group_norm_act(lay(x, layout), 1, act="identity"), expected, torch.float32, 4)


def test_constant_input_and_infinities():
    assert torch.equal(dx.group_norm_act(torch.full((1, 4, 3, 3), 7.0), 2), torch.zeros(1, 4, 3, 3))
    x = torch.randn(2, 4, 3, 3)
    x[0, 0, 0, 0] = torch.inf
    y = dx.group_norm_act(x, 2)
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()
    assert y[1].isfinite().all()


def test_the_memory_format_is_kept():
    for shape in ((2, 4, 5, 5), (2, 4, 3, 5, 5)):
        x = lay(torch.randn(shape), "channels_last")
        assert dx.group_norm_act(x, 2).stride() == x.stride()


def test_parameters_of_another_dtype_and_strides():
    x = torch.randn(2, 6, 4, 4).bfloat16()
    scale, shift = torch.randn(2, 12, dtype=torch.float32).chunk(2, dim=1)
    weight = torch.randn(6, dtype=torch.float64)
    expected = reference.group_norm_act(
        x.double(), 3, weight, scale=scale.double(), shift=shift.double()
    )
    assert_close(dx.group_norm_act(x, 3, weight, scale=scale, shift=shift), expected, x.dtype)
    leaves = [t.detach().requires_grad_() for t in (weight, scale, shift)]
    y = dx.group_norm_act(x, 3, leaves[0], scale=leaves[1], shift=leaves[2])
    y.sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float64, torch.float32, torch.float32]


@pytest.mark.backends("cpu", "cuda")
def test_gradcheck_of_the_reference():
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    shapes = {"weight": (4,), "bias": (4,), **dict.fromkeys(MODULATIONS, (2, 4))}
    extra = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes.values()]
    for act in ACTIVATIONS:
        assert torch.autograd.gradcheck(
            lambda x, *extra, act=act: dx.group_norm_act(
                x, 2, act=act, **dict(zip(shapes, extra, strict=True))
            ),
            (x, *extra),
        )


@pytest.mark.backends(*KERNELS)
def test_only_x_mean_and_rstd_are_saved():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    y = dx.group_norm_act(x, 2, weight)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert {t.data_ptr() for t in saved} >= {x.data_ptr(), weight.data_ptr()}
    others = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [tuple(t.shape) for t in others] == [(2, 2), (2, 2)]


@pytest.mark.backends("cpu")
def test_the_number_of_threads_changes_no_bits():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for layout in ("contiguous", "channels_last"):
                torch.manual_seed(0)
                inputs = inputs_for((1, 8, 160, 160), layout, torch.float32, ("weight",))
                y, gradients = run(inputs, 2, "silu", torch.randn(1, 8, 160, 160))
                results.append([y, *gradients.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[2::2]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for other in results[3::2]:
        assert all(torch.equal(a, b) for a, b in zip(results[1], other, strict=True))


@pytest.mark.backends(*KERNELS)
def test_squares_beyond_float32_are_nan_not_zero():
    assert dx.group_norm_act(1e20 * torch.randn(1, 4, 3, 3), 2).isnan().all()


def test_second_derivatives():
    """A gradient penalty in float32 agrees with float64, whatever of dy and x carries the graph."""

    def penalty(dtype):
        torch.manual_seed(3)
        x, post = torch.randn(2, 4, 3, 3).to(dtype), torch.randn(2, 4).to(dtype)
        x, post = x.requires_grad_(), post.requires_grad_()
        y = dx.group_norm_act(x.sin(), 2, post_scale=post)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, post))

    for ours, exact in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        assert_close(ours, exact, factor=20)


@pytest.mark.backends("cpu", "cuda")
def test_forward_mode_derivatives():
    x, direction = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    ours = torch.func.jvp(lambda x: dx.group_norm_act(x, 2), (x,), (direction,))[1]
    wide = (x.double(),), (direction.double(),)
    assert_close(ours, torch.func.jvp(lambda x: dx.group_norm_act(x, 2), *wide)[1], factor=20)


def test_module_has_the_parameters_of_group_norm():
    ours = dx.nn.GroupNormAct(4, 8, act="relu")
    theirs = torch.nn.GroupNorm(4, 8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 5)
    assert_close(ours(x), F.relu(theirs(x)), torch.float32)


def test_create_graph_of_inputs_that_depend_on_each_other(backend):
    """As where a network makes scale and shift from x, under a gradient penalty."""
    x = torch.randn(2, 8, 3, 3, requires_grad=True)

    def penalised(create_graph):
        scale = x.mean((2, 3))
        y = dx.group_norm_act(x, 4, scale=scale, shift=2 * scale, act="silu")
        return torch.autograd.grad(y.square().sum(), x, create_graph=create_graph)[0]

    torch.testing.assert_close(penalised(True).detach(), penalised(False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 16), (1, 16), (0, 16), (2, 8, 2, 3, 2, 2)])
def test_any_number_of_dimensions_as_torchs_group_norm(backend, dtype, shape):
    x = torch.randn(shape).to(dtype).requires_grad_()
    scale = torch.randn(shape[:2])
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    y = dx.group_norm_act(x, 4, weight, bias, act="relu", scale=scale)
    wide = x.detach().double().requires_grad_()
    expected = F.group_norm(wide, 4, weight.double(), bias.double())
    expected = F.relu(expected * (1 + scale.double().reshape(shape[:2] + (1,) * (len(shape) - 2))))
    assert_close(y, expected)
    dy = torch.randn(shape)
    (dx_,) = torch.autograd.grad(y, x, dy.to(dtype))
    (wanted,) = torch.autograd.grad(expected, wide, dy.to(dtype).double())
    assert_close(dx_, wanted, factor=4)


AMBIGUOUS = [(2, 16, 1, 1), (2, 4, 4, 1), (2, 4, 1, 4), (1, 4, 4, 4), (2, 1, 4, 4), (2, 4, 1)]


@pytest.mark.parametrize("shape", AMBIGUOUS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "one value"])
def test_layouts_that_a_size_of_1_leaves_open(backend, shape, layout):
    """Whatever the strides of a size of 1, or of an expanded one: torch's values and format."""
    x = torch.randn(()).expand(shape) if layout == "one value" else lay(torch.randn(shape), layout)
    groups = 1 if shape[1] == 1 else 2
    y = dx.group_norm_act(x, groups, act="identity")
    expected = F.group_norm(x.contiguous().double(), groups)
    assert_close(y, expected)
    for layout_ in (torch.contiguous_format, torch.channels_last):
        if x.dim() == 4 and x.is_contiguous(memory_format=layout_):
            assert y.is_contiguous(memory_format=layout_)
