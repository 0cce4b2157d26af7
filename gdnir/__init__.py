"""gdnir: a kernel IR for Gated Delta Net layers.

The computation is written once, as ops; kernels are registered by whoever owns a platform; a small lowering
pass picks among them and says why; the result is a plan that runs with or without torch.compile.
"""

from gdnir import lowering, models, ops, platforms
from gdnir.errors import GdnirError
from gdnir.ir import Graph, Node, SeqType, StateType, TensorType, Value, to_networkx
from gdnir.lowering import eager, gluon_impl, lowers, native_impl, triton_impl
from gdnir.op import fused, op, set_eager
from gdnir.op import verify_graph as verify
from gdnir.passes import Lowered, lower
from gdnir.passes.base import Pass, PassResult, Pipeline, register_pass
from gdnir.plan import Plan
from gdnir.platforms import Platform, register_platform
from gdnir.plugins import load_plugins
from gdnir.pool import LayerState, StatePool
from gdnir.seq import Seq
from gdnir.text import parse
from gdnir.weights import Weights

set_eager(eager.run_eager)

__version__ = "0.1.0"

__all__ = [
    "GdnirError", "Graph", "LayerState", "Lowered", "Node", "Pass", "PassResult", "Pipeline", "Plan", "Platform", "Seq",
    "SeqType", "StatePool", "StateType", "TensorType", "Value", "Weights", "fused", "gluon_impl", "load_plugins", "lower",
    "lowering", "lowers", "models", "native_impl", "op", "ops", "parse", "platforms", "register_pass",
    "register_platform", "to_networkx", "triton_impl", "verify",
]  # fmt: skip
