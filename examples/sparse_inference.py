# SPDX-License-Identifier: Apache-2.0
"""Denoise with a tiny random Wan transformer, dense and sparse, on a CPU or a GPU.

With a real pipeline only one line is needed: ``apply_vsa(pipe.transformer, topk=0.1)``.

    python examples/sparse_inference.py --steps 8 --topk 0.1
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from vsa.integrations.diffusers import apply_vsa, remove_vsa


def denoise(transformer: WanTransformer3DModel, noise: Tensor, text: Tensor, steps: int) -> Tensor:
    """Integrate the flow from noise to video in equal steps."""
    video = noise
    for step in range(steps):
        timestep = torch.full((len(noise),), 1000 * (1 - step / steps), device=noise.device)
        flow = transformer(video, timestep, text, return_dict=False)[0]
        video = video - flow / steps
    return video


@torch.no_grad()
def main(arguments: list[str] | None = None) -> float:
    """Run both and print what they took; returns the relative difference of the videos."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--topk", type=float, default=0.1, help="share of the tiles")
    parser.add_argument("--frames", type=int, default=8, help="of the latent video")
    parser.add_argument("--size", type=int, default=48, help="height and width, likewise")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, text_dim=32, ffn_dim=128, num_layers=3
    ).to(device)
    noise = torch.randn(1, 16, options.frames, options.size, options.size, device=device)
    text = torch.randn(1, 16, 32, device=device)

    seconds, videos = {}, {}
    for name in ("dense", "sparse"):
        if name == "sparse":
            # Dense first steps and layers are what sparse video models commonly keep.
            apply_vsa(transformer, topk=options.topk, dense_layers=[0], dense_steps=1)
        denoise(transformer, noise, text, steps=2)  # warm up
        start = time.perf_counter()
        videos[name] = denoise(transformer, noise, text, options.steps)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        print(f"{name:6s} {seconds[name]:.2f} s for {options.steps} steps on {device}")
    remove_vsa(transformer)

    dense, sparse = videos["dense"], videos["sparse"]
    difference = float((sparse - dense).norm() / dense.norm())
    print(
        f"the videos differ by {difference:.1%}; weights are random, so this says nothing of the "
        "quality of a real model"
    )
    return difference


if __name__ == "__main__":
    main()
