"""Generation from caches equals the full forward; rows do not know of each other; samplers by literal distributions."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import tree
from t5g2.core.batch import Sequences, image_blocks
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.core.sharding import make as make_mesh
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval import decoding, sample_search
from t5g2.eval import generation as g
from t5g2.eval.sampling import row_keys
from t5g2.eval.stop_strings import stop_table
from t5g2.models import build
from t5g2.models.layers import Compute
from tests import tiny, weights
from tests.models.test_loss import equations

COMPUTE = Compute(dtype="float32")
INF = -np.inf
NO_EOS = 96  # of the tiny vocabulary; not what these models say
LENGTH = 24  # of rows in full forward passes: one, so that they are one program


def model_of(config):
    """Blocks that outweigh the embedding: otherwise, as it is tied, the likeliest next token is the last one again."""
    drawn = {key: (0.3 if len(x) > 90 else 3) * x for key, x in weights.weights(config).items()}
    return tree.build(build.abstract(config), drawn.__getitem__)


@pytest.fixture(scope="module")
def gemma():
    return model_of(tiny.GEMMA3)


@pytest.fixture(scope="module")
def t5gemma():
    return model_of(tiny.T5GEMMA2)


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(8, 90, n).astype(np.int32) for n in lengths]


def options(new, ends=(NO_EOS,), **others):
    return g.GenerationOptions(new, stop_ids=ends, pad_id=0, compute=COMPUTE, **others)


# samples and beams of each prompt, which end at different lengths
SEVERAL = [
    dataclasses.replace(options(6, ends=(5, 6, 7, 8, 9), **extra), num_return_sequences=2, min_new_tokens=2)
    for extra in ({"sampler": g.TopK(5, t=2.0)}, {"num_beams": 3})
]


def generate(model, encoder, prompt, options):
    """Returns int32[P, N], the tokens of one output of each prompt."""
    keys = None if options.sampler == g.GREEDY else row_keys(1, np.arange(len(prompt.tokens)), 1)
    generated = g.generate(model, g.Prompts(prompt, encoder), options=options, keys_R=keys)
    return np.asarray(generated.tokens_PnN[:, 0])


def complete(model, prompts, images=None, *, indices=None, **setup):
    return g.complete(model, prompts, images, setup=g.GenerationSetup(**setup), indices=indices)


def tokens_of(outputs):
    return [output.tokens for output in outputs]


@jax.jit
def full_logits(model, encoder, decoder, images=None):
    return model.logits(model.hidden(encoder, decoder, images, compute=COMPUTE))


def by_full_forward(model, encoder, start, new, images=None):
    """The likeliest token again and again, each from a forward pass over everything so far."""
    tokens = [int(t) for t in start]
    while len(tokens) < len(start) + new:
        row = np.array([tokens + [0] * (LENGTH - len(tokens))], np.int32)
        here = (np.arange(LENGTH) < len(tokens)).astype(np.int32)[None]
        blocks = None if images is None or encoder is not None else image_blocks(row, tiny.IMAGES.token)
        decoder = Sequences(row, here, np.arange(LENGTH, dtype=np.int32)[None], blocks)
        logits = np.asarray(full_logits(model, encoder, decoder, images))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(start) :]


def test_greedy_from_the_cache_is_the_argmax_of_the_full_forward_decoder_only(gemma):
    [start] = prompts([6])
    generated = generate(gemma, None, g.pad_rows([start], pad=0, left=True), options(8))
    expected = by_full_forward(gemma, None, start, 8)
    assert generated[0].tolist() == expected
    assert len(set(expected)) > 3  # it does not just repeat itself


def test_a_prompt_that_sees_both_ways_is_a_prefix(gemma):
    """As the full forward pass has it, with the prompt as a block and what follows from left to right."""
    for prompt in prompts((3, 9)):
        tokens, places = prompt, np.arange(LENGTH, dtype=np.int32)
        for _ in range(8):
            row = np.pad(tokens, (0, len(places) - len(tokens)))
            here, block = (places < len(tokens)).astype(np.int32), (places < len(prompt)).astype(np.int32)
            line = Sequences(*(x[None] for x in (row, here, places, block)))
            logits = np.asarray(full_logits(gemma, None, line))
            tokens = np.append(tokens, np.int32(logits[0, len(tokens) - 1].argmax()))
        both_ways = dataclasses.replace(options(8), prompt_both_ways=True)
        [generated] = tokens_of(complete(gemma, [prompt], bos=2, options=both_ways))
        np.testing.assert_array_equal(generated, tokens[len(prompt) :])
        [causal] = tokens_of(complete(gemma, [prompt], bos=2, options=options(8)))
        assert generated.tolist() != causal.tolist()


def test_greedy_from_the_cache_is_the_argmax_of_the_full_forward_encoder_decoder(t5gemma):
    [read], start = prompts([11]), np.array([2], np.int32)
    encoder = g.pad_rows([read], pad=0, left=False)
    generated = generate(t5gemma, encoder, g.pad_rows([start], pad=0, left=True, multiple=1), options(8))
    expected = by_full_forward(t5gemma, encoder, start, 8)
    assert generated[0].tolist() == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("sampler", [g.GREEDY, g.TopK(5, t=2.0)])
def test_rows_of_different_lengths_are_generated_as_each_alone(gemma, sampler):
    starts = prompts([9, 1, 4])
    together = generate(gemma, None, g.pad_rows(starts, pad=0, left=True), options(8, sampler=sampler))
    for row, start in enumerate(starts):
        # the same row, because its draws depend on its number; the others are left empty
        only = [start if r == row else start[:0] for r in range(3)]
        alone = generate(gemma, None, g.pad_rows(only, pad=0, left=True), options(8, sampler=sampler))
        assert alone[row].tolist() == together[row].tolist()
        assert alone[(row + 1) % 3].tolist() == [0] * 8  # nothing is generated for an empty row


def test_rows_of_different_encoder_lengths_are_generated_as_each_alone(t5gemma):
    reads = prompts([9, 1, 13])
    starts = g.pad_rows([np.array([2], np.int32)] * 3, pad=0, left=True, multiple=1)
    one = jax.tree.map(lambda x: x[:1], starts)
    together = generate(t5gemma, g.pad_rows(reads, pad=0, left=False), starts, options(8))
    for row, read in enumerate(reads):
        alone = generate(t5gemma, g.pad_rows([read], pad=0, left=False), one, options(8))
        assert alone[0].tolist() == together[row].tolist()
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_a_row_ends_with_eos_and_then_pad_while_others_go_on(gemma):
    starts = g.pad_rows(prompts([9, 1, 4]), pad=0, left=True)
    free = generate(gemma, None, starts, options(8)).tolist()
    ends = free[0][3], free[1][2]
    ended = generate(gemma, None, starts, options(8, ends=ends)).tolist()
    for before, after in zip(free, ended, strict=True):
        end = min([before.index(eos) + 1 for eos in ends if eos in before], default=8)
        assert after == before[:end] + [0] * (8 - end)
    assert set(ended[0][:4]) & set(ends)
    assert set(ended[1][:3]) & set(ends)


def test_what_is_suppressed_is_never_made(gemma):
    """Another token is made in its place, as if it had no probability at all."""
    starts = g.pad_rows(prompts([9, 1, 4]), pad=0, left=True)
    free = np.asarray(generate(gemma, None, starts, options(8)))
    unwanted = (0, NO_EOS, *free[:, 0].tolist())
    for sampler in (g.GREEDY, g.Temperature(5.0)):
        restricted = options(8, sampler=sampler, suppressed_ids=unwanted)
        generated = generate(gemma, None, starts, restricted)
        assert not np.isin(generated, unwanted).any()
        assert generated.all()


@pytest.mark.parametrize("config", [tiny.GEMMA3_IMAGES, tiny.T5GEMMA2_IMAGES], ids=["decoder-only", "encoder-decoder"])
def test_images_are_read_with_the_prompt(config):
    """From caches as from full forwards; rows have one image and two, one of them none that others do not see."""
    model = model_of(config)
    image = [tiny.IMAGES.begin, *[tiny.IMAGES.token] * tiny.IMAGES.tokens, tiny.IMAGES.end]
    reads = [np.array(tokens, np.int32) for tokens in ([2, 20, *image, 30], [2, *image, 40, *image], [2, 50, 51])]
    images = np.random.default_rng(0).uniform(-1, 1, (3, 2, 16, 16, 3)).astype(np.float32)
    together = tokens_of(complete(model, reads, images, bos=2, options=options(6, ends=())))
    for row, read in enumerate(reads):
        encoder, start = None, read
        if config is tiny.T5GEMMA2_IMAGES:
            encoder, start = g.pad_rows([read], pad=0, left=False), np.array([2], np.int32)
        assert together[row].tolist() == by_full_forward(model, encoder, start, 6, images[row : row + 1])
    others = tokens_of(complete(model, reads, -images, bos=2, options=options(6, ends=())))
    assert [a.tolist() == b.tolist() for a, b in zip(together, others, strict=True)] == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "cut"), [(options(8), "context"), *((settings, "tensor") for settings in SEVERAL)]
)
def test_eight_devices_generate_what_one_does(t5gemma, devices, settings, cut):
    """Three prompts on four parts of rows, one of which is empty; heads are cut too, or the columns of prompts."""
    reads, rows = prompts([9, 13, 5]), 8 if settings in SEVERAL else 3
    alone = complete(t5gemma, reads, bos=2, options=settings, rows=rows)
    with jax.set_mesh(make_mesh(MeshShape(**{"data": 2, "fsdp": 2, cut: 2}), devices)):
        batch, keys = g.batch_of(t5gemma, reads, setup=g.GenerationSetup(settings, bos=2))
        together = g.generate(t5gemma, batch, options=settings, keys_R=keys)
    assert together.tokens_PnN.is_fully_replicated
    assert len(together.tokens_PnN) == 4
    outputs = g.outputs(together, settings)[: len(alone)]
    assert [t.tolist() for t in tokens_of(outputs)] == [t.tolist() for t in tokens_of(alone)]


def test_complete_takes_prompts_of_any_length():
    """Each gets the tokens that it would get alone, without stop token and padding."""
    tokenizer = Bytes(sentinels=3)
    special = tokenizer.special_tokens
    config = dataclasses.replace(tiny.GEMMA3, vocab_size=tokenizer.vocab_size)
    greedy = options(5, ends=(special.eos,))
    nucleus = options(5, ends=(special.eos,), sampler=g.TopP(0.9))
    for model in (model_of(config), model_of(dataclasses.replace(tiny.T5GEMMA2, encoder=config, decoder=config))):
        reads = [np.append(np.int32(special.bos), tokenizer.encode(text)) for text in ("def f(", "")]
        both = tokens_of(complete(model, reads, bos=special.bos, options=greedy))
        assert [type(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in both] == [str, str]
        [alone] = tokens_of(complete(model, reads[:1], bos=special.bos, options=greedy, rows=2))
        assert alone.tolist() == both[0].tolist()
        [sampled] = tokens_of(complete(model, [tokenizer.encode("x")], bos=special.bos, options=nucleus))
        assert len(sampled) <= 5
        assert not np.isin(sampled, (special.eos, special.pad)).any()
    assert complete(model, [], bos=special.bos, options=greedy) == []


def test_padding_is_drawn_as_in_the_docstring():
    left = g.pad_rows([np.array([7, 8, 9]), np.array([5])], pad=0, left=True, multiple=1)
    assert left.tokens.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert left.segments.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    right = g.pad_rows([np.array([7, 8, 9]), np.array([5])], pad=3, left=False, multiple=4)
    assert right.tokens.tolist() == [[7, 8, 9, 3], [5, 3, 3, 3]]
    assert right.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("sampler", "logits", "expected"),
    [
        (g.Greedy(), [1, 3, 3], [INF, 3, INF]),
        (g.Temperature(0.5), [1, 3, 2], [2, 6, 4]),
        (g.TopK(2), [1, 3, 2, 2], [INF, 3, 2, INF]),
        (g.TopK(2, t=0.5), [1, 3, 2, 2], [INF, 6, 4, INF]),
        (g.TopK(9), [1, 3, 2], [1, 3, 2]),
        (g.TopP(1.0), [1, 3, 2], [1, 3, 2]),
    ],
)
def test_samplers_leave_these_logits(sampler, logits, expected):
    left = sampler.restrict(jnp.array([logits, logits[::-1]], jnp.float32))
    assert left[0].tolist() == expected


@pytest.mark.parametrize(
    ("p", "t", "expected"),
    [
        (0.6, 1.0, [0, 0.625, 0.375, 0]),
        (0.5, 1.0, [0, 1, 0, 0]),
        (0.01, 1.0, [0, 1, 0, 0]),
        (0.81, 1.0, [0.1 / 0.9, 0.5 / 0.9, 0.3 / 0.9, 0]),  # of equal ones the first
        (1.0, 1.0, [0.1, 0.5, 0.3, 0.1]),
        (0.6, 0.5, [0, 1, 0, 0]),  # the temperature first: the likeliest has 0.25 / 0.36 = 0.69
    ],
)
def test_nucleus_by_literal_probabilities(p, t, expected):
    probabilities = jnp.array([[0.1, 0.5, 0.3, 0.1]])
    left = jax.nn.softmax(g.TopP(p, t).restrict(jnp.log(probabilities)))
    np.testing.assert_allclose(left[0], expected, atol=1e-6)


def random_operations(model, sampler):
    """Those of a program that generates the first token of two rows."""
    starts = g.pad_rows(prompts([3, 4]), pad=0, left=True)
    greedy = sampler == g.GREEDY
    prefill = partial(decoding.prefill, new_tokens=4, compute=g.FLOAT32)
    program = jax.make_jaxpr(
        lambda read, keys: sample_search.start(starts, read, None, keys, options=options(4, sampler=sampler))
    )
    keys = None if greedy else row_keys(0, np.arange(2), 1)
    read = jax.eval_shape(prefill, model, g.Prompts(starts))
    names = {equation.primitive.name for equation in equations(program(read, keys).jaxpr)}
    return {name for name in names if "random" in name or "threefry" in name}


def test_greedy_draws_no_random_number(gemma):
    assert random_operations(gemma, g.GREEDY) == set()
    assert random_operations(gemma, g.Temperature())


def test_a_greedy_draw_is_the_first_of_the_likeliest():
    logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    key, step = row_keys(0, np.arange(2), 1), jnp.int32(5)
    assert g.GREEDY.draw(logits, key, step).tolist() == [1, 0]
    # as a sampler of one token draws it, whatever the key
    assert g.TopK(1).draw(logits, key, step).tolist() == [1, 0]


def test_a_row_draws_the_same_token_whatever_is_in_the_others():
    logits, keys = np.random.default_rng(1).normal(size=(5, 50)).astype(np.float32), row_keys(0, np.arange(5), 1)
    others = logits.copy()
    others[[0, 1, 3]] = 0.0
    draw = jax.jit(lambda logits, step: g.Temperature().draw(logits, keys, step))
    together = np.asarray(draw(logits, np.int32(3)))
    assert np.asarray(draw(others, np.int32(3)))[[2, 4]].tolist() == together[[2, 4]].tolist()
    assert draw(logits, np.int32(4)).tolist() != together.tolist()


def test_draws_follow_the_restricted_distribution():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.3, 0.1]]))
    left = g.TopP(0.6).restrict(logits)[0]
    drawn = jax.random.categorical(jax.random.key(0), left, shape=(4000,))
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0, 0.625, 0.375, 0], atol=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: g.Temperature(0.0),
            "t = 0.0; it must be at least 1e-06 and at most 1000000; for the likeliest token use greedy",
        ),
        # logits divided by it are not finite in float32
        (lambda: g.Sampling(1e-40), "t = 1e-40; it must be at least 1e-06 and at most 1000000; for the likeliest"),
        (lambda: g.TopK(0), "k = 0; it must be at least 1"),
        (lambda: g.TopP(1.5), "p = 1.5; it must be above 0 and at most 1"),
        (lambda: g.TopP(0.5, t=-1), "t = -1; it must be at least 1e-06"),
        (lambda: options(0), "max_new_tokens = 0; it must be at least 1"),
    ],
)
def test_impossible_settings_are_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_samplers_compose_in_transformers_order():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
    cases = [(0.7, 8, 0.9), (1.3, 64, 0.95), (1.0, None, 0.3), (2.0, 1, None), (0.5, 40, 1.0)]
    for t, k, p in cases:
        warpers = [transformers.TemperatureLogitsWarper(t)]
        warpers += [] if k is None else [transformers.TopKLogitsWarper(min(k, 40))]
        warpers += [] if p is None else [transformers.TopPLogitsWarper(p)]
        expected = torch.tensor(logits)
        for warper in warpers:
            expected = warper(None, expected)
        np.testing.assert_allclose(g.Sampling(t, k, p).restrict(jnp.asarray(logits)), expected.numpy(), rtol=1e-5)


def test_a_drawn_row_of_composed_samplers():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2]]))
    probabilities = jax.nn.softmax(g.Sampling(k=3, p=0.6).restrict(logits))
    np.testing.assert_allclose(probabilities, [[0, 4 / 7, 3 / 7, 0]], atol=1e-6)


def test_a_draw_depends_on_seed_index_and_sample_alone():
    keys = {
        (seed, index, sample): tuple(data)
        for seed in (1, 2**32 + 1, 2**62 + 1, 2**63 - 1)
        for index in (0, 1, 7)
        for sample, data in enumerate(jax.random.key_data(row_keys(seed, np.array([index]), 3)).tolist())
    }
    assert len(set(keys.values())) == len(keys)
    both = jax.random.key_data(row_keys(2**62 + 1, np.array([7, 1]), 2)).tolist()
    assert [tuple(key) for key in both] == [keys[2**62 + 1, index, sample] for index in (7, 1) for sample in (0, 1)]


def test_a_pad_token_that_the_model_chooses_does_not_end_a_text():
    tokens = np.array([[[5, 0, 7, 9, 0, 0]], [[5, 0, 7, 0, 0, 0]]])
    generated = g.Generated(tokens, np.array([[4], [5]]))
    assert [t.tolist() for t in tokens_of(g.outputs(generated, options(6, ends=(9,))))] == [[5, 0, 7], [5, 0, 7, 0, 0]]


def test_prompts_whose_scores_fit_no_device_are_refused(gemma):
    long, reference = [np.zeros(1_000_000, np.int32)] * 2, dataclasses.replace(COMPUTE, backend="reference")
    dense = dataclasses.replace(options(4), compute=reference)
    with pytest.raises(UserError, match=r"2 prompts, the longest of 1,000,000 tokens, need 29,802 GiB for attention"):
        complete(gemma, long, bos=2, options=dense)
    with pytest.raises(UserError, match=r"need 715 GiB for keys and values, .* give fewer at a time"):
        complete(gemma, long * 1000, bos=2, options=options(4))
    with pytest.raises(UserError, match=r"outputs of max_new_tokens = 16,777,216 need .* for keys and .*; lower"):
        complete(gemma, [np.zeros(2, np.int32)] * 20_000, bos=2, options=options(2**24))


def stops_of(*strings):
    """Stop strings in a vocabulary whose token k is the letter k, from a on."""
    return stop_table(strings, [chr(97 + token).encode() for token in range(97)])


@pytest.mark.parametrize("extra", [{}, {"num_beams": 2}])
def test_an_output_ends_with_its_stop_string(gemma, extra):
    settings = dataclasses.replace(options(8), **extra)
    [free] = tokens_of(complete(gemma, prompts([6]), bos=2, options=settings))
    string = "".join(chr(97 + token) for token in free[3:5])
    [stopped] = tokens_of(complete(gemma, prompts([6]), bos=2, options=settings, stops=stops_of("zzz", string)))
    if not extra:
        assert stopped.tolist() == free[:5].tolist()
    # of beams, those that end early may be better than the one that does not
    text = "".join(chr(97 + token) for token in stopped.tolist())
    assert text.endswith(string) or (string not in text and len(text) == 8)


def test_a_batch_of_eight_is_eight_batches_of_one(gemma, t5gemma):
    """Whatever the other prompts and their padding: the same tokens, and in the same program the same scores."""
    reads = prompts([9, 1, 4, 30, 12, 7, 2, 5])
    for model in (gemma, t5gemma):
        for settings in SEVERAL:
            n = settings.num_return_sequences
            together = complete(model, reads, bos=2, options=settings, seed=3)
            for i, rows in ((0, 8), (7, 8), (3, 1)):
                alone = complete(model, [reads[i]], bos=2, options=settings, seed=3, indices=[i], rows=rows)
                expected = together[i * n : (i + 1) * n]
                assert [t.tolist() for t in tokens_of(alone)] == [t.tolist() for t in tokens_of(expected)]
                assert rows == 1 or [output.score for output in alone] == [output.score for output in expected]


def test_samples_of_a_prompt_differ_and_do_not_depend_on_its_place(gemma):
    read, other = prompts([6, 4])
    settings = dataclasses.replace(options(8, sampler=g.Temperature(3.0)), num_return_sequences=3)
    first = [t.tolist() for t in tokens_of(complete(gemma, [read, other], bos=2, options=settings, indices=[5, 2]))]
    second = [t.tolist() for t in tokens_of(complete(gemma, [other, read], bos=2, options=settings, indices=[2, 5]))]
    assert first[:3] == second[3:]
    assert first[3:] == second[:3]
    assert len({tuple(tokens) for tokens in first}) == 6
    single = dataclasses.replace(settings, num_return_sequences=1)
    assert tokens_of(complete(gemma, [read], bos=2, options=single, indices=[5]))[0].tolist() == first[0]


def test_log_probabilities_are_those_of_the_full_forward(t5gemma):
    """In the model's own distribution, whatever the sampler, the penalty and what is suppressed."""
    [read] = prompts([11])
    settings = dataclasses.replace(
        options(5, sampler=g.TopK(3, t=2.0), suppressed_ids=(40,)), log_probs=True, repetition_penalty=1.5
    )
    [output] = complete(t5gemma, [read], bos=2, options=settings, seed=1)
    decoder = g.pad_rows([np.append(np.int32(2), output.tokens[:-1])], pad=0, left=False, multiple=LENGTH)
    logits = np.asarray(full_logits(t5gemma, g.pad_rows([read], pad=0, left=False), decoder), np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = log_probs[np.arange(len(output.tokens)), output.tokens]
    np.testing.assert_allclose(output.log_probs, expected, rtol=1e-5)


@pytest.mark.parametrize("extra", [{"num_beams": 4}, {"sampler": g.Temperature(), "num_return_sequences": 4}])
def test_the_keys_of_an_encoder_are_stored_once(t5gemma, extra):
    settings = dataclasses.replace(options(6), **extra)
    batch, keys = g.batch_of(t5gemma, prompts([9, 3]), setup=g.GenerationSetup(settings, bos=2))
    cache = jax.eval_shape(lambda: g.prefilled(t5gemma, batch, options=settings, keys_R=keys)).rows.cache
    memory_rows = {x.shape[-4] for x in jax.tree.leaves(cache.memory)}
    past_rows = {x.shape[-4] for x in jax.tree.leaves(cache.past)}
    assert (memory_rows, past_rows) == ({2}, {8})


def test_prompts_are_read_by_one_program_whatever_is_chosen_after_them(gemma, caplog):
    def compiled(**extra):
        settings = dataclasses.replace(options(6), **extra)
        batch, keys = g.batch_of(gemma, prompts([9, 3]), setup=g.GenerationSetup(settings, bos=2))
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            g.prefilled(gemma, batch, options=settings, keys_R=keys)
        return [message.split()[1] for message in caplog.messages if message.startswith("Compiling jit(")]

    compiled()
    for extra in ({"sampler": g.TopK(3)}, {"num_beams": 4}, {"repetition_penalty": 1.5, "log_probs": True}):
        programs = compiled(**extra)
        assert "jit(_start)" in programs
        assert "jit(prefill)" not in programs


@pytest.mark.parametrize(
    ("name", "extra", "parts"),
    [("gemma", {}, ("past",)), ("t5gemma", {}, ("past", "memory")), ("t5gemma", {"num_beams": 4}, ("memory",))],
)
def test_the_first_token_copies_no_keys(name, extra, parts, request, monkeypatch):
    """They are as many as the prompt is long; those of a decoder's own rows are copied for each beam alone."""
    model, settings = request.getfixturevalue(name), dataclasses.replace(options(6), **extra)
    batch, keys = g.batch_of(model, prompts([9, 3]), setup=g.GenerationSetup(settings, bos=2))
    prefill, before = g._prefill, {}

    def pointers(cache):
        return {part: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(getattr(cache, part))] for part in parts}

    def read(*arguments, **settings):
        made = prefill(*arguments, **settings)
        before.update(pointers(made.cache))
        return made

    monkeypatch.setattr(g, "_prefill", read)
    state = g.prefilled(model, batch, options=settings, keys_R=keys)
    assert pointers(state.rows.cache) == before
    assert all(before.values())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"num_beams": 2, "sampler": g.Temperature()}, "num_beams = 2 and a sampler: beam search draws nothing"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences = 3 is more than num_beams = 2; raise"),
        ({"num_return_sequences": 3}, "num_return_sequences = 3 outputs would all be the likeliest tokens; give a"),
        ({"min_new_tokens": 9}, "min_new_tokens = 9 is more than max_new_tokens = 8; lower"),
        ({"early_stopping": "always"}, "unknown early_stopping 'always'"),
        ({"length_penalty": 6.0}, "length_penalty = 6.0; it must be at least -5 and at most 5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0; it must be at least 1e-06"),
    ],
)
def test_options_that_exclude_each_other_are_errors(extra, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(options(8), **extra)


def test_more_beams_than_tokens_are_refused(gemma):
    settings = dataclasses.replace(options(8), num_beams=98)
    with pytest.raises(UserError, match="num_beams = 98 is more than the 97 tokens of the vocabulary; lower it"):
        complete(gemma, prompts([6]), bos=2, options=settings)


@pytest.mark.parametrize(("length", "padded"), [(1, 32), (32, 32), (129, 160), (256, 256), (257, 320), (5000, 5120)])
def test_rows_have_few_lengths(length, padded):
    assert g.padded_length(length) == padded
