"""A platform that gdnir has never heard of."""

from gdnir import Platform, register_platform

NPU = register_platform(Platform("npu:example", "cpu", order=("example",), source="an example, run on the CPU"))
