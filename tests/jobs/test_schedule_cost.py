"""The time of small scheduled programs, by hand: a cycle is a nanosecond, a link sends a byte a nanosecond."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from t5g2.core.tpu_chips import target
from t5g2.jobs import hlo_text, target_check
from t5g2.jobs.schedule_cost import Speeds, schedule_cost
from t5g2.jobs.transfers import Network, replica_groups
from t5g2.models import masks
from t5g2.models.backends.site import Site

SPEEDS = Speeds(flops_per_s=1e12, bytes_per_s=1e11, cycles_per_s=1e9)
# 2 x 2 chips: a group of all has two links, a group of two has one
COORDINATES = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
NETWORK = Network(target("v5p:2x2x1"), COORDINATES, link_bytes_per_s=1e9, slices_bytes_per_s=1e8)
ESTIMATE = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'
PROGRAM = """
%part (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0:T(1024)} parameter(0)
  ROOT %twice = f32[1000]{0:T(1024)} add(%p, %p)
}

%all-reduce-scatter.1 (input.1: f32[1000]) -> f32[250] {
  %input.1 = f32[1000]{0:T(1024)} parameter(0)
  %all-reduce.1 = f32[1000]{0:T(1024)} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %slice = f32[250]{0:T(256)} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={250}
}

%piece.1 (part.2: f32[250]) -> f32[1000] {
  %part.2 = f32[250]{0:T(256)} parameter(0)
  ROOT %all-gather.3 = f32[1000]{0:T(1024)} all-gather(%part.2), replica_groups={{0,1,2,3}}, CHAIN
}

%piece.2 (part.3: f32[250]) -> f32[1000] {
  %part.3 = f32[250]{0:T(256)} parameter(0)
  %all-gather.4 = f32[1000]{0:T(1024)} all-gather(%part.3), replica_groups={{0,1,2,3}}, CHAIN
  ROOT %more = f32[1000]{0:T(1024)} add(%all-gather.4, %all-gather.4)
}

%piece.3 (part.4: f32[250]) -> f32[1000] {
  %part.4 = f32[250]{0:T(256)} parameter(0)
  ROOT %all-gather.5 = f32[1000]{0:T(1024)} all-gather(%part.4), replica_groups={{0,1,2,3}}, CHAIN
}

