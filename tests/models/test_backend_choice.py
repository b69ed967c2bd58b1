"""The choice of an attention backend, and what the kinds of attention in a model are."""

import dataclasses
import logging
from functools import partial

import jax
import numpy as np
import pytest

from t5g2.core import sharding
from t5g2.core.batch import Batch, Sequences
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.models import attention, build, masks
from t5g2.models.attention_sites import attention_sites, layers_of
from t5g2.models.backends import blockwise, choice, cudnn
from t5g2.models.backends.choice import BackendChoice, choose
from t5g2.models.backends.site import Site
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.layers import Compute
from t5g2.models.masks import ALL
from t5g2.models.sizes import size
from tests import tiny

# a local encoder layer of T5Gemma 2 270M, 16 rows of 4096
LOCAL = Site(16, 4096, (4096,), (masks.bidirectional(512),), 0, 4, 256, False, False, "bfloat16")
GLOBAL = dataclasses.replace(LOCAL, masks=(ALL,))
CAUSAL = dataclasses.replace(LOCAL, masks=(masks.causal(512),))
MERGED = dataclasses.replace(LOCAL, keys=(4096, 4096), masks=(ALL, masks.causal()), own=1)
CACHE = dataclasses.replace(LOCAL, keys=(4096, 512), masks=(masks.causal(), masks.causal()), own=1)
SMALL = dataclasses.replace(LOCAL, rows=1, queries=512, keys=(512,))
ONE = dataclasses.replace(CACHE, queries=1)
SIGLIP = dataclasses.replace(GLOBAL, heads=16, head_size=72, dtype="float32")


def on(monkeypatch, device: str, capability: float = 9.0) -> None:
    monkeypatch.setattr(choice, "platform", lambda: device)
    monkeypatch.setattr(cudnn, "compute_capability", lambda: capability)


@pytest.mark.parametrize(
    ("device", "site", "name"),
    [
        ("cpu", LOCAL, "blockwise"),
        ("cpu", MERGED, "blockwise"),
        ("cpu", SMALL, "reference"),
        ("cpu", ONE, "reference"),
        ("tpu", LOCAL, "splash"),
        ("tpu", GLOBAL, "splash"),
        ("tpu", MERGED, "splash"),
        ("tpu", dataclasses.replace(MERGED, softcap=True), "splash"),
        ("tpu", dataclasses.replace(MERGED, blocks=True), "blockwise"),
        ("tpu", CACHE, "blockwise"),
        ("tpu", ONE, "reference"),
        ("tpu", SMALL, "reference"),
        ("tpu", SIGLIP, "blockwise"),
        ("gpu", GLOBAL, "cudnn"),
        ("gpu", CAUSAL, "cudnn"),
        ("gpu", MERGED, "cudnn"),
        ("gpu", LOCAL, "blockwise"),
        ("gpu", dataclasses.replace(MERGED, masks=(ALL, masks.causal(512))), "blockwise"),
        ("gpu", dataclasses.replace(GLOBAL, softcap=True), "blockwise"),
        ("gpu", dataclasses.replace(CAUSAL, blocks=True), "blockwise"),
        ("gpu", dataclasses.replace(GLOBAL, dtype="float32"), "blockwise"),
        ("gpu", dataclasses.replace(GLOBAL, queries=4095, keys=(4095,)), "blockwise"),
        ("gpu", dataclasses.replace(GLOBAL, head_size=320), "blockwise"),
        ("gpu", dataclasses.replace(GLOBAL, queries=2**17, keys=(2**17,)), "blockwise"),
        ("gpu", SIGLIP, "blockwise"),
    ],
)
def test_automatic_choice(monkeypatch, device, site, name):
    on(monkeypatch, device)
    assert choose("auto", site).name == name


@pytest.mark.parametrize("backend", ["reference", "blockwise", "splash"])
def test_one_query_of_decoding_takes_the_short_path_whatever_is_set(monkeypatch, backend):
    on(monkeypatch, "tpu")
    assert choose(backend, ONE) == BackendChoice("reference", "one query has no more scores than keys")


def test_before_hopper_cudnn_is_not_used(monkeypatch):
    on(monkeypatch, "gpu", 8.0)
    assert choose("auto", GLOBAL) == BackendChoice(
        "blockwise", "cudnn cannot: heads of 256 need compute capability 9.0, and this GPU has 8.0"
    )


def test_a_named_backend_that_cannot_gives_way_and_says_so_once(monkeypatch, caplog):
    on(monkeypatch, "tpu")
    images = dataclasses.replace(CAUSAL, blocks=True)
    with caplog.at_level(logging.WARNING, "t5g2"):
        choices = {choose("splash", images) for _ in range(3)}
    assert choices == {BackendChoice("blockwise", "splash cannot: its masks know no blocks of images or prefixes")}
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("attention: splash was asked for and cannot run (its masks know no blocks")


@pytest.mark.parametrize(("backend", "where"), [("splash", "TPUs"), ("cudnn", "NVIDIA GPUs")])
def test_a_kernel_of_another_device_is_an_error(backend, where):
    with pytest.raises(
        UserError, match=rf"backend='{backend}' runs on {where}, and the devices .* are 'cpu'; .*='auto'"
    ):
        choose(backend, GLOBAL)


