"""Batches: the same on any number of hosts, resumed as if never stopped, every example in its place exactly once."""

import collections
import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from t5g2.core.batch import HostBatch
from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data.config import DataConfig, Source
from t5g2.data.corpus import open_corpus
from t5g2.data.examples import source_examples
from t5g2.data.pipeline import Pipeline, describe_ratio, finite_batches, to_global
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.streams import StreamAssignment
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import UL2, Causal, PrefixLM, PrefixLMDecoder
from tests.data import corpus

# rows below, at and above 8 streams; the last splits a stream's rows between hosts
SHAPES = [(4, 8), (8, 8), (16, 8), (4, 2)]


def host_rows(rows: int, hosts: int) -> list[range]:
    each = rows // hosts
    return [range(h * each, (h + 1) * each) for h in range(hosts)]


@pytest.mark.parametrize(("rows", "streams"), SHAPES)
@pytest.mark.parametrize("made", [corpus.mixed, corpus.decoder_only])
@pytest.mark.parametrize("packing", ["first_fit", "best_fit"])
def test_batches_are_the_same_on_1_2_4_and_8_hosts(tmp_path, rows, streams, made, packing):
    config = made(tmp_path, rows=rows, streams=streams, packing=packing)
    alone, _ = corpus.batches(config, count=6)
    for hosts in (n for n in (2, 4, 8) if rows % n == 0):
        parts = [corpus.batches(config, count=6, rows=r)[0] for r in host_rows(rows, hosts)]
        corpus.assert_same(alone, corpus.joined(parts))


def dealt_out(batches: list[HostBatch], rows: Sequence[int]) -> list[HostBatch]:
    """These rows of every array of the batches."""
    return jax.tree.map(lambda array: array[list(rows)], batches)


@pytest.mark.parametrize(("rows", "streams"), SHAPES)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_rows_of_a_host_need_not_be_neighbours(tmp_path, rows, streams, workers):
    """Every second row, or any: of the same batches, from the same positions."""
    config = corpus.mixed(tmp_path, rows=rows, streams=streams)
    whole, end = corpus.batches(config, count=6)
    with_workers = dataclasses.replace(config, workers=workers)
    hosts = [range(0, rows, 2), range(1, rows, 2)] if workers else [range(0, rows, 2), range(1, rows, 2), (0, 2, 3)]
    reached = {}
    for held in hosts:
        parts, positions = corpus.batches(with_workers, count=6, rows=held)
        corpus.assert_same(dealt_out(whole, held), parts)
        assert positions == {stream: end[stream] for stream in positions}
        reached |= positions
    assert reached == end


@pytest.mark.parametrize("rows", [(), (1, 0), (1, 1), (-1, 0), (3, 4)])
def test_rows_that_are_no_part_of_the_batch(tmp_path, rows):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    with pytest.raises(UserError, match=re.escape(f"rows {rows} are not a part of the batch; it has rows 0 to 3, in")):
        Pipeline(config, seed=0, rows=rows)


@pytest.mark.parametrize(("rows", "streams"), SHAPES)
@pytest.mark.parametrize("made", [corpus.mixed, corpus.decoder_only])
def test_saved_on_4_hosts_resumed_on_2(tmp_path, rows, streams, made):
    config = made(tmp_path, rows=rows, streams=streams)
    whole, _ = corpus.batches(config, count=9)
    saved = {}
    for r in host_rows(rows, 4):
        saved |= corpus.batches(config, count=5, rows=r)[1]
    assert saved.keys() == set(range(streams))
    saved = {str(stream): list(position) for stream, position in saved.items()}  # through JSON
    parts = [corpus.batches(config, count=4, rows=r, positions=saved)[0] for r in host_rows(rows, 2)]
    corpus.assert_same(whole[5:], corpus.joined(parts))


@pytest.mark.parametrize(("rows", "streams"), [(2, 4), (6, 3)])
@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "none"])
def test_resumed_at_any_step_is_never_stopped(tmp_path, rows, streams, packing):
    config = corpus.mixed(tmp_path, rows=rows, streams=streams, packing=packing, prefetch=4)
    whole, end = corpus.batches(config, count=9)
    positions = None
    with Pipeline(config, seed=0) as pipeline:
        for step in range(1, 9):
            pipeline.next()
            positions = pipeline.positions  # of what was taken, though up to 4 batches more are made
            rest, rest_end = corpus.batches(config, count=9 - step, positions=positions)
            corpus.assert_same(whole[step:], rest)
            assert rest_end == end


