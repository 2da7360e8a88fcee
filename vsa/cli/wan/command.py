# SPDX-License-Identifier: Apache-2.0
"""``vsa wan``: the denoising loop of Wan2.1, dense against sparse."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vsa.cli import options
from vsa.cli.extras import require_demo_extra, require_diffusers_extra
from vsa.cli.outputs import INTERRUPTED, check_output
from vsa.measure.machine import machine
from vsa.measure.provenance import provenance, write
from vsa.stages.inputs import DEFAULT_TILE
from vsa.values import precision as precisions

if TYPE_CHECKING:
    from vsa.cli.wan.model import Size

RANDOM = (
    "Weights are random: time and memory are the model's, quality cannot be judged. Neighbouring "
    "tiles choose less alike in noise than in a video, which costs the kernels speed."
)

COMPILED = ", compiled (self-attention and other parts timed uncompiled)"


def wan(
    context: typer.Context,
    model: Annotated[
        Literal["1.3b", "14b"], typer.Option(help="Which Wan2.1 text-to-video model.")
    ] = "1.3b",
    weights: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="A local folder in diffusers' format; else random."
        ),
    ] = None,
    gates: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A safetensors file with blocks.N.to_gate_compress.weight and .bias of every "
            "layer: run with the coarse branch behind these gates. Gates in the folder of "
            "--weights, as FastVideo's checkpoints have them, are taken by themselves.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text embeddings (passes, tokens, channels) by torch.save: the prompt, and with "
            "--guidance what to lead away from; else random.",
        ),
    ] = None,
    size: Annotated[
        list[str],
        typer.Option(
            "--size",
            metavar="SIZE",
            help="480p, 448p, 720p, or frames x height x width such as 81x480x832; repeat for "
            "several; by default 480p and 448p.",
        ),
    ] = [],  # noqa: B006  typer copies it
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of guidance, which doubles the passes; else none.")
    ] = None,
    topk: options.Topk = "0.125",
    tile: options.TileShape = "auto",
    dense_layers: Annotated[
        str, typer.Option(metavar="N,N", help="Layers that stay dense, negative from the end.")
    ] = "",
    dense_steps: Annotated[int, typer.Option(min=0, help="First steps that stay dense.")] = 0,
    refresh_every: Annotated[
        int, typer.Option(min=1, help="Choose tiles every so many steps.")
    ] = 1,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="native, int8 or fp8, or one of them for each layer, separated by commas. Then "
            "the sparse run in native precision stands beside.",
        ),
    ] = "native",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks, for both runs.")
    ] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the model's blocks.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A small model and video instead, for a CPU.")
    ] = False,
    device: options.Device = "auto",
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs that share out the video, a process for each; under torchrun those it has "
            "started.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this .json file.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Denoise the first video once more and write what its layers and steps kept, a "
            ".html page or a .png picture."
        ),
    ] = None,
) -> None:
    """Denoise with Wan2.1, dense against sparse in the same run, and print what each took.

    The model is built from its public configuration, with random weights unless --weights gives
    real ones; both runs start from the same noise. Dense attention is the fastest kernel that
    PyTorch has here for the shape. The table of a size is printed, and written to --json, when it
    is done.
    """
    require_diffusers_extra("vsa wan runs a transformer of diffusers")
    from vsa.cli.wan import compare as wan_compare
    from vsa.cli.wan import loop as wan_loop
    from vsa.cli.wan import model as wan_model
    from vsa.cli.wan import ranks as wan_ranks  # these need the extra

    check_output(json_file, ".json", "--json")
    if report is not None:
        check_output(report, ".png" if report.suffix == ".png" else ".html", "--report")
        require_demo_extra("matplotlib", purpose="the report is drawn by matplotlib")
    if device.type == "cpu" and weights is None and not tiny:
        _refuse("--device", "a step of Wan takes hours on a CPU: add --tiny, or use a GPU")
    if weights is not None and (tiny or layers):
        _refuse("--weights", "they need the whole model: leave --tiny and --layers out")
    if dense_steps >= steps:
        _refuse("--dense-steps", f"{dense_steps} of {steps} steps leave none to be sparse")
    sizes = [_parse_size(name) for name in size or (["tiny"] if tiny else ["480p", "448p"])]
    is_low = {options.parse_precision(name) for name in precision.split(",")} != {"native"}
    if ranks is not None and ranks > 1 and not wan_ranks.is_launched():
        if device.type == "cuda" and ranks > torch.cuda.device_count():
            there = torch.cuda.device_count()
            _refuse("--ranks", f"a GPU for each process is needed, but there are {there}")
        raise typer.Exit(wan_ranks.launch(ranks))
    try:
        team = context.with_resource(wan_ranks.joined(ranks, device))
    except ValueError as error:
        _refuse("--ranks", str(error))
    device = team.device
    if report is not None and team.count > 1:
        _refuse("--report", "a report is of whole sequences, which no process has: leave one out")
    dtype = torch.bfloat16 if device.type == "cuda" or is_low else torch.float32

    console = Console(quiet=team.rank > 0)
    json_file = json_file if team.rank == 0 else None
    with console.status("building the model"):
        transformer, trained, source = _loaded(
            weights, gates, "tiny" if tiny else model, layers, device, dtype
        )
    for each in sizes:
        heads = transformer.config.num_attention_heads
        reason = wan_ranks.why_not(team.count, heads, math.prod(each.grid))
        if reason is not None:
            _refuse("--ranks", f"{reason} at {each}")
    team.share(wan_ranks.tensors_of(transformer))
    team.parallelise(transformer)
    settings = {
        "topk": topk,
        "tile": DEFAULT_TILE if trained and tile == "auto" else tile,  # that of their training
        "gates": "coarse" if trained else None,
        "dense_layers": _parse_layers(dense_layers, len(transformer.blocks)),
        "dense_steps": dense_steps,
        "refresh_every": refresh_every,
        "precision": _parse_precision(precision, len(transformer.blocks)),
    }
    config = transformer.config
    for kind in precisions.in_any_layer(settings["precision"]):
        backend = options.check_backend(
            "auto", device, dtype, config.attention_head_dim, False, kind
        )
    prompt = _text(text, 1 if guidance is None else 2, config.text_dim).to(device, dtype)
    team.share([prompt])
    if compiled:
        # Each size compiled for itself, as in a pipeline that only ever makes one.
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    origin = provenance(device, "diffusers")
    called = "tiny" if tiny else model if weights is None else str(weights)
    about: dict[str, Any] = {
        **origin,
        "model": called,
        "random_weights": weights is None,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "compiled": compiled,
        "ranks": team.count,
        "guidance": guidance,
        **settings,
        "gates_from": None if source is None else str(source),
        "weights": wan_model.bytes_of(transformer),
    }
    comparisons: list[wan_compare.Comparison] = []

    def keep(complete: bool) -> None:
        done = [wan_compare.figures(found) for found in comparisons]
        write(json_file, about, done, complete)

    interrupted = False
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        total = steps * ((2 + is_low) * len(sizes) + (report is not None))
        task = progress.add_task("warming up", total=total)
        keep(complete=False)
        try:
            for each in sizes:

                def told(kind: str, each: Size = each) -> None:
                    progress.update(task, advance=1, description=f"{each}, {kind}")

                noise = torch.randn(1, wan_model.LATENT_CHANNELS, *each.latents, device=device)
                team.share([noise])
                denoiser = wan_loop.Denoiser(transformer, noise, prompt, steps, guidance)
                found = wan_compare.compare(denoiser, each, settings, trained, told, team)
                comparisons.append(found)
                progress.console.print(wan_compare.table(found, transformer, compiled))
                progress.console.print(wan_compare.kernel_line(found))
                keep(complete=len(comparisons) == len(sizes))
                if report is not None and each == sizes[0]:
                    noted = partial(told, "report")
                    wan_compare.observe(denoiser, settings, trained, noted, report)
        except KeyboardInterrupt:
            interrupted = True

    console.print(
        f"{called}, {str(dtype).removeprefix('torch.')}{COMPILED * compiled}, backend {backend}, "
        f"weights {wan_compare.in_bytes(about['weights'])}"
    )
    if trained:
        console.print(f"sparse runs add the coarse branch behind the gates of {source}")
    console.print(
        f"{f'{team.count} x ' * (team.count > 1)}{machine(device)}, "
        f"diffusers {origin['diffusers']}, vsa {origin['vsa']}, commit "
        f"{(origin['commit'] or 'unknown')[:12]}, {origin['date']}"
    )
    for found in comparisons:
        console.print(f"the results at {found.size} differ by {found.difference:.1%}")
        if found.of_precision is not None:
            console.print(f"low precision changes the sparse one by {found.of_precision:.1%}")
    if interrupted:
        console.print(f"interrupted after {len(comparisons)} of {len(sizes)} videos", style="red")
        raise typer.Exit(INTERRUPTED)
    if report is not None:
        console.print(f"what the sparse run kept, by layer and step: {report}")
    if weights is None:
        console.print(RANDOM, style="bold")


def _loaded(
    weights: Path | None,
    gates: Path | None,
    name: str,
    layers: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, dict[str, Tensor], Path | None]:
    """The model, its coarse gates if there are any, and where these come from."""
    from vsa.cli.wan.model import loaded_gates, loaded_model, random_model
    from vsa.integrations.diffusers import apply_vsa, load_gates, remove_vsa

    option = "--weights"
    found: dict[str, Tensor] = {}
    try:
        if weights is None:
            transformer = random_model(name, layers, device, dtype)
        else:
            transformer, found = loaded_model(weights, device, dtype)
        source = weights if found else gates
        if gates is not None:
            option = "--gates"
            if found:
                raise ValueError(f"{weights} holds gates of its own: leave --gates out")
            found = loaded_gates(gates, device)
    except (ValueError, OSError) as error:
        _refuse(option, str(error))
    if found:  # those that do not fit are found out before the first run
        try:
            load_gates(apply_vsa(transformer, gates="coarse"), found)
        except ValueError as error:
            _refuse(option, f"the gates of {source} do not fit: {error}")
        remove_vsa(transformer)
    return transformer, found, source


def _refuse(option: str, sentence: str) -> NoReturn:
    raise typer.BadParameter(sentence, param_hint=option)


def _parse_size(text: str) -> Size:
    """A name in ``SIZES``, or three numbers."""
    from vsa.cli.wan.model import SIZES, Size

    if text in SIZES:
        return SIZES[text]
    try:
        return Size(*options.parse_extent(text))
    except ValueError as error:
        _refuse("--size", str(error))
    except typer.BadParameter:
        names = ", ".join(SIZES)
        _refuse("--size", f"{names} or one such as 81x480x832 is needed, but it is {text!r}")


def _parse_layers(text: str, count: int) -> list[int]:
    """Numbers of layers, such as 0,-1."""
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        _refuse("--dense-layers", f"whole numbers such as 0,-1 are needed, but it is {text!r}")
    if any(not -count <= number < count for number in numbers):
        _refuse("--dense-layers", f"numbers from {-count} to {count - 1} are needed: {text}")
    return numbers


def _parse_precision(text: str, layers: int) -> Any:
    """A name, or as many as there are layers; "native" where all of them are."""
    names = text.split(",")
    try:
        found = precisions.of_layers(names if len(names) > 1 else text, layers)
    except ValueError as error:
        _refuse("--precision", str(error))
    return "native" if precisions.in_any_layer(found) == {"native"} else found


def _text(file: Path | None, passes: int, channels: int) -> Tensor:
    """(passes, tokens, channels) from a file, or random."""
    from vsa.cli.wan.model import TEXT_TOKENS

    if file is None:
        return torch.randn(passes, TEXT_TOKENS, channels)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle makes of a file that is something else
        _refuse("--text", f"{file} holds no tensor that torch.load can read: {error}")
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[::2] != (passes, channels):
        _refuse(
            "--text",
            f"({passes}, tokens, {channels}) is needed, {passes} for "
            f"{'one pass' if passes == 1 else 'guidance'}, but it is {shape}",
        )
    return found
