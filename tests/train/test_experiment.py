import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from t5g2.core.errors import UserError
from t5g2.models.config import Rope
from t5g2.models.sizes import size
from t5g2.train import config_file, resume
from t5g2.train import experiment as experiments

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
ARMS = ("source", "adapted", "scratch")


@pytest.mark.parametrize("arm", ARMS)
def test_dump_and_build_are_inverse(arm):
    loaded = config_file.load(f"{QUICKSTART}:{arm}")
    plain = experiments.dump(loaded)
    assert experiments.build(plain) == loaded
    assert experiments.build(copy.deepcopy(plain)) == loaded
    assert experiments.fingerprint(experiments.build(plain)) == experiments.fingerprint(loaded)


def test_the_fingerprint_changes_with_every_setting():
    config = f"{QUICKSTART}:adapted"
    changes = [(), (("train.seed", "1"),), (("optim.schedule.peak", "1e-3"),), (("data.sources.0.weight", "2"),)]
    assert len({experiments.fingerprint(config_file.load(config, change)) for change in changes}) == len(changes)


def test_the_arms_of_the_quickstart_differ_in_nothing_but_where_weights_come_from():
    adapted, scratch = (experiments.dump(config_file.load(f"{QUICKSTART}:{arm}")) for arm in ("adapted", "scratch"))
    assert adapted.pop("init") != scratch.pop("init")
    assert adapted == scratch


def test_a_model_is_named_by_a_folder_or_a_file(tmp_path, monkeypatch):
    """Only model.json is read: the folder needs no weights. experiment.json has every field, and no folder."""
    plain = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.json").write_text(json.dumps(plain["model"]))
    (tmp_path / "other.json").write_text(json.dumps(plain["model"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(tmp_path / "m"), "m", "~/m", "m/model.json", "other.json"):
        built = experiments.build(plain | {"model": {"folder": path}})
        assert experiments.dump(built) == plain
    changed = experiments.build(plain | {"model": {"folder": "m", "cross": "merged"}})
    assert changed.model == dataclasses.replace(built.model, cross="merged")
    assert "folder" not in experiments.dump(changed)["model"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"folder": "nowhere"}, r"nowhere does not exist; give a Hugging Face folder, an official Flax one or a model"),
        ({"folder": "."}, r"holds no known model: neither config\.json .* nor model\.json \(a model folder\)"),
        ({"folder": "bad.json"}, r"bad\.json is not JSON \(nested too deeply"),
        ({"folder": "list.json"}, r"list\.json holds list, not an object; write the folder again"),
        ({"folder": 3}, r"model\.folder is 3 of type int; it must be text"),
        ({"size": ["gemma3:1b"]}, r"model\.size is \['gemma3:1b'\] of type list; it must be text"),
        (
            {"folder": "m", "size": "gemma3:1b"},
            r"model has a size and also a folder, so it is a whole architecture twic",
        ),
        (
            {"folder": "m", "kind": "decoder"},
            r"model has a folder and also a kind, .*config\.model = \{\"folder\": PATH\}",
        ),
    ],
)
def test_a_folder_that_names_no_model(tmp_path, monkeypatch, model, message):
    plain = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=message):
        experiments.build(plain | {"model": model})


def test_a_size_by_name_and_what_is_otherwise():
    plain = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    named = plain | {"model": {"size": "t5gemma2:270m-270m"}}
    assert experiments.build(named).model == size("t5gemma2:270m-270m")
    other = plain | {"model": {"size": "t5gemma:2b-2b", "cross": "merged", "decoder": {"rope_global": {"factor": 4}}}}
    base = size("t5gemma:2b-2b")
    decoder = dataclasses.replace(base.decoder, rope_global=Rope(10_000.0, 4.0))
    assert experiments.build(other).model == dataclasses.replace(base, cross="merged", decoder=decoder)
    assert experiments.build(experiments.dump(experiments.build(other))) == experiments.build(other)
    with pytest.raises(UserError, match=r"unknown key 'width' in config\.model \(EncoderDecoderConfig\)"):
        experiments.build(plain | {"model": {"size": "t5gemma2:270m-270m", "width": 3}})
    with pytest.raises(UserError, match="model has a size and also a kind, so it is a whole architecture twice; keep"):
        experiments.build(plain | {"model": plain["model"] | {"size": "t5gemma2:270m-270m"}})
    with pytest.raises(UserError, match="t5gemma2:270m-270m"):
        experiments.build(plain | {"model": {"size": "t5gemma2:270m"}})


def test_a_run_saved_with_the_former_name_of_an_objective_goes_on():
    plain = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    saved, now = copy.deepcopy(plain), copy.deepcopy(plain)
    for node, kind in ((saved, "answers"), (now, "sft")):
        node["data"]["sources"][0]["objective"] = {"kind": kind, "starts": [5], "ends": [6]}
    current = experiments.dump(experiments.build(now))
    assert resume.check_resume(saved, current) == {}
    assert experiments.dump(experiments.build(saved)) == current


