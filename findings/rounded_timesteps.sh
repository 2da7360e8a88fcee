#!/usr/bin/env bash
# diffusers 0.42.1. HunyuanVideo 1.5's pipeline casts each timestep to the type of the latents before
# it calls the transformer, bf16 for published weights. bf16 has 8 bits: from 512 to 1000 it knows
# every fourth number only. With the shift of the 720p model, 50 steps are fewer numbers, most of the
# repeats among the first steps, where dense-first schedules and caches look at the timestep. Whoever
# tells steps apart by it takes two steps for one call with guidance.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 numpy scipy
"$folder/env/bin/python" - <<'PYTHON'
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

folder = Path(diffusers.__file__).parent / "pipelines" / "hunyuan_video1_5"
source = (folder / "pipeline_hunyuan_video1_5.py").read_text()
assert "timestep = t.expand(latent_model_input.shape[0]).to(latent_model_input.dtype)" in source
scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 51)[:-1])
exact = scheduler.timesteps.unique().numel()
rounded = scheduler.timesteps.bfloat16().unique().numel()
first = scheduler.timesteps[:12].bfloat16().unique().numel()
print(f"diffusers {diffusers.__version__}: {exact} steps, {rounded} numbers in bf16; "
      f"of the first 12 steps {first}")
assert exact == 50 and rounded < 50 and first < 12, "the behaviour has changed"
PYTHON
