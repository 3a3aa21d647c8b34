"""AOTInductor as an engine library: PyTorch's compiler ahead of time, for processors and NVIDIA GPUs without TensorRT.

A plan is a ``.pt2`` package (https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html): the graph compiled
to native code, with its weights. It is made from the portable graph, as every engine is
(:class:`lehr.export.graph_module.GraphModule`), so hoisting, lowering to half precision and parity are the same as for
the other libraries, and the model's own source is not needed.

This module needs PyTorch to build and to run, and a C++ compiler to build, which is why it lives here and is plugged
into engines and runtime through entry points.

A package is a library of native code that runs when it is loaded, which no check of its bytes makes harmless. It is
loaded if it was built by this user on this machine, of which a mark is kept in the user's cache, or if
``LEHR_TRUST_NATIVE`` is 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export import Dim, ExportedProgram

from lehr.engines import cache
from lehr.engines.job import Job
from lehr.export.graph_module import GraphModule
from lehr.runtime import host
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, BundleError, IncompatibleEngine, RunFailed
from lehr.runtime.hoisted import SHAPE_SUFFIX
from lehr.runtime.recipe import Format

Array = npt.NDArray[Any]

NAME = "aotinductor"
TRUST = "LEHR_TRUST_NATIVE"
# What the exporter, the compiler and compiled code raise on purpose; they share no public base class.
FAILURES = (RuntimeError, ValueError, TypeError, OSError, NotImplementedError, AssertionError, KeyError)
_TYPES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "double"}
_CHUNK = 1 << 20


def _first_line(error: Exception) -> str:
    """What is said before the stack of C++ functions."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _version() -> str:
    return str(torch.__version__).partition("+")[0]


# ----------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True, slots=True, kw_only=True)
class AotInductorBuilder:
    """A builder for this machine, :class:`lehr.engines.builders.Builder`.

    Attributes:
        device: PyTorch's name of it.
    """

    device: str
    FORMATS: frozenset[Format] = frozenset({Format.FP32, Format.FP16, Format.BF16})
    LOWERED: frozenset[Format] = frozenset({Format.FP16, Format.BF16})
    REFUSES: Mapping[Format, str] = field(default_factory=dict)
    HEEDS: frozenset[str] = frozenset()
    CACHED: bool = True

    def version(self) -> str:
        """PyTorch's version."""
        return _version()

    def build(self, job: Job, folder: Path) -> Plan:
        """Compile a graph into ``folder``; see :class:`lehr.engines.builders.Builder`.

        Raises:
            IncompatibleEngine: there is no GPU of PyTorch's here.
        """
        job.settings.hold("AOTInductor", self.HEEDS)
        if job.recipe.arithmetic not in self.FORMATS:
            raise BuildFailed(f"AOTInductor cannot build recipe {job.recipe.name!r}: no {job.recipe.arithmetic.value}.")
        _check_device(self.device)
        if self.device == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            raise BuildFailed("AOTInductor needs a C++ compiler, and there is no g++ here. Install one, or set CXX.")
        module = GraphModule(job.graph).eval().to(self.device)
        example = tuple(_tensor(key, job.feeds[key], self.device) for key in module.inputs)
        plan = folder / f"{job.name}.pt2"
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations within PyTorch's own compiler
                program = _exported(module, example)
                torch._inductor.aoti_compile_and_package(program, package_path=str(plan))
        except FAILURES as e:
            raise BuildFailed(f"AOTInductor cannot build {job.graph.name}: {_first_line(e)}") from e
        _trust(plan)
        operators, precision = _inspect(program)
        return Plan(
            file=plan.name,
            options={
                "device": self.device,
                "gpu": host.gpu_compute_capability() if self.device == "cuda" else None,
                "threads": job.threads,
                "inputs": [
                    {"name": key, "dtype": job.feeds[key].dtype.name, "shape": _shape_of(shape)}
                    for key, shape in zip(module.inputs, _sizes(program), strict=True)
                ],
                "outputs": list(module.outputs),
            },
            achieved_precision=precision,
            operators=operators,
        )


def _exported(module: GraphModule, example: tuple[torch.Tensor, ...]) -> ExportedProgram:
    """The module's program; sizes that the graph leaves open stay open, as far as its operators allow it."""
    shapes = tuple(
        {
            k: Dim.AUTO
            for k in range(tensor.ndim)
            if key.endswith(SHAPE_SUFFIX) or isinstance(module.shapes[key][k], str)
        }
        for key, tensor in zip(module.inputs, example, strict=True)
    )
    return torch.export.export(module, example, dynamic_shapes={"given": shapes}, strict=False)


def _sizes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """The shape of every input of the program, with symbols for sizes that stayed open."""
    names = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [tuple(node.meta["val"].shape) for node in nodes]


def _shape_of(shape: tuple[Any, ...]) -> list[int | str]:
    return [size if isinstance(size, int) else str(size) for size in shape]


