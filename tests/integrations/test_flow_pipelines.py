"""Flow-matching transformers of tiny random parts, for images and videos, with our schedulers."""

from __future__ import annotations

import pytest
import torch

theirs = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusion_ext.integrations import diffusers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def image_pipeline(scheduler, dtype=torch.float32):
    """Stable Diffusion 3's shape; prompts come as embeddings."""
    torch.manual_seed(0)
    transformer = theirs.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    vae = theirs.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    nothing = dict.fromkeys(
        f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")
    )
    pipe = theirs.StableDiffusion3Pipeline(transformer, scheduler, vae, **nothing).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, dtype=torch.float32, **options):
    torch.manual_seed(1)
    embeddings, pooled = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 16, dtype=dtype)
    return pipe(
        prompt_embeds=embeddings, negative_prompt_embeds=-embeddings, pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=-pooled, height=8, width=8, num_inference_steps=5,
        generator=torch.Generator().manual_seed(3), output_type="pt", **options,
    ).images  # fmt: skip


FLOW = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
}


@pytest.mark.parametrize("name", FLOW)
def test_an_image_of_flow(name):
    want, got = (images(image_pipeline(getattr(lib, name)(**FLOW[name]))) for lib in (theirs, ours))
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{"mu": 0.8}, {"sigmas": [1.0, 0.7, 0.4, 0.2, 0.1], "mu": 0.8}])
def test_shifted_by_the_resolution(options):
    made = [
        images(
            image_pipeline(lib.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
            **options,
        )
        for lib in (theirs, ours)
    ]
    torch.testing.assert_close(*made, atol=1e-3, rtol=0)


def test_bfloat16():
    made = [
        images(
            image_pipeline(lib.FlowMatchEulerDiscreteScheduler(), torch.bfloat16), torch.bfloat16
        )
        for lib in (theirs, ours)
    ]
    torch.testing.assert_close(*made, atol=0.05, rtol=0)


@pytest.mark.compiles
def test_beside_a_compiled_transformer():
    pipe = image_pipeline(ours.FlowMatchEulerDiscreteScheduler(shift=3.0))
    want = images(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    torch.testing.assert_close(images(pipe), want, atol=1e-3, rtol=0)


def video_pipeline(scheduler):
    """Wan's shape: the sample stays float32."""
    torch.manual_seed(0)
    transformer = theirs.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=16, num_layers=1,
    ).to(torch.bfloat16)  # fmt: skip
    vae = theirs.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = theirs.WanPipeline(None, None, vae, scheduler, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


VIDEO = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "DPMSolverMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
}


@pytest.mark.parametrize("name", VIDEO)
def test_a_video(name):
    made = []
    for library in (theirs, ours):
        pipe = video_pipeline(getattr(library, name)(**VIDEO[name]))
        torch.manual_seed(1)
        embeddings = torch.randn(1, 5, 16)
        frames = pipe(
            prompt_embeds=embeddings, negative_prompt_embeds=-embeddings, height=16, width=16,
            num_frames=5, num_inference_steps=5, output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).frames  # fmt: skip
        made.append(frames)
    assert made[0].dim() == 5
    assert made[0].std() > 0.01
    torch.testing.assert_close(*made, atol=0.05, rtol=0)  # the transformer's are bfloat16
