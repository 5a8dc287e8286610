"""Stable Diffusion with lsync: two lines more than without.

    python examples/stable_diffusion.py MODEL "a lighthouse in a storm" -o lighthouse.png

MODEL is a folder or a name that diffusers can load. Without one, a network of random weights is
made on the spot, which draws noise but takes the same way. ``--deep-cache`` is an approximation;
the report that is printed at the end says what was done.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("prompt", nargs="?", default="a lighthouse in a storm")
    parser.add_argument("-o", "--output", default="picture.png")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--deep-cache", action="store_true")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    if arguments.model is None:
        pipeline, conditions = small_pipeline()
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, torch_dtype=dtype)
        conditions = {"prompt": arguments.prompt}
    pipeline = pipeline.to(device)

    options = {"lowering": arguments.lowering, "deep_cache": arguments.deep_cache}
    pipeline = torch.compile(pipeline, backend="lsync", options=options)

    picture = pipeline(**conditions, num_inference_steps=arguments.steps).images[0]
    picture.save(arguments.output)
    print(pipeline.lsync.report())


def small_pipeline() -> tuple[StableDiffusionPipeline, dict[str, object]]:
    """Random weights, and the embeddings of no prompt in particular."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=None,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompt = torch.randn(1, 7, 32)
    return pipeline, {"prompt_embeds": prompt, "negative_prompt_embeds": -prompt}


if __name__ == "__main__":
    main()
