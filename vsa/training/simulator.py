# SPDX-License-Identifier: Apache-2.0
"""Clips of a small world whose motion is known, made on the device, equal for equal numbers.

A camera that pans, turns and zooms looks at a textured ground. Before it move up to six textured
bodies (discs, squares, rings, diamonds) that spin, fall, bounce off the edges and hide each other,
under a light that comes and goes. Every clip has textures of its own, so a model cannot remember
them: to remove noise it has to find the same body in other frames.

With cuts the camera jumps every so many frames, by up to two fifths of the picture to each side.
What belongs together then lies at other places in other shots: who looks nearby does not find it.

A clip is a function of the seed and of its number alone. All its random numbers are hashes of the
two, so clips can be made in any order, in any batch and on any device; devices may round a colour
differently.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

BODIES = 6
JUMP = 0.8
"""Of the shorter side: how far apart two shots may lie along an axis."""
GROUND_TEXELS, BODY_TEXELS = 48, 8
MASK = 0xFFFFFFFF
SHADES = 255


def generate(
    numbers: Tensor, seed: int, frames: int, height: int, width: int, cuts: int = 0
) -> Tensor:
    """Clips by their numbers.

    Args:
        numbers: (N,) int64 on the device that makes them.
        seed: of the world.
        frames: of every clip.
        height: pixels.
        width: pixels.
        cuts: frames between two jumps of the camera; 0 for none.

    Returns:
        (N, frames, 3, height, width) uint8.
    """
    draw = _Draws(numbers, seed)
    time = torch.arange(frames, device=numbers.device, dtype=torch.float32)
    rows = (torch.arange(height, device=numbers.device) - (height - 1) / 2)[:, None]
    columns = torch.arange(width, device=numbers.device) - (width - 1) / 2
    if cuts:
        jump = JUMP * min(height, width) * (draw(11, -(-frames // cuts), 2) - 0.5)
        shot = time.long() // cuts
        y, x = (rearrange(part[:, shot], "n t -> (n t) 1 1") for part in jump.unbind(-1))
        rows, columns = rows + y, columns + x
    image = _ground(draw, time, rows, columns)
    for body in _bodies(draw, time, height, width):
        _paint(image, body, rows, columns)
    phase, slowness, depth = draw(9, 3).unbind(-1)
    turn = 2 * math.pi * (phase[:, None] + time / frames * (0.5 + slowness[:, None]))
    light = 1 + 0.2 * depth[:, None] * turn.sin()
    image *= rearrange(light, "n t -> (n t) 1 1 1")
    shades = (image * SHADES).round_().clamp_(0, SHADES).byte()
    return rearrange(shades, "(n t) c h w -> n t c h w", t=frames)


class _Draws:
    """Uniform numbers in [0, 1) that depend on the seed, a clip's number and the question."""

    def __init__(self, numbers: Tensor, seed: int) -> None:
        self.key = _hash(_hash(numbers & MASK) ^ _hash(torch.full_like(numbers, seed & MASK)))

    def __call__(self, question: int, *shape: int) -> Tensor:
        """(N, *shape) fp32."""
        places = torch.arange(math.prod(shape), device=self.key.device)
        key = _hash(self.key + 0x9E3779B9 * (question + 1) & MASK)
        words = _hash(_hash(key[:, None] ^ _hash(places)) + places & MASK)
        return ((words >> 8).float() / (1 << 24)).view(-1, *shape)


def _hash(x: Tensor) -> Tensor:
    """A mix of 32 bits in int64: multiply and shift, each step invertible."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def _ground(draw: _Draws, time: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What the camera sees of the ground, (N * T, 3, H, W) in [0, 1]."""
    coarse = functional.interpolate(draw(0, 3, 6, 6), GROUND_TEXELS, mode="bicubic")
    texture = 0.15 + 0.5 * coarse + 0.3 * draw(1, 3, GROUND_TEXELS, GROUND_TEXELS)
    side = max(rows.shape[-2], columns.shape[-1])
    pan_y, pan_x, spin, zoom, start = (draw(2, 5) - 0.5).unbind(-1)
    y, x, angle, size = (
        rearrange(value[:, None] * time, "n t -> (n t) 1 1")
        for value in (0.04 * pan_y, 0.04 * pan_x, 0.08 * spin, 0.04 * zoom)
    )
    angle = angle + repeat(2 * math.pi * start, "n -> (n t) 1 1", t=len(time))
    v, u = _turned(rows, columns, angle)
    scale = torch.exp(size) / side
    place = torch.stack((u * scale + x, v * scale + y), -1)
    return _sampled(texture, place, len(time))


