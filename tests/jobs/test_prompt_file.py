"""Outputs for a file of prompts: order, resumption, what is refused. The model answers by a rule, at no cost."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from t5g2.api.text_generation import TextOptions
from t5g2.core.errors import UserError
from t5g2.eval.output_text import TextOutput
from t5g2.jobs.prompt_file import complete_file, read_prompts


class Killed(Exception):
    """Stands for a signal that ends the process."""


class Model:
    """Answers a prompt with its letters reversed, its index and the seed; batches come back in the order of lengths."""

    def __init__(self, folder, killed_after=None):
        self.folder, self.killed_after, self.asked = SimpleNamespace(origin=str(folder)), killed_after, []

    def check_prompts(self, prompts, counts, options, *, names):
        for prompt, name in zip(prompts, names, strict=True):
            if "unknown" in prompt:
                raise UserError(f"{name} has an unknown token")

    def outputs_as_done(self, prompts, images, *, indices, **options):
        for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
            if len(self.asked) == self.killed_after:
                raise Killed
            self.asked.append(indices[row])
            skipped = "too long" if len(prompts[row]) > 20 else None
            shown = f"{prompts[row][::-1]}{indices[row]}{options['seed']}{images[row] if images else ''}"
            text = "" if skipped else shown
            outputs = [
                TextOutput(f"{text}{k or ''}", np.arange(3), skipped=skipped)
                for k in range(options["num_return_sequences"])
            ]
            yield row, outputs


OPTIONS = TextOptions(rows=2, seed=5)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    lengths = np.random.default_rng(0).integers(1, 24, 45)
    lines = [json.dumps({"prompt": "é" * n}) + "\n" for n in lengths.tolist()]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    return lengths.tolist()


def complete(folder, model=None, *, options=OPTIONS, out="out.jsonl"):
    return complete_file(model or Model(folder / "model"), str(folder / "in.jsonl"), str(folder / out), options)


def test_lines_come_in_the_order_of_the_prompts(tmp_path, prompts):
    assert complete(tmp_path).startswith("45 prompts, 135 tokens, ")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    long = {"output": None, "skipped": "too long"}
    assert lines == [
        {"prompt": "é" * n} | (long if n > 20 else {"output": f"{'é' * n}{i}5"}) for i, n in enumerate(prompts)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "model", "out.jsonl"]


@pytest.mark.parametrize("after", [0, 1, 7, 16, 17, 40, 44])
def test_a_killed_call_goes_on_without_a_lost_or_repeated_line(tmp_path, prompts, after):
    complete(tmp_path, out="alone.jsonl")
    with pytest.raises(Killed):
        complete(tmp_path, Model(tmp_path / "model", killed_after=after))
    partial = tmp_path / "out.jsonl.partial"
    if partial.exists():
        with partial.open("a") as lines:
            lines.write('{"prompt": "torn')
        written = partial.read_text().count("\n")
        goes_on = Model(tmp_path / "model")
        complete(tmp_path, goes_on)
        # windows of 16 prompts begin at the same places, so that batches are the same
        assert min(goes_on.asked) == written // 16 * 16
    else:
        complete(tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_several_outputs_and_images_of_a_prompt(tmp_path, prompts):
    (tmp_path / "a.png").touch()
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab", "image": "a.png"}\n\n{"prompt": "c"}\n')
    complete(tmp_path, options=TextOptions(rows=2, temperature=1, num_return_sequences=2))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    path = str(tmp_path / "a.png")
    assert lines == [
        {"prompt": "ab", "images": [path], "outputs": [f"ba00['{path}']", f"ba00['{path}']1"]},
        {"prompt": "c", "outputs": ["c10[]", "c10[]1"]},
    ]


def test_other_settings_do_not_go_on(tmp_path, prompts):
    with pytest.raises(Killed):
        complete(tmp_path, Model(tmp_path / "model", killed_after=20))
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(UserError, match=r"begun with other settings \(max_new_tokens, seed\); give the same, or anoth"):
        complete(tmp_path, options=TextOptions(rows=2, max_new_tokens=3))
    (tmp_path / "model" / "weights").write_text("others")
    with pytest.raises(UserError, match=r"begun with other settings \(model\)"):
        complete(tmp_path)
    with (tmp_path / "in.jsonl").open("a") as lines:
        lines.write('{"prompt": "more"}\n')
    with pytest.raises(UserError, match=r"begun with other settings \(model, prompts\)"):
        complete(tmp_path)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_a_model_at_the_hub_or_in_one_file_is_known_by_its_address_or_its_file(tmp_path, prompts):
    """And not by its folder in a cache, which is made anew where it was lost."""
    (tmp_path / "model.gguf").write_text("w")
    for origin in ("hf://owner/name@0123/model.gguf", tmp_path / "model.gguf"):
        with pytest.raises(Killed):
            complete(tmp_path, Model(origin, killed_after=20), out="two.jsonl")
        complete(tmp_path, Model(origin), out="two.jsonl")
        (tmp_path / "two.jsonl").unlink()
    with pytest.raises(Killed):
        complete(tmp_path, Model(tmp_path / "model.gguf", killed_after=20))
    (tmp_path / "model.gguf").write_text("others")
    with pytest.raises(UserError, match=r"begun with other settings \(model\)"):
        complete(tmp_path, Model(tmp_path / "model.gguf"))


def test_a_refusal_leaves_nothing(tmp_path, prompts):
    class Refuses(Model):
        def outputs_as_done(self, *_, **__):
            raise UserError("prompts[3] is too long")
            yield

    with pytest.raises(UserError):
        complete(tmp_path, Refuses(tmp_path / "model"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "model"]


def test_a_line_that_cannot_be_done_is_refused_before_any_is_done(tmp_path, prompts):
    """A line behind the first window: what is done could not go on once the file is mended."""
    with (tmp_path / "in.jsonl").open("a") as lines:
        lines.write('\n{"prompt": "unknown"}\n')
    model = Model(tmp_path / "model")
    with pytest.raises(UserError, match=r"in.jsonl, line 47 has an unknown token"):
        complete(tmp_path, model)
    with (tmp_path / "in.jsonl").open("a") as lines:
        lines.write('{"prompt": "x", "images": ["none.png"]}\n')
    with pytest.raises(UserError, match=r"in.jsonl, line 48: no image .*none.png; put it there, or remove it from"):
        complete(tmp_path, model)
    assert model.asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "model"]


def test_the_summary_of_one_prompt(tmp_path, prompts):
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab"}\n')
    assert complete(tmp_path).startswith("1 prompt, 3 tokens, ")


def test_what_is_no_file_of_prompts(tmp_path):
    file = tmp_path / "in.jsonl"
    for text, message in [
        ("", "holds no prompt"),
        ('{"prompt": 3}', r'line 1: .* is not {"prompt": "a text"}'),
        ('{"prompt": "a"}\n{"prompt": "b", "images": 3}', "line 2: its images are not a path or a list of paths"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_prompts(str(file))