%offloaded (part: f32[250], token: token[]) -> f32[1000] {
  %token = token[] parameter(1)
  %part.1 = f32[250]{0:T(256)} parameter(0)
  ROOT %all-gather.2 = f32[1000]{0:T(1024)} all-gather(%part.1), replica_groups=[1,4]<=[4], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[1000], b: f32[250]) -> f32[1000] {
  %a = f32[1000]{0:T(1024)} parameter(0)
  %b = f32[250]{0:T(256)} parameter(1)
LINES
}
""".replace("CHAIN", 'dimensions={0}, frontend_attributes={chain_id="7"}')


def cost(*lines, sites=None, slices=1):
    body = "\n".join(f"  {line}" for line in lines)
    *computations, main = PROGRAM.strip().split("\n\n")
    called = [text for text in computations if text.split()[0] in body]
    text = "\n\n".join([*called, main.replace("LINES", body)])
    network = NETWORK._replace(target=NETWORK.target._replace(slices=slices))
    return schedule_cost(hlo_text.read(text), SPEEDS, network, sites)


def computes(name, operand, cycles):
    return f"%{name} = f32[1000]{{0:T(1024)}} fusion(%{operand}), kind=kLoop, calls=%part, {ESTIMATE.format(cycles)}"


GATHER = "f32[1000]{0:T(1024)} all-gather(%b), replica_groups=[1,4]<=[4], dimensions={0}"


def nanoseconds(seconds):
    return round(seconds * 1e9, 6)


def test_estimated_cycles_are_added_up():
    result = cost(computes("x", "a", 700), computes("y", "x", 50))
    assert (nanoseconds(result.seconds), nanoseconds(result.estimated)) == (750, 750)
    assert not result.transfers


def test_a_collective_is_waited_for():
    """A device sends 3/4 of 4000 bytes through two links."""
    result = cost(computes("x", "a", 700), f"%gather = {GATHER}")
    assert nanoseconds(result.seconds) == 700 + 1500
    (transfer,) = result.transfers
    assert (transfer.kind, transfer.group, transfer.sent, transfer.times) == ("all-gather", 4, 3000, 1)
    assert not transfer.overlapped
    assert nanoseconds(result.waited) == 1500


START = "%start = (f32[250]{0:T(256)}, f32[1000]{0:T(1024)}) all-gather-start(%b), replica_groups=[1,4]<=[4]"
DONE = "%done = f32[1000]{0:T(1024)} all-gather-done(%start)"


@pytest.mark.parametrize(
    ("between", "seconds", "overlapped"), [(1600, 1700, True), (900, 1600, True), (0, 1600, False)]
)
def test_a_collective_that_is_begun_ahead_is_waited_for_as_far_as_no_work_stands_between(between, seconds, overlapped):
    result = cost(computes("w", "a", 100), START, computes("x", "a", between), DONE)
    assert nanoseconds(result.seconds) == seconds
    assert nanoseconds(result.waited) == seconds - 100 - between
    (transfer,) = result.transfers
    assert (transfer.kind, transfer.sent, transfer.overlapped) == ("all-gather", 3000, overlapped)


@pytest.mark.parametrize(
    "begun",
    [
        ["((f32[250]{0}, token[]), (f32[1000]{0:T(1024)})) call-start(%b, %after), to_apply=%offloaded"],
        [  # libtpu 0.0.52: begun without operands, which are given later
            "((), (), (s32[64]{0})) custom-call-start(), called_computations={%offloaded}",
            "((f32[250]{0}), (f32[1000]{0:T(1024)}), (s32[64]{0})) custom-call-update(%begun0, %b)",
        ],
    ],
)
def test_a_collective_of_another_unit_of_the_chip_is_waited_for_alike(begun):
    """SparseCores of tpu7x run collectives, in a computation that a call begins."""
    lines = [f"%begun{number} = {line}" for number, line in enumerate(begun)]
    if len(lines) > 1:
        lines.insert(1, computes("w", "a", 100))
    done = f"%done = f32[1000]{{0:T(1024)}} call-done(%begun{len(begun) - 1})"
    result = cost("%after = token[] after-all()", *lines, computes("x", "a", 900), done)
    (transfer,) = result.transfers
    assert (transfer.kind, transfer.group, transfer.sent) == ("all-gather", 4, 3000)
    assert (nanoseconds(result.seconds), nanoseconds(transfer.waited)) == (1400 + 100 * len(begun), 600)
    assert not result.uncounted


def test_an_update_of_a_collective_that_is_on_its_way_costs_nothing():
    begin = "%begun = ((f32[250]{0}), f32[1000]{0:T(1024)}) async-start(%b), calls=%offloaded"
    update = "%on = ((f32[250]{0}), f32[1000]{0:T(1024)}) async-update(%begun)"
    done = "%done = f32[1000]{0:T(1024)} async-done(%on)"
    result = cost(begin, computes("w", "a", 100), update, computes("x", "a", 900), done)
    (transfer,) = result.transfers
    assert (nanoseconds(result.seconds), nanoseconds(transfer.waited)) == (1500, 500)


@pytest.mark.parametrize(("cycles", "seconds"), [(400, 1500), (1400, 1500), (1600, 1600)])
def test_a_collective_that_is_spread_over_operations_is_one(cycles, seconds):
    """It is begun, goes on in an operation that computes, and ends in a third one; the core computes beside it."""
    pieces = [f"%f{n} = f32[1000]{{0:T(1024)}} fusion(%b), kind=kCustom, calls=%piece.{n}" for n in (1, 2, 3)]
    pieces[1] += f", {ESTIMATE.format(cycles - 100)}"
    result = cost(pieces[0], computes("x", "a", 100), *pieces[1:])
    (transfer,) = result.transfers
    assert (transfer.kind, transfer.group, transfer.sent, transfer.times) == ("all-gather", 4, 3000, 1)
    assert (nanoseconds(result.seconds), nanoseconds(transfer.waited)) == (seconds, seconds - cycles)
    assert not result.uncounted


def test_collectives_that_are_not_found_are_counted():
    assert not cost(f"%gather = {GATHER}").uncounted
    assert cost("%made = f32[1000]{0:T(1024)} custom-call(%b), called_computations={%offloaded}").uncounted == 1


def between_slices(kind, given, received, name="r"):
    """Returns the lines in which hosts of slices exchange an array: begun by a send, ended by a recv-done."""
    attributes = (
        f'is_host_transfer=true, frontend_attributes={{_xla_host_transfer_rendezvous="{name}",'
        f'_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}'
    )
    return (
        f"%token.{name} = token[] after-all()",
        f"%send.{name} = (f32[{given}]{{0:T(256)}}, u32[], token[]) send(%b, %token.{name}), {attributes}",
        f"%recv.{name} = (f32[{received}]{{0:T(256)}}, u32[], token[]) recv(%token.{name}), {attributes}",
        f"%send-done.{name} = token[] send-done(%send.{name}), is_host_transfer=true",
        f"%recv-done.{name} = (f32[{received}]{{0:T(256)}}, token[]) recv-done(%recv.{name}), is_host_transfer=true",
    )


@pytest.mark.parametrize(
    ("kind", "given", "received", "slices", "name", "sent"),
    [
        ("ALL_REDUCE", 250, 250, 2, "all-reduce", 1000),  # half of the array there, the sums of it back
        ("ALL_REDUCE", 240, 240, 3, "all-reduce", 2 * 960 * 2 // 3),
        ("ALL_GATHER", 250, 750, 3, "all-gather", 2000),  # to each of two others
        ("REDUCE_SCATTER", 250, 125, 2, "reduce-scatter", 500),
        ("ALL_TO_ALL", 250, 250, 2, "all-to-all", 500),
        ("ONE_TO_ONE", 250, 250, 3, "collective-permute", 1000),
    ],
)
def test_hosts_of_slices_exchange_arrays_beside_other_work(kind, given, received, slices, name, sent):
    """A device's part of its host's network sends a byte in ten nanoseconds, while the core and the links work."""
    *begin, done = between_slices(kind, given, received)
    result = cost(*begin, computes("x", "a", 700), f"%gather = {GATHER}", done, slices=slices)
    between = next(transfer for transfer in result.transfers if transfer.kind.endswith("of slices"))
    assert (between.kind, between.group, between.sent, between.times) == (f"{name} of slices", slices, sent, 1)
    assert nanoseconds(between.seconds) == 10 * sent
    assert nanoseconds(between.waited) == 10 * sent - 700 - 1500
    assert nanoseconds(result.seconds) == 10 * sent
    assert not result.uncounted


@pytest.mark.parametrize("lines", [(START,), between_slices("ALL_REDUCE", 250, 250)[:3]])
def test_what_is_begun_and_not_ended_there_is_waited_for(lines):
    result = cost(*lines, computes("x", "a", 700), slices=2)
    (transfer,) = result.transfers
    assert nanoseconds(result.seconds) == nanoseconds(transfer.seconds) > 700
    assert nanoseconds(transfer.waited) == nanoseconds(transfer.seconds) - 700


def test_a_permutation_has_one_link_to_its_partner():
    """Over the diagonal of 2 x 2 chips too; and nobody sends where there are no pairs."""
    permuted = "%moved = f32[250]{0:T(256)} collective-permute(%b), source_target_pairs={PAIRS}"
    (transfer,) = cost(permuted.replace("PAIRS", "{0,3},{3,0}")).transfers
    assert (transfer.kind, transfer.sent, nanoseconds(transfer.seconds)) == ("collective-permute", 1000, 1000)
    assert not cost(permuted.replace("PAIRS", "")).transfers


def test_slices_exchange_one_array_after_the_other():
    first, second = (between_slices("ALL_REDUCE", 250, 250, name) for name in ("r", "s"))
    result = cost(*first[:3], *second[:3], computes("x", "a", 700), *second[3:], *first[3:], slices=2)
    assert nanoseconds(result.seconds) == 20_000
    assert [nanoseconds(transfer.waited) for transfer in result.transfers] == [19_300, 0]


def test_an_exchange_between_slices_that_is_not_known_is_counted_as_such():
    assert not cost(*between_slices("ALL_REDUCE", 250, 250), slices=2).uncounted
    assert cost(*between_slices("BROADCAST", 250, 250), slices=2).uncounted == 1


def test_transfers_share_the_links():
    """The second begins when the first has ended, however early it is asked for."""
    second = [re.sub(r"%(start|done)\b", r"%\1.2", line) for line in (START, DONE)]
    result = cost(START, second[0], computes("x", "a", 2000), DONE, second[1])
    assert nanoseconds(result.seconds) == 3000


def test_the_compilers_reduce_scatter_is_a_fusion():
    fusion = "%cut = f32[250]{0:T(256)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"
    (transfer,) = cost(fusion).transfers
    assert (transfer.kind, transfer.sent) == ("reduce-scatter", 3000)
    alone = "%sum = f32[1000]{0:T(1024)} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add"
    (transfer,) = cost(alone).transfers
    # twice half of the bytes, through the one link of a pair
    assert (transfer.kind, transfer.group, transfer.sent) == ("all-reduce", 2, 4000)
    assert nanoseconds(transfer.seconds) == 4000


def test_an_operation_that_computes_and_sends_takes_the_longer_of_both():
    fusion = (
        f"%cut = f32[250]{{0:T(256)}} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1, {ESTIMATE.format(1200)}"
    )
    result = cost(fusion)
    assert (nanoseconds(result.seconds), nanoseconds(result.waited)) == (1500, 300)
    assert result.transfers[0].overlapped


def test_what_has_no_estimate_is_charged_half_of_the_peak():
    """Bytes: 4000 read and as many written, at 50 a nanosecond. A kernel: the FLOPs of its blocks, at 500."""
    result = cost("%sorted = f32[1000]{0:T(1024)} sort(%a), dimensions={0}")
    assert (nanoseconds(result.seconds), nanoseconds(result.others), result.kernels) == (160, 160, 0)
    kernel = (
        "%splash_mqa_fwd_residuals.2 = (f32[512,128]{1,0:T(8,128)}, bf16[2,4,4096,256]{3,2,1,0:T(8,128)(2,1)}) "
        'custom-call(%table, %q, %a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        r'"xprof_metadata":"{\"block_q\": 512, \"block_kv\": 256, \"block_q_dq\": 128}"' + "\n}}, "
        'metadata={op_name="jit(train_step)/jvp(encoder)/local/attention/pallas_call"}'
    )
    inputs = (
        "%table = s8[1,8,3]{2,1,0:T(8,128)} parameter(2)",
        "%q = bf16[2,4,4096,256]{3,2,1,0:T(8,128)(2,1)} parameter(3)",
    )
    result = cost(*inputs, kernel)
    # two products over 8 x 3 blocks of 512 x 256 pairs, in 2 rows of 4 heads of 256
    flops = 2 * 2 * 8 * 3 * 512 * 256 * 2 * 4 * 256
    assert result.flops["encoder.local.attention"] == flops
    assert (nanoseconds(result.seconds), nanoseconds(result.kernels)) == (flops / 500, flops / 500)
    # of a known mask, the blocks that it does not hide: 4096 x 4096 pairs, causal, are 2, 4, … 16 blocks of 512 x 256
    site = Site(2, 4096, (4096,), (masks.causal(),), 0, 4, 256, softcap=False, blocks=False, dtype="bfloat16")
    result = cost(*inputs, kernel, sites={"encoder.local": site})
    assert result.flops["encoder.local.attention"] == flops // (8 * 3) * sum(range(2, 17, 2))


def test_a_loop_takes_its_turns():
    loop = """
