"""Handwritten digits as pictures, which scikit-learn ships (pip install 't5g2[eval]'): captions, questions, classes.

    t5g2 evaluate --model=DIR --tasks=digits --out=DIR             a language model with an image tower, 100 pictures
    t5g2 evaluate --model=DIR --tasks=digits:dual --out=DIR        a dual encoder (SigLIP), all pictures

1797 pictures of 8 x 8 pixels and 17 greys (load_digits: the test set of Alpaydin and Kaynak, UCI 1998), enlarged
sixteenfold; the last 297 are asked. Nothing is downloaded. `digit_captions` and `digit_question` compare what is
written; `digit_classes/accuracy` is zero-shot classification, and `digit_probe/accuracy` a logistic regression on the
embeddings of the first 1500. 0.1 is chance.
"""

import numpy as np
from PIL import Image

from t5g2.core.errors import unknown
from t5g2.core.optional import require
from t5g2.eval.image_probe import ImageLinearProbe
from t5g2.eval.image_tasks import ImageClassification
from t5g2.eval.tasks import GenerateAndCompare

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINED = 1500


def pictures():
    """Returns records with a picture, its digit and the digit's name, in scikit-learn's order."""
    digits = require("sklearn.datasets", "eval").load_digits()
    return [
        {"image": enlarged(image), "digit": int(digit), "word": WORDS[digit]}
        for image, digit in zip(digits.images, digits.target, strict=True)
    ]


def enlarged(image):
    """Returns a picture of 128 x 128 pixels, white on black, in which each of the 8 x 8 is a square."""
    return Image.fromarray(np.kron(np.round(image * 255 / 16), np.ones((16, 16))).astype(np.uint8)).convert("RGB")


def get_tasks(models: str = "language"):
    if models not in ("language", "dual"):
        raise unknown("kind of model", models, ("language", "dual"), where="of the digits")
    records = pictures()
    train, test = records[:TRAINED], records[TRAINED:]
    if models == "dual":
        shared = {"data": test, "classes": WORDS, "label": "{digit}"}
        prompts = ("a handwritten digit {name}.", "a photo of the number {name}.")
        return [
            ImageClassification(**shared, name="digit_classes", prompts=prompts),
            ImageLinearProbe(**shared, name="digit_probe", train=train),
        ]
    shared = {"data": test, "examples": 100, "images": "image", "stop": ("\n",)}
    return [
        GenerateAndCompare(
            **shared,
            name="digit_captions",
            template="Caption: a picture of the digit",
            reference="{word}",
            metrics=("exact_match", "chrf"),
            max_new_tokens=4,
        ),
        GenerateAndCompare(
            **shared,
            name="digit_question",
            template="Question: which digit from 0 to 9 is in the picture?\nAnswer:",
            reference="{digit}",
            metrics=("exact_match",),
            max_new_tokens=4,
        ),
    ]
