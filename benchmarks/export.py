"""Export beside plain ``torch.onnx.export`` and optimum-onnx: seconds, peak memory and size on disk.

    python benchmarks/export.py [CASE ...] [--scratch DIR] [--optimum DIR]

Writes benchmarks/results/export.json. Every export is a process of its own, whose peak is the resident set that the
kernel reports (imports included). Folders are diffusers' own, written with random weights in fp16. ``torch`` is plain
``torch.onnx.export(dynamo=True)`` of diffusers' module (of ours for digits-dit) with the same dynamic dimensions.
``optimum`` is optimum-onnx 0.1.0, whose pins exclude ours: --optimum names a folder with it, transformers 4.57 and
diffusers 0.39 (``pip install --target DIR``); it exports in fp32 and fixes sizes that it does not know to be dynamic.
Lehr runs with ``--golden none``, so that nothing but the export is compared. ``flux-dev 12B`` is a synthetic checkpoint
of 11.9 billion parameters in bf16 (24 GB, and as much again for the bundle); it runs only when named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import RESULTS, write

UNETS = {  # diffusers' published configurations
    "sd-1.5": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "sdxl-base": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

FOLDER = """
import json, sys
from pathlib import Path
import numpy as np, torch
from diffusers import UNet2DConditionModel
from lehr.engines.graph.tensor_file import TensorInfo, write_safetensors
folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
with torch.device("meta"):
    module = UNet2DConditionModel(**config)
module.save_config(folder)
def random(shape):
    size = int(np.prod(shape))
    block = np.random.default_rng(0).uniform(-0.02, 0.02, min(size, 1 << 20)).astype(np.float16)
    return np.resize(block, size)
tensors = [(n, TensorInfo(np.dtype(np.float16), tuple(t.shape)), lambda s=tuple(t.shape): random(s))
           for n, t in module.state_dict().items()]
write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
"""

FLUX_FILE = """
import sys
import ml_dtypes, numpy as np, torch
from lehr.engines.graph.tensor_file import TensorInfo, write_safetensors
from lehr.export.backbones import preset
with torch.device("meta"):
    state = preset("flux-dev").module().state_dict()
block = np.random.default_rng(0).uniform(-0.02, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
write_safetensors(sys.argv[1], [
    (name, TensorInfo(block.dtype, tuple(tensor.shape)), lambda size=tensor.numel(): np.resize(block, size))
    for name, tensor in state.items()])
"""

TORCH_UNET = """
import sys, torch
from diffusers import UNet2DConditionModel
module = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.float16).eval()
batch, height, width, tokens = (torch.export.Dim(n, min=1, max=m) for n, m in
    (("batch", 64), ("_height", 256), ("_width", 256), ("tokens", 308)))
dims = {"sample": {0: batch, 2: 8 * height, 3: 8 * width}, "timestep": {0: batch},
        "encoder_hidden_states": {0: batch, 1: tokens}}
side, width_ = int(sys.argv[3]), module.config.cross_attention_dim
inputs = {"sample": torch.randn(2, 4, side, side).half(), "timestep": torch.tensor([5.0, 5.0]),
          "encoder_hidden_states": torch.randn(2, 77, width_).half()}
with torch.no_grad():
    torch.onnx.export(module, kwargs=inputs, dynamo=True, dynamic_shapes=dims, opset_version=20).save(
        sys.argv[2], external_data=True)
"""

TORCH_DIGITS = """
import sys, torch
from safetensors.torch import load_file
from lehr.export.backbones import preset
from lehr.export.source import shipped_weights
from lehr.export.dims import dynamic_shapes
chosen = preset("digits-dit")
module = chosen.module().eval()
module.load_state_dict(load_file(shipped_weights("digits-dit")))
spec = chosen.spec
inputs = {t.name: (torch.ones if t.dtype.value == "int64" else torch.randn)(
    t.sizes(spec.default_sizes(batch=2))).to(getattr(torch, t.dtype.value)) for t in spec.inputs}
with torch.no_grad():
    torch.onnx.export(module, kwargs=inputs, dynamo=True, dynamic_shapes=dynamic_shapes(spec), opset_version=20).save(
        sys.argv[1], external_data=True)
