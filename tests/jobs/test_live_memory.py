"""The temporary arrays of a small scheduled program, by hand."""

import pytest

from t5g2.jobs import hlo_text
from t5g2.jobs.live_memory import at_most

NAME = 'metadata={{op_name="jit(train_step)/{}"}}'


def made(name, elements, operands, op_name, extra=""):
    return (
        f"  %{name} = f32[{elements}]{{0:T(256)}} fusion({', '.join(f'%{o}' for o in operands)}), kind=kLoop, "
        f"calls=%any, {NAME.format(op_name)}{extra}"
    )


BODY = """
%body (state: (s32[], f32[2560])) -> (s32[], f32[2560]) {
  %state = (s32[], f32[2560]{0:T(256)}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %x = f32[2560]{0:T(256)} get-tuple-element(%state), index=1
  %inside = f32[5120]{0:T(256)} fusion(%x), kind=kLoop, calls=%any
  %new = f32[2560]{0:T(256)} fusion(%inside), kind=kLoop, calls=%any
  ROOT %result = (s32[], f32[2560]{0:T(256)}) tuple(%turn, %new)
}

%turns (state.1: (s32[], f32[2560])) -> pred[] {
  %state.1 = (s32[], f32[2560]{0:T(256)}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""


def program(*lines):
    head = (
        "ENTRY %main (a: f32[256]) -> f32[256] {\n  %a = f32[256]{0:T(256)} parameter(0)\n  %i = s32[] parameter(1)\n"
    )
    root = "  ROOT %out = f32[256]{0:T(256)} fusion(%last), kind=kLoop, calls=%any"
    return hlo_text.read(f"{BODY}\n{head}" + "\n".join([*lines, root]) + "\n}\n")


def test_an_array_is_there_from_its_maker_to_its_last_reader():
    """First a + b, then b + c; arguments and results are not temporary."""
    memory = at_most(
        program(
            made("first", 2560, ["a"], "jvp(encoder)/mlp"),
            made("second", 512, ["first"], "jvp(encoder)/mlp"),
            made("last", 256, ["second"], "transpose(jvp(encoder))/mlp"),
        )
    )
    assert memory.total == 4 * (2560 + 512)
    assert memory.kept == 4 * 512  # which the backward pass reads
    assert memory.gradients == 0
    assert [size for size, _ in memory.largest] == [4 * 2560, 4 * 512]


def test_gradients_are_what_the_optimizer_reads():
    memory = at_most(
        program(
            made("gradient", 1024, ["a"], "transpose(jvp(encoder))/mlp"),
            made("kept", 512, ["a"], "jvp(encoder)/mlp"),
            made("both", 256, ["kept"], "transpose(jvp(encoder))/mlp"),
            made("last", 256, ["gradient", "both"], "optimizer/mul"),
        )
    )
    assert (memory.gradients, memory.kept) == (4 * (1024 + 256), 4 * 512)


def test_views_and_updates_in_place_take_no_memory():
    """The second array is the first, changed; the third is in the memory of the core."""
    in_place = ', backend_config={"aliasing_operands":{"lists":[{"indices":["0","1"]}]}}'
    memory = at_most(
        program(
            made("first", 2560, ["a"], "jvp(encoder)/mlp"),
            "  %view = f32[10,256]{1,0:T(8,128)} bitcast(%first)",
            made("second", 2560, ["view"], "jvp(encoder)/mlp", in_place),
            made("third", 2560, ["a"], "jvp(encoder)/mlp").replace("T(256)}", "T(256)S(1)}"),
            made("last", 256, ["second", "third"], "jvp(encoder)/mlp"),
        )
    )
    assert memory.total == 4 * (2560 + 256)


def test_what_is_offloaded_is_the_hosts():
    """Kept for the backward pass there, it takes the device's memory only where it is made and where it is read."""
    there, here = "f32[2560]{0:T(256)S(5)}", "f32[2560]{0:T(256)}"
    memory = at_most(
        program(
            made("first", 2560, ["a"], "jvp(encoder)/mlp"),
            f"  %out = ({there}, {here}, u32[]{{:S(2)}}) copy-start(%first)",
            f"  %kept = {there} copy-done(%out)",
            made("second", 2560, ["a"], "jvp(encoder)/mlp"),
            made("third", 256, ["second"], "jvp(encoder)/mlp"),
            f"  %in = ({here}, {there}, u32[]{{:S(2)}}) copy-start(%kept)",
            f"  %back = {here} copy-done(%in)",
            made("last", 256, ["third", "back"], "transpose(jvp(encoder))/mlp"),
        )
    )
    assert memory.total == 4 * (2560 + 256 + 256)


def test_a_loop_works_in_its_state_and_adds_what_its_body_needs():
    memory = at_most(
        program(
            made("first", 2560, ["a"], "jvp(encoder)/mlp"),
            "  %begin = (s32[], f32[2560]{0:T(256)}) tuple(%i, %first)",
            "  %loop = (s32[], f32[2560]{0:T(256)}) while(%begin), condition=%turns, body=%body",
            "  %end = f32[2560]{0:T(256)} get-tuple-element(%loop), index=1",
            made("last", 256, ["end"], "transpose(jvp(encoder))/mlp"),
        )
    )
    assert memory.total == 4 * (2560 + 5120)
    assert memory.largest[0][1].startswith("inside ")


def test_a_copy_that_is_begun_ahead_is_one_array():
    memory = at_most(
        program(
            made("first", 2560, ["a"], "jvp(encoder)/mlp"),
            "  %start = (f32[2560]{0:T(256)}, f32[2560]{0:T(256)}, u32[]{:S(2)}) copy-start(%first)",
            "  %done = f32[2560]{0:T(256)} copy-done(%start)",
            made("last", 256, ["done"], "jvp(encoder)/mlp"),
        )
    )
    assert memory.total == 4 * 2 * 2560


@pytest.mark.parametrize(
    "begun",
    [
        # begun without operands, which are given later, with what the start made
        [
            "((), (), (s32[256]{0:T(256)})) custom-call-start(), called_computations={%any}",
            "((GIVEN), (RESULT), (s32[256]{0:T(256)})) custom-call-update(%begun0, %first)",
        ],
        # begun with them
        ["((GIVEN), RESULT) async-start(%first), calls=%any", "((GIVEN), RESULT) async-update(%begun0)"],
    ],
)
def test_of_what_is_begun_ahead_the_result_is_there_until_it_is_read(begun):
    """Once, whatever an update says of what it is given and of what the start made, which are gone by then."""
    given, result = "f32[2560]{0:T(256)}", "f32[1280]{0:T(256)}"
    lines = [line.replace("GIVEN", given).replace("RESULT", result) for line in begun]
    memory = at_most(
        program(
            made("first", 2560, ["a"], "jvp(encoder)/mlp"),
            *(f"  %begun{number} = {line}" for number, line in enumerate(lines)),
            made("beside", 5120, ["a"], "jvp(encoder)/mlp"),
            f"  %done = {result} call-done(%begun1)",
            made("last", 256, ["done", "beside"], "transpose(jvp(encoder))/mlp"),
        )
    )
    assert memory.total == 4 * (1280 + 5120 + 256)
