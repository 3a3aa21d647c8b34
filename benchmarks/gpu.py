"""Engines on a CUDA machine in one run: eager, torch.compile, AOTInductor, ONNX Runtime CUDA, and what Lehr builds.

    python benchmarks/gpu.py [MODEL ...] [--target h100] [--recipes bf16,fp16,fp8] [--device cuda|cpu]

Writes benchmarks/results/gpu-<device's name>.json. Models have random weights (uniform in ±fan_in^-1/2) and are held
against eager float32 first; a contestant further than 20 dB from it is listed and not ranked. Each has a process of its
own, and they take turns (``lehr.engines.bench``); an evaluation is timed from host to host, synchronised. Needs PyTorch
with CUDA; onnxruntime-gpu, TensorRT and cuda-python take part where they are installed, and what cannot take part is
recorded with its reason. With ``--device cpu`` and a small model it runs anywhere, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from torch import nn

from lehr.engines.bench import Contestant, child_environment, compare
from lehr.engines.contestants import contestants, runnable
from lehr.export.backbones import preset
from lehr.export.dims import dynamic_shapes
from lehr.export.eager import eager
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.errors import LehrError
from lehr.runtime.host import peak_rss_mb
from lehr.runtime.noise import batch_normal
from lehr.runtime.spec import ModelSpec
from lehr.runtime.timing import Feeds, read_inputs, serve, write_inputs

RESULTS = Path(__file__).parent / "results"
BATCH, LEAST_DB = 2, 20.0
MODELS: dict[str, dict[str, Any]] = {  # preset -> changes of its configuration
    "dit-xl-2": {},
    "sd-1.5": {},
    "sdxl-base": {},
    "flux-dev": {"depth": 4, "depth_single_blocks": 8},  # flux-shaped: the published width, fewer blocks
    "digits-dit": {},
}
DEFAULT = ("dit-xl-2", "sd-1.5", "sdxl-base", "flux-dev")
KINDS = ("eager-fp32", "eager-bf16", "compile-bf16", "aotinductor-bf16", "onnxruntime-fp16")
FACTORY = """
import sys
sys.path.insert(0, {here!r})
from gpu import model_of

def make():
    return model_of({name!r})
"""


def model_of(name: str) -> tuple[nn.Module, ModelSpec]:
    """A module with random weights, and its spec."""
    from dataclasses import replace

    chosen = preset(name)
    torch.manual_seed(0)
    module = chosen.build(replace(chosen.params, **MODELS[name])).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound)
    return module, chosen.spec


def inputs_of(spec: ModelSpec) -> dict[str, Any]:
    """Inputs of one evaluation in the middle of the path."""
    sample = batch_normal(0, range(BATCH), spec.sample_shape(BATCH)[1:]).astype(spec.sample.dtype.numpy)
    middle = spec.path.timestep_of([1.0]).astype(spec.timestep.dtype.numpy).repeat(BATCH)
    return {spec.sample.name: sample, spec.timestep.name: middle, **synthetic_conditions(spec, BATCH, seed=0)}


# ------------------------------------------------------------------------------------------- in a contestant's process


def evaluation(kind: str, name: str, device: str, feeds: Feeds) -> Callable[[Feeds], Any]:
    """What a contestant's process evaluates, host arrays in and out."""
    module, spec = model_of(name)
    if kind == "onnxruntime-fp16":
        return _onnxruntime(module, spec, device, feeds)
    dtype = torch.float32 if kind == "eager-fp32" else torch.bfloat16
    module = module.to(device=device, dtype=dtype)
    called: Any = module
    if kind == "compile-bf16":
        called = torch.compile(module, dynamic=False, mode="max-autotune" if device == "cuda" else "default")
    elif kind == "aotinductor-bf16":
        tensors = {n: torch.from_numpy(np.array(v)).to(device) for n, v in feeds.items()}
        cast = {n: t.to(dtype) if t.is_floating_point() and n != spec.timestep.name else t for n, t in tensors.items()}
        with torch.no_grad():
            program = torch.export.export(module, (), cast)
            package = torch._inductor.aoti_compile_and_package(program, inductor_configs={"max_autotune": True})
        called = torch._inductor.aoti_load_package(package)
    denoiser = eager(called, spec, dtype=dtype, device=device)

    def evaluate(given: Feeds) -> Any:
        conditions = {tensor.name: given[tensor.name] for tensor in spec.conditions}
        return denoiser.with_variance(given[spec.sample.name], float(given[spec.timestep.name][0]), conditions)

    return evaluate


