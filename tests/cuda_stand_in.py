"""Triton's CUDA driver on a machine without a GPU: kernels are compiled for sm_90 and launched into cuda_stand_in.c.

    with cuda_stand_in(folder) as cuda: ...; cuda.launches

All in Triton up to the driver is as with a GPU, its C code too. `launches` lists (config, bytes of the parameters) of each.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton

SIZES = {"b8": 1, "u8": 1, "u16": 2, "b16": 2, "u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8, "f64": 8}
PARAM = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr[^,\n]*?)? \w+_param_\d+(?:\[(\d+)\])?")
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))


class Cuda:
    def __init__(self, library):
        self.library, self.launches, self.kernels = library, [], {}

    @property
    def encodes(self):
        return ctypes.c_int.in_dll(self.library, "encodes").value

    def on_launch(self, config, function, params):
        ptx = self.kernels[function].asm["ptx"]
        sizes = [SIZES[kind] * int(count or 1) for kind, count in PARAM.findall(ptx)]
        assert len(sizes) == ptx.count(".param ."), "a parameter that is not known here"
        read = [ctypes.string_at(params[i], size) for i, size in enumerate(sizes)]
        self.launches.append((tuple(config[:9]), function, read))


@contextlib.contextmanager
def cuda_stand_in(folder):
    """Triton's driver is CUDA's for the moment; skips where a GPU or a compiler's absence forbids that."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and its library")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton looks for it
    if compiler is None or shutil.which(compiler) is None:
        pytest.skip("there is no C compiler (gcc or clang), which Triton's launcher is built with")
    from triton.backends.nvidia import driver as nvidia

    source, path = Path(__file__).with_suffix(".c"), Path(folder) / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    command = [compiler, "-O1", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{include}", source, "-o", path]
    subprocess.run(command, check=True)
    cuda = Cuda(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    init_handles = triton.compiler.CompiledKernel._init_handles

    def remember(kernel):
        init_handles(kernel)
        cuda.kernels[kernel.function] = kernel

    callback = CALLBACK(cuda.on_launch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(triton.compiler.CompiledKernel, "_init_handles", remember)
        driver = nvidia.CudaDriver()
        driver.get_current_device = lambda: -1  # as tensors on the CPU say
        driver.get_current_stream = lambda device: 5
        driver.get_device_capability = lambda device: (9, 0)
        patch.setattr(triton.runtime.driver, "_active", driver)
        ctypes.c_void_p.in_dll(cuda.library, "on_launch").value = ctypes.cast(callback, ctypes.c_void_p).value
        yield cuda
        ctypes.c_void_p.in_dll(cuda.library, "on_launch").value = None
