"""Where a plan runs: platforms, their facts, and the one this machine is.

A platform may differ from the machine gdnir runs on: lowering for `cuda:sm_90` works on a laptop. A *named*
platform is assumed to have its usual software (Triton on a GPU); the *detected* one has what is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from gdnir.errors import RegistryError, closest


@dataclass(frozen=True)
class Platform:
    """One kind of machine.

    `device` is torch's device type; `order` the providers to try, best first (`native` comes last by itself);
    `software` what a provider may rely on. Facts: `bandwidth` in bytes/s (a large copy, read + write),
    `matrix_rate` in FLOP/s (dense bf16), `shared_memory` in bytes a block may use, `cores` (SMs, CUs); None
    where nobody has said. `source` says where the facts come from.
    """

    name: str
    device: str
    arch: str = ""
    order: tuple[str, ...] = ()
    software: frozenset[str] = frozenset()
    bandwidth: float | None = None
    matrix_rate: float | None = None
    shared_memory: int | None = None
    cores: int | None = None
    source: str = "facts unknown"
    detected: bool = False

    @property
    def kind(self) -> str:
        """`cpu`, `cuda`, `rocm`, `xpu`, ...: the part of the name before the colon."""
        return self.name.partition(":")[0]

    def __str__(self) -> str:
        return self.name


_CUDA = Platform("cuda", "cuda", order=("triton",), software=frozenset({"triton"}))
_ROCM = Platform("rocm", "cuda", order=("triton",), software=frozenset({"triton"}))
_PATTERNS = (("cuda", re.compile(r"cuda:(sm_\d{2,3})"), _CUDA), ("rocm", re.compile(r"rocm:(gfx[0-9a-f]{3,4})"), _ROCM))


def _gpu(base: Platform, arch: str, bandwidth: float, rate: float, shared: int, cores: int, source: str) -> Platform:
    return replace(
        base,
        name=f"{base.name}:{arch}",
        arch=arch,
        bandwidth=bandwidth,
        matrix_rate=rate,
        shared_memory=shared,
        cores=cores,
        source=source,
    )


PLATFORMS: dict[str, Platform] = {
    p.name: p
    for p in (
        Platform("cpu", "cpu", source="depends on the machine"),
        _gpu(_CUDA, "sm_80", 1.8e12, 312e12, 166_912, 108, "A100 80GB: datasheet, copy at 90 % of 2.0 TB/s"),
        _gpu(replace(_CUDA, order=("gluon", "triton")), "sm_90", 4.27e12, 773e12, 232_448, 132, "H200: measured copy and bf16 8192^3 product"),
        _gpu(_CUDA, "sm_100", 7.2e12, 2250e12, 232_448, 148, "B200: datasheet, copy at 90 % of 8 TB/s"),
        _gpu(_CUDA, "sm_120", 1.6e12, 209e12, 101_376, 170, "RTX 5090: datasheet, copy at 90 % of 1.79 TB/s"),
        _gpu(_ROCM, "gfx942", 4.7e12, 1307e12, 65_536, 304, "MI300X: datasheet, copy at 90 % of 5.3 TB/s"),
        Platform("xpu", "xpu", order=("triton",), software=frozenset({"triton"}), bandwidth=2.9e12, matrix_rate=839e12,
                 shared_memory=131_072, cores=128, source="Data Center GPU Max 1550: datasheet, copy at 90 % of 3.28 TB/s"),
    )
}  # fmt: skip


def register_platform(platform: Platform) -> Platform:
    """Make a platform known by its name; RegistryError if another one has it."""
    if PLATFORMS.get(platform.name, platform) != platform:
        raise RegistryError(f"platform `{platform.name}` is already registered with other facts. Choose another name.")
    PLATFORMS[platform.name] = platform
    return platform


def get_platform(name: str | Platform | None = None) -> Platform:
    """A platform by name; None is this machine. Any `cuda:sm_NN` or `rocm:gfxNNN` is accepted, without facts
    where none are known. Raises RegistryError for other unknown names."""
    if isinstance(name, Platform):
        return name
    if name is None:
        return detect()
    if name in PLATFORMS:
        return PLATFORMS[name]
    for _, pattern, base in _PATTERNS:
        if match := pattern.fullmatch(name):
            return replace(base, name=name, arch=match[1])
    raise RegistryError(
        f"unknown platform `{name}`. {closest(name, PLATFORMS)} Another package may add one with "
        "gdnir.register_platform."
    )


def copy_bandwidth(properties: Any) -> float | None:
    """Bytes/s, read and written, of a large copy on a CUDA device of these properties: 88 % of its memory's rate, which an
    H100 (89 %) and an H200 (87 %) reach. None where the driver does not tell."""
    rate = getattr(properties, "memory_clock_rate", 0) * 2e3 * getattr(properties, "memory_bus_width", 0) / 8
    return 0.88 * rate or None


@functools.cache
def detect(device: str | None = None) -> Platform:
    """The platform of this machine, or of a torch device type on it. Only this call may initialise CUDA."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    software = frozenset({"triton"}) if importlib.util.find_spec("triton") else frozenset()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if torch.version.hip:
            name = f"rocm:{properties.gcnArchName.partition(':')[0]}"
        else:
            name = f"cuda:sm_{properties.major}{properties.minor}"
    elif device in PLATFORMS:
        name = device
    else:
        known = [p for p in PLATFORMS.values() if p.device == device]
        if not known:
            raise RegistryError(
                f"no platform is registered for torch device `{device}`. Register one with gdnir.register_platform."
            )
        name = known[0].name
    platform = get_platform(name)
    if platform.kind in ("cuda", "rocm", "xpu"):
        platform = replace(platform, software=platform.software & software)
    if platform.kind == "cuda" and (measured := copy_bandwidth(properties)):
        platform = replace(platform, bandwidth=measured, source="88 % of this device's memory rate; rate as published")
    return replace(platform, detected=True)
