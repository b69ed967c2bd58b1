"""Classes of the user's own by dotted path: built and checked like t5g2's own, dumped, hashed, sent to workers."""

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import pytest

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.data.pipeline import Pipeline
from t5g2.data.tokenizers import registry
from t5g2.models.config import from_dict
from t5g2.train import config_file
from t5g2.train import experiment as experiments
from tests import own_classes, own_tasks
from tests.data import corpus

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
OWN = "tests.own_classes."


@pytest.fixture(scope="module")
def plain():
    """The quickstart with a class of the user's own in every place that takes one."""
    node = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    [source, *_] = node["data"]["sources"]
    source["text"] = {"kind": f"{OWN}StorySource", "count": 40}
    source["objective"] = {"kind": f"{OWN}Upper", "prefix": 0.5}
    node["data"] |= {"sources": [source], "tokenizer": {"kind": f"{OWN}LowerBytes", "sentinels": 100}}
    node["optim"]["schedule"] = {"kind": f"{OWN}Stairs", "peak": 1e-3}
    node["eval"] |= {"tasks": [{"kind": "tests.own_tasks.Constant", "value": 3}], "final": []}
    return node


def changed(node, path, value):
    node = json.loads(json.dumps(node))
    settings.override(node, path, json.dumps(value))
    return node


def test_every_place_takes_a_class_of_ones_own(plain):
    built = experiments.build(plain)
    [source] = built.data.sources
    assert source.text == own_classes.StorySource(40)
    assert source.objective == own_classes.Upper(prefix=0.5)
    assert built.data.tokenizer == own_classes.LowerBytes(sentinels=100)
    assert built.optim.schedule == own_classes.Stairs(1e-3)
    assert built.eval.tasks == (own_tasks.Constant(3.0),)
    dumped = experiments.dump(built)
    assert dumped["data"]["sources"][0]["text"] == {"kind": f"{OWN}StorySource", "count": 40, "seed": 0}
    assert dumped["optim"]["schedule"] == {"kind": f"{OWN}Stairs", "peak": 1e-3, "every": 10}
    assert experiments.build(json.loads(json.dumps(dumped))) == built
    assert pickle.loads(pickle.dumps(built)) == built


def test_the_fingerprint_is_that_of_the_defining_path(plain, monkeypatch):
    """However the class is imported; another value of it, or another class, is another experiment."""
    again = type(sys)("another_name")
    vars(again).update(vars(own_classes))
    monkeypatch.setitem(sys.modules, "another_name", again)
    built = experiments.build(plain)
    renamed = changed(plain, "optim.schedule.kind", "another_name.Stairs")
    assert experiments.fingerprint(experiments.build(renamed)) == experiments.fingerprint(built)
    other = changed(plain, "optim.schedule.every", 11)
    assert experiments.fingerprint(experiments.build(other)) != experiments.fingerprint(built)


def test_a_class_of_t5g2_by_its_path_is_that_kind(plain):
    built = experiments.build(changed(plain, "optim.schedule", {"kind": "t5g2.train.schedules.Constant", "peak": 0.1}))
    assert experiments.dump(built)["optim"]["schedule"] == {"kind": "constant", "peak": 0.1, "warmup_steps": 0}


def test_workers_make_the_same_batches(plain):
    data = dataclasses.replace(experiments.build(plain).data, streams=4, rows=4)
    batches = []
    for workers in (0, 2):
        with Pipeline(dataclasses.replace(data, workers=workers), seed=1) as pipeline:
            batches.append([pipeline.next() for _ in range(2)])
    corpus.assert_same(*batches)
    assert batches[0][0].batch.weights.max() == 2.0


def test_a_tokenizer_is_read_from_a_model_folder():
    tokenizer = own_classes.LowerBytes(sentinels=7)
    assert registry.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    with pytest.raises(UserError, match=r"tokenizer\.kind = 'tests\.own_classes\.Upper': the class is not what is exp"):
        registry.from_dict({"kind": f"{OWN}Upper"})


SOURCE, OBJECTIVE, TASK = "data.sources.0.text", "data.sources.0.objective", "eval.tasks.0"
SCHEDULE, TOKENIZER = "optim.schedule", "data.tokenizer"


