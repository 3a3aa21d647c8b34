"""The kernels' CUDA source as a library for the processor, made by g++."""

from __future__ import annotations

import subprocess
from pathlib import Path

import lehr.runtime

KERNELS = Path(lehr.runtime.__file__).parent / "kernels"

# What CUDA C++ has and C++ has not, for one thread that strides over all elements.
SHIM = """
#define __device__
#define __global__
#define __forceinline__ inline
struct { int x; } blockIdx, threadIdx, blockDim = {1}, gridDim = {1};
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static double __dmul_rn(double a, double b) { return a * b; }
static double __dadd_rn(double a, double b) { return a + b; }
"""


def compiled_kernels(compiler: str, folder: Path) -> Path:
    """The library, in ``folder``."""
    source = (KERNELS / "table.cu").read_text().replace('_Pragma("unroll 1")', "").replace("#pragma unroll 1", "")
    (folder / "table.cpp").write_text(SHIM + source)
    library = folder / "table.so"
    command = [compiler, "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", library, folder / "table.cpp"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=60)
    return library
