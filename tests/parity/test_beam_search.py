"""Generated tokens of every family equal those of transformers: greedy and beams, in batches of unequal lengths.

Runs wherever torch and transformers are installed. In CI on Python 3.11, where they are pinned, their absence fails.
"""

import numpy as np
import pytest

from t5g2.eval.generation import GenerationOptions, GenerationSetup, complete
from t5g2.models.config import EncoderDecoderConfig
from tests import weights
from tests.parity.test_exports import FAMILIES, export, load

torch = pytest.importorskip("torch")

# past the windows of the tiny models
LENGTHS, NEW, PAD, BOS = (19, 11), 20, 0, 2
# so many that outputs of random models end with one
STOPS = (5, 6, 7, 11, 12, 13, 14, 15, 16)
SETTINGS = {
    "greedy": {"min_new_tokens": 6, "repetition_penalty": 1.3},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    "beams that stop early": {
        "num_beams": 4,
        "num_return_sequences": 2,
        "early_stopping": True,
        "min_new_tokens": 3,
        "repetition_penalty": 1.2,
    },
    "beams that never stop early": {
        "num_beams": 2,
        "num_return_sequences": 2,
        "early_stopping": "never",
        "length_penalty": 0.3,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """A model, the same in transformers, prompts, and the images of each, or None."""
    config = FAMILIES[request.param]
    side = config.encoder if isinstance(config, EncoderDecoderConfig) else config
    rng = np.random.default_rng(7)
    prompts = [np.append(np.int32(BOS), rng.integers(20, 90, n - 1).astype(np.int32)) for n in LENGTHS]
    images = None
    if side.images is not None:
        for prompt in prompts:
            prompt[3:9] = [side.images.begin, *[side.images.token] * side.images.tokens, side.images.end]
        size = side.images.vision.image_size
        images = rng.uniform(-1, 1, (len(prompts), 1, size, size, 3)).astype(np.float32)
    theirs = load(export(tmp_path_factory.mktemp("model"), config))
    return weights.model(config), theirs, prompts, images


def inputs_of(config, prompts, images):
    """Arguments of transformers: prompts padded on the right for an encoder, on the left for a decoder-only model."""
    longest = max(map(len, prompts))
    ids, mask = np.full((len(prompts), longest), PAD, np.int64), np.zeros((len(prompts), longest), np.int64)
    is_encoder_decoder = isinstance(config, EncoderDecoderConfig)
    for row, prompt in enumerate(prompts):
        columns = slice(0, len(prompt)) if is_encoder_decoder else slice(longest - len(prompt), longest)
        ids[row, columns], mask[row, columns] = prompt, 1
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if images is not None:
        inputs["pixel_values"] = torch.tensor(images[:, 0].transpose(0, 3, 1, 2))
        if not is_encoder_decoder:
            inputs["token_type_ids"] = torch.tensor(ids == config.images.token).long()
    return inputs


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_tokens_and_scores(models, name):
    ours, theirs, prompts, images = models
    settings = SETTINGS[name]
    inputs = inputs_of(ours.config, prompts, images)
    generated = theirs.generate(
        **inputs,
        **settings,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=list(STOPS),
        pad_token_id=PAD,
        # the penalty of repetition would also be that of padding
        suppress_tokens=[PAD],
        return_dict_in_generate=True,
        output_scores=True,
    )
    first = 1 if ours.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    expected = [row[first:].tolist() for row in generated.sequences]
    options = GenerationOptions(NEW, STOPS, PAD, suppressed_ids=(PAD,), log_probs=True, **settings)
    outputs = complete(ours, prompts, images, setup=GenerationSetup(options, BOS))
    ends = [next((i for i, token in enumerate(row) if token in STOPS), NEW) for row in expected]
    assert [output.tokens.tolist() for output in outputs] == [row[:n] for row, n in zip(expected, ends, strict=True)]
    if "num_beams" in settings:
        scores = [output.score for output in outputs]
        np.testing.assert_allclose(scores, generated.sequences_scores.numpy(), rtol=1e-5)
        assert any(n < NEW for n in ends)
