"""Dialogues: records with the turns of a user and a model, as Gemma's chat template writes them.

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "What is 2 + 2?", "answer": "4"}

both become

    <start_of_turn>user
    What is 2 + 2?<end_of_turn>
    <start_of_turn>model
    4<end_of_turn>

which is the template of Gemma 3's released tokenizer_config.json: "assistant" is called model; what the system says
stands in front of the first user's turn, two line breaks between; contents are stripped of white space at their ends;
user and model alternate, the user begins. (Gemma 2's template is the same but refuses a system's message.) The first
and the last tokens of a turn are ids, so that a content which spells them out is a text and no turn.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from t5g2.core import optional
from t5g2.core.errors import UserError
from t5g2.data.sources import local_copies
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.text_files import find_files, line_spans
from t5g2.data.sources.validation import MAX_PROBLEMS, RecordValidator, SourceSummary, ValidatedDocuments
from t5g2.data.tokenizers.base import Tokenizer

USER, MODEL = "user", "model"
ROLES = {"user": USER, "assistant": MODEL, "model": MODEL}
SYSTEM = ("system", "developer")
Turn = tuple[str, str]  # "user" or "model", and what is said


@dataclass(frozen=True)
class Chat:
    """Files of dialogues: JSON lines, or parquet with the same columns (pip install 't5g2[parquet]').

    A record has `messages_field`, or else `prompt_field` and `answer_field`. A dialogue is never cut: one that has more
    tokens than chunk_tokens is a bad record. It is for the objectives `answers` and `answers_decoder`, which are told
    what `answer_ids` gives.

    Attributes:
      path: a file, a folder (all files below it, hidden ones aside) or a pattern; here or at a URL; plain, or
        compressed if the name ends in .gz or .zst.
      messages_field: the key of the turns, each {"role": …, "content": …}; a content is a text, or a list of parts
        {"type": "text", "text": …}. The last one is the model's.
      prompt_field, answer_field: the keys of a single question and its answer.
      start_of_turn, end_of_turn: ids; None = those that the tokenizer has by these names.
    """

    path: str
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    start_of_turn: int | None = None
    end_of_turn: int | None = None

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> "Dialogues":
        """The dialogues, files in the order of their names; empty lines are none.

        Raises:
          UserError: no file is found, all are empty, or a record is no dialogue (unless those are skipped).
        """
        names, scan, spans = find_files(self.path), RecordValidator(on_bad_record), []
        files = tuple(map(self._plain, names))
        for number, name in enumerate(names):
            for place, offset, data in line_spans(files[number], "row" if name.endswith(".parquet") else "line"):
                if scan.accept(f"{name}, {place}", functools.partial(_text, data, self)):
                    spans.append((number, offset, len(data)))
        scanned = scan.finish(self.path)
        if not spans:
            raise UserError(f"{self.path}: {len(names)} files without a dialogue; give records as {_wanted(self)}")
        return Dialogues(self, tuple(names), files, np.array(spans, np.int64), scanned)

    def _plain(self, name: str) -> str:
        if not name.endswith(".parquet"):
            return local_copies.plain_copy(name)
        fields = (self.messages_field, self.prompt_field, self.answer_field)
        return local_copies.converted_copy(name, functools.partial(_rows, fields=fields), ("dialogues", *fields))


@dataclass(frozen=True, eq=False)
class Dialogues(ValidatedDocuments):
    """Dialogues; `spans` int64[documents, 3] says which file, from which byte, how many bytes."""

    config: Chat
    names: tuple[str, ...]
    files: tuple[str, ...]
    spans: np.ndarray
    summary: SourceSummary

    @property
    def is_indivisible(self) -> bool:
        """True."""
        return True

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> str:
        return as_text(self.turns(index))

    def turns(self, index: int) -> list[Turn]:
        """What is said in turn."""
        file, offset, size = self.spans[index].tolist()
        with open(self.files[file], "rb") as data:
            data.seek(offset)
            return read_turns(data.read(size), self.config)

    def location(self, index: int) -> str:
        """Which record this is, in words."""
        file, offset, _ = self.spans[index].tolist()
        return f"{self.names[file]}, the record at byte {offset}"

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """int64[documents]."""
        return np.array([len(self.tokens(i, tokenizer)) for i in range(len(self))], np.int64)

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """int32[tokens] of a dialogue."""
        return encode(self.turns(index), tokenizer, self.config.start_of_turn, self.config.end_of_turn)


@dataclass(frozen=True, eq=False)
class Fitting(Documents):
    """Those of some dialogues that are not too long, with `lengths` int64[documents] in tokens."""

    dialogues: Dialogues
    numbers: np.ndarray
    lengths: np.ndarray
    too_long: tuple[str, ...]
    count_too_long: int

    @property
    def fingerprint(self) -> str:
        """Of all dialogues; which of them fit follows from the settings."""
        return self.dialogues.fingerprint

    @property
    def characters(self) -> int:
        """Of all dialogues."""
        return self.dialogues.characters

    @property
    def skipped(self) -> int:
        """Records that could not be read, and those that are too long."""
        return self.dialogues.skipped + self.count_too_long

    @property
    def problems(self) -> tuple[str, ...]:
        """The first of them, and what is wrong with each."""
        return (*self.dialogues.problems, *self.too_long)[:MAX_PROBLEMS]

    @property
    def is_indivisible(self) -> bool:
        """True."""
        return True

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return self.dialogues[int(self.numbers[index])]

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """int64[documents]."""
        return self.lengths

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """int32[tokens] of a dialogue."""
        return self.dialogues.tokens(int(self.numbers[index]), tokenizer)


@dataclass(frozen=True)
class FilteredChat:
    """A source of dialogues as a run reads it; it has the shape of the other sources.

    Attributes:
      chunk_tokens: the longest dialogue that is read; longer ones are bad records.
    """

    chat: Chat
    tokenizer: Tokenizer
    chunk_tokens: int

    def __str__(self) -> str:
        return str(self.chat)

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Fitting:
        """The dialogues that are not too long.

        Raises:
          UserError: as Chat; or one is too long (unless such are skipped).
        """
        dialogues = self.chat.open(on_bad_record=on_bad_record)
        lengths = dialogues.token_lengths(self.tokenizer)
        long, told = np.flatnonzero(lengths > self.chunk_tokens), []
        for index in long[:MAX_PROBLEMS].tolist():
            told.append(
                f"{dialogues.location(index)}: {lengths[index]} tokens, and chunk_tokens is {self.chunk_tokens}; a "
                f"dialogue is not cut, so raise it"
            )
        if len(long) and on_bad_record == "stop":
            raise UserError(
                f"{told[0]} (to {lengths.max()} for the longest of {len(long)} such), or leave them out: "
                f"on_bad_record=skip"
            )
        fitting = np.flatnonzero(lengths <= self.chunk_tokens)
        return Fitting(dialogues, fitting, lengths[fitting], tuple(told), len(long))


def answer_ids(
    tokenizer: Tokenizer, start_of_turn: int | None = None, end_of_turn: int | None = None
) -> dict[str, list[int]]:
    """The `starts` and `ends` of the objective `answers` for dialogues of these turns, for a config file.

    Raises:
      UserError: the tokenizer has no such tokens, and they are not given.
    """
    start, end = _turn_ids(tokenizer, start_of_turn, end_of_turn)
    return {"starts": [start, *tokenizer.encode(f"{MODEL}\n").tolist()], "ends": [end]}


def encode(
    turns: list[Turn], tokenizer: Tokenizer, start_of_turn: int | None = None, end_of_turn: int | None = None
) -> np.ndarray:
    """int32[tokens] of a dialogue, without BOS; each line of the template is tokenised by itself.

    With start_of_turn = 5, end_of_turn = 6, bytes as ids ("user" = [117 115 101 114], line break = 10):

        user: "a", model: "b"    [5 117 115 101 114 10 97 6 10  5 109 111 100 101 108 10 98 6 10]

    Raises:
      UserError: the tokenizer has no such tokens, and they are not given.
    """
    start, end = _turn_ids(tokenizer, start_of_turn, end_of_turn)
    newline, parts = tokenizer.encode("\n"), []
    for role, content in turns:
        parts += [[start], tokenizer.encode(f"{role}\n"), tokenizer.encode_plain(content), [end], newline]
    return np.concatenate(parts).astype(np.int32)


def as_text(turns: list[Turn]) -> str:
    """A dialogue as the template spells it, without BOS."""
    return "".join(f"<start_of_turn>{role}\n{content}<end_of_turn>\n" for role, content in turns)


def read_turns(data: bytes, config: Chat) -> list[Turn]:
    """The turns of a record.

    Raises:
      ValueError: says what is wrong with it.
    """
    try:
        record = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"the record is no object; it must be {_wanted(config)}")
    if record.get(config.messages_field) is not None:
        return _turns(record[config.messages_field], config)
    if record.get(config.prompt_field) is None or record.get(config.answer_field) is None:
        has = ", ".join(key for key, value in record.items() if value is not None) or "nothing"
        raise ValueError(f"the record has {has}; it must be {_wanted(config)}")
    prompt, answer = (record[field] for field in (config.prompt_field, config.answer_field))
    return _turns([{"role": USER, "content": prompt}, {"role": MODEL, "content": answer}], config)


def _turns(messages: Any, config: Chat) -> list[Turn]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{config.messages_field!r} is no list of {{'role': …, 'content': …}}")
    first = ""
    if messages and messages[0].get("role") in SYSTEM:
        first = _content(messages[0], 1) + "\n\n"
        messages = messages[1:]
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            allowed = ", ".join([*ROLES, f"{SYSTEM[0]} (the first only)"])
            raise ValueError(f"message {number + 1} has the role {role!r}; roles are {allowed}")
        if (ROLES[role] == USER) != (number % 2 == 0):
            raise ValueError(f"message {number + 1} is of {role!r}; user and model alternate, and the user begins")
        turns.append((ROLES[role], (first if number == 0 else "") + _content(message, number + 1).strip()))
    if len(turns) < 2 or turns[-1][0] != MODEL:
        raise ValueError(
            f"the dialogue has {len(turns)} turns and does not end with the model's, so nothing is asked for"
        )
    if not turns[-1][1]:
        raise ValueError("the model's last turn is empty, so nothing is asked for")
    return turns


def _content(message: Mapping[str, Any], number: int) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text for its content, but {json.dumps(content, default=str)[:40]}")
    return content


def _text(data: bytes, config: Chat) -> str:
    return as_text(read_turns(data, config))


def _wanted(config: Chat) -> str:
    return (
        f'{{"{config.messages_field}": [{{"role": "user", "content": …}}, {{"role": "assistant", "content": …}}]}} or '
        f'{{"{config.prompt_field}": …, "{config.answer_field}": …}}'
    )


def _turn_ids(tokenizer: Tokenizer, start: int | None, end: int | None) -> tuple[int, int]:
    return _turn_id(tokenizer, "start_of_turn", start), _turn_id(tokenizer, "end_of_turn", end)


def _turn_id(tokenizer: Tokenizer, name: str, given: int | None) -> int:
    token = tokenizer.named().get(name) if given is None else given
    if token is None or not 0 <= token < tokenizer.vocab_size:
        raise UserError(
            f"{name} = {token}: the tokenizer has no such token; its named ones are {', '.join(tokenizer.named())}. "
            f"Give an id below {tokenizer.vocab_size} that means nothing else, such as a sentinel's, from "
            f"{tokenizer.special_tokens.first_sentinel} on: text.{name}"
        )
    return token


def _rows(source: BinaryIO, out: BinaryIO, *, fields: tuple[str, ...]) -> None:
    """Writes a line of JSON for each row of a parquet file, of those of the columns that there are."""
    parquet = optional.require("pyarrow.parquet", "parquet").ParquetFile(source)
    there = [field for field in fields if field in parquet.schema_arrow.names]
    if not there:
        names = ", ".join(parquet.schema_arrow.names)
        raise UserError(f"{getattr(source, 'name', source)} has the columns {names}, and none of {', '.join(fields)}")
    for batch in parquet.iter_batches(columns=there):
        for row in batch.to_pylist():
            out.write(local_copies.json_line(row))
