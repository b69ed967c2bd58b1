import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from t5g2.core import settings
from t5g2.core.errors import UserError


@dataclass(frozen=True)
class Constant:
    rate: float


@dataclass(frozen=True)
class Cosine:
    peak: float
    warmup_steps: int = 100


@dataclass(frozen=True)
class Outer:
    schedule: Constant | Cosine
    names: tuple[str, ...] = ()
    shape: tuple[int, int] = (1, 2)
    mode: Literal["a", "b"] = "a"
    limit: float | None = None
    on: bool = False


class Shape:
    """A base class whose members a table names."""


@dataclass(frozen=True)
class Square(Shape):
    side: int


@dataclass(frozen=True)
class Holder:
    shape: Shape


TABLES = [{"constant": Constant, "cosine": Cosine}, {"square": Square}]


def build(node):
    return settings.build(Outer, node, tables=TABLES)


def test_build_and_dump_are_inverse():
    outer = build(
        {"schedule": {"kind": "cosine", "peak": 1}, "names": ["x", "y"], "shape": [3, 4], "mode": "b", "limit": 2}
    )
    assert outer == Outer(Cosine(1.0), ("x", "y"), (3, 4), "b", 2.0)
    assert isinstance(outer.schedule.peak, float)
    plain = settings.dump(outer, tables=TABLES)
    assert plain["schedule"] == {"kind": "cosine", "peak": 1.0, "warmup_steps": 100}
    assert build(plain) == outer


def test_an_alias_is_read_and_the_first_name_is_written():
    tables = [{"square": Square, "quadrat": Square}]
    holder = settings.build(Holder, {"shape": {"kind": "quadrat", "side": 3}}, tables=tables)
    assert holder == settings.build(Holder, {"shape": {"kind": "square", "side": 3}}, tables=tables)
    assert settings.dump(holder, tables=tables) == {"shape": {"kind": "square", "side": 3}}
    with pytest.raises(UserError, match=r"unknown config\.shape\.kind 'circle'\. Allowed: square$"):
        settings.build(Holder, {"shape": {"kind": "circle"}}, tables=tables)
    with pytest.raises(UserError, match=r"config\.shape has no 'kind'; give one of: square$"):
        settings.build(Holder, {"shape": {"side": 3}}, tables=tables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scedule": {}}, r"unknown key 'scedule' in config \(Outer\); did you mean 'schedule'\?"),
        (
            {"schedule": {"kind": "cosin", "peak": 1}},
            r"unknown config\.schedule\.kind 'cosin'; did you mean 'cosine'\?",
        ),
        ({"schedule": {"peak": 1}}, r"config\.schedule has no 'kind'; give one of: constant, cosine"),
        ({"schedule": {"kind": "cosine"}}, r"config\.schedule lacks peak, which Cosine has no default for"),
        ({"schedule": {"kind": "constant", "rate": "fast"}}, r"config\.schedule\.rate is 'fast' of type str; .* float"),
        ({"on": 1}, r"config\.on is 1 of type int; it must be of type bool"),
        ({"limit": True}, r"config\.limit is True of type bool; it must be of type float"),
        ({"mode": "c"}, r"unknown value 'c' of config\.mode\. Allowed: a, b"),
        ({"names": "xy"}, r"config\.names is 'xy' of type str; it must be a list"),
        ({"shape": [1]}, r"config\.shape is \[1\] of type list; it must be a list of 2"),
        ({"names": ["x", 3]}, r"config\.names\.1 is 3 of type int; it must be of type str"),
    ],
)
def test_errors_name_the_path_and_what_is_allowed(change, message):
    good = {"schedule": {"kind": "constant", "rate": 0.1}}
    build(good)
    with pytest.raises(UserError, match=message):
        build(good | change)


def test_override_reads_literals_and_reaches_into_lists():
    node = {"a": {"b": 1}, "list": [{"w": 1.0}]}
    for path, text in {
        "a.b": "2e-3",
        "a.c.d": "None",
        "list.0.w": "3",
        "flag": "true",
        "word": "none",
        "name": "x/y.z",
    }.items():
        settings.override(node, path, text)
    assert node == {
        "a": {"b": 2e-3, "c": {"d": None}},
        "list": [{"w": 3}],
        "flag": True,
        "word": "none",
        "name": "x/y.z",
    }
    with pytest.raises(UserError, match=r"cannot set list\.1\.w: '1' is not an entry; give a number below 1"):
        settings.override(node, "list.1.w", "3")
    with pytest.raises(UserError, match=r"cannot set name\.x: name is 'x/y\.z', which has no entries"):
        settings.override(node, "name.x", "3")


def test_flatten_keeps_every_leaf():
    assert settings.flatten({"a": {"b": 1, "c": []}, "d": [2, {"e": 3}]}) == {"a.b": 1, "a.c": [], "d.0": 2, "d.1.e": 3}


def test_an_invariant_of_a_dataclass_is_an_error_with_its_path():
    @dataclass(frozen=True)
    class Even:
        n: int

        def __post_init__(self):
            if self.n % 2:
                raise UserError(f"n = {self.n} is odd; give an even number")

    with pytest.raises(UserError, match=r"config\.data: n = 3 is odd; give an even number"):
        settings.build(Even, {"n": 3}, where="config.data")
    assert dataclasses.asdict(settings.build(Even, {"n": 4})) == {"n": 4}


def test_a_base_class_is_chosen_by_kind():
    holder = settings.build(Holder, {"shape": {"kind": "square", "side": 3}}, tables=TABLES)
    assert holder == Holder(Square(3))
    assert settings.dump(holder, tables=TABLES) == {"shape": {"kind": "square", "side": 3}}
    with pytest.raises(UserError, match=r"unknown config\.shape\.kind 'cosine'\. Allowed: square"):
        settings.build(Holder, {"shape": {"kind": "cosine", "peak": 1.0}}, tables=TABLES)
    with pytest.raises(
        UserError, match=r"config\.shape is 3 of type int; it must be settings with a 'kind', one of: square"
    ):
        settings.build(Holder, {"shape": 3}, tables=TABLES)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("None", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ('{"kind": "chat", "eos": true, "limit": null}', {"kind": "chat", "eos": True, "limit": None}),
        ("{'kind': 'chat', 'eos': True}", {"kind": "chat", "eos": True}),
        ("[1, 2.5, false]", [1, 2.5, False]),
        ("adamw", "adamw"),
        ("NaN", "NaN"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_values_of_flags(text, value):
    assert settings.parse(text) == value


@pytest.mark.parametrize("kind", [["constant"], None, 3, {"a": 1}])
def test_a_kind_is_a_word(kind):
    with pytest.raises(UserError, match=r"unknown key 'kind' in config \(Square\)"):
        settings.build(Square, {"kind": kind, "side": 1}, tables=TABLES)
    with pytest.raises(UserError, match=r"config\.schedule\.kind is .*; it must be one of: constant, cosine"):
        build({"schedule": {"kind": kind, "peak": 1.0}})
