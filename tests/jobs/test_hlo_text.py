"""The reader of HLO text, on small programs as XLA for TPU and XLA for CPU write them."""

import pytest

from t5g2.jobs import hlo_text

# a counter that is compared with a constant, one that is carried through the loop, and a kernel over several lines
LOOPS = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (state: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%state), index=1
  %limit = s32[]{:T(128)} get-tuple-element(%state), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%turn, %one), backend_config={"flag_configs":[]}
  %half = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, calls=%halves, metadata={op_name="jit(step)/encoder/mlp/mul"}, \
backend_config={"window_config":{"estimated_cycles":"70","iteration_bounds":["1"]}}
  ROOT %result = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%next, %half, %limit)
}

%halves (input: f32[8]) -> f32[8] {
  %input = f32[8]{0:T(128)} parameter(0)
  %point5 = f32[]{:T(128)} constant(0.5)
  %all = f32[8]{0:T(128)} broadcast(%point5), dimensions={}
  ROOT %product = f32[8]{0:T(128)} multiply(%input, %all)
}

%five (state.1: (s32[], f32[8], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %end = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %end), direction=LT
}

%carried (state.2: (s32[], f32[8], s32[])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %turn.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %end.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=2
  ROOT %less.2 = pred[]{:T(512)} compare(%turn.2, %end.2), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %nine = s32[]{:T(128)} constant(9)
  %first = s32[]{:T(128)} copy(%two)
  %begin = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%first, %a, %nine)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) while(%begin), condition=%five, body=%body
  %loop.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) while(%begin), condition=%carried, body=%body
  %x.2 = f32[8]{0:T(128)} get-tuple-element(%loop.2), index=1
  ROOT %kernel = (f32[8]{0:T(128)}, f32[4]{0:T(128)}) custom-call(%x.2, /*index=1*/%nine), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/transpose(jvp(encoder))/attention/pallas_call"}
}
"""


def test_the_instructions_of_each_computation():
    program = hlo_text.read(LOOPS)
    assert program.entry == "main"
    assert {name: len(part) for name, part in program.computations.items()} == {
        "body": 8,
        "halves": 4,
        "five": 4,
        "carried": 4,
        "main": 9,
    }
    half, kernel = program.by_name["half"], program.by_name["kernel"]
    assert (half.opcode, half.operands, half.called, half.op_name) == (
        "fusion",
        ("x",),
        "halves",
        "jit(step)/encoder/mlp/mul",
    )
    assert (half.number("estimated_cycles"), half.number("no_such_number"), half.root) == (70, None, False)
    assert [part.name for part in program.inside(half)] == ["input", "point5", "all", "product"]
    # of several lines, with a comment among its operands
    assert (kernel.operands, kernel.size, kernel.root) == (("x.2", "nine"), 4 * (8 + 4), True)
    assert kernel.op_name == "jit(step)/transpose(jvp(encoder))/attention/pallas_call"
    assert '"block_q\\": 512' in kernel.text


def test_the_turns_of_loops():
    """From 2 to a constant 5, and to a 9 that is carried."""
    program = hlo_text.read(LOOPS)
    assert program.turns(program.by_name["loop"]) == 3
    assert program.turns(program.by_name["loop.2"]) == 7


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("constant(1)", "constant(2)", 2),  # two turns in one: 2, 4
        ("%first = s32[]{:T(128)} copy(%two)", "%first = s32[]{:T(128)} add(%two, %two)", None),
        ("condition=%five", 'condition=%five, backend_config={"known_trip_count":{"n":"12"}}', 12),
        ("direction=LT", "direction=NE", None),
    ],
)
def test_the_turns_of_other_loops(old, new, turns):
    assert old in LOOPS
    program = hlo_text.read(LOOPS.replace(old, new))
    assert program.turns(program.by_name["loop"]) == turns


def test_the_turns_of_a_loop_whose_condition_is_a_fusion():
    """As XLA for CPU of an older release writes it."""
    condition = """  ROOT %less = pred[] fusion(%turn.1, %end), kind=kLoop, calls=%compares
}

%compares (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %smaller = pred[] compare(%p, %q), direction=LT
"""
    old = "  ROOT %less = pred[]{:T(512)} compare(%turn.1, %end), direction=LT\n"
    assert old in LOOPS
    program = hlo_text.read(LOOPS.replace(old, condition))
    assert program.turns(program.by_name["loop"]) == 3


@pytest.mark.parametrize(
    ("shape", "size", "padded", "on_device"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 4096, True),
        ("bf16[3,130]{1,0:T(8,128)(2,1)S(1)}", 780, 2 * 8 * 256, False),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(5)}", 2048, 2048, False),
        ("f32[100,3]{0,1:T(4,128)}", 1200, 4 * 128 * 4, True),
        ("pred[10]", 10, 10, True),
        ("f8e4m3fn[7]{0}", 7, 7, True),
        ("s32[]{:T(128)}", 4, 4, True),
    ],
)
def test_the_bytes_of_arrays(shape, size, padded, on_device):
    (array,) = hlo_text.arrays(shape)
    assert (array.size, array.padded_size, array.on_device) == (size, padded, on_device)


def test_the_arrays_of_a_tuple():
    dtypes = [(array.dtype, array.shape) for array in hlo_text.arrays("((f32[2,3]{1,0}), (bf16[4]{0}), u32[])")]
    assert dtypes == [("f32", (2, 3)), ("bf16", (4,)), ("u32", ())]


def test_operands_with_types():
    """Types may have parentheses themselves."""
    text = """ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0:T(128)} parameter(0)
  ROOT %b = f32[2]{0:T(128)} add(f32[2]{0:T(128)} %a, f32[2]{0:T(128)} %a), metadata={op_name="jit(f)/add(x)"}
}
"""
    assert hlo_text.read(text).by_name["b"].operands == ("a", "a")


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no HLO module: it has no ENTRY computation; it begins 'hello'"):
        hlo_text.read("hello")
