# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a tiny Wan transformer from dense to sparse, with coarse gates that start at zero.

The clip is synthetic: a bright spot that moves through latent frames. At first every tile is kept,
then the ramp takes some away every few steps, while the gates learn how much of the coarse branch
to add.

    python examples/finetune.py --steps 48 --end 0.25
"""

from __future__ import annotations

import argparse
from statistics import fmean

import torch
from diffusers import WanTransformer3DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import vsa
from vsa.integrations.diffusers import apply_vsa, gates_state_dict

CHANNELS, FRAMES, SIZE = 16, 8, 16  # of the latent clip: 8x8x8 tokens, 8 tiles


def clip(batch: int) -> Tensor:
    """Spots that move on straight lines, (B, channels, frames, height, width)."""
    start, end = torch.rand(2, batch, 2, 1) * SIZE
    time = torch.linspace(0, 1, FRAMES)
    y, x = (start + (end - start) * time).unbind(1)  # (B, frames) each
    place = torch.arange(SIZE)
    rows, columns = (torch.exp(-((at[..., None] - place) ** 2) / 8) for at in (y, x))
    spots = rows[:, :, :, None] * columns[:, :, None, :]
    return spots[:, None] * torch.linspace(-1, 1, CHANNELS).view(1, -1, 1, 1, 1)


def flow_loss(transformer: WanTransformer3DModel, video: Tensor, text: Tensor) -> Tensor:
    """Flow matching: predict noise - video from a mixture of both."""
    noise, level = torch.randn_like(video), torch.rand(len(video))
    share = level.view(-1, 1, 1, 1, 1)
    mixed = (1 - share) * video + share * noise
    flow = transformer(mixed, 1000 * level, text, return_dict=False)[0]
    return (flow - (noise - video)).square().mean()


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    """Train and print; returns the loss and the density of every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--end", type=float, default=0.25, help="share of the tiles in the end")
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # a model this small gains nothing from more
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=32, ffn_dim=128, num_layers=2
    )
    text = torch.randn(options.batch, 8, 32)
    # Four stairs of equal length from everything to the end.
    ramp = vsa.SparsityRamp(1.0, options.end, max(1, options.steps // 4), (1 - options.end) / 3)
    apply_vsa(transformer, topk=1.0, gates="coarse")  # before the optimizer, which needs the gates
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)

    losses: list[float] = []
    densities: list[float] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn()) as progress:
        for step in progress.track(range(options.steps), description="training"):
            density = ramp(step)
            if not densities or density != densities[-1]:
                apply_vsa(transformer, topk=density, gates="coarse")  # the gates stay
            loss = flow_loss(transformer, clip(options.batch), text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            densities.append(density)
            progress.update(
                progress.task_ids[0], description=f"{density:.0%} kept, loss {losses[-1]:.3f}"
            )
    part = max(1, options.steps // 6)
    largest = max(float(gate.abs().max()) for gate in gates_state_dict(transformer).values())
    print(
        f"loss {fmean(losses[:part]):.3f} -> {fmean(losses[-part:]):.3f} (means of {part} steps), "
        f"tiles kept {densities[0]:.0%} -> {densities[-1]:.0%}, "
        f"largest weight of a gate 0 -> {largest:.4f}"
    )
    return losses, densities


if __name__ == "__main__":
    main()
