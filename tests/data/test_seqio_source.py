"""A seqio mixture gives the examples that seqio's own feature converter gives; its tokens are kept and read again."""

import pickle

import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.data.chunking import describe, open_chunks
from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import finite_batches
from t5g2.data.shards import token_shards
from t5g2.data.shards.token_shards import Tokens
from t5g2.data.sources.python_text import PythonText
from t5g2.data.sources.seqio_source import Seqio
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import SentencePiece
from t5g2.eval.generate_and_compare import GenerateAndCompare
from t5g2.eval.task_interface import EvalContext
from t5g2.objectives import Causal, Seq2Seq
from tests.data import tokenizer_files

seqio = pytest.importorskip("seqio", reason="the extra `seqio` (TensorFlow, Python 3.11) is not installed")

pytestmark = pytest.mark.long

MODULE = "tests.data.seqio_tasks"
INPUTS, TARGETS = 24, 6
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seqio")
    with pytest.MonkeyPatch.context() as patch:
        path = tokenizer_files.sentencepiece(folder)
        patch.setenv("T5G2_TEST_VOCABULARY", str(path))
        patch.setenv("T5G2_CACHE", str(folder / "cache"))
        yield SentencePiece(str(path))


def converted(name, converter, lengths, *, examples, num_epochs):
    """The unpadded examples of seqio's converter, as lists."""
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        sequence_length=lengths, split="train", shuffle=False, seed=7, num_epochs=num_epochs
    )
    out = []
    for example in converter(dataset.take(examples), lengths).as_numpy_iterator():
        length = np.count_nonzero(example["decoder_loss_weights"])
        encoder = example.get("encoder_input_tokens", np.empty(0, np.int32))
        decoder = [example[f"decoder_{side}_tokens"][:length].tolist() for side in ("input", "target")]
        out.append((encoder[encoder > 0].tolist(), *decoder))
    return out


def test_examples_of_seqio_are_records_of_an_evaluation_task(tokenizer):
    data = DataConfig((Source(PythonText(), Causal()),), tokenizer, 2, 0, 64, 24, streams=2)
    task = GenerateAndCompare(
        data=Seqio(MODULE, "plain_pairs", TARGETS, INPUTS), name="qa", template="{inputs}", reference="{targets}"
    )
    examples = task.read(EvalContext(data))
    lengths = {"inputs": INPUTS, "targets": TARGETS}
    own = seqio.get_mixture_or_task("plain_pairs").get_dataset(sequence_length=lengths, split="train", shuffle=False)
    prompts = [tokenizer.decode(e["inputs"], skip_special_tokens=True) for e in own.as_numpy_iterator()]
    assert [example.prompt for example in examples] == prompts
    assert [example.record["targets"] for example in examples] == ["0", "1", "2", "3", "4"]
    assert examples[2].prompt.startswith("plain question 2: why?")


def test_a_mixture_gives_what_seqio_gives(tokenizer):
    source = Seqio(MODULE, "mixed_pairs", TARGETS, INPUTS, examples=20, seed=7)
    chunks = open_chunks(source, tokenizer, chunk_tokens=32, on_bad_record="stop", pairs=True)
    objective, special_tokens = Seq2Seq(INPUTS, TARGETS), tokenizer.special_tokens
    made = [objective(chunks[i], RNG, special_tokens=special_tokens) for i in range(len(chunks))]
    ours = [(e.encoder_tokens.tolist(), e.decoder_tokens.tolist(), e.targets.tolist()) for e in made]
    converter = seqio.EncDecFeatureConverter(pack=False, bos_id=special_tokens.bos)
    lengths = {"inputs": INPUTS, "targets": TARGETS}
    theirs = converted("mixed_pairs", converter, lengths, examples=20, num_epochs=None)
    assert ours == theirs
    assert len(ours) == 20
    assert max(len(encoder) for encoder, _, _ in ours) == INPUTS, "some are cut off"
    assert describe("seqio", chunks).startswith("seqio: 20 pairs, ")

    # and through shuffling and rows of one example each
    data = DataConfig(
        (Source(source, objective),),
        tokenizer=tokenizer,
        rows=2,
        encoder_length=INPUTS,
        decoder_length=TARGETS,
        chunk_tokens=32,
        packing="none",
        streams=2,
    )
    rows = []
    for host in finite_batches(data, seed=0):
        batch = host.batch
        for encoder, decoder, targets, segments in zip(
            batch.encoder.tokens, batch.decoder.tokens, batch.targets, batch.decoder.segments, strict=True
        ):
            length = np.count_nonzero(segments)
            rows.append((encoder[encoder > 0].tolist(), decoder[:length].tolist(), targets[:length].tolist()))
    assert sorted(rows) == sorted(theirs)


