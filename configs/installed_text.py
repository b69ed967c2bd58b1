"""Text that is installed: the standard library, descriptions of packages, and names in other languages from Babel.

    >>> import installed_text
    >>> installed_text.folder()    # train-python.jsonl, train-packages.jsonl, train-languages.jsonl, heldout.jsonl

The rule. A document is one of these, at most 4,000 characters of it:

    python      a top-level module of the standard library, or a topic of the language reference
    packages    the description of an installed package, but of this one (its README, as pip has it)
    languages   one of five parts of the names of countries and languages in a language that has at least 150 of them,
                six to a sentence, as Babel joins a list in that language, and dates in words

Documents come in the order of the SHA-256 of their names (of python their text), each kind up to its number of
characters. Held out are those of python that the kind "python" of text holds out too, so that the tasks that read them
ask for nothing that was trained on, and of the others those whose hash is divisible by 10. The files are written once,
to the cache (T5G2_CACHE), and kept whatever is installed later, so that a run can be resumed; remove the folder to
collect anew. Other releases of Python, Babel and the packages have other text here and there.
"""

import hashlib
import importlib.metadata
import json
import random
from datetime import date

from t5g2.core import files
from t5g2.core.optional import require
from t5g2.data.sources.python_text import PythonText

RULE = 2  # its version, in the name of the folder: of a former rule's texts others were held out
KINDS = ("python", "packages", "languages")
TRAIN_CHARACTERS, HELDOUT_CHARACTERS = 120_000, 40_000  # of a kind
LONGEST, SHORTEST = 4_000, 1_000  # characters of a document
LEAST_NAMES, PARTS, IN_SENTENCE = 150, 5, 6


def folder():
    """The folder of the files, which are written if they are not there."""
    target = files.cache_folder() / f"installed_text-{RULE}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(target.with_suffix(".lock")):
        if not (target / "heldout.jsonl").exists():
            collect(target)
    return target


def collect(target):
    """Writes the files; the held-out one, which mixes the kinds, last."""
    heldout = {}
    for kind, (training, others) in zip(KINDS, (python(), by_hash(packages()), by_hash(languages())), strict=True):
        files.write_text(target / f"train-{kind}.jsonl", lines(up_to(TRAIN_CHARACTERS, kind, training)))
        heldout |= up_to(HELDOUT_CHARACTERS, kind, others)
    files.write_text(target / "heldout.jsonl", lines({name: heldout[name] for name in sorted(heldout, key=name_hash)}))


def name_hash(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def up_to(characters, kind, documents):
    """The documents of a kind by their names' hashes, until the next one would be too much."""
    named = {f"{kind} {name}": text[:LONGEST] for name, text in documents.items()}
    chosen = {}
    for name in sorted(named, key=name_hash):
        if sum(map(len, chosen.values())) + len(named[name]) > characters:
            break
        chosen[name] = named[name]
    return chosen


def lines(texts):
    return "".join(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in texts.items())


def by_hash(documents):
    """Documents for training, and those that are held out."""
    training, heldout = {}, {}
    for name, text in documents.items():
        (training if name_hash(name) % 10 else heldout)[name] = text
    return training, heldout


def python():
    """As by_hash."""
    return tuple(
        {hashlib.sha256(text.encode()).hexdigest(): text for text in map(documents.__getitem__, range(len(documents)))}
        for documents in (PythonText(split=split).open() for split in ("train", "heldout"))
    )


def packages():
    described = {}
    for package in importlib.metadata.distributions():
        text = package.metadata.get_payload() or package.metadata.get("Description", "")
        if len(text) >= SHORTEST and package.metadata["Name"] != "t5g2":
            described[package.metadata["Name"]] = text.strip()
    return described


def languages():
    babel = require("babel", "eval")
    dates = require("babel.dates", "eval")
    join = require("babel.lists", "eval").format_list
    documents = {}
    for identifier in sorted(require("babel.localedata", "eval").locale_identifiers()):
        locale = babel.Locale.parse(identifier) if "_" not in identifier and identifier != "root" else None
        names = sorted({*locale.territories.values(), *locale.languages.values()}) if locale else []
        if len(names) < LEAST_NAMES:
            continue
        draw = random.Random(identifier)
        draw.shuffle(names)
        for part in range(PARTS):
            own = names[part::PARTS]
            sentences = []
            for first in range(0, len(own) - IN_SENTENCE + 1, IN_SENTENCE):
                day = date.fromordinal(draw.randrange(date(1900, 1, 1).toordinal(), date(2030, 1, 1).toordinal()))
                joined = join(own[first : first + IN_SENTENCE], locale=locale)
                sentences.append(f"{dates.format_date(day, 'full', locale=locale)}: {joined}.")
            documents[f"{identifier} {part}"] = "\n".join(sentences)
    return documents
