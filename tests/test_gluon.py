"""Where and on what the provider gluon takes gated_delta_rule, and what it says otherwise."""

import dataclasses
import itertools
import types

import pytest
import torch

import gdnir
from gdnir.ir import SeqType, StateType, TensorType
from gdnir.lowering import find, gluon_impl, gluon_step, triton_step
from gdnir.platforms import get_platform

RULE = find("gated_delta_rule", "gluon")


def says(dtype="bf16", k=128, v=128, phase="prefill", layout="vk", scale=0.1, state="f32"):
    shape = ("S", 4, v, k) if layout == "vk" else ("S", 4, k, v)
    gate = TensorType("f32", ("T", 4))
    return RULE.accepts(
        TensorType(dtype, ("T", 2, k)), TensorType(dtype, ("T", 2, k)), TensorType(dtype, ("T", 4, v)), gate, gate,
        StateType(state, shape, layout), SeqType(phase, "T"), scale=scale, state_layout=layout,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"state": "bf16"}, None),
        ({"phase": "decode"}, "the batch's phase is decode, want prefill."),
        ({"phase": "mixed"}, "the batch's phase is mixed, want prefill."),
        ({"dtype": "f16"}, None),
        ({"dtype": "f32"}, "q is f32 and v is f32, want bf16 or f16, both the same."),
        ({"k": 96}, "K is 96 and V is 128, want 128 and 128."),
        ({"v": 192}, "K is 128 and V is 192, want 128 and 128."),
        ({"layout": "kv"}, "the state's layout is kv, want vk."),
        ({"scale": -1.0}, "scale is -1.0, want a positive number: the kernel uses its logarithm."),
    ],
    ids=str,
)
def test_accepts(change, sentence):
    assert says(**change) == sentence


def test_available(monkeypatch):
    hopper = get_platform("cuda:sm_90")
    assert RULE.available(hopper) is None
    for name in ("cuda:sm_80", "cuda:sm_100", "rocm:gfx942", "cpu"):
        assert RULE.available(get_platform(name)).endswith(f"cuda:sm_90; this platform is {name}.")
    assert "pip install" in RULE.available(dataclasses.replace(hopper, software=frozenset()))
    here = dataclasses.replace(hopper, detected=True)
    monkeypatch.setattr(gluon_impl, "_gluon_is_installed", lambda: False)
    assert RULE.available(here) == "the installed Triton has no Gluon for Hopper; Triton 3.6 has it."


def test_a_batch_that_is_too_large_is_refused():
    count = 2**19
    seq = gdnir.Seq.from_tensors(
        "prefill",
        torch.zeros(count + 1, dtype=torch.int32),
        torch.zeros(count, dtype=torch.int32),
        torch.zeros(count, 1, dtype=torch.int32),
        torch.zeros(count, dtype=torch.bool),
        num_tokens=0,
        max_len=0,
    )
    q, v = torch.empty(0, 16, 128, dtype=torch.bfloat16), torch.empty(0, 16, 128, dtype=torch.bfloat16)
    g = torch.empty(0, 16)
    with pytest.raises(gdnir.errors.ShapeError, match="2\\^23 chunks x heads"):
        RULE.run(q, q, v, g, g, torch.empty(1, 16, 128, 128), seq, scale=0.1, state_layout="vk")


STEP = find("gdn_step", "gluon")


def says_of_step(phase="decode", heads=(16, 32, 128, 128), layout="vk", width=4):
    h, hv, k, v = heads
    channels = 2 * h * k + hv * v
    rows, weight = TensorType("bf16", ("T", channels)), TensorType("bf16", (channels, width))
    z, gate = TensorType("bf16", ("T", hv, v)), TensorType("bf16", ("T", hv))
    pool, vector = StateType("bf16", ("S", channels, width - 1), "cw"), TensorType("f32", (hv,))
    state = StateType("f32", ("S", hv, v, k) if layout == "vk" else ("S", hv, k, v), layout)
    return STEP.accepts(
        rows, z, gate, gate, weight, None, pool, state, vector, vector, TensorType("f32", (v,)), SeqType(phase, "T"),
        activation="silu", conv_layout="cw", heads=heads, l2norm_eps=1e-6, allow_neg_eigval=False, scale=0.1,
        state_layout=layout, eps=1e-6, gate="silu",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"phase": "verify"}, None),
        ({"heads": (30, 30, 96, 192)}, None),
        ({"heads": (4, 16, 128, 128)}, None),
        ({"heads": (2, 16, 128, 128)}, "8 value heads of 128 x 128 share a key head: too much for a program."),
        ({"phase": "prefill"}, "the batch is prefill; this kernel takes decode and verify."),
        ({"width": 5}, "the convolution is 5 wide, want 2 to 4."),
        ({"layout": "kv"}, "the state's layout is kv, want vk."),
        ({"heads": (1, 9, 64, 64)}, "9 value heads share a key head, want at most 8."),
    ],
    ids=str,
)
def test_accepts_steps(change, sentence):
    assert says_of_step(**change) == sentence


