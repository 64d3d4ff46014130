"""Build and load what makes torch believe in the emulated GPU; imports no torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "emulated_device.cpp"


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build_device() -> tuple[Path | None, str]:
    """Return the library, built once for this torch; or None and why it cannot be built."""
    compiler, folder = shutil.which("g++"), torch_folder()
    if sys.platform != "linux" or compiler is None:
        return None, "the emulated GPU is built by g++ on Linux"
    if (folder / "lib" / "libtorch_cuda.so").exists():
        return None, "this torch has CUDA of its own: the emulated GPU needs the CPU build"
    key = hashlib.sha256(SOURCE.read_bytes() + str(folder).encode() + (folder / "version.py").read_bytes()).hexdigest()
    library = Path(tempfile.gettempdir()) / f"dual_loop_emulated_gpu_{os.getuid()}" / f"{key[:16]}.so"
    if library.exists():
        return library, ""
    library.parent.mkdir(mode=0o700, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{folder / 'include'}", "-o", str(part), str(SOURCE)]
    links = ["-Wl,--no-as-needed", f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}"]
    built = subprocess.run([compiler, *flags, *links], capture_output=True, text=True, check=False)
    if built.returncode != 0:
        return None, f"g++ cannot build the emulated GPU against this torch: {built.stderr.strip().splitlines()[-1:]}"
    part.rename(library)
    return library, ""


def load_device() -> None:
    """Load the library before torch, so that torch finds its answers first."""
    assert "torch" not in sys.modules, "the emulated GPU has to be loaded before torch"
    library, reason = build_device()
    if library is None:
        raise RuntimeError(reason)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