def _onnxruntime(module: nn.Module, spec: ModelSpec, device: str, feeds: Feeds) -> Callable[[Feeds], Any]:
    """Plain ``torch.onnx.export`` in half precision, run by ONNX Runtime's provider for the device."""
    import onnxruntime as ort

    if device == "cuda":
        ort.preload_dlls()  # cuBLAS and cuDNN of torch's packages
    half = {
        n: torch.from_numpy(np.array(v)).to(torch.float16)
        if v.dtype == np.float32 and n != spec.timestep.name
        else torch.from_numpy(np.array(v))
        for n, v in feeds.items()
    }
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise SystemExit(f"onnxruntime here has no {provider}")
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        path = Path(scratch) / "model.onnx"
        made: Any = torch.onnx.export(
            module.half(), kwargs=half, dynamo=True, dynamic_shapes=dynamic_shapes(spec), opset_version=20
        )
        made.save(path, external_data=True)
        session = ort.InferenceSession(path, providers=[provider])
    if session.get_providers()[0] != provider:
        raise SystemExit(f"ONNX Runtime fell back to {session.get_providers()}")
    types = {p.name: np.float16 if p.type == "tensor(float16)" else None for p in session.get_inputs()}

    def evaluate(given: Feeds) -> Any:
        cast = {n: given[n].astype(kind) if kind is not None else given[n] for n, kind in types.items()}
        return session.run(None, cast)[0].astype(np.float32)

    return evaluate


# ------------------------------------------------------------------------------------------------ the comparison


def lehr(*words: str) -> str | None:
    """Run a verb; None if it did what it was asked, else what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "lehr", *words], capture_output=True, text=True, check=False, env=child_environment()
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def our_engines(name: str, target: str, recipes: list[str], scratch: Path) -> tuple[list[Contestant], dict[str, str]]:
    """Lehr's engines for a target, one a recipe and library, and why others could not be built."""
    from lehr.engines.target import target as find_target

    factory, failed, ready = scratch / "model.py", {}, []
    factory.write_text(FACTORY.format(here=str(Path(__file__).parent), name=name))
    for library in find_target(target).libraries:
        bundle = scratch / f"{library}.lehr"
        problem = lehr("export", f"{factory}:make", "-o", str(bundle), "--golden", "none")
        if problem:
            return [], {"lehr": f"export failed: {problem}"}
        for recipe in recipes:
            problem = lehr("audit", str(bundle)) if recipe == "fp16" else None
            problem = problem or lehr(
                "build", str(bundle), "--target", target, "--recipe", recipe, "--library", library
            )
            if problem:
                failed[f"lehr {recipe} {library}"] = problem
        opened = Bundle.open(bundle)
        try:
            ready += contestants(opened, runnable(opened, target, ()))
        except LehrError as e:
            failed[f"lehr {library}"] = str(e)
    return ready, failed


def measure(name: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One model's table."""
    chosen = preset(name)
    file = scratch / "inputs.npz"
    write_inputs(file, inputs_of(chosen.spec))
    python = (sys.executable, str(Path(__file__).resolve()), "--serve")
    others = [Contestant(name=kind, command=(*python, kind, name, given.device)) for kind in KINDS]
    ours, failed = our_engines(name, given.target, given.recipes.split(","), scratch)
    rows = [
        row.to_json()
        for row in compare(
            [*others, *ours],
            [file],
            loop_steps=20,
            seconds=given.seconds,
            progress=lambda text: print(f"{name}: {text}", file=sys.stderr),
        )
    ]
    compiled = next((row["step_ms"] for row in rows if row["name"] == "compile-bf16"), None)
    for row in rows:
        ranked = row["step_ms"] is not None and row["sqnr_db"] >= LEAST_DB
        row["of_torch_compile"] = round(row["step_ms"] / compiled, 4) if ranked and compiled else None
        if row["loop_s"]:
            row["loop_overhead"] = round(1000 * row["loop_s"] / (20 * row["step_ms"]) - 1, 4)
    rows += [{"name": key, "reason": why} for key, why in failed.items()]
    return {"model": name, "changes": MODELS[name], "batch": BATCH, "rows": rows}


def main() -> None:
    """Measure what is named on the command line."""
    if sys.argv[1:2] == ["--serve"]:
        kind, name, device, inputs = sys.argv[2:]
        base, path = peak_rss_mb(), Path(inputs)
        serve(evaluation(kind, name, device, read_inputs(path)), path, base_mb=base)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(DEFAULT))
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--recipes", default="bf16,fp16")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here. Use --device cpu to try the script on a small model.")
    device = torch.cuda.get_device_name(0) if given.device == "cuda" else "cpu"
    known = []
    path = given.output or RESULTS / f"gpu-{device.lower().replace(' ', '-')}.json"
    for name in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            known.append(measure(name, given, Path(scratch)))
        data = {
            "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
            "device": device,
            "environment": environment(),
            "models": known,
        }
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")  # after each, in case the time runs out
    print(path)


if __name__ == "__main__":
    main()