%body (state: (s32[], f32[250])) -> (s32[], f32[250]) {
  %state = (s32[]{:T(128)}, f32[250]{0:T(256)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %b.1 = f32[250]{0:T(256)} get-tuple-element(%state), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%turn, %one), BACKEND
  %gather.1 = f32[1000]{0:T(1024)} all-gather(%b.1), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %result = (s32[]{:T(128)}, f32[250]{0:T(256)}) tuple(%next, %b.1)
}

%four (state.1: (s32[], f32[250])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[250]{0:T(256)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %end = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %end), direction=LT
}

ENTRY""".replace("BACKEND", ESTIMATE.format(10))
    lines = (
        "  %none = s32[]{:T(128)} constant(0)",
        "%begin = (s32[]{:T(128)}, f32[250]{0:T(256)}) tuple(%none, %b)",
        "%loop = (s32[]{:T(128)}, f32[250]{0:T(256)}) while(%begin), condition=%four, body=%body",
    )
    text = PROGRAM.replace("\nENTRY", loop).replace("LINES", "\n  ".join(lines))
    result = schedule_cost(hlo_text.read(text), SPEEDS, NETWORK)
    assert nanoseconds(result.seconds) == 4 * (10 + 1500)
    (transfer,) = result.transfers
    assert (transfer.times, result.loops) == (4, 0)
    unknown = schedule_cost(hlo_text.read(text.replace("constant(4)", "add(%turn.1, %turn.1)")), SPEEDS, NETWORK)
    assert (nanoseconds(unknown.seconds), unknown.loops) == (1510, 1)


def branch(name, line):
    parameter = f"  %of.{name} = f32[1000]{{0:T(1024)}} parameter(0)"
    return f"%{name} (of.{name}: f32[1000]) -> f32[1000] {{\n{parameter}\n  ROOT {line}\n}}\n\n"


@pytest.mark.parametrize(
    ("cycles", "seconds", "estimated", "collectives"),
    [((700, 90), 4000, 0, 1), ((5000, 90), 5000, 5000, 0), ((5000, 6000), 6000, 6000, 0)],
)
def test_of_a_conditional_only_the_longest_branch_is_counted(cycles, seconds, estimated, collectives):
    """Two branches compute, and the third waits for a collective for 4000 ns."""
    reduce = "all-reduce(%of.third), replica_groups={{0,1},{2,3}}, to_apply=%add"
    branches = [
        branch("first", computes("x", "of.first", cycles[0])),
        branch("second", computes("y", "of.second", cycles[1])),
        branch("third", f"%sum = f32[1000]{{0:T(1024)}} {reduce}"),
    ]
    conditional = "conditional(%which, %a, %a, %a), branch_computations={%first, %second, %third}"
    lines = f"  %which = s32[] constant(1)\n  %one = f32[1000]{{0:T(1024)}} {conditional}"
    text = PROGRAM.replace("ENTRY", "".join(branches) + "ENTRY").replace("LINES", lines)
    result = schedule_cost(hlo_text.read(text), SPEEDS, NETWORK)
    assert (nanoseconds(result.seconds), nanoseconds(result.estimated)) == (seconds, estimated)
    assert len(result.transfers) == collectives
    assert nanoseconds(sum(result.by_scope.values())) == estimated
    assert nanoseconds(result.estimated + result.waited + result.others) == seconds


def test_a_conditional_in_a_loop_counts_once_for_each_turn():
    body = """
%body (s: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %s = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%s), index=0
  %c = f32[1000]{0:T(1024)} get-tuple-element(%s), index=1
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%turn, %step), BACKEND
  %which = pred[] constant(true)
  %one = f32[1000]{0:T(1024)} conditional(%which, %c, %c), true_computation=%less, false_computation=%more
  ROOT %result = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) tuple(%next, %one)
}