def test_rows_carry_the_position_of_their_stream(tmp_path):
    config = corpus.mixed(tmp_path, rows=6, streams=3)
    batches, end = corpus.batches(config, count=4)
    for batch in batches:
        np.testing.assert_array_equal(batch.streams, [0, 0, 1, 1, 2, 2])
        assert batch.positions.shape == (6, 3)
    assert end == {s: tuple(batches[-1].positions[2 * s + 1].tolist()) for s in range(3)}
    rest, _ = corpus.batches(config, count=2, positions={s: batches[1].positions[2 * s + 1] for s in range(3)})
    corpus.assert_same(batches[2:], rest)


def test_streams_are_read_in_turn_when_rows_are_few(tmp_path):
    batches, _ = corpus.batches(corpus.mixed(tmp_path, rows=2, streams=6), count=7)
    assert [b.streams.tolist() for b in batches] == [[0, 3], [1, 4], [2, 5], [0, 3], [1, 4], [2, 5], [0, 3]]


def test_groups_hold_rows_and_streams():
    few, many = StreamAssignment(rows=2, streams=6), StreamAssignment(rows=6, streams=2)
    assert [(list(few.rows_of(g)), list(few.streams_of(g))) for g in range(few.groups)] == [
        ([0], [0, 1, 2]),
        ([1], [3, 4, 5]),
    ]
    assert [(list(many.rows_of(g)), list(many.streams_of(g))) for g in range(many.groups)] == [
        ([0, 1, 2], [0]),
        ([3, 4, 5], [1]),
    ]
    assert many.groups_with(range(2, 4)) == (0, 1)
    assert many.groups_with(range(3, 5)) == (1,)
    assert StreamAssignment(rows=8, streams=4).groups_with((1, 4, 5)) == (0, 2)


