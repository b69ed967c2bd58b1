"""Paths as users write them."""

import pytest

from t5g2.commands import flags, generate
from t5g2.core import paths
from t5g2.train.weight_origin import Adapt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png", ["a.png"]),
        ("a.png,b.png", ["a.png", "b.png"]),
        ("x,y.png", ["x,y.png"]),
        ("a.png,x,y.png,b.png", ["a.png", "x,y.png", "b.png"]),
        ("x,y.png,x,y.png", ["x,y.png", "x,y.png"]),
        ("x,z.png", ["x", "z.png"]),
        ("~/home.png,b.png", ["HOME/home.png", "b.png"]),
        ("b.png,~/none.png", ["b.png", "HOME/none.png"]),
        ("", [""]),
    ],
)
def test_a_comma_in_the_name_of_a_path_that_exists(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("a.png", "b.png", "x,y.png"):
        (tmp_path / name).touch()
    assert paths.split(text) == [path.replace("HOME", str(tmp_path / "home")) for path in expected]


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.expand_home("~/models/a") == "/home/me/models/a"
    for text in ("a/~/b", "~", "~ is a sign", "/a", ""):
        assert paths.expand_home(text) == text


def test_flags_and_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b").mkdir()
    argv = ["--model=~/m", "--prompt=~/x is a path", f"--image={tmp_path}/a,b,~/c.png"]
    parsed = flags.parse("generate", generate.run, generate.FLAGS, argv)
    assert (parsed.model, parsed.prompt) == (f"{tmp_path}/m", "~/x is a path")
    assert parsed.paths("image") == (f"{tmp_path}/a,b", f"{tmp_path}/c.png")
    assert flags.parse("generate", generate.run, generate.FLAGS, ["--model=m"]).paths("image") == ()
    assert Adapt(f"{tmp_path}/a,b").sources == [f"{tmp_path}/a,b"]
    assert Adapt(f"{tmp_path}/a,b,~/a,b").sources == [f"{tmp_path}/a,b"] * 2
    assert Adapt("encoder,decoder").sources == ["encoder", "decoder"]
