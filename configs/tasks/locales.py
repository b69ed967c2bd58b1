"""Names of countries and languages in over 100 languages, from Babel (pip install 't5g2[eval]'): translated, counted.

    t5g2 evaluate --model=DIR --tasks=locales --out=DIR        2 names of each language
    t5g2 evaluate --model=DIR --tasks=locales:10 --out=DIR     10
    t5g2 evaluate --model=DIR --tasks=locales:0 --out=DIR      none: the tokenizer's table alone

`locale_names/chrf` compares the model's translation of an English name, after three solved ones, with CLDR's; from 0 to
100, and `locale_names/chrf/<locale>` for each language. `locale_coverage/bytes_per_token` is of the tokenizer on all
names of a language, days and months too, and `unknown` and `single_bytes` are shares of its tokens, each also by
language: `locale_coverage/unknown/my`. Nothing is downloaded; releases of Babel have other names here and there.
"""

import random

from t5g2.core.optional import require
from t5g2.eval.tasks import GenerateAndCompare, TokenizerCoverage

# names that a language must have to be taken
LEAST = 150


def locales():
    """The languages, without countries, that name LEAST countries, as Babel's locales; English is not among them."""
    babel = require("babel", "eval")
    names = [name for name in require("babel.localedata", "eval").locale_identifiers() if "_" not in name]
    parsed = [babel.Locale.parse(name) for name in sorted(names) if name not in ("en", "root")]
    return [locale for locale in parsed if locale.english_name and len(_own(locale)) >= LEAST]


def _own(locale):
    """The countries and languages of a locale whose names are not the English ones, by their English names."""
    english = require("babel", "eval").Locale("en")
    names = {}
    for field in ("territories", "languages"):
        own, theirs = getattr(locale, field), getattr(english, field)
        for code in sorted(own.keys() & theirs.keys()):
            if own[code] != theirs[code] and not code.isdigit():
                names.setdefault(theirs[code], own[code])
    return names


def get_tasks(names: str = "2"):
    translations, texts = [], []
    for locale in locales():
        own = _own(locale)
        drawn = random.Random(str(locale)).sample(sorted(own), 3 + int(names))
        solved = "\n".join(f"{name} = {own[name]}" for name in drawn[:3])
        shared = {"locale": str(locale), "language": locale.english_name}
        translations += [shared | {"solved": solved, "english": name, "own": own[name]} for name in drawn[3:]]
        words = [*own.values(), *locale.days["format"]["wide"].values(), *locale.months["format"]["wide"].values()]
        texts.append(shared | {"text": "\n".join(words)})
    coverage = TokenizerCoverage(data=texts, name="locale_coverage", group="{locale}")
    if not translations:
        return [coverage]
    return [
        GenerateAndCompare(
            data=translations,
            name="locale_names",
            template="English = {language}\n{solved}\n{english} =",
            reference="{own}",
            group="{locale}",
            metrics=("chrf", "exact_match"),
            max_new_tokens=24,
            stop=("\n",),
        ),
        coverage,
    ]