%three (t: (s32[], f32[1000])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%t), index=0
  %end = s32[]{:T(128)} constant(3)
  ROOT %before = pred[]{:T(512)} compare(%turn.1, %end), direction=LT
}

ENTRY"""
    less, more = (branch(name, computes(f"y.{name}", f"of.{name}", n)) for name, n in (("less", 100), ("more", 400)))
    lines = (
        "  %none = s32[]{:T(128)} constant(0)",
        "%begin = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) tuple(%none, %a)",
        "%loop = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) while(%begin), condition=%three, body=%body",
    )
    program = PROGRAM.replace("\nENTRY", "\n" + less + more + body.replace("BACKEND", ESTIMATE.format(0)))
    result = schedule_cost(hlo_text.read(program.replace("LINES", "\n  ".join(lines))), SPEEDS, NETWORK)
    assert nanoseconds(result.seconds) == nanoseconds(result.estimated) == 3 * 400


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={}, dimensions={0}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={1}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}, dimensions={0}", [[0, 2, 1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("source_target_pairs={}", []),
    ],
)
def test_groups_of_devices(text, groups):
    assert replica_groups(text, 4).tolist() == groups


def test_groups_that_are_written_in_another_way_are_an_error():
    with pytest.raises(ValueError, match="groups of devices that are not known: replica_groups=everyone"):
        replica_groups("replica_groups=everyone", 4)


def test_two_devices_share_a_chip():
    """A TPU7x has 2307 TFLOP/s and 7380 GB/s, and 100 Gb/s to other slices; jax has two devices of it."""
    assert target_check.speeds(target("tpu7x:2x2x1")) == Speeds(1153.5e12, 3690e9, 2.2e9)
    assert target_check.speeds(target("v5p:2x2x1")) == Speeds(459e12, 2765e9, 1.75e9)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(coords=(0, 0, 0))] * 2))
    assert Network.of(target("tpu7x:2x2x1"), mesh)[2:] == (45e9, 6.25e9)
    assert Network.of(target("v5p:2x2x1"), mesh)[2:] == (90e9, 6.25e9)


def test_the_network_of_several_slices_is_that_of_one():
    mesh = SimpleNamespace(devices=np.empty((2, 4), dtype=object))
    mesh.devices.flat[:] = [SimpleNamespace(coords=tuple(chip)) for chip in (*COORDINATES, *COORDINATES)]
    network = Network.of(target("v5p:2x2x1")._replace(slices=2), mesh)
    assert network.coordinates.tolist() == COORDINATES.tolist()
