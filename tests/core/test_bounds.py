"""The range of every setting: declared, checked by every constructor, and printed in docs/settings.md."""

import dataclasses
import importlib.util
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from t5g2.core import bounds
from t5g2.core.bounds import Bounds, Count, Positive, TokenId, checked
from t5g2.core.errors import UserError
from t5g2.eval.generation import GenerationOptions, TopK
from t5g2.models.config import Rope
from t5g2.models.layers import Compute
from t5g2.objectives.prefix_lm import PrefixLM
from t5g2.objectives.ul2 import UL2
from t5g2.train.optim import Decay, Freeze, OptimConfig
from t5g2.train.optimizers import Adafactor, AdamW
from t5g2.train.schedules import Constant, Cosine

ROOT = Path(__file__).parents[2]


def load_settings_writer():
    spec = importlib.util.spec_from_file_location("write_settings", ROOT / "docs/write_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETTINGS = load_settings_writer()


@dataclass(frozen=True)
@checked
class Base:
    rate: Positive
    ids: tuple[TokenId, ...] = ()
    names: tuple[tuple[str, TokenId], ...] = ()
    limit: Count | None = None
    order: Literal["first", "last"] | None = None
    kinds: tuple[Literal["a", "b"], ...] = ()
    width: Count | Literal["all"] = 1
    early: Literal[True, False, "never"] = False
    any: Literal["auto"] | str = "auto"
    flag: bool | Literal["auto"] = "auto"
    share: Bounds | Literal["none"] = "none"

    def __post_init__(self):
        self.__dict__["ran_after_the_check"] = True


@dataclass(frozen=True)
class Derived(Base):
    share: Annotated[float, Bounds(least=0, below=1)] = 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Base(0), r"rate = 0; it must be above 0"),
        (lambda: Base(math.nan), r"rate = nan; it must be above 0"),
        (lambda: Base(math.inf), r"rate = inf; it must be above 0"),
        (lambda: Base(1, ids=(3, -1)), r"ids = -1; it must be at least 0 and at most 2147483647"),
        (lambda: Base(1, names=(("S", 2**31),)), r"names = 2147483648; it must be at least 0"),
        (lambda: Base(1, limit=0), r"limit = 0; it must be at least 1 and at most 2147483647, or None for none"),
        (lambda: Derived(1, share=1.0), r"share = 1\.0; it must be at least 0 and below 1"),
        (lambda: Derived(-1e-8), r"rate = -1e-08; it must be above 0"),
        (lambda: Base(np.float32(-1)), r"rate = -1.0; it must be above 0"),
        (lambda: Base(np.float32("nan")), r"rate = nan; it must be above 0"),
        (lambda: Base(1, ids=(np.int64(-1),)), r"ids = -1; it must be at least 0 and at most 2147483647"),
        (
            lambda: Base(1, order="frist"),
            r"unknown order 'frist' of Base; did you mean 'first'\? Allowed: None, first, last",
        ),
        (lambda: Derived(1, kinds=("a", "c")), r"unknown kinds 'c' of Derived\. Allowed: a, b"),
        (lambda: Base(1, width="al"), r"unknown width 'al' of Base; did you mean 'all'"),
        (lambda: Base(1, width=True), r"unknown width 'True' of Base"),
        (lambda: Base(1, width=0), r"width = 0; it must be at least 1 and at most 2147483647, or 'all'"),
        (lambda: Base(1, kinds=(1,)), r"unknown kinds '1' of Base"),
        (lambda: Base(1, early="always"), r"unknown early 'always' of Base"),
        (lambda: Base(1, early=None), r"unknown early 'None' of Base"),
        (lambda: Base(1, early=1), r"unknown early '1' of Base"),
        (lambda: Base(1, order=object()), r"unknown order '<object object at .*>' of Base"),
        (lambda: Base(1, order=b"first"), r"unknown order 'b'first'' of Base|unknown order \"b'first'\" of Base"),
        (lambda: Base(1, kinds=["a"]), r"unknown kinds .*\['a'\].* of Base"),
        (lambda: Base(1, flag=1), r"unknown flag '1' of Base"),
        (lambda: Base(1, share=Count), r"unknown share .* of Base"),
        (lambda: Compute(dtype=np.dtype("float16")), r"unknown dtype 'float16' of Compute"),
    ],
)
def test_a_number_out_of_its_bounds_and_an_unknown_word_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_numbers_within_their_bounds_are_taken():
    value = Derived(1e-30, ids=(0, 2**31 - 1), names=(("S", 0),), limit=None, share=0)
    assert value.share == 0
    assert value.__dict__["ran_after_the_check"]
    assert dataclasses.replace(value, limit=1).limit == 1
    words = Base(1, order="first", kinds=("a", "b", "a"), width="all", early="never", any="thing", flag=True)
    assert dataclasses.replace(words, order=None, width=np.int64(3), early=True, share=Bounds(least=1)).width == 3


def test_a_word_that_is_allowed_instead_is_named():
    assert PrefixLM("uniform").prefix == "uniform"
    with pytest.raises(UserError, match=r"prefix = 1\.0; it must be above 0 and below 1, or 'uniform'"):
        PrefixLM(1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OptimConfig(Constant(1e-3), clip_norm=0),
        lambda: OptimConfig(Constant(1e-3), clip_norm=-1),
        lambda: OptimConfig(Constant(1e-3), clip_norm=math.nan),
        lambda: AdamW(eps=0),
        lambda: AdamW(eps=-1e-8),
        lambda: AdamW(b2=1.0),
        lambda: Adafactor(clip_rms=0),
        lambda: Adafactor(decay_rate=-0.8),
        lambda: Decay("*", -0.1),
        lambda: Decay("*", 10.0),
        lambda: Freeze("*", first=-1),
        lambda: Constant(-1e-3),
        lambda: Cosine(1e-3, final_fraction=1.5),
        lambda: Rope(0.0),
        lambda: TopK(0),
        lambda: GenerationOptions(2**31, (1,), 0),
        lambda: UL2(mode_tokens=(("NLG", -1),)),
    ],
)
def test_numbers_that_would_ruin_a_run_are_refused(make):
    with pytest.raises(UserError, match=r"it must be (at least|above)"):
        make()


@pytest.mark.parametrize("cls", SETTINGS.classes(), ids=lambda cls: cls.__name__)
def test_every_numeric_setting_has_a_range_and_words_are_checked(cls):
    ranges = bounds.of(cls)
    hints = typing.get_type_hints(cls)
    numeric = {f.name for f in dataclasses.fields(cls) if f.init and {int, float} & set(flattened(hints[f.name]))}
    assert numeric <= set(ranges), f"without bounds: {numeric - set(ranges)}"
    # a class that declares bounds or words and forgets @checked would not hold them
    if ranges or any("Literal" in str(hint) for hint in hints.values()):
        assert any("checked" in vars(base).get("__post_init__", checked).__qualname__ for base in cls.__mro__)


def test_the_reference_of_settings_is_up_to_date():
    assert SETTINGS.FILE.read_text() == SETTINGS.text(), "run: make settings"
    assert "| `clip_norm` | number or None | `1.0` | above 0 |" in SETTINGS.text()


def flattened(annotation):
    return [annotation, *(part for argument in typing.get_args(annotation) for part in flattened(argument))]
