"""Examples of TensorFlow Datasets as records of evaluation tasks, and as labelled texts."""

import numpy as np
import pytest

from t5g2.data.config import DataConfig, Source
from t5g2.data.sources.array_records import Tfds
from t5g2.data.sources.labelled_text import LabelledText
from t5g2.data.sources.python_text import PythonText
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval.generate_and_compare import GenerateAndCompare
from t5g2.eval.task_interface import EvalContext
from t5g2.eval.task_records import open_records
from t5g2.objectives import Causal

TEXTS = ["once upon a time", "two", "the third text"]


@pytest.fixture(scope="module")
def tales(tmp_path_factory):
    """A data set of two splits, written by TensorFlow Datasets itself."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `tfds` is not installed")

    class ShortTales(tfds.core.GeneratorBasedBuilder):
        """Three tales."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {"text": text, "id": tfds.features.Scalar(np.int64), "more": {"title": text}}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["a text held out"])}

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                yield i, {"text": text, "id": i, "more": {"title": f"title {i}"}}

    folder = tmp_path_factory.mktemp("tfds")
    ShortTales(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_examples_of_tfds_are_records_of_an_evaluation_task(tales):
    """Texts and numbers as Python's, nested features by str.format's brackets, a split of its own for the shots."""
    where = {"data_dir": str(tales)}
    task = GenerateAndCompare(
        data=Tfds("short_tales", split="test", **where),
        shot_data=Tfds("short_tales", **where),
        shots=1,
        name="tales",
        template="{more[title]}, number {id}:",
        reference="{text}",
    )
    data = DataConfig((Source(PythonText(), Causal()),), Bytes(), 2, 0, 64, 24, streams=2)
    [example] = task.read(EvalContext(data))
    shown, asked = example.prompt.split("\n\n")
    assert asked == "title 0, number 0:"
    assert shown in {f"title {i}, number {i}: {text}" for i, text in enumerate(TEXTS)}
    assert example.record == {"text": "a text held out", "id": 0, "more": {"title": "title 0"}}
    labelled = LabelledText(Tfds("short_tales", **where), template="{text}", label="{id}")
    opened = labelled.open()
    assert sorted(opened.tokens(i, Bytes())[-1:].view(np.float32)[0] for i in range(3)) == [0, 1, 2]
    assert sorted(opened) == sorted(TEXTS)


def test_pictures_of_tfds_stay_arrays(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `tfds` is not installed")
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)

    class Pictures(tfds.core.GeneratorBasedBuilder):
        """One picture."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8), "label": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": [(0, {"image": pixels, "label": "a gradient"})]}

        def _generate_examples(self):
            raise NotImplementedError

    Pictures(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    [record] = open_records(Tfds("pictures", data_dir=str(tmp_path)), Bytes())
    np.testing.assert_array_equal(record["image"], pixels)
    assert record["label"] == "a gradient"
