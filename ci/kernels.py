"""Make ``runtime/kernels/table.ptx`` from ``table.cu``: ``python ci/kernels.py LIBNVRTC.so``.

NVRTC comes with CUDA, or from PyPI (``nvidia-cuda-nvrtc-cu12``); no GPU is needed. PTX is what the driver itself turns
into machine code, so neither NVRTC nor CUDA has to be on the machine that runs engines, and the same text serves every
GPU from SM 7.5 on.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "runtime" / "kernels"
OPTIONS = ("--gpu-architecture=compute_75", "--fmad=false", "--std=c++17")
PTX_VERSION = "7.0"  # drivers from CUDA 11.0 on read it; the kernels use nothing newer


def compiled(source: bytes, nvrtc: ctypes.CDLL) -> str:
    """PTX of CUDA C++ source; ends the program with the compiler's log if that refuses it."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"table.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    what = "ProgramLog" if failed else "PTX"
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    if failed:
        sys.exit(text.value.decode())
    return text.value.decode()


def written(source: bytes, ptx: str, release: str) -> str:
    """The file's text: what it was made from and how, then the code without the compiler's comments."""
    code = re.sub(r"^\s*//.*\n", "", ptx, flags=re.MULTILINE)
    code = re.sub(r"^\.version .*$", f".version {PTX_VERSION}", code, flags=re.MULTILINE)
    head = (
        f"// Made by ci/kernels.py from table.cu, SHA-256 {hashlib.sha256(source).hexdigest()},\n"
        f"// with NVRTC {release} {' '.join(OPTIONS)}\n"
    )
    return head + re.sub(r"\n{3,}", "\n\n", code).strip() + "\n"


def main() -> None:
    """Compile and write."""
    source, nvrtc = (KERNELS / "table.cu").read_bytes(), ctypes.CDLL(sys.argv[1])
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    text = written(source, compiled(source, nvrtc), f"{major.value}.{minor.value}")
    (KERNELS / "table.ptx").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