def test_what_is_launched_follows_from_how_many_there_are(monkeypatch):
    """By the table, of 132 multiprocessors and 16 key heads: clusters, then ways by bulk copies. Triton's kernel is for batch-invariant
    plans, and for rows of more columns than the kernel's code is written out for."""
    launched = []

    def launch(_kernel, _programs, _args, made):
        tile = made["BV"] * made["K_POW2"] * 16 // made["VECTOR"] >> 10
        launched.append(
            "clusters" if made["num_ctas"] > 1 else (tile, made["AHEAD"], made["num_warps"], made["maxnreg"])
        )

    monkeypatch.setattr(gluon_step, "launch", launch)
    monkeypatch.setattr(triton_step, "kinds", lambda _: ("sm_90",))
    monkeypatch.setattr(triton_step, "launch", lambda *_: launched.append("triton"))
    monkeypatch.setattr(gluon_step, "_kernels", lambda _: types.SimpleNamespace(gdn_step_gluon_kernel=None))
    monkeypatch.setattr(triton_step, "_kernels", lambda _: types.SimpleNamespace(gdn_step_kernel=None))
    f32, bf16 = torch.float32, torch.bfloat16
    want = [
        ("decode", f32, 3, 1, "clusters"),
        *(("decode", f32, rows, 1, (32, 3, 8, 128)) for rows in (4, 8, 34)),
        *(("decode", f32, rows, 1, (32, 2, 8, 128)) for rows in (9, 33)),
        ("decode", bf16, 4, 1, "clusters"),
        *(("decode", bf16, rows, 1, (32, 2, 8, 128)) for rows in (5, 16, 133)),
        *(("decode", bf16, rows, 1, (16, 2, 4, 128)) for rows in (17, 33)),
        *(("decode", bf16, rows, 1, (16, 2, 4, 168)) for rows in (34, 132)),
        ("verify", f32, 3, 2, "clusters"),
        ("verify", f32, 4, 2, (32, 4, 8, 248)),
        ("verify", f32, 3, 9, "triton"),
    ]
    for invariant in (False, True):
        for phase, dtype, rows, columns, way in want:
            slots = list(range(rows))
            seq = (
                gdnir.Seq.decode(slots)
                if phase == "decode"
                else gdnir.Seq.verify(
                    [columns] * rows, read_slots=slots, write_slots=[[n, *[-1] * (columns - 1)] for n in slots]
                )
            )
            tokens, some = rows * columns, {"dtype": bf16}
            STEP.chosen(invariant).run(
                torch.empty(tokens, 8192, **some), torch.empty(tokens, 32, 128, **some), torch.empty(tokens, 32, **some),
                torch.empty(tokens, 32, **some), torch.empty(8192, 4, **some), None, torch.empty(rows, 8192, 3, **some),
                torch.empty(rows, 32, 128, 128, dtype=dtype), torch.empty(32), torch.empty(32), torch.empty(128), seq,
                activation="silu", conv_layout="cw", heads=(16, 32, 128, 128), l2norm_eps=1e-6, allow_neg_eigval=False,
                scale=0.1, state_layout="vk", eps=1e-6, gate="silu",
            )  # fmt: skip
            assert launched.pop() == ("triton" if invariant else way), (phase, dtype, rows)
    assert not launched


