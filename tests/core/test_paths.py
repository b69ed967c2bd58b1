"""Paths as users write them."""

import pytest

from t5g2.core import paths


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