def test_what_may_differ_on_resume():
    saved = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    free = {
        "train.steps": "70",
        "log.every_steps": "3",
        "save.every_steps": "7",
        "save.keep": "5",
        "eval.every_steps": "9",
        "mesh.fsdp": "2",
        "compute.remat": "none",
        "compute.backend": "reference",
        "data.workers": "2",
        "data.prefetch": "4",
        "init.adapt.source": "elsewhere",
    }
    now = experiments.dump(config_file.load(f"{QUICKSTART}:adapted", list(free.items())))
    changed = resume.check_resume(saved, now)
    assert set(changed) == set(free)
    assert changed["train.steps"] == (100, 70)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("train.seed", "1"),
        ("train.microbatches", "2"),
        ("data.rows", "16"),
        ("data.streams", "8"),
        ("data.sources.0.weight", "2"),
        ("optim.schedule.peak", "1e-4"),
        ("model.decoder.window", "8"),
        ("compute.dtype", "bfloat16"),
    ],
)
def test_anything_else_is_refused_with_the_difference_unless_it_is_named(path, text):
    saved = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    now = experiments.dump(config_file.load(f"{QUICKSTART}:adapted", [(path, text)]))
    with pytest.raises(UserError, match=rf"(?s)changed  {path}: .*--allow_change={path}"):
        resume.check_resume(saved, now)
    assert list(resume.check_resume(saved, now, allow=[path])) == [path]
    parent = path.rpartition(".")[0]
    assert list(resume.check_resume(saved, now, allow=[parent])) == [path]


def test_a_run_saved_before_there_was_a_setting_is_resumed_at_its_default():
    saved = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    before = copy.deepcopy(saved)
    del before["distill"], before["data"]["max_skipped"]
    assert resume.check_resume(before, saved) == {}
    now = experiments.dump(config_file.load(f"{QUICKSTART}:adapted", [("data.max_skipped", "0.5")]))
    with pytest.raises(UserError, match=r"changed  data\.max_skipped: 0\.01 -> 0\.5"):
        resume.check_resume(before, now)
    before["no_such_setting"] = 1
    with pytest.raises(UserError, match="no_such_setting"):
        resume.check_resume(before, saved)


def test_errors_of_config_files(tmp_path):
    with pytest.raises(UserError, match=r"no config file quickstart; did you mean configs/quickstart\.py\?"):
        config_file.load("quickstart")
    with pytest.raises(UserError, match=r"no config file .*quickstrat\.py; did you mean .*quickstart\.py\?"):
        config_file.load(str(QUICKSTART.with_name("quickstrat.py")))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty\.py has no get_config\(\)"):
        config_file.load(str(tmp_path / "empty.py"))
    with pytest.raises(UserError, match=r"unknown arm 'sauce' of the quickstart; did you mean 'source'\?"):
        config_file.load(f"{QUICKSTART}:sauce")


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("def get_config(:\n", "", r"line 1: SyntaxError"),
        ("# Title\n\nSome prose, not code.\n", "", r"line 3: SyntaxError"),
        ("import no_such_module\n", "", r"line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return {}\n", ":arm", r"get_config\(\) of .* was called with arm"),
        ("def get_config(arm):\n    return {}\n", "", r"get_config\(arm\) of .* was called with nothing"),
        ("def get_config():\n    return 3\n", "", r"returns int; it must return a ConfigDict"),
        ("def get_config():\n    return {}['x']\n", "", r"line 2: KeyError: 'x'"),
        ("import sys\nsys.exit(0)\n", "", r"config.py ends the program, with 0; take out its call of exit\(\)"),
        ("def get_config():\n    raise SystemExit('no data')\n", "", r"ends the program, with 'no data'; take out"),
    ],
)
def test_a_config_file_that_fails_says_where(tmp_path, text, argument, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UserError, match=message):
        config_file.read(f"{tmp_path / 'config.py'}{argument}")


def test_a_config_may_import_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "work").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "work" / "of_working_folder.py").write_text("STEPS = 3")
    (tmp_path / "configs" / "of_config_folder.py").write_text("ROWS = 4")
    (tmp_path / "configs" / "json.py").write_text("raise RuntimeError('hides an installed module')")
    config = tmp_path / "configs" / "config.py"
    config.write_text(
        "import json\nimport of_config_folder as a, of_working_folder as b\n"
        "def get_config():\n    return {'steps': b.STEPS, 'rows': a.ROWS, 'json': json.dumps(1)}\n"
    )
    monkeypatch.chdir(tmp_path / "work")
    assert config_file.read("../configs/config.py") == {"steps": 3, "rows": 4, "json": "1"}