def test_another_seed_gives_other_batches(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    a, b = (corpus.batches(config, count=1, seed=seed)[0][0].batch.targets for seed in (0, 1))
    assert not np.array_equal(a, b)


def test_an_epoch_has_every_piece_of_every_source_once(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    with Pipeline(config, seed=0) as pipeline:
        epoch = [len(p) for p in pipeline.corpus.chunks]
        seen = collections.Counter()
        for _ in range(60):
            ids = pipeline.next().example_ids
            seen.update(ids[ids >= 0].tolist())
    assert set(seen.values()) == {1}
    for source, chunks in enumerate(epoch):
        # up to the slowest stream nothing is left out; example k and k + epoch are of the same shuffle's two rounds
        drawn = sorted(i // 2 for i in seen if i % 2 == source)
        unbroken = next((n for n, k in enumerate(drawn) if k != n), len(drawn))
        assert unbroken > chunks


def test_what_is_packed_is_the_examples_themselves(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    packed, _ = corpus.batches(config, count=30)
    alone, _ = corpus.batches(dataclasses.replace(config, packing="none"), count=70)
    whole = {example_id: example for batch in alone for example_id, example in examples(batch)}
    compared = 0
    for batch in packed:
        for example_id, example in examples(batch):
            if example_id in whole:
                compared += 1
                for a, b in zip(example, whole[example_id], strict=True):
                    np.testing.assert_array_equal(a, b)
    assert compared > 200


def examples(host_batch):
    """(id, arrays by side, positions included) of every example in a batch."""
    batch = host_batch.batch
    for row, ids in enumerate(host_batch.example_ids):
        for number, example_id in enumerate(ids[ids >= 0], start=1):
            e = batch.encoder.segments[row] == number
            d = batch.decoder.segments[row] == number
            yield (
                int(example_id),
                (
                    batch.encoder.tokens[row][e],
                    batch.encoder.positions[row][e],
                    batch.decoder.tokens[row][d],
                    batch.decoder.positions[row][d],
                    batch.targets[row][d],
                    batch.weights[row][d],
                    batch.denoisers[row][d],
                    batch.sources[row][d],
                ),
            )


def test_a_batch_keeps_the_contract(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    assert config.denoisers == (*UL2().denoisers, "prefix_lm")
    for host_batch in corpus.batches(config, count=5)[0]:
        batch = host_batch.batch
        for stream in (batch.encoder, batch.decoder):
            assert {a.dtype for a in stream[:3]} == {np.dtype(np.int32)}
            assert not np.any(stream.tokens[stream.segments == 0])
        padding = batch.decoder.segments == 0
        for array in (batch.targets, batch.weights, batch.denoisers, batch.sources):
            assert array.shape == (4, 96)
            assert not np.any(array[padding])
        starts = (batch.decoder.positions == 0) & ~padding
        assert np.all(batch.decoder.tokens[starts] == corpus.SPECIALS.bos)
        assert starts.sum() == np.sum(host_batch.example_ids >= 0)
        # a source's denoisers are its own
        assert np.all((batch.denoisers == 5)[~padding] == (batch.sources == 1)[~padding])


def test_a_decoder_only_batch_has_no_encoder(tmp_path):
    source = Source(corpus.write_texts(tmp_path, "few", 5), Causal())
    config = DataConfig((source,), Bytes(), rows=2, encoder_length=0, decoder_length=96, chunk_tokens=40, streams=2)
    batches, _ = corpus.batches(config, count=3)
    assert batches[0].batch.encoder is None
    with Pipeline(config, seed=0) as pipeline:
        pipeline.next()
        summary = pipeline.statistics.summary()
    assert summary["encoder_padding"] == 0.0
    assert summary["decoder_padding"] == np.mean(batches[0].batch.decoder.segments == 0)
    assert summary["examples_per_row"] == np.mean(np.sum(batches[0].example_ids >= 0, axis=1))


def test_blocks_are_packed_with_their_examples(tmp_path):
    """Each prefix is BOS and the tokens whose targets do not count; elsewhere, and without such a source, none."""
    config = corpus.decoder_only(tmp_path, rows=4, streams=4)
    prefixes = 0
    for host_batch in [*corpus.batches(config, count=5)[0], *finite_batches(config, seed=0)]:
        batch = host_batch.batch
        blocks = batch.decoder.blocks
        assert blocks.dtype == np.int32
        assert not np.any(blocks[batch.decoder.segments == 0])
        for row in range(4):
            for segment in np.unique(batch.decoder.segments[row][batch.decoder.segments[row] > 0]):
                here = batch.decoder.segments[row] == segment
                silent = int(np.sum(batch.weights[row][here] == 0.0))
                prefix = silent + 1 if batch.sources[row][here][0] == 0 else 0
                np.testing.assert_array_equal(blocks[row][here], np.arange(here.sum()) < prefix)
                prefixes += prefix > 0
    assert prefixes > 50
    plain = dataclasses.replace(config, sources=config.sources[1:])
    assert corpus.batches(plain, count=1)[0][0].batch.decoder.blocks is None


def test_blocks_come_through_workers(tmp_path):
    config = corpus.decoder_only(tmp_path, rows=4, streams=4)
    here, _ = corpus.batches(config, count=3)
    there, _ = corpus.batches(dataclasses.replace(config, workers=2), count=3)
    corpus.assert_same(here, there)


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "none"])
@pytest.mark.parametrize("made", [corpus.mixed, corpus.decoder_only])
def test_packed_examples_are_those_that_went_in(tmp_path, made, packing):
    """Array by array: tokens, targets, weights and blocks of every example, from 0 on and at its own segment."""
    config = made(tmp_path, rows=4, streams=4, packing=packing)
    opened = open_corpus(config)
    went_in = [source_examples(opened, i, seed=derive_seed(3, "finite"), epochs=1) for i in range(2)]
    packed = 0
    for host in finite_batches(config, seed=3):
        data = host.batch
        for row, segment in zip(*np.nonzero(host.example_ids >= 0), strict=True):
            number, source = divmod(int(host.example_ids[row, segment]), 2)
            example, sides = went_in[source][number], {"decoder": data.decoder}
            if data.encoder is not None:
                sides["encoder"] = data.encoder
            for side, stream in sides.items():
                here = stream.segments[row] == segment + 1
                np.testing.assert_array_equal(stream.tokens[row][here], example[side])
                np.testing.assert_array_equal(stream.positions[row][here], np.arange(here.sum()))
            here = data.decoder.segments[row] == segment + 1
            np.testing.assert_array_equal(data.targets[row][here], example["targets"])
            np.testing.assert_array_equal(data.weights[row][here], example["weights"])
            assert (data.decoder.blocks is not None) == ("blocks" in example) == config.uses_blocks
            if data.decoder.blocks is not None:
                np.testing.assert_array_equal(data.decoder.blocks[row][here], example["blocks"])
            packed += 1
    assert packed == sum(map(len, went_in))


def test_both_arms_of_a_comparison_train_on_the_same_targets(tmp_path):
    """An encoder-decoder with prefix_lm and a decoder-only model with prefix_lm_decoder, example by example."""
    text = corpus.write_texts(tmp_path, "many", 23)

    def asked(objective, **lengths):
        config = corpus.mixed(tmp_path, rows=4, streams=4, sources=(Source(text, objective),), **lengths)
        found = {}
        for host in corpus.batches(config, count=8)[0]:
            data = host.batch
            for row, segment in zip(*np.nonzero(host.example_ids >= 0), strict=True):
                counts = (data.decoder.segments[row] == segment + 1) & (data.weights[row] > 0)
                found[int(host.example_ids[row, segment])] = data.targets[row][counts].tolist()
        return found

    pair, alone = asked(PrefixLM("uniform")), asked(PrefixLMDecoder("uniform"), encoder_length=0)
    both = pair.keys() & alone.keys()
    assert len(both) > 40
    assert {k: pair[k] for k in both} == {k: alone[k] for k in both}


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "none"])
def test_finite_batches_have_every_piece_exactly_once(tmp_path, packing):
    config = corpus.mixed(tmp_path, rows=4, streams=4, packing=packing)
    with Pipeline(config, seed=0) as pipeline:
        chunks = [len(p) for p in pipeline.corpus.chunks]
    batches = list(finite_batches(config, seed=3))
    assert {len(b.batch.targets) for b in batches} == {4}
    ids = np.concatenate([b.example_ids[b.example_ids >= 0] for b in batches])
    assert sorted(ids.tolist()) == sorted([2 * k for k in range(chunks[0])] + [2 * k + 1 for k in range(chunks[1])])
    empty = np.all(batches[-1].example_ids < 0, axis=1)
    assert not np.any(batches[-1].batch.weights[empty])
    corpus.assert_same(batches, list(finite_batches(config, seed=3)))
    parts = [list(finite_batches(config, seed=3, rows=r)) for r in host_rows(4, 2)]
    corpus.assert_same(batches, corpus.joined(parts))
    corpus.assert_same(dealt_out(batches, (0, 2)), list(finite_batches(config, seed=3, rows=(0, 2))))


def test_finite_batches_of_one_denoiser(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    config = dataclasses.replace(config, sources=config.sources[:1])
    for batch in finite_batches(config, seed=3, denoiser="mu32_r50", examples=10):
        # of this one the number stays what it is in the mixture, so losses can be kept apart by it
        assert set(np.unique(batch.batch.denoisers)) <= {0, 3}
    assert (
        sum(np.sum(b.example_ids >= 0) for b in finite_batches(config, seed=3, denoiser="mu32_r50", examples=10)) == 10
    )
    with pytest.raises(UserError, match=r"unknown denoiser 'mu32'.*did you mean"):
        finite_batches(config, seed=3, denoiser="mu32")


def test_to_global_puts_rows_on_devices(tmp_path, devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = corpus.batches(corpus.mixed(tmp_path, rows=8, streams=4), count=1)[0][0].batch
    on_devices = to_global(batch, sharding, rows=8)
    assert on_devices.encoder.tokens.sharding == sharding
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), on_devices, batch)


def test_positions_of_another_number_of_streams_are_refused(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    with pytest.raises(
        UserError, match=r"of 2 streams and data.streams is \d+; .* to the number that the run began with"
    ):
        Pipeline(config, seed=0, positions={0: (0, 0, 0), 1: (0, 0, 0)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 6}, "rows = 6 and streams = 4: neither divides the other.*nearest streams that fit: 2, 3, 6"),
        (
            {"encoder_length": 30},
            "'many'.* up to 36 encoder and 31 decoder tokens.*encoder_length = 30.* or lower chunk_tokens to 33",
        ),
        ({"decoder_length": 20}, "decoder_length = 20; raise the lengths to at least these"),
        (
            {"tokenizer": Bytes(sentinels=1)},
            "takes up to 2 sentinels, and the tokenizer has 1; give the tokenizer 2 sentinels",
        ),
        ({"chunk_tokens": 4}, "chunk_tokens = 4; it must be at least 16"),
        ({"sources": ()}, "sources is empty"),
        ({"workers": -1}, "workers = -1; it must be at least 0"),
        (
            {"encoder_length": 0},
            "'many': its objective, UL2, makes encoder inputs, and encoder_length is 0: .* Take causal or prefix_lm_",
        ),
        (
            {"sources": (Source(TextFiles("*.txt"), PrefixLMDecoder()),)},
            "its objective, PrefixLMDecoder, is for a decoder-only model, and encoder_length is 96; take prefix_lm, or",
        ),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, message):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)