def test_blocks_follow_from_shapes_and_platform(monkeypatch):
    """Of one row and of 16, of a window and without one; a block is never longer than what it is of."""
    sizes = partial(blockwise.block_sizes, queries=4096, keys=(4096, 100))
    window, both = [masks.causal(512), ALL], [ALL, ALL]
    assert sizes(window, 4) == (128, (128, 100))
    assert sizes(both, 64) == (256, (256, 100))
    assert blockwise.block_sizes([ALL], 4, 7, (4096,)) == (7, (256,))
    monkeypatch.setattr(blockwise, "platform", lambda: "gpu")
    assert sizes(window, 4) == (256, (256, 100))
    assert sizes(both, 64) == (1024, (1024, 100))
    # 512 rows and heads: 2^26 scores are those of 256 x 256
    assert sizes(both, 512) == (256, (256, 100))
    assert sizes([masks.causal(1), masks.causal(10**6)], 1) == (128, (128, 100))


def test_without_a_gpu_cudnn_is_judged_as_on_hopper():
    assert cudnn.refusal(GLOBAL) is None
    assert cudnn.refusal(dataclasses.replace(GLOBAL, softcap=True)) == "it has no soft cap"
    assert choose("cudnn", GLOBAL, device="gpu") == BackendChoice("cudnn", "set by compute.backend")


def batch_of(model, rows=2, encoder_length=12, decoder_length=10, blocks=False) -> Batch:
    def stream(length, blocks):
        ones = np.ones((rows, length), np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
        return Sequences(np.full_like(ones, 9), ones, positions, ones if blocks else None)

    two_sided = isinstance(model, EncoderDecoderConfig)
    images = None
    if model.image_stack.images is not None:
        side = model.image_stack.images.vision.image_size
        images = np.zeros((rows, 1, side, side, 3), np.float32)
    encoder, decoder = stream(encoder_length, False) if two_sided else None, stream(decoder_length, blocks)
    ones = np.ones((rows, decoder_length), np.int32)
    return Batch(encoder, decoder, ones, ones.astype(np.float32), ones, ones, images)


MODELS = {
    "gemma 2": tiny.GEMMA2,
    "gemma 3": tiny.GEMMA3,
    "gemma 3 with images": tiny.GEMMA3_IMAGES,
    "t5gemma": tiny.T5GEMMA,
    "t5gemma 2": tiny.T5GEMMA2,
    "t5gemma 2 with images": tiny.T5GEMMA2_IMAGES,
    "causal encoder with images": dataclasses.replace(tiny.T5GEMMA2_IMAGES, encoder_attention="causal"),
    "cross-attention in global layers": dataclasses.replace(tiny.T5GEMMA2, cross_layers="global"),
    "separate, in global layers": dataclasses.replace(tiny.T5GEMMA, cross_layers="global"),
}


@pytest.mark.parametrize(("name", "context"), [*((name, 1) for name in MODELS), ("t5gemma", 4), ("t5gemma 2", 4)])
def test_the_sites_of_a_model_are_those_of_its_calls(name, context, monkeypatch):
    """On one device, and with the encoder's 12 tokens cut over four."""
    model, compute = MODELS[name], Compute(dtype="bfloat16")
    blocks = model.image_stack.images is not None and not isinstance(model, EncoderDecoderConfig)
    batch, calls = batch_of(model, blocks=blocks), []

    def record(backend, site):
        calls.append(site)
        return choose(backend, site)

    monkeypatch.setattr(attention, "choose", record)
    # every layer on its own, so that calls can be counted
    compute = dataclasses.replace(compute, scan=False)
    mesh = sharding.make(MeshShape(data=1, context=context), jax.devices()[:context])
    with jax.set_mesh(mesh):
        jax.eval_shape(
            lambda made: made.hidden(batch.encoder, batch.decoder, batch.images, compute=compute), build.abstract(model)
        )
        sites = attention_sites(model, batch, compute)
    assert set(calls) == set(sites.values())
    counts = dict.fromkeys(sites.values(), 0)
    for kind, site in sites.items():
        counts[site] += layers_of(model, kind)
    assert counts == {site: calls.count(site) for site in counts}


@pytest.mark.parametrize("cross_layers", ["all", "global"])
def test_an_offset_is_of_the_layers_that_see_the_encoder(cross_layers, monkeypatch):
    """Known before anything is traced, so that a kernel that cannot add it is not chosen."""
    model = dataclasses.replace(tiny.T5GEMMA2, cross_layers=cross_layers)
    batch, calls, compute = batch_of(model), set(), Compute(dtype="bfloat16")

    def record(backend, site):
        calls.add(site)
        return choose(backend, site)

    monkeypatch.setattr(attention, "choose", record)
    jax.eval_shape(
        lambda made, offset: made.hidden(batch.encoder, batch.decoder, encoder_offset=offset, compute=compute),
        build.abstract(model),
        jax.ShapeDtypeStruct((), "float32"),
    )
    sites = attention_sites(model, batch, compute, encoder_offset=True)
    assert calls == set(sites.values())
    with_offset = {kind for kind, site in sites.items() if site.score_offset}
    assert with_offset == ({"decoder.local", "decoder.global"} if cross_layers == "all" else {"decoder.global"})


def test_a_step_of_the_smallest_release_on_a_cpu():
    model = size("t5gemma2:270m-270m")
    sites = attention_sites(model, batch_of(model, 1, 4096, 512), Compute(dtype="float32"))
    names = {kind: choose("auto", site).name for kind, site in sites.items()}
    assert names == dict.fromkeys(
        ["encoder.local", "encoder.global", "decoder.local", "decoder.global", "vision"], "blockwise"
    )