def _inspect(program: ExportedProgram) -> tuple[dict[str, int], dict[str, float]]:
    """Count operators, and shares of element types among those that return floating-point tensors.

    The compiler fuses operators and keeps their types.
    """
    operators: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        operators[str(getattr(node.target, "__name__", node.target)).partition(".")[0]] += 1
        if value.dtype in _TYPES:
            types[_TYPES[value.dtype]] += 1
    total = sum(types.values()) or 1
    return dict(sorted(operators.items())), {key: round(n / total, 4) for key, n in sorted(types.items())}


# -------------------------------------------------------------------------------------------------------------- trust


def _mark(plan: Path) -> Path:
    digest = hashlib.sha256()
    with plan.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return cache.root() / "native" / digest.hexdigest()


def _trust(plan: Path) -> None:
    mark = _mark(plan)
    with contextlib.suppress(OSError):  # a home that cannot be written: the engine loads with LEHR_TRUST_NATIVE alone
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _check_trust(plan: Path) -> None:
    if os.environ.get(TRUST) != "1" and not _mark(plan).is_file():
        raise IncompatibleEngine(
            f"{plan.name} is native code that was not built by this user on this machine. Build it here with "
            f"lehr build NAME.lehr --library aotinductor --no-cache, or set {TRUST}=1 if you trust where the bundle "
            "comes from."
        )


# ------------------------------------------------------------------------------------------------------------ running


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise IncompatibleEngine(
            "PyTorch finds no NVIDIA GPU here: there is none, no driver, or this PyTorch was made without CUDA. "
            "Run on a machine with one, or build for the processor: lehr build NAME.lehr --target cpu"
        )


def _tensor(name: str, array: Array, device: str) -> torch.Tensor:
    """An input as the module takes it; a shape becomes a tensor of that shape without elements of its own."""
    if name.endswith(SHAPE_SUFFIX):
        return torch.empty(1, device=device).expand(tuple(int(size) for size in array))
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


class AotInductorSession:
    """A loaded package; calls must not overlap."""

    def __init__(self, package: Any, options: Mapping[str, Any]) -> None:
        self._package, self._device = package, str(options["device"])
        self._inputs = {str(row["name"]): (str(row["dtype"]), list(row["shape"])) for row in options["inputs"]}
        self._outputs = [str(name) for name in options["outputs"]]
        self._threads = int(options["threads"]) or host.cores()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._check(feeds)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            results = self._package(*(_tensor(name, feeds[name], self._device) for name in self._inputs))
        except FAILURES as e:
            raise RunFailed(f"AOTInductor failed: {_first_line(e)}") from e
        finally:
            torch.set_num_threads(before)
        rows = results if isinstance(results, (list, tuple)) else [results]
        return {name: row.cpu().numpy() for name, row in zip(self._outputs, rows, strict=True)}

    def _check(self, feeds: Mapping[str, Array]) -> None:
        """Compiled code reads past the end of inputs of another shape or type, and does not look at names."""
        if set(feeds) != set(self._inputs):
            raise RunFailed(f"AOTInductor failed: inputs are {sorted(self._inputs)}, got {sorted(feeds)}.")
        bound: dict[str, int] = {}
        for name, (dtype, expected) in self._inputs.items():
            array = feeds[name]
            if array.dtype.name != dtype:
                raise RunFailed(f"AOTInductor failed: input {name!r} is {array.dtype}, expected {dtype}.")
            shape = tuple(int(size) for size in array) if name.endswith(SHAPE_SUFFIX) else array.shape
            pairs = list(zip(expected, shape, strict=False))
            fits = len(expected) == len(shape) and all(
                size == (bound.setdefault(want, size) if isinstance(want, str) and want.isidentifier() else want)
                for want, size in pairs
                if isinstance(want, int) or want.isidentifier()
            )
            if not fits:
                raise RunFailed(f"AOTInductor failed: input {name!r} has shape {shape}, expected {expected}.")


class AotInductorBackend:
    """AOTInductor as an engine library of the runtime."""

    name = NAME

    def version(self) -> str:
        return _version()

    def load(self, plan: Path, options: Mapping[str, Any]) -> AotInductorSession:
        """Load a package.

        Raises:
            BundleError: it is damaged, or of another GPU; IncompatibleEngine if nobody vouches for its code.
        """
        _check_device(str(options["device"]))
        here = host.gpu_compute_capability() if options["device"] == "cuda" else None
        if options["gpu"] != here:
            raise IncompatibleEngine(
                f"{plan.name} was compiled for SM {options['gpu']} and the GPU here has SM {here}. Build it again here."
            )
        if not zipfile.is_zipfile(plan):
            raise BundleError(f"{plan.name} is no package of AOTInductor. Build it again with lehr build.")
        _check_trust(plan)
        try:
            package = torch._inductor.aoti_load_package(str(plan))
        except FAILURES as e:
            raise BundleError(
                f"AOTInductor cannot load {plan.name}: {_first_line(e)}. Build it again with lehr build."
            ) from e
        return AotInductorSession(package, options)


CPU = AotInductorBuilder(device="cpu")
CUDA = AotInductorBuilder(device="cuda")
BACKEND = AotInductorBackend()