STATE = torch.empty(3, 4, 128, 128)
APART = torch.empty(3, 5, 128, 128, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("state", "change", "takes"),
    [
        (STATE, {}, True),
        (STATE.bfloat16(), {}, True),
        (STATE[1:], {}, True),
        (APART[:, 1:], {}, True),  # an engine's pages
        (STATE, {"phase": "verify", "tokens": 4}, True),
        (STATE, {"phase": "verify", "tokens": 8}, True),
        (STATE, {"layout": "kv"}, False),
        (STATE.transpose(2, 3), {}, False),
        (torch.empty(3, 4, 128, 132)[..., :128], {}, False),  # rows with gaps
        (torch.empty(3 * 4 * 128 * 128 + 1)[1:].view(3, 4, 128, 128), {}, False),  # 4 bytes past a multiple of 16
        (torch.empty(3 * (4 * 128 * 128 + 1)).view(3, -1)[:, :-1].unflatten(1, (4, 128, 128)), {}, False),
        (torch.empty(3, 4, 192, 128), {}, True),
        (torch.empty(3, 4, 128, 64), {}, True),
        (torch.empty(3, 4, 192, 96), {}, False),  # K is no power of two
        (torch.empty(3, 4, 120, 128), {}, False),  # nor do tiles end with the head
        (torch.empty(3, 4, 128, 16), {}, False),  # a row is less than 128 bytes
        (torch.empty(3, 16, 128, 128), {}, True),
        (torch.empty(3, 32, 128, 128), {"phase": "verify", "tokens": 8}, False),  # 16 heads: no room for a ring
        (
            torch.empty(3, 32, 128, 128).bfloat16(),
            {"phase": "verify", "tokens": 5},
            False,
        ),  # rows keep more than a ring
    ],
)
def test_what_bulk_copies_take(state, change, takes):
    hv, v, k = state.shape[1:]
    phase, tokens, layout = change.get("phase", "decode"), change.get("tokens", 1), change.get("layout", "vk")
    assert gluon_step.takes_bulk(phase, tokens, (2, hv, k, v), state, layout) is takes


def test_clusters_end_where_they_end_also_for_heads_that_the_first_way_does_not_fit():
    first, *_ = gluon_step._bulk("decode", 2, (2, 4, 128, 128), 1)
    (fill, way), *_ = gluon_step._bulk("decode", 2, (2, 4, 128, 16), 1)
    assert fill == first[0] and way["num_warps"] < first[1]["num_warps"]


@pytest.mark.parametrize(("v", "rows"), [(128, 128), (192, 64), (64, 64), (96, 32)])
def test_a_tile_is_at_most_a_head_and_divides_it(v, rows):
    (_, way), *_ = gluon_step._bulk("decode", 2, (1, 1, 128, v), 1)
    assert way["BV"] == rows


def test_every_ring_has_room():
    """For its tiles beside what a program keeps, and in a row of 1 KB for a barrier of each warp and tile."""
    found = 0
    for (phase, size), r, k, v, tokens in itertools.product(
        gluon_step.BULK, range(1, 9), (32, 64, 128, 256), (16, 32, 96, 128, 192, 256), (1, 4, 8)
    ):
        for _, way in gluon_step._bulk(phase, size, (1, r, k, v), tokens):
            found += 1
            ahead, tile = way["AHEAD"], way["BV"] * k * size
            assert 8 * ahead * way["num_warps"] <= 1024
            kept = 16 * tokens * way["TILES"] * way["BV"] + 8 * gluon_step._next_power_of_2(tokens) * (k + 1)
            assert (ahead + 1) * tile + (2 << 10) + kept <= 227 << 10
            assert v % way["BV"] == way["BV"] % (4 * way["num_warps"]) == 0
    assert found > 500


@pytest.mark.parametrize(
    ("version", "takes"), [("3.6.0.post1", True), ("3.7.1", True), ("3.8.0", False), ("4.0.0+git", False)]
)
def test_bulk_copies_are_for_a_triton_that_is_known(version, takes, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    gluon_step._bulk.cache_clear()
    try:
        assert gluon_step.takes_bulk("decode", 1, (2, 4, 128, 128), STATE, "vk") is takes
    finally:
        gluon_step._bulk.cache_clear()


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_every_accepted_state_is_covered(tokens):
    """Also where heads are no powers of two: the CTAs' tiles have all rows, and are not too many, their elements in registers."""
    for r, k, v in itertools.product(range(1, 9), (1, 16, 65, 96, 128, 200, 256), (1, 16, 65, 96, 128, 192, 256)):
        if triton_step.tiles(1, r, k, v) > 16:
            continue
        for by, size in itertools.product(("clusters", "tiles"), (2, 4)):
            made = gluon_step._constants(
                by, size, (1, r, k, v), 4, "vk", (k, 1), "verify", tokens, "silu", False, "silu", True
            )
            heads = made["CTAS"] * made["TILES"] * made["BV"] // made["V_POW2"]
            assert heads >= r
            assert made["V_POW2"] % made["BV"] == 0
            assert made["num_ctas"] == made["CTAS"] <= 8
            assert 1 in (made["CTAS"], made["TILES"])
            assert made["AHEAD"] * made["BV"] * made["K_POW2"] <= 32 * 64 * made["num_warps"]
            shared = 16 * tokens * made["TILES"] * made["BV"] + 8 * made["TOKENS_POW2"] * (made["K_POW2"] + 1)
            assert shared <= 227 << 10 or tokens * made["TILES"] * made["BV"] > gluon_step.MOST_ROWS