def test_the_sentinels_of_a_16384_token_piece():
    source = Source(None, UL2())
    lengths = {"rows": 1, "streams": 1, "encoder_length": 16384, "decoder_length": 16384}
    with pytest.raises(UserError, match="takes up to 819 sentinels, and the tokenizer has 100"):
        DataConfig((source,), Bytes(), chunk_tokens=16384, **lengths)
    DataConfig((source,), Bytes(sentinels=819), chunk_tokens=16384, **lengths)


def test_sources_have_names_and_weights(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    assert config.names == ("many", "few")
    same = tuple(dataclasses.replace(s, name="x") for s in config.sources)
    with pytest.raises(UserError, match="two sources have the same name: x, x"):
        dataclasses.replace(config, sources=same)
    with pytest.raises(UserError, match=r"weight = 0; .*; to leave the source out, remove it"):
        Source(config.sources[0].text, PrefixLM(), weight=0)


def test_statistics_count_slots_and_weigh_them(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    with Pipeline(config, seed=0) as pipeline:
        batch = pipeline.next().batch
        statistics = pipeline.statistics
    encoder, decoder = (int(np.count_nonzero(side.segments)) for side in (batch.encoder, batch.decoder))
    summary = statistics.summary()
    assert summary["mixture_ratio"] == decoder / encoder
    assert summary["row_ratio"] == 1.0
    assert summary["padding"] == 1 - (encoder + decoder) / (2 * 4 * 96)
    assert statistics.padding(encoder_flops=1, decoder_flops=3) == 1 - (encoder + 3 * decoder) / (4 * 4 * 96)
    assert statistics.padding(encoder_flops=0) == summary["decoder_padding"]


def test_lengths_that_do_not_fit_the_mixture_are_told(tmp_path):
    def told(**changes):
        config = corpus.mixed(tmp_path, rows=8, streams=4, **changes)
        with Pipeline(config, seed=0) as pipeline:
            for _ in range(40):
                pipeline.next()
            return describe_ratio(pipeline.statistics.summary(), config)

    fits = told(encoder_length=192, decoder_length=200)
    assert re.fullmatch(r"1\.\d\d decoder tokens to one encoder token in the examples, 1.04 in the rows", fits)
    # half of the encoder is of no use; a chunk of 40 tokens fits into less
    wide = told(encoder_length=384, decoder_length=200)
    named = re.search(
        r"0.52 in the rows; 5\d\.\d% of the encoder's slots and \d\.\d% of the decoder's are empty: "
        r"decoder_length = (\d+) or encoder_length = (\d+) would fit",
        wide,
    )
    assert named, wide
    assert 370 <= int(named[1]) <= 512
    assert 170 <= int(named[2]) <= 210
    # an encoder that fits would be too short for the longest example
    assert re.search(
        r"empty: decoder_length = \d+ would", told(encoder_length=400, decoder_length=100, chunk_tokens=100)
    )
    assert "empty" not in told(encoder_length=384, decoder_length=200, packing="none")
    plain = corpus.decoder_only(tmp_path, rows=4, streams=4)
    with Pipeline(plain, seed=0) as pipeline:
        pipeline.next()
        assert describe_ratio(pipeline.statistics.summary(), plain) == ""


def test_a_run_is_told_how_its_rows_fit(tmp_path, caplog):
    config = corpus.mixed(tmp_path, rows=4, streams=4, packing_rows=3)
    with caplog.at_level("INFO", logger="t5g2"), Pipeline(config, seed=0) as pipeline:
        for _ in range(5):
            pipeline.next()
    [line] = [record.getMessage() for record in caplog.records if "padding" in record.getMessage()]
    assert re.match(r"the first 3 batches: \d\d\.\d% padding; \d\.\d\d decoder tokens to one encoder token", line)