def _bodies(draw: _Draws, time: Tensor, height: int, width: int) -> list[dict[str, Tensor]]:
    """Place, angle, radius, shape and texture of each body, farthest first."""
    n, side = len(draw.key), min(height, width)
    size = torch.tensor((height, width), device=time.device) / 2
    radius = side * (0.09 + 0.13 * draw(3, BODIES, 1))
    room = size - radius
    place = (2 * draw(4, BODIES, 2) - 1) * room
    speed = (2 * draw(5, BODIES, 2) - 1) * side / 20
    # A third of the worlds have gravity, in pixels per frame and frame.
    pull = (draw(6, 1, 1) < 0.33) * side * 0.006
    down = torch.tensor((1.0, 0.0), device=time.device)
    path = []
    for _ in range(len(time)):
        path.append(place)
        speed = speed + pull * down
        place = place + speed
        beyond = place.abs() > room
        place = torch.where(beyond, 2 * room * place.sign() - place, place)
        speed = torch.where(beyond, -speed, speed)
    paths = torch.stack(path, 2)  # (N, BODIES, T, 2)
    first, spin, shape, present = draw(7, 4, BODIES).unbind(1)
    angle = 2 * math.pi * first[..., None] + 0.5 * (spin[..., None] - 0.5) * time
    colour = draw(8, BODIES, 3, 1, 1)
    texture = colour + 0.8 * (draw(10, BODIES, 3, BODY_TEXELS, BODY_TEXELS) - 0.5)
    count = 2 + (present[:, :1] * (BODIES - 1)).long()
    there = (torch.arange(BODIES, device=time.device) < count).float()
    assert paths.shape == (n, BODIES, len(time), 2)
    return [
        {
            "place": paths[:, body],
            "angle": angle[:, body],
            "radius": radius[:, body],
            "shape": (4 * shape[:, body, None]).long(),
            "texture": texture[:, body],
            "there": there[:, body, None],
        }
        for body in range(BODIES)
    ]


def _paint(image: Tensor, body: dict[str, Tensor], rows: Tensor, columns: Tensor) -> None:
    """Lay a body over the image, with an edge of one pixel."""
    frames = body["angle"].shape[1]

    def each(value: Tensor) -> Tensor:
        return rearrange(value.expand(-1, frames), "n t -> (n t) 1 1")

    y, x = (each(part) for part in body["place"].unbind(-1))
    radius = each(body["radius"])
    v, u = _turned((rows - y) / radius, (columns - x) / radius, each(body["angle"]))
    round_, square = (u.square() + v.square()).sqrt(), torch.maximum(u.abs(), v.abs()) * 1.2
    shapes = (round_, square, 0.5 + (round_ - 0.7).abs() * 1.7, (u.abs() + v.abs()) * 0.9)
    kind, distance = each(body["shape"]), round_
    for number, found in enumerate(shapes):
        distance = torch.where(kind == number, found, distance)
    opacity = ((1 - distance) * radius + 0.5).clamp(0, 1) * each(body["there"])
    colour = _sampled(body["texture"], torch.stack((u, v), -1) * 0.8, frames)
    image.lerp_(colour, opacity[:, None])


def _turned(v: Tensor, u: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    sine, cosine = angle.sin(), angle.cos()
    return v * cosine + u * sine, u * cosine - v * sine


def _sampled(texture: Tensor, place: Tensor, frames: int) -> Tensor:
    """Colours of (N, 3, h, w) at places (N * T, H, W, 2), mirrored beyond [-1, 1]."""
    textures = repeat(texture, "n c h w -> (n t) c h w", t=frames)
    return functional.grid_sample(
        textures, place, mode="bilinear", padding_mode="reflection", align_corners=False
    )