def test_neighbours_of_one_name_are_those_of_each_config(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared_rows.py").write_text(f"ROWS = {folder!r}")
        text = "import shared_rows\ndef get_config():\n    return {'rows': shared_rows.ROWS}\n"
        (tmp_path / folder / "config.py").write_text(text)
    for folder in ("a", "b", "a"):
        assert config_file.read(f"{tmp_path}/{folder}/config.py") == {"rows": folder}


def test_colons_and_home_in_the_path_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run:3").mkdir()
    text = "def get_config(arm='none'):\n    return {'arm': arm, 'path': '~/x', 'text': 'in ~/x'}\n"
    (tmp_path / "run:3" / "config.py").write_text(text)
    for config in (f"{tmp_path}/run:3/config.py", "~/run:3/config.py"):
        assert config_file.read(config) == {"arm": "none", "path": f"{tmp_path}/x", "text": "in ~/x"}
        assert config_file.read(f"{config}:a:b")["arm"] == "a:b"
    with pytest.raises(UserError, match=r"no config file .*/run;"):
        config_file.read(f"{tmp_path}/run:4/config.py")


def test_an_allowed_change_names_a_setting():
    saved = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    assert resume.check_resume(saved, saved, allow=["data.corpus", "optim", "data.sources.0"]) == {}
    with pytest.raises(UserError, match=r"--allow_change=optim\.schedule\.peek is not a setting; did you mean optim"):
        resume.check_resume(saved, saved, allow=["optim.schedule.peek"])


def test_the_refusal_names_a_list_and_not_each_of_its_entries():
    saved = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    now = copy.deepcopy(saved)
    saved["optim"]["decay"] = []
    with pytest.raises(UserError, match=r"--allow_change=optim\.decay$"):
        resume.check_resume(saved, now)
    assert resume.check_resume(saved, now, allow=["optim.decay"])


def test_with_other_sources_the_flag_is_data_sources_and_the_difference_is_short():
    saved = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    now = copy.deepcopy(saved)
    new = {
        "text": {
            "kind": "text",
            "path": "corpus",
        },
        "objective": {"kind": "ul2"},
        "name": "web",
        "weight": 3,
    }
    now["data"]["sources"].insert(0, new)
    now = experiments.dump(experiments.build(now))
    for before, after, word in ((saved, now, "surplus"), (now, saved, "missing")):
        with pytest.raises(UserError, match=r"--allow_change=data\.sources$") as refused:
            resume.check_resume(before, after)
        assert f"{word}  data.sources.web: text, ul2, weight 3\n" in str(refused.value)
        assert len(str(refused.value)) < 300
        assert list(resume.check_resume(before, after, allow=["data.sources"])) == ["data.sources.web"]
    # what else has changed of a source is shown under its name
    now["data"]["sources"][1]["weight"] = 9
    with pytest.raises(UserError, match=r"changed  data\.sources\.python\.weight: 1 -> 9\n.*=data\.sources$"):
        resume.check_resume(saved, now)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([("optim.optimizer", '{"kind": "adafactor"}')], "optim.optimizer"),
        ([("optim.optimizer.moment_dtype", "bfloat16")], "optim.optimizer.moment_dtype"),
        ([("optim.freeze", '[{"pattern": "decoder.*"}]')], "optim.freeze"),
        ([("train.param_dtype", "bfloat16")], "train.param_dtype"),
        ([("model.decoder.mlp_width", "96")], "model.decoder.mlp_width"),
    ],
)
def test_a_change_that_the_saved_state_does_not_fit_is_not_recommended(overrides, named):
    saved = experiments.dump(config_file.load(f"{QUICKSTART}:adapted"))
    now = experiments.dump(config_file.load(f"{QUICKSTART}:adapted", overrides))
    with pytest.raises(UserError, match=rf"(?s)cannot go on with another {named}, because .* init\.params") as refused:
        resume.check_resume(saved, now)
    assert "--allow_change" not in str(refused.value)
    # beside one that can be allowed
    now["train"]["z_loss"] = 0.125
    with pytest.raises(UserError, match=rf"(?s)another {named}, .* on purpose: --allow_change=train\.z_loss$"):
        resume.check_resume(saved, now)


def test_a_config_may_read_another_one(tmp_path):
    """Modules under former names are there until the outer one has been read, and for nobody after it."""
    (tmp_path / "inner.py").write_text("from t5g2.data.tokenizer import Bytes\ndef get_config(): return {'a': 1}\n")
    (tmp_path / "outer.py").write_text(
        "from t5g2.train import config_file\n"
        f"INNER = config_file.read({str(tmp_path / 'inner.py')!r})\n"
        "from t5g2.data.copies import cache\n"
        "def get_config(): return INNER\n"
    )
    assert config_file.read(str(tmp_path / "outer.py")) == {"a": 1}
    assert not {"t5g2.data.copies", "t5g2.data.tokenizer"} & sys.modules.keys()
