"""Our DDPMScheduler and DDIMScheduler beside diffusers' own, over their configurations."""

import copy
import inspect
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

theirs = pytest.importorskip("diffusers")
from diffusion_ext.integrations import diffusers as ours  # noqa: E402

NAMES = ("DDPMScheduler", "DDIMScheduler")
EPS = {torch.float64: 2**-23, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPE = (2, 3, 6, 5)

configs = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.sampled_from([10, 48, 100, 1000]),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_start": st.sampled_from([0.0001, 0.00085]),
        "beta_end": st.sampled_from([0.012, 0.02, 0.2]),  # of 1000 timesteps, 0.2 leaves no signal
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([0.5, 1.0, 2.0]),
        "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
        "thresholding": st.sampled_from([False, False, True]),
        "dynamic_thresholding_ratio": st.sampled_from([0.5, 0.995]),
        "sample_max_value": st.sampled_from([1.0, 1.7]),
        "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
        "steps_offset": st.sampled_from([0, 1]),
        "rescale_betas_zero_snr": st.booleans(),
    }
).map(lambda c: {**c, "beta_end": min(c["beta_end"], 20 / c["num_train_timesteps"])})
# fixed_large_log is NaN in diffusers: test_diffusers_differences.py.
variance_types = st.sampled_from(
    ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
)
counts = st.sampled_from([0, 1, 3])  # a list of so many generators; 0 is one, not in a list
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, *EPS])


def pair(name, config):
    return [getattr(library, name)(**config) for library in (theirs, ours)]


def generators(count):
    made = [torch.Generator().manual_seed(5 + i) for i in range(max(count, 1))]
    return made if count else made[0]