@pytest.mark.parametrize(
    ("place", "node", "message"),
    [
        (SOURCE, {"kind": f"{OWN}StorySource"}, r"lacks count, which StorySource has no default for"),
        (SOURCE, {"kind": f"{OWN}StorySource", "count": 101}, r"count = 101; it must be at least 1 and at most 100"),
        (SOURCE, {"kind": f"{OWN}StorySource", "conut": 3}, r"unknown key 'conut' .*; did you mean 'count'"),
        (SOURCE, {"kind": f"{OWN}StorySource", "count": "3"}, r"count is '3' of type str; it must be of type int"),
        (SOURCE, {"kind": f"{OWN}Upper"}, r"is not what is expected there; derive it from .*documents\.Openable"),
        (OBJECTIVE, {"kind": f"{OWN}StorySource"}, r"derive it from t5g2\.core\.objective\.Objective"),
        (OBJECTIVE, {"kind": f"{OWN}Derived"}, r"is no dataclass; decorate it with @dataclass\(frozen=True\)"),
        (
            TASK,
            {"kind": "tests.own_tasks.Unfinished"},
            r"lacks prepare, which t5g2\.eval\.task_interface\.Task declares; define them",
        ),
        (TASK, {"kind": f"{OWN}Unrelated"}, r"derive it from t5g2\.eval\.task_interface\.Task"),
        (SCHEDULE, {"kind": f"{OWN}Unrelated"}, r"derive it from .*t5g2\.train\.schedules\.LearningRateSchedule"),
        (
            SCHEDULE,
            {"kind": f"{OWN}Changeable"},
            r"can be changed after it is made; decorate it with @dataclass\(frozen",
        ),
        (
            SCHEDULE,
            {"kind": f"{OWN}Local"},
            r"is not found as tests\.own_classes\.local\.<locals>\.Local; define it at",
        ),
        (
            SCHEDULE,
            {"kind": f"{OWN}Untyped", "peak": 1},
            r"an annotation that means nothing .*'Fraction' is not defined",
        ),
        (TOKENIZER, {"kind": f"{OWN}Plain"}, r"is no dataclass; decorate it with @dataclass\(frozen=True\)"),
        (TOKENIZER, {"kind": f"{OWN}Nothing"}, r"module tests\.own_classes has no class Nothing; it has .*LowerBytes"),
        (TOKENIZER, {"kind": f"{OWN}local"}, r"module tests\.own_classes has no class local"),
        (
            TOKENIZER,
            {"kind": "no_such_module.X"},
            r"module no_such_module does not import \(ModuleNotFoundError: .*PYTHON",
        ),
        (TOKENIZER, {"kind": "tests..X"}, r"unknown config\.data\.tokenizer\.kind 'tests\.\.X'"),
    ],
)
def test_what_cannot_be_a_kind(plain, place, node, message):
    with pytest.raises(UserError, match=message) as caught:
        experiments.build(changed(plain, place, node))
    assert f"config.{place}" in str(caught.value)


def test_a_module_that_fails_is_named(plain, tmp_path, monkeypatch):
    (tmp_path / "broken_kinds.py").write_text("x = 1 +\n")
    (tmp_path / "failing_kinds.py").write_text("raise KeyError('no key')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, error in (("broken_kinds", "SyntaxError"), ("failing_kinds", "KeyError: 'no key'")):
        with pytest.raises(UserError, match=rf"module {module} does not import \({error}"):
            experiments.build(changed(plain, SCHEDULE, {"kind": f"{module}.X"}))


def test_no_module_is_imported_for_kinds_that_are_ours_alone(plain, tmp_path, monkeypatch):
    """Such as the architecture in a model.json that somebody else wrote, or the optimizer."""
    (tmp_path / "imported_by_mistake.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"unknown model\.json\.kind 'imported_by_mistake\.X'"):
        from_dict({"kind": "imported_by_mistake.X"}, where="model.json")
    with pytest.raises(UserError, match=r"unknown config\.optim\.optimizer\.kind 'imported_by_mistake\.X'"):
        experiments.build(changed(plain, "optim.optimizer", {"kind": "imported_by_mistake.X"}))
    assert "imported_by_mistake" not in sys.modules
