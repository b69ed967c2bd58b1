import numpy as np

from t5g2.data import preview
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import UL2, Denoiser
from tests.data import corpus


class Drawn:
    """A generator that cuts after the given tokens."""

    def __init__(self, *cuts):
        self._cuts = list(cuts)

    def random(self):
        return 0.0

    def choice(self, items, count, **_):
        return np.array(self._cuts.pop(0))


def test_the_drawn_example():
    tokenizer, text = Bytes(), "The cat sat on the mat"
    ul2 = UL2((Denoiser("spans", rate=10 / 22, mean_span=5.0),), loss_on_sentinels=False)
    example = ul2(tokenizer.encode(text), Drawn([3], [2]), special_tokens=tokenizer.special_tokens)
    assert preview.format_example(example, tokenizer) == (
        "encoder  The <sentinel_0> sat on <sentinel_1>\ntargets  ⟦<sentinel_0>⟧cat⟦<sentinel_1>⟧the mat<eos>"
    )


def test_a_packed_row(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    batch = corpus.batches(config, count=1)[0][0]
    lines = preview.format_row(batch, 1, config).splitlines()
    count = int(np.sum(batch.example_ids[1] >= 0))
    used = int(np.count_nonzero(batch.batch.encoder.segments[1]))
    assert lines[0].startswith(f"row 1 of stream 1: {count} examples, encoder {used} of 96 tokens, decoder ")
    assert len(lines) == 1 + 3 * count
    assert lines[1].startswith(f"[1] example {batch.example_ids[1][0]}, source ")
    assert all(line.endswith("<eos>") for line in lines[3::3])


def test_a_row_of_a_decoder_only_model(tmp_path):
    from t5g2.data.config import DataConfig, Source
    from t5g2.objectives import Causal

    source = Source(corpus.write_texts(tmp_path, "few", 5), Causal())
    config = DataConfig((source,), Bytes(), rows=2, encoder_length=0, decoder_length=41, chunk_tokens=40, streams=2)
    batch = corpus.batches(config, count=1)[0][0]
    first, _, targets = preview.format_row(batch, 0, config).splitlines()[:3]
    assert first.startswith("row 0 of stream 0: 1 example, decoder ")
    assert targets.startswith("targets  ")
    assert targets.endswith("<eos>")
    assert "\n" not in targets


def test_a_prefix_that_sees_both_ways(tmp_path):
    config = corpus.decoder_only(tmp_path, rows=4, streams=4)
    batch = next(iter(corpus.batches(config, count=1)[0]))
    lines = preview.format_row(batch, 0, config).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("prefix   "))
    prefix = lines[at].removeprefix("prefix   <bos>")
    assert lines[at + 1].startswith(f"targets  ⟦{prefix}⟧")
    assert lines[at + 1].endswith("<eos>")