def assert_close(got, want, dtype, scale, slack=0.0):
    """Equal to a few roundings of the dtype, relative to the numbers that were added up."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().nan_to_num(nan=0.0, posinf=0.0)
    assert torch.equal(got.isnan(), want.isnan())
    assert error.max() <= (16 * EPS[dtype] + slack) * (1 + scale.double().abs().max())


def same_run(name, config, start, dtype, count, strided=False, channels=1, **options):
    """Every step of a run from the same samples, with generators in the same state."""
    them, us = pair(name, config)
    start(them), start(us)
    timesteps = them.timesteps[them.timesteps >= 0]
    assert torch.equal(timesteps, us.timesteps)
    assume(timesteps[0] < config["num_train_timesteps"])  # leading with an offset may leave it
    zero = them.alphas_cumprod[timesteps] == 0
    free = not config["clip_sample"] or config["thresholding"]
    assume(not (zero.any() and free and config["prediction_type"] == "epsilon"))
    draws, spares = generators(count), generators(count)
    batch = (count or SHAPE[0], *SHAPE[1:])
    x = torch.randn(batch).to(dtype)
    for i, t in enumerate(us.timesteps):
        m = torch.randn((batch[0], channels * batch[1], *batch[2:])).to(dtype)
        if channels == 2:  # a learned variance is one
            m[:, batch[1] :] = torch.rand(batch)
        if strided:
            x, m = (v.transpose(-1, -2).contiguous().transpose(-1, -2) for v in (x, m))
        t = [t, int(t), t.clone()][i % 3]
        want = them.step(m, t, x, generator=draws, **options)
        got = us.step(m, t, x, generator=spares, **options)
        assume(not want.prev_sample.isnan().any())  # see the differences
        assert type(got) is type(want)
        x0, scale = want.pred_original_sample, torch.cat([want.prev_sample, x, m[:, : batch[1]]])
        # diffusers takes β_t = 1 - ᾱ_t/ᾱ_{t-1} in float32, ours does not: its error beside 1-ᾱ_t.
        slack = 2**-22 / (1 - float(them.alphas_cumprod[t]))
        if options.get("eta") == 1:  # the same under a root: √(1 - ᾱ_{t-1} - σ²) nearly 0
            slack += 2**-11
        amplified = max(float(them.alphas_cumprod[t]), 1e-30) ** -0.5
        assert_close(got.prev_sample, want.prev_sample, dtype, scale, slack)
        if dtype != torch.float16 or x0.abs().max() < 6e4:
            assert_close(got.pred_original_sample, x0, dtype, amplified * x)
        x = want.prev_sample.clamp(-8, 8)
    each = zip(draws, spares, strict=True) if count else [(draws, spares)]
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in each)


@given(
    configs, variance_types, st.integers(1, 9), dtypes, st.sampled_from([0, 1, 3]), st.booleans()
)
def test_ddpm_steps(config, variance_type, steps, dtype, count, strided):
    config = {**config, "variance_type": variance_type}
    channels = 2 if variance_type.startswith("learned") else 1
    same_run(
        "DDPMScheduler", config, lambda s: s.set_timesteps(steps), dtype, count, strided, channels
    )


@given(configs, st.lists(st.integers(0, 9), min_size=1, unique=True), variance_types)
def test_ddpm_custom_timesteps(config, timesteps, variance_type):
    timesteps = sorted(timesteps, reverse=True)
    channels = 2 if variance_type.startswith("learned") else 1
    same_run(
        "DDPMScheduler",
        {**config, "variance_type": variance_type},
        lambda s: s.set_timesteps(timesteps=timesteps),
        torch.float32,
        0,
        channels=channels,
    )


@given(
    configs,
    st.booleans(),
    st.integers(1, 10),
    dtypes,
    counts,
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([True, False, None]),
)
def test_ddim_steps(config, alpha_to_one, steps, dtype, count, eta, clipped):
    config = {**config, "set_alpha_to_one": alpha_to_one}
    same_run(
        "DDIMScheduler",
        config,
        lambda s: s.set_timesteps(steps),
        dtype,
        count,
        eta=eta,
        use_clipped_model_output=clipped,
    )


@given(
    configs,
    st.sampled_from(NAMES),
    st.sampled_from([(2,), (1,), ()]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_noising(config, name, shape, dtype, integer):
    them, us = pair(name, config)
    x, z = torch.randn(2, *SHAPE).to(dtype)
    t = torch.randint(0, config["num_train_timesteps"], shape).to(integer)
    for method in ("add_noise", "get_velocity"):
        want, got = (getattr(s, method)(x, z, t) for s in (them, us))
        assert_close(got, want, dtype, x, slack=1e-5)  # 1 - ᾱ of a float32 ᾱ, under a root
    wide = (x[:1], z, t)  # what only diffusers broadcasts
    if len(shape) == 0 or shape == (1,):
        assert_close(us.add_noise(*wide), them.add_noise(*wide), dtype, x)


@pytest.mark.parametrize("name", NAMES)
def test_before_and_between_set_timesteps(name):
    them, us = pair(name, {})
    x, m = torch.randn(2, *SHAPE)
    if name == "DDPMScheduler":
        assert torch.allclose(us.step(m, 400, x)[1], them.step(m, 400, x)[1], atol=1e-5)
    for steps in (7, 5):  # and a row is found wherever a run starts, however often, and resumed
        them.set_timesteps(steps), us.set_timesteps(steps)
        for t in (us.timesteps[3], us.timesteps[3], us.timesteps[1], us.timesteps[-1:]):
            want, got = (
                s.step(m, t, x, generator=generators(0), return_dict=False) for s in (them, us)
            )
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for s in (them, us):  # pipelines assign, and training scripts replace, what diffusers reads
        s.timesteps = s.timesteps[1:]
        s.alphas_cumprod = s.alphas_cumprod**1.1
        s._internal_dict = type(s.config)({**s.config, "clip_sample": False})
    t = us.timesteps[1]
    want, got = (s.step(m, t, x, generator=generators(0))[0] for s in (them, us))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    us.timesteps.clamp_(max=3), them.timesteps.clamp_(max=3)
    want, got = (s.step(m, s.timesteps[0], x, generator=generators(0))[0] for s in (them, us))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    them, us = (getattr(library, name) for library in (theirs, ours))
    for method in ("step", "set_timesteps", "add_noise", "get_velocity"):
        parameters = [inspect.signature(getattr(c, method)).parameters for c in (them, us)]
        plain = [[(p.name, p.default, p.kind) for p in each.values()] for each in parameters]
        assert plain[0] == plain[1]
    init = inspect.signature(us).parameters
    for parameter in inspect.signature(them).parameters.values():
        assert init[parameter.name].default == parameter.default
    positional = us(100, 0.001, 0.1)
    assert positional.config.beta_end == 0.1
    assert len(positional) == 100
    assert us.__doc__


@given(configs, st.sampled_from(NAMES), st.sampled_from([{}, {"noise": "counter"}]))
def test_configs(tmp_path_factory, config, name, switches):
    them, us = (getattr(library, name) for library in (theirs, ours))
    if name == "DDIMScheduler" and switches:
        switches = {**switches, "exact_previous_timestep": True}
    made = us(**config, **switches)
    folder = tmp_path_factory.mktemp("scheduler")
    made.save_pretrained(folder)
    for other in (
        us.from_pretrained(folder),
        us.from_config(made.config),
        us.from_config(them.from_config(made.config).config),  # diffusers passes switches along
        us.from_config(them(**config).config, **switches),
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
    ):
        assert type(other) is us
        assert other.config.items() >= {**config, **switches}.items()
        assert {k: getattr(other, k) for k in switches} == switches
        assert torch.equal(other.betas, made.betas)
    loaded = them.from_pretrained(folder)
    assert loaded.config.items() >= config.items()
    assert set(made.compatibles) == set(loaded.compatibles)
    across = theirs.EulerDiscreteScheduler.from_config(made.config)
    assert us.from_config(across.config).config.beta_end == config["beta_end"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "broken",
    [
        lambda s, m, x: s.set_timesteps(2000),
        lambda s, m, x: s.step(m, 5000, x),
        lambda s, m, x: s.step(m, 2.5, x),
        lambda s, m, x: s.step(m, torch.tensor(2.5), x),
        lambda s, m, x: s.step(m, s.timesteps[:2], x),
        lambda s, m, x: s.step(m[:, :, :2], s.timesteps[0], x),
        lambda s, m, x: s.step(torch.cat([m, m], 1), s.timesteps[0], x),
        lambda s, m, x: s.step(m, None, x),
        lambda s, m, x: s.step(None, 5, x),
        lambda s, m, x: s.step(m, s.timesteps[0], x, generator=[generators(0)] * 3, eta=1.0),
        lambda s, m, x: s.add_noise(x, m[:, :2], torch.tensor([3])),
        lambda s, m, x: s.add_noise(x, m, torch.tensor([5000])),
        lambda s, m, x: s.add_noise(x, m, torch.tensor([5.0])),
        lambda s, m, x: s.add_noise(x, m, 5),
    ],
)
def test_errors(name, broken):
    caught = []
    for scheduler in pair(name, {}):
        scheduler.set_timesteps(20)
        with pytest.raises(Exception) as error:
            broken(scheduler, *torch.randn(2, 5, *SHAPE[1:]))
        caught.append(error.type)
    assert caught[0] is caught[1]


def test_errors_of_settings():
    x, m = torch.randn(2, *SHAPE)
    for library in (theirs, ours):
        with pytest.raises(NotImplementedError):
            library.DDIMScheduler(beta_schedule="none")
        with pytest.raises(ValueError, match="set_timesteps"):
            library.DDIMScheduler().step(m, 5, x)
        with pytest.raises(ValueError):
            library.DDPMScheduler(timestep_spacing="none").set_timesteps(5)
        with pytest.raises(ValueError, match="prediction_type"):
            library.DDPMScheduler(prediction_type="none").step(m, 5, x)
        scheduler = library.DDPMScheduler()
        scheduler.set_timesteps(10)
        with pytest.raises(IndexError):
            scheduler.step(m, 5, x)
        with pytest.raises(TypeError):
            library.DDPMScheduler(variance_type="learned").step(m, 5, x)
        with pytest.raises(ValueError, match="descending"):
            library.DDPMScheduler().set_timesteps(timesteps=[1, 2])
        scheduler = library.DDIMScheduler()
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="both"):
            scheduler.step(m, 100, x, eta=1.0, generator=generators(0), variance_noise=m)
    with pytest.raises(ValueError, match="noise: wanted"):
        ours.DDPMScheduler(noise="none")


VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", [*VARIANCES, 0.0, 0.6, 1.0])
def test_coefficients_are_diffusers_own(prediction, clip, kind):
    """In float64 samples, where nothing else rounds, the steps agree to 1e-12: the float32 weights
    in them are the same numbers. (A weight one unit off in its last place would show as 6e-8.)"""
    config = {"prediction_type": prediction, "clip_sample": clip, "timestep_spacing": "trailing"}
    generator = torch.Generator().manual_seed(5)
    x, m, z = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    if isinstance(kind, str):
        them, us = pair("DDPMScheduler", {"variance_type": kind, **config})
        m = torch.cat([m, z.tanh().abs()], 1) if kind.startswith("learned") else m
        options = [{"generator": torch.Generator().manual_seed(6)} for _ in range(2)]
    else:
        them, us = pair("DDIMScheduler", config)
        options = [{"eta": kind, "variance_noise": z if kind else None}] * 2
    for steps in (1000, 7):
        them.set_timesteps(steps), us.set_timesteps(steps)
        for t in them.timesteps[:: max(1, steps // 60)]:
            want, got = (s.step(m, t, x, **o) for s, o in zip((them, us), options, strict=True))
            for a, b in zip(got.values(), want.values(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noising_has_diffusers_own_coefficients(name, dtype):
    them, us = pair(name, {})
    x, z = torch.zeros(1000, 1, dtype=dtype), torch.ones(1000, 1, dtype=dtype)
    t = torch.arange(1000)
    for a, b in ((x, z), (z, x)):
        assert torch.equal(us.add_noise(a, b, t), them.add_noise(a, b, t))
        assert torch.equal(us.get_velocity(a, b, t), them.get_velocity(a, b, t))


def test_a_last_alpha_bar_that_is_replaced():
    """Runs of the same steps share their tables, but not these."""
    them, us = pair("DDIMScheduler", {"clip_sample": False})
    x = torch.randn(SHAPE)
    for final in (1.0, 0.99995):  # at t = 0 it is 0.9999
        for scheduler in (them, us):
            scheduler.final_alpha_cumprod = torch.tensor(final)
            scheduler.set_timesteps(4)
        t = us.timesteps[-1]
        want, got = (scheduler.step(x, t, x).prev_sample for scheduler in (them, us))
        torch.testing.assert_close(got, want)
