"""Texts with images beside texts without, small enough for two CPU cores: T5Gemma 2 blocks and an image tower.

    tar --sort=name -cf pictures.tar pictures    # 0001.jpg 0001.txt 0002.jpg 0002.txt …: an image, and a text about it
    t5g2 data  --config=configs/t5gemma2_images.py:pictures.tar --n=3
    t5g2 train --config=configs/t5gemma2_images.py:pictures.tar --workdir=runs/images

The argument is a tar file, a folder of them or a pattern. For lines of JSON with the paths of images, or parquet, set
data.sources.0.text to {"kind": "image_jsonl", "path": …} or {"kind": "image_parquet", "path": …}.

From T5Gemma 2's report (arXiv 2512.14856, section 3.1): images are read by the encoder alone; what is up to the end of
the last image is read and the rest is asked for; texts have UL2's tasks. Ours, because it does not say: the share of
texts with images (half of the draws), and that the projector is trained. Known deviation: the image tower is new, so it
is trained too, where the report's is pretrained and frozen.

Compiled for v5e:1x1 (t5g2 check --target): 0.13 GiB of the chip. At a released size: bench/results/tpu_steps.md.
"""

from ml_collections import ConfigDict

TEXT_TOKENS, IMAGE_TOKENS = 120, 16
BLOCKS = {
    "vocab_size": 384,
    "width": 128,
    "layers": 4,
    "mlp_width": 256,
    "heads": 2,
    "kv_heads": 1,
    "head_size": 64,
    "window": 32,
    "pattern": ["local", "global"],
}
TOWER = {"width": 64, "layers": 2, "mlp_width": 128, "heads": 2, "image_size": 64, "patch_size": 8}


def get_config(path="pictures.tar"):
    config = ConfigDict()
    # ids of the bytes' image tokens
    images = {"vision": TOWER, "tokens": IMAGE_TOKENS, "begin": 5, "end": 6, "token": 7}
    config.model = {"kind": "t5gemma", "encoder": {**BLOCKS, "images": images}, "decoder": BLOCKS, "eoi_id": 6}
    config.data = {
        "sources": [
            {
                "text": {"kind": "webdataset", "path": path},
                "objective": {"kind": "multimodal_prefix_lm"},
                "name": "images",
            },
            {"text": {"kind": "python", "split": "train"}, "objective": {"kind": "ul2"}, "name": "python"},
        ],
        "tokenizer": {"kind": "bytes"},
        "images": {"per_row": 2},
        "chunk_tokens": TEXT_TOKENS,
        "rows": 8,
        "encoder_length": 192,
        "decoder_length": 192,
        "streams": 8,
        "packing": "best_fit",
    }
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": 3e-3, "warmup_steps": 20, "final_fraction": 0.1},
        "clip_norm": 1.0,
        "decay": [
            # norms, biases and embeddings are not decayed
            {"pattern": "*.scale", "rate": 0.0},
            {"pattern": "*.bias", "rate": 0.0},
            {"pattern": "embedder.*", "rate": 0.0},
            {"pattern": "vision.positions", "rate": 0.0},
            {"pattern": "*", "rate": 0.1},
        ],
        "freeze": [{"pattern": "vision.*", "end": 0}],  # never: there is nothing to keep
    }
    config.train = {"steps": 400}
    # bfloat16 is slower than float32 on a CPU
    config.compute = {"dtype": "float32"}
    config.eval = {
        "every_steps": 100,
        "tasks": [
            {
                "kind": "heldout_loss",
                "name": "python",
                "text": {"kind": "python", "split": "heldout"},
                "objective": {"kind": "ul2"},
            }
        ],
    }
    config.save = {"every_steps": 100, "keep": 1}
    config.log = {"every_steps": 10}
    return config