def test_a_task_without_inputs_gives_documents(tokenizer):
    source = Seqio(MODULE, "documents", 64, seed=7)
    chunks = open_chunks(source, tokenizer, chunk_tokens=128, on_bad_record="stop")
    made = [Causal(eos=False)(chunks[i], RNG, special_tokens=tokenizer.special_tokens) for i in range(len(chunks))]
    ours = [([], e.decoder_tokens.tolist(), e.targets.tolist()) for e in made]
    converter = seqio.LMFeatureConverter(pack=False, bos_id=tokenizer.special_tokens.bos)
    assert ours == converted("documents", converter, {"targets": 64}, examples=4, num_epochs=1)
    assert len(ours) == 4


def test_tokens_are_kept_for_runs_without_seqio(tokenizer, tmp_path):
    source = Seqio(MODULE, "mixed_pairs", TARGETS, INPUTS, examples=9)
    documents = source.open()
    again = source.open()
    assert (documents.fingerprint, documents.file) == (again.fingerprint, again.file)
    token_shards.write(token_shards.Job(documents, tokenizer, {"kind": "seqio"}, 2), tmp_path / "tokens")
    kept, sent = Tokens(str(tmp_path / "tokens")).open(), pickle.loads(pickle.dumps(documents))
    assert kept.has_pairs
    assert sent.has_pairs
    assert kept.fingerprint == sent.fingerprint == documents.fingerprint
    for i in range(9):
        for other in (kept, sent):
            np.testing.assert_array_equal(other.tokens(i, tokenizer), documents.tokens(i, tokenizer))


def test_what_is_wrong_with_a_task_is_told(tokenizer):
    def opened(name, targets=TARGETS, inputs=INPUTS, *, tokenizer=tokenizer, pairs=True, bad="stop", **more):
        source = Seqio(more.pop("module", MODULE), name, targets, inputs, **more)
        return open_chunks(source, tokenizer, chunk_tokens=32, on_bad_record=bad, pairs=pairs)

    with pytest.raises(UserError, match=r"module 'no\.such', which has 'x', does not import"):
        opened("x", module="no.such")
    with pytest.raises(UserError, match="unknown seqio task or mixture 'plain_pair'; did you mean 'plain_pairs'"):
        opened("plain_pair")
    with pytest.raises(UserError, match="unknown split of plain_pairs 'test'"):
        opened("plain_pairs", split="test")
    with pytest.raises(UserError, match="mixed_pairs is a mixture, which is endless; set `examples`"):
        opened("mixed_pairs")
    with pytest.raises(UserError, match="documents has targets, and inputs_tokens = 24 asks for inputs, targets"):
        opened("documents")
    with pytest.raises(UserError, match="plain_pairs has inputs, targets, and inputs_tokens = 0 asks for targets"):
        opened("plain_pairs", inputs=0)
    with pytest.raises(
        UserError, match=r"has pairs of inputs and targets, and its objective takes text; the objective seq2seq"
    ):
        opened("plain_pairs", pairs=False)
    with pytest.raises(UserError, match=r"a pair of inputs and targets has \d+ tokens .* and chunk_tokens is 32"):
        opened("plain_pairs", inputs=64)
    with pytest.raises(UserError, match=r"plain_pairs has a vocabulary of its own .* gives other ids for 'The quick"):
        opened("plain_pairs", tokenizer=Bytes())
    with pytest.raises(UserError, match="with_an_empty_one, example 3: no targets; mend the task, or leave such"):
        opened("with_an_empty_one", 32, 0, pairs=False)
    with pytest.raises(UserError, match=r"1 of 4 records cannot be read.*\n  with_an_empty_one, example 3: no targets"):
        opened("with_an_empty_one", 32, 0, pairs=False, bad="skip")
    without_ids = (
        "%s does not give the features that it promises .*its examples must be ids: end its preprocessors with"
    )
    with pytest.raises(UserError, match=without_ids % "seqio's text"):
        opened("text", 32, 0, pairs=False)
    with pytest.raises(UserError, match=without_ids % "seqio's text_pairs"):
        opened("text_pairs")
