"""A latent text-to-image pipeline of tiny random parts: our schedulers, and fuse, beside theirs."""

import copy
import json

import pytest
import torch
from fused_models import ops_of
from test_fuse import pytestmark as of_fused_models
from torch import nn

theirs = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
import diffusion_ext as dx  # noqa: E402
from diffusion_ext.integrations import diffusers as ours  # noqa: E402

# diffusers' own schedulers make numpy warn.
pytestmark = [of_fused_models, pytest.mark.filterwarnings("ignore")]
NAMES = ("DDPMScheduler", "DDIMScheduler")
TRACED = {  # with what they take beside the pipeline's own configuration
    "PNDMScheduler": {"skip_prk_steps": True},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "SASolverScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD |= {"clip_sample": False, "steps_offset": 1}
WIDTH, PROMPT_LENGTH = 8, 6


def tokenizer(folder):
    """Every letter is a token, alone or at the end of a word."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{a}</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=PROMPT_LENGTH)


def text_encoder():
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=PROMPT_LENGTH, bos_token_id=52,
        eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


def unet(**options):
    return theirs.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
    ).eval()  # fmt: skip


def autoencoder():
    return theirs.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    torch.manual_seed(0)
    return {
        "tokenizer": tokenizer(tmp_path_factory.mktemp("tokenizer")),
        "text_encoder": text_encoder(),
        "unet": unet(),
        "vae": autoencoder(),
    }


@pytest.fixture
def pipe(parts):
    """A pipeline of its own networks, for a test to fuse."""
    own = {**parts, "unet": copy.deepcopy(parts["unet"]), "vae": copy.deepcopy(parts["vae"])}
    scheduler = theirs.DDIMScheduler(**SD, set_alpha_to_one=False)
    return ready("StableDiffusionPipeline", own, scheduler)


def ready(pipeline: str, parts: dict, scheduler, **more):
    made = getattr(theirs, pipeline)(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **more,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, prompt=("a cat", "dog"), **options):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"} | options
    generator = [torch.Generator().manual_seed(s) for s in (1, 2)]
    return pipe(list(prompt), generator=generator, **options).images


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}, {"eta": 0.6}], ids=str)
def test_the_same_images(pipe, name, options):
    """guidance_scale > 1: the prompt and the empty prompt as one doubled batch."""
    pipe.scheduler = getattr(theirs, name).from_config(pipe.scheduler.config)
    want = draw(pipe, **options)
    pipe.scheduler = getattr(ours, name).from_config(pipe.scheduler.config)
    got = draw(pipe, **options)
    assert want.shape == (2, 3, 16, 16)
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    assert (draw(pipe, ("a hat", "dog"), **options) - got).abs().max() > 1e-3  # the prompt counts


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_same_images_by_the_traced(pipe, name, scale):
    """With guidance and without, in a first run and in one that has its traces."""
    want, got = (
        [set_scheduler(pipe, library, name) or draw(pipe, guidance_scale=scale) for _ in range(2)]
        for library in (theirs, ours)
    )
    assert want[0].std() > 0.01
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def set_scheduler(pipe, library, name) -> None:
    new = getattr(library, name)
    if type(pipe.scheduler) is not new:
        pipe.scheduler = new.from_config(pipe.scheduler.config, **TRACED.get(name, {}))


@pytest.mark.parametrize("name", [*NAMES, *TRACED])
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_pipelines_that_start_from_an_image(pipe, name, kind):
    """They noise the image with add_noise, and begin in the middle of the timesteps."""
    pipe = getattr(theirs, f"StableDiffusion{kind}Pipeline")(
        **pipe.components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    options = {"image": torch.rand(2, 3, 16, 16), "strength": 0.6, "num_inference_steps": 5}
    if kind == "Inpaint":
        options |= {"mask_image": (torch.rand(2, 1, 16, 16) > 0.5).float()}
        options |= {"height": 16, "width": 16}
    set_scheduler(pipe, theirs, name)
    want = draw(pipe, **options)
    set_scheduler(pipe, ours, name)
    torch.testing.assert_close(draw(pipe, **options), want, atol=2e-3, rtol=0)


def test_fused_networks_draw_the_same_images(pipe):
    want = draw(pipe)
    norms = [m for net in (pipe.unet, pipe.vae) for m in net.modules() if type(m) is nn.GroupNorm]
    reports = [dx.fuse(pipe.unet), dx.fuse(pipe.vae)]
    assert sum(len(report.fused) for report in reports) == len(norms) > 30
    left = {why for report in reports for _, why in report.left}
    assert left == {"LayerNorm: no group norm", "torch's is faster for so few channels"}
    pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(draw(pipe), want, atol=1e-3, rtol=0)
    count = ops_of(lambda: draw(pipe))
    assert count["group_norm_act"] > 4 * 20
    assert count["native_group_norm"] == 0
    assert count["sampler_step_of_row"] == 4


def test_a_latent_consistency_model(parts):
    """The LCM pipeline: few steps, the guidance's scale an input of the network."""
    images = []
    network = unet(time_cond_proj_dim=8)
    for library in (theirs, ours):
        pipe = ready(
            "LatentConsistencyModelPipeline", parts | {"unet": network}, library.LCMScheduler(**SD)
        )
        images.append(draw(pipe, guidance_scale=8.0))
        assert type(pipe.scheduler) is library.LCMScheduler
    torch.testing.assert_close(*images, atol=2e-3, rtol=0)


def test_an_inversion(parts):
    """DiffEdit's way back from an image to its noise."""
    latents = []
    for library in (theirs, ours):
        pipe = ready(
            "StableDiffusionDiffEditPipeline", parts, library.DDIMScheduler(**SD),
            inverse_scheduler=library.DDIMInverseScheduler(**SD),
        )  # fmt: skip
        torch.manual_seed(1)
        image = torch.rand(1, 3, 16, 16)
        noise = torch.Generator().manual_seed(2)
        found = pipe.invert("a cat", image, num_inference_steps=5, generator=noise)
        latents.append(torch.as_tensor(found.latents))
        assert type(pipe.inverse_scheduler) is library.DDIMInverseScheduler
    torch.testing.assert_close(*latents, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_noise_of_the_kernel_is_a_samples_own(pipe, name):
    """noise="counter": an image depends on its seed, whatever else is in the batch."""
    pipe.scheduler = getattr(ours, name).from_config(pipe.scheduler.config, noise="counter")
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", "eta": 1.0}
    latents = dx.philox_normal(torch.tensor([5, 9]), (2, 4, 8, 8))

    def images(rows):
        pipe.scheduler.set_seeds(torch.tensor([5, 9])[rows])
        prompts = ["a cat", "dog"][rows]
        return pipe(prompts, latents=latents[rows], **options).images

    both = images(slice(0, 2))
    torch.testing.assert_close(images(slice(1, 2)), both[1:], atol=1e-4, rtol=0)


def test_saved_and_loaded_with_its_schedulers_name(pipe, tmp_path):
    pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
    dx.fuse(pipe.unet)
    want = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = theirs.StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is ours.DDIMScheduler
    assert type(loaded.unet) is theirs.UNet2DConditionModel  # fused ones are saved as theirs
    torch.testing.assert_close(draw(loaded), want, atol=1e-3, rtol=0)
