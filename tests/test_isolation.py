"""Whatever the batch: slots it does not write keep their bits, padding gives 0, and a fresh sequence sees no garbage."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import gdnir
from gdnir.testing import bits

Seq = gdnir.Seq
SLOTS = 10
CONFIG = gdnir.models.config(dict(model_type="qwen3_next", hidden_size=8, num_hidden_layers=4, linear_num_key_heads=1,
                                  linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=6))  # fmt: skip
WEIGHTS = gdnir.models.random_weights(CONFIG)
PLANS = {
    (phase, layout): gdnir.Plan(gdnir.lower(gdnir.models.trace(CONFIG, phase=phase, dtype=torch.float32, state_layout=layout, conv_layout=order), "cpu"), WEIGHTS)
    for phase in ("prefill", "decode", "verify", "mixed")
    for layout, order in (("vk", "cw"), ("kv", "wc"))
}  # fmt: skip


@st.composite
def parts(draw, phase, slots):
    """One part of a batch over `slots`, which it consumes; rows may pad, read elsewhere than they write, or not store."""
    rows = draw(st.integers(0, 3))
    width = draw(st.integers(1, 3)) if phase == "verify" else 1
    read, write, lengths, has_state = [], [], [], []
    for _ in range(rows):
        if len(slots) < width + 1:
            break
        kind = draw(st.sampled_from(["in place", "elsewhere", "padding", "not stored"]))
        own = slots.pop()
        targets = [slots.pop() for _ in range(width)] if kind == "elsewhere" or width > 1 else [own]
        if kind == "not stored":
            targets = [-1] * width
        read.append(-1 if kind == "padding" else own)
        write.append(targets)
        lengths.append(
            1
            if phase == "decode"
            else draw(st.integers(0, width))
            if phase == "verify"
            else draw(st.sampled_from([0, 1, 2, 3, 5, 64, 65]))
        )
        has_state.append(draw(st.booleans()))
    if phase == "decode":
        return Seq.decode(read_slots=read, write_slots=[w[0] for w in write], has_state=has_state), lengths
    if phase == "prefill":
        return Seq.prefill(lengths, read_slots=read, write_slots=[w[0] for w in write], has_state=has_state), lengths
    return Seq.verify(lengths, read_slots=read, write_slots=write, has_state=has_state), lengths


@st.composite
def batches(draw):
    slots = draw(st.permutations(range(SLOTS)))
    phase = draw(st.sampled_from(["prefill", "decode", "verify", "mixed"]))
    slots = list(slots)
    if phase == "mixed":
        return Seq.mixed(*(draw(parts(p, slots))[0] for p in ("decode", "verify", "prefill")))
    return draw(parts(phase, slots))[0]


@given(batches(), st.sampled_from(["vk", "kv"]), st.integers(0, 2**16), st.booleans())
def test_only_written_slots_change(seq, layout, seed, through_device):
    random = torch.Generator().manual_seed(seed)
    pool = gdnir.StatePool(
        CONFIG,
        slots=SLOTS,
        conv_dtype=torch.float32,
        layout=layout,
        conv_layout="cw" if layout == "vk" else "wc",
        layers=[0],
    )
    states = pool.layer(0)
    written, read, padding_tokens, live_tokens, start = set(), set(), [], [], 0
    for part in seq.parts or (seq,):
        for n, length in enumerate(part.lengths):
            slot = int(part.read_slots[n])
            (padding_tokens if slot < 0 else live_tokens).extend(range(start, start + length))
            start += length
            if slot < 0:
                continue
            if part.has_state[n]:
                read.add(slot)
            columns = part.write_slots[n].tolist()
            written.update(w for w in (columns[:length] if part.phase == "verify" else columns[:1]) if w >= 0)
    for tensor in states:
        tensor.fill_(float("nan"))
        for slot in read:
            tensor[slot] = torch.randn(tensor[slot].shape, generator=random)
    before = [t.clone() for t in states]
    x = torch.randn(seq.num_tokens, 8, generator=random)
    x[padding_tokens] = float("nan")
    if through_device and seq.phase != "mixed":  # as an engine's buffers: the host knows nothing
        seq = Seq.from_tensors(
            seq.phase,
            seq.cu_seqlens,
            seq.read_slots,
            seq.write_slots,
            seq.has_state,
            num_tokens=seq.num_tokens,
            max_len=seq.max_len,
        )
    out = PLANS[seq.phase, layout](x, states, seq)
    for old, new in zip(before, states, strict=True):
        for slot in range(SLOTS):
            if slot in written:
                assert torch.isfinite(new[slot]).all()
            else:
                assert torch.equal(bits(old[slot]), bits(new[slot])), f"slot {slot} changed"
    assert torch.isfinite(out[live_tokens]).all()
    assert torch.equal(out[padding_tokens], torch.zeros(len(padding_tokens), 8))


@given(st.lists(st.sampled_from([1, 2, 3, 63, 64, 65, 7]), min_size=1, max_size=4), st.integers(0, 2**16))
def test_any_split_of_a_sequence_gives_the_same(chunks, seed):
    """Prefill in pieces equals prefill at once: conv state bit for bit, outputs and recurrent state within rounding."""
    torch.manual_seed(seed)
    x = torch.randn(sum(chunks), 8)
    pools = [gdnir.StatePool(CONFIG, slots=1, conv_dtype=torch.float32, layers=[0]) for _ in range(2)]
    whole = PLANS["prefill", "vk"](x, pools[0].layer(0), Seq.prefill([len(x)], slots=[0]))
    start, outs = 0, []
    for i, n in enumerate(chunks):
        outs.append(
            PLANS["prefill", "vk"](
                x[start : start + n], pools[1].layer(0), Seq.prefill([n], slots=[0], has_state=i > 0)
            )
        )
        start += n
    torch.testing.assert_close(torch.cat(outs), whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pools[1].layer(0).conv, pools[0].layer(0).conv, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pools[1].layer(0).ssm, pools[0].layer(0).ssm, rtol=1e-3, atol=1e-4)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2**16))
def test_batch_invariance(lengths, pick, seed):
    """With batch_invariant a sequence's bits are those it has alone."""
    torch.manual_seed(seed)
    pick %= len(lengths)
    x = torch.randn(sum(lengths), 8)
    plan = gdnir.Plan(PLANS["prefill", "vk"].lowered, WEIGHTS, batch_invariant=True)
    pool = gdnir.StatePool(CONFIG, slots=4, conv_dtype=torch.float32, layers=[0])
    alone = gdnir.StatePool(CONFIG, slots=4, conv_dtype=torch.float32, layers=[0])
    out = plan(x, pool.layer(0), Seq.prefill(lengths, slots=list(range(len(lengths)))))
    at = sum(lengths[:pick])
    one = plan(x[at : at + lengths[pick]], alone.layer(0), Seq.prefill([lengths[pick]], slots=[pick]))
    assert torch.equal(out[at : at + lengths[pick]], one)
    assert torch.equal(pool.layer(0).ssm[pick], alone.layer(0).ssm[pick])
