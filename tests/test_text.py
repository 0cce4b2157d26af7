"""The text is the truth: parse(str(g)) == g, for any graph."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdnir.errors import ParseError
from gdnir.ir import DTYPES, Graph, Node, SeqType, StateType, TensorType, Value
from gdnir.passes import DEFAULT_PIPELINE
from gdnir.passes.base import Pipeline
from gdnir.text import parse

names = st.one_of(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}(\.[a-z0-9]{1,3})?", fullmatch=True), st.text(min_size=0, max_size=8)
)
dims = st.one_of(st.integers(0, 2**40), st.sampled_from(["T", "S", "T.decode", "odd dim"]))
shapes = st.lists(dims, max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(DTYPES))
types = st.one_of(
    st.builds(TensorType, dtypes, shapes), st.builds(StateType, dtypes, shapes, names), st.builds(SeqType, names, dims)
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), names)
attr_values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@st.composite
def graphs(draw):
    """Graphs with weights, absent operands, any attribute, odd names, lowered and folded nodes, ops nobody knows."""
    taken: set[tuple[bool, str]] = set()

    def value(weight=False):
        name = draw(names)
        while (weight, name) in taken:
            name += "x"
        taken.add((weight, name))
        return Value(name, draw(types), weight)

    inputs = [value() for _ in range(draw(st.integers(0, 3)))]
    weights = [value(True) for _ in range(draw(st.integers(0, 2)))]
    known = [*inputs, *weights]
    nodes = []
    for _ in range(draw(st.integers(0, 4))):
        choose = st.one_of(st.none(), st.sampled_from(known)) if known else st.none()
        operands = tuple(draw(st.lists(choose, max_size=4)))
        results = tuple(value() for _ in range(draw(st.integers(1, 3))))
        attrs = tuple(draw(st.dictionaries(names, attr_values, max_size=3)).items())
        nodes.append(
            Node(draw(names), operands, results, attrs, draw(st.one_of(st.none(), names)), draw(st.booleans()))
        )
        known += results
    outputs = tuple(draw(st.lists(st.sampled_from(known), max_size=3))) if known else ()
    return Graph(draw(names), tuple(inputs), tuple(weights), tuple(nodes), outputs)


@given(graphs())
def test_round_trip(graph):
    again = parse(str(graph))
    assert again == graph
    assert str(again) == str(graph)


def test_special_floats_survive():
    for value in (math.inf, -math.inf, math.nan, 1e-6, -0.0, 1e300):
        node = Node(
            "f", (), (Value("y", TensorType("f32", ())),), (("a", value), ("list", (value, "nan", None, True, 1)))
        )
        graph = Graph("g", (), (), (node,), ())
        assert parse(str(graph)) == graph
    different = Graph("g", (), (), (Node("f", (), (Value("y", TensorType("f32", ())),), (("a", 1.0),)),), ())
    assert parse(str(graph)) != different


GOOD = "gdnir 1\ngraph @g (%x: f32[T]) weights {} {\n  %y: f32[T] = f(%x) {a=1}\n  return %y\n}\n"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "expected `gdnir`"),
        (GOOD.replace("gdnir 1", "gdnir 9"), 1, "format 9"),
        (GOOD.replace("f32[T] =", "f23[T] ="), 3, "Did you mean `f32`"),
        (GOOD.replace("f(%x)", "f(%z)"), 3, "%z is not defined"),
        (GOOD.replace("a=1", "a=1, a=2"), 3, "given twice"),
        (GOOD.replace("a=1", "a=one"), 3, "attribute value"),
        (GOOD.replace("a=1", "a=" + "[" * 100 + "]" * 100), 3, "nest"),
        (GOOD + "more", 6, "after the end"),
        (GOOD.replace("%y: f32[T] =", "%y: f32[T] = $"), 3, "unexpected character"),
        (GOOD[:-3], 4, "expected"),
    ],
)
def test_errors_say_where(text, line, says):
    with pytest.raises(ParseError) as caught:
        parse(text)
    assert caught.value.line in (line, line + 1)
    assert says in str(caught.value)


@given(st.text(alphabet='gdnir1@%(){}[]<>,:= "\\\n\tfold state seq weights return abc0123.-', max_size=80))
def test_garbage_gives_parse_errors_only(text):
    try:
        parse(text)
    except ParseError:
        pass


def test_pipeline_round_trip():
    for text in (DEFAULT_PIPELINE, "", "fuse{op=conv_prep}", 'split-mixed{whole=["in_proj"]},lower'):
        assert str(Pipeline.parse(text)) == text
        assert Pipeline.parse(str(Pipeline.parse(text))) == Pipeline.parse(text)
    for text, says in (
        ("fuze", "Did you mean `fuse`"),
        ("fuse{ops=a}", "Did you mean `op`"),
        ("fuse lower", "expected `,`"),
    ):
        with pytest.raises(ParseError, match=says):
            Pipeline.parse(text)