"""


OPTIMUM_UNET = """
import sys
from pathlib import Path
from diffusers import UNet2DConditionModel
from optimum.exporters.onnx.convert import export
from optimum.exporters.onnx.model_configs import UNetOnnxConfig
unet = UNet2DConditionModel.from_pretrained(sys.argv[1]).eval()
for name in ("text_encoder_projection_dim", "requires_aesthetics_score", "time_cond_proj_dim"):
    setattr(unet.config, name, None)
export(unet, UNetOnnxConfig(unet.config, task="semantic-segmentation"), Path(sys.argv[2]), opset=14, device="cpu")
"""


def run(command: Sequence[str], made: Path, path: Path | None = None) -> dict[str, Any]:
    """Run a process, modules of ``path`` before others; its seconds, peak memory and output, or how it failed."""
    made.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": str(path.resolve())}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read()
    seconds = time.monotonic() - started
    if process.returncode:
        return {"failed": said.strip().splitlines()[-1][:300] if said.strip() else f"exit {process.returncode}"}
    files = [path for path in ([made] if made.is_file() else made.rglob("*")) if path.is_file()]
    if made.is_file():
        files = [path for path in made.parent.iterdir() if path.is_file()]
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_mb": round(used.ru_maxrss / 1024),
        "output_mb": round(sum(path.stat().st_size for path in files) / 1e6, 1),
    }


def lehr(source: str, folder: Path, *options: str) -> dict[str, Any]:
    """``lehr export`` of a source."""
    bundle = folder / "lehr" / "m.lehr"
    command = [sys.executable, "-m", "lehr", "export", source, "-o", str(bundle), *options]
    return run(command, bundle)


def measure(case: str, scratch: Path, optimum: Path | None) -> dict[str, Any]:
    """One case with whoever can do it."""
    if case == "flux-dev structure":
        return {"lehr": lehr("flux-dev", scratch, "--structure-only")}
    if case == BY_HAND:
        file = scratch / "flux.safetensors"
        subprocess.run([sys.executable, "-c", FLUX_FILE, str(file)], check=True)
        return {"lehr": lehr(str(file), scratch, "--preset", "flux-dev", "--golden", "none")}
    if case == "digits-dit":
        made = scratch / "torch" / "m.onnx"
        made.parent.mkdir()
        return {
            "lehr": lehr("digits-dit", scratch, "--golden", "none"),
            "torch": run([sys.executable, "-c", TORCH_DIGITS, str(made)], made),
        }
    folder = scratch / "unet"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", FOLDER, str(folder), json.dumps(UNETS[case])], check=True)
    rows = {"lehr": lehr(str(folder), scratch, "--golden", "none")}
    shutil.rmtree(scratch / "lehr", ignore_errors=True)
    if case == "sd-1.5":
        made = scratch / "torch" / "m.onnx"
        made.parent.mkdir()
        rows["torch"] = run([sys.executable, "-c", TORCH_UNET, str(folder), str(made), "64"], made)
        shutil.rmtree(made.parent)
        if optimum is not None:
            made = scratch / "optimum" / "m.onnx"
            rows["optimum"] = run([sys.executable, "-c", OPTIMUM_UNET, str(folder), str(made)], made, optimum)
            rows["optimum"].pop("output_mb", None)  # fp32, so not to be compared
    return rows


CASES = ("digits-dit", "flux-dev structure", "sd-1.5", "sdxl-base")
BY_HAND = "flux-dev 12B"


def main() -> None:
    """Measure what is named on the command line, all by default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--scratch", type=Path, help="A folder with room for 20 GB.")
    parser.add_argument("--optimum", type=Path, help="A folder with optimum-onnx and what it needs.")
    arguments = parser.parse_args()
    stored = RESULTS / "export.json"
    known = json.loads(stored.read_text())["cases"] if stored.is_file() else {}
    for case in arguments.cases:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            known[case] = measure(case, Path(scratch), arguments.optimum)
        print(case, json.dumps(known[case]), file=sys.stderr)
    write("export", {"cases": {case: known[case] for case in (*CASES, BY_HAND) if case in known}})


if __name__ == "__main__":
    main()
