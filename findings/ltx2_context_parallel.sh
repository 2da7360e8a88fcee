#!/usr/bin/env bash
# diffusers 0.42.1 has a plan by which enable_parallelism shards LTX-2 over ranks. It cannot run: the
# plan splits the video's tokens and the rotary tables of its self-attention, but not the tables of
# attention between video and audio (cross_attn_rope), which stay those of the whole video. Every
# forward pass ends in an error about sizes. With rope_type="split", as LTX-2.3 has it, the first
# tables are not split either: the plan expects three dimensions, they have four, and a warning says
# that nothing was done. Two processes on a CPU show it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1 transformers==5.24.0
cat >"$folder/ranks.py" <<'PYTHON'
import diffusers
import torch
import torch.distributed as dist
import transformers.utils.logging  # noqa: F401  diffusers logs by a method that it adds
from diffusers import ContextParallelConfig, LTX2VideoTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh

dist.init_process_group("gloo")
torch.accelerator.device_count = lambda: 1  # diffusers asks for one even where the mesh is of CPUs
T, H, W = 4, 6, 8
for rope_type in ("interleaved", "split"):
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24,
        cross_attention_dim=48, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=12, audio_cross_attention_dim=24,
        num_layers=1, caption_channels=16, rope_type=rope_type,
    )
    inputs = dict(
        hidden_states=torch.randn(1, T * H * W, 4), audio_hidden_states=torch.randn(1, 8, 4),
        encoder_hidden_states=torch.randn(1, 6, 16), timestep=torch.tensor([500.0]),
        audio_encoder_hidden_states=torch.randn(1, 6, 16), sigma=torch.tensor([500.0]),
        num_frames=T, height=H, width=W, audio_num_frames=8, return_dict=False,
        encoder_attention_mask=None,  # left out, the plan fails for want of it
    )
    with torch.no_grad():
        assert model(**inputs)[0].isfinite().all()  # alone it runs
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
        try:
            model(**inputs)
        except RuntimeError as error:
            assert "must match the size" in str(error), error
            if dist.get_rank() == 0:
                print(f"diffusers {diffusers.__version__}, {rope_type}: {error}")
        else:
            raise SystemExit("it has changed: LTX-2 runs on two ranks")
dist.destroy_process_group()
PYTHON
"$folder/env/bin/python" -m torch.distributed.run --nproc-per-node 2 --master-port 29533 \
    "$folder/ranks.py" 2>"$folder/log" || { tail -20 "$folder/log"; exit 1; }
