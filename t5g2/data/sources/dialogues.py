"""Dialogues: records with the turns of a user and a model, as Gemma's chat template writes them.

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "What is 2 + 2?", "answer": "4"}

both become

    <start_of_turn>user
    What is 2 + 2?<end_of_turn>
    <start_of_turn>model
    4<end_of_turn>

which is the template of Gemma 3's released tokenizer_config.json: "assistant" is called model; a system message is put
in front of the first user's turn, with an empty line between; contents are stripped of white space at their ends; user
and model alternate, the user begins. (Gemma 2's template is the same but refuses a system message.) The tokens that
start and end a turn are added as ids, so their spelling in a content is text and not a turn.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import TokenId, checked
from t5g2.core.errors import UserError
from t5g2.data.sources import local_copies
from t5g2.data.sources.data_files import find_files
from t5g2.data.sources.documents import OnBadRecord
from t5g2.data.sources.filtered_documents import FilteredDocuments
from t5g2.data.sources.parquet import write_columns
from t5g2.data.sources.text_files import line_spans
from t5g2.data.sources.validation import LocatedDocuments, RecordValidator, SourceSummary, decode_json
from t5g2.data.tokenizers.base import Tokenizer

USER, MODEL = "user", "model"
ROLES = {"user": USER, "assistant": MODEL, "model": MODEL}
SYSTEM = ("system", "developer")
Turn = tuple[str, str]  # "user" or "model", and the content


@dataclass(frozen=True)
@checked
class Chat:
    """Files of dialogues: JSON lines, or parquet with the same columns (pip install 't5g2[parquet]').

    A record has `messages_field`, or else `prompt_field` and `answer_field`. A dialogue is never cut: one that has more
    tokens than chunk_tokens is a bad record. It is for the objectives of supervised fine-tuning, whose `starts` and
    `ends` are what `answer_ids` returns.

    Attributes:
      path: a file, a folder (the data files below it, data_files.py) or a pattern; local or at a URL; plain, or
        compressed if the name ends in .gz or .zst.
      messages_field: the key of the turns, each {"role": …, "content": …}; a content is a text, or a list of parts
        {"type": "text", "text": …}. The last turn is the model's.
      prompt_field, answer_field: the keys of a single question and its answer.
      start_of_turn, end_of_turn: ids; None = the tokenizer's special tokens of these names.
    """

    path: str
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    start_of_turn: TokenId | None = None
    end_of_turn: TokenId | None = None

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> "Dialogues":
        """Returns the dialogues, files in the order of their names; empty lines are ignored.

        Raises:
          UserError: no file is found, all are empty, or a record is not a dialogue (unless such records are skipped).
        """
        names, validator, spans = find_files(self.path), RecordValidator(on_bad_record), []
        files = tuple(map(self._plain_copy, names))
        for number, name in enumerate(names):
            for location, offset, data in line_spans(files[number], "row" if name.endswith(".parquet") else "line"):
                if validator.accept(f"{name}, {location}", functools.partial(_read_text, data, self)):
                    spans.append((number, offset, len(data)))
        summary = validator.finish(self.path)
        if not spans:
            raise UserError(f"{self.path}: {len(names)} files without a dialogue; give records as {_record_form(self)}")
        return Dialogues(self, tuple(names), files, np.array(spans, np.int64), summary)

    def _plain_copy(self, name: str) -> str:
        if not name.endswith(".parquet"):
            return local_copies.plain_copy(name)
        # the fields are part of the copy's name, so other fields get another copy
        fields = (self.messages_field, self.prompt_field, self.answer_field)
        return local_copies.converted_copy(
            name, functools.partial(write_columns, columns=fields), ("dialogues", *fields)
        )


@dataclass(frozen=True, eq=False)
class Dialogues(LocatedDocuments):
    """Dialogues of files.

    Attributes:
      names, files: each file's name as the user wrote it, and the path of its local copy.
      spans: int64[documents, 3]: number of the file, first byte, bytes.
    """

    config: Chat
    names: tuple[str, ...]
    files: tuple[str, ...]
    spans: np.ndarray
    summary: SourceSummary

    @property
    @override
    def is_indivisible(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> str:
        return as_text(self.turns(index))

    def turns(self, index: int) -> list[Turn]:
        """Returns the turns of a dialogue."""
        file, offset, size = self.spans[index].tolist()
        with open(self.files[file], "rb") as data:
            data.seek(offset)
            return read_turns(data.read(size), self.config)

    @override
    def location(self, index: int) -> str:
        file, offset, _ = self.spans[index].tolist()
        return f"{self.names[file]}, the record at byte {offset}"

    @override
    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        return np.array([len(self.tokens(i, tokenizer)) for i in range(len(self))], np.int64)

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        return encode(self.turns(index), tokenizer, self.config.start_of_turn, self.config.end_of_turn)


@dataclass(frozen=True)
class FilteredChat:
    """A source of dialogues, as a run reads it; it has the interface of the other sources.

    Attributes:
      chunk_tokens: the longest dialogue that is read; longer ones are bad records.
    """

    chat: Chat
    tokenizer: Tokenizer
    chunk_tokens: int

    def __str__(self) -> str:
        return str(self.chat)

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> FilteredDocuments:
        """Returns the dialogues that are not too long.

        Raises:
          UserError: as in Chat.open; or a dialogue is too long (unless such dialogues are skipped).
        """
        dialogues = self.chat.open(on_bad_record=on_bad_record)
        lengths = dialogues.token_lengths(self.tokenizer)
        problem = (
            f"and chunk_tokens is {self.chunk_tokens}; a dialogue is not cut, so raise it (to {lengths.max()} for the "
            f"longest)"
        )
        checks = [
            (length, f"{length} tokens, {problem}" if length > self.chunk_tokens else "") for length in lengths.tolist()
        ]
        return FilteredDocuments.select(dialogues, checks, on_bad_record=on_bad_record)


def answer_ids(
    tokenizer: Tokenizer, start_of_turn: int | None = None, end_of_turn: int | None = None
) -> dict[str, list[int]]:
    """Returns the `starts` and `ends` of the objectives of supervised fine-tuning, for a config file.

    They are the tokens that enclose the model's turns.

    Raises:
      UserError: the tokenizer has no tokens of these names, and the ids are None.
    """
    start, end = _turn_ids(tokenizer, start_of_turn, end_of_turn)
    return {"starts": [start, *tokenizer.encode(f"{MODEL}\n").tolist()], "ends": [end]}


def encode(
    turns: list[Turn], tokenizer: Tokenizer, start_of_turn: int | None = None, end_of_turn: int | None = None
) -> np.ndarray:
    """Returns int32[tokens] of a dialogue, without BOS; each line of the template is tokenised by itself.

    With start_of_turn = 5, end_of_turn = 6, bytes as ids ("user" = [117 115 101 114], line break = 10):

        user: "a", model: "b"    [5 117 115 101 114 10 97 6 10  5 109 111 100 101 108 10 98 6 10]

    Raises:
      UserError: the tokenizer has no tokens of these names, and the ids are None.
    """
    start, end = _turn_ids(tokenizer, start_of_turn, end_of_turn)
    newline, parts = tokenizer.encode("\n"), []
    for role, content in turns:
        # encode_plain for the content: a user cannot end their turn by spelling <end_of_turn>
        parts += [[start], tokenizer.encode(f"{role}\n"), tokenizer.encode_plain(content), [end], newline]
    return np.concatenate(parts).astype(np.int32)


def as_text(turns: list[Turn]) -> str:
    """Returns a dialogue as the template spells it, without BOS."""
    return "".join(f"<start_of_turn>{role}\n{content}<end_of_turn>\n" for role, content in turns)


def read_turns(data: bytes, config: Chat) -> list[Turn]:
    """Returns the turns of a record.

    Raises:
      ValueError: the record is not a dialogue; the message has the reason.
    """
    record: Any = decode_json(data)
    if not isinstance(record, dict):
        raise ValueError(f"the record is not an object; it must be {_record_form(config)}")
    if record.get(config.messages_field) is not None:
        return _turns(record[config.messages_field], config)
    if record.get(config.prompt_field) is None or record.get(config.answer_field) is None:
        keys = ", ".join(key for key, value in record.items() if value is not None) or "nothing"
        raise ValueError(f"the record has {keys}; it must be {_record_form(config)}")
    prompt, answer = (record[field] for field in (config.prompt_field, config.answer_field))
    return _turns([{"role": USER, "content": prompt}, {"role": MODEL, "content": answer}], config)


def _turns(messages: Any, config: Chat) -> list[Turn]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{config.messages_field!r} is not a list of {{'role': …, 'content': …}}")
    # Gemma has no system role: the template puts such a message in front of the user's first turn
    system = ""
    if messages and messages[0].get("role") in SYSTEM:
        system = _content(messages[0], 1) + "\n\n"
        messages = messages[1:]
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            allowed = ", ".join([*ROLES, f"{SYSTEM[0]} (the first only)"])
            raise ValueError(f"message {number + 1} has the role {repr(role)[:40]}; roles are {allowed}")
        if (ROLES[role] == USER) != (number % 2 == 0):
            raise ValueError(f"message {number + 1} has the role {role!r}; user and model alternate, user first")
        turns.append((ROLES[role], (system if number == 0 else "") + _content(message, number + 1).strip()))
    if len(turns) < 2 or turns[-1][0] != MODEL:
        raise ValueError(
            f"the dialogue has {len(turns)} turns and does not end with the model's, so there is nothing to learn"
        )
    if not turns[-1][1]:
        raise ValueError("the model's last turn is empty, so there is nothing to learn")
    return turns


def _content(message: Mapping[str, Any], number: int) -> str:
    content = message.get("content")
    # the form of multimodal chats; parts that are not text are refused below
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text for its content, but {json.dumps(content, default=str)[:40]}")
    return content


def _read_text(data: bytes, config: Chat) -> str:
    return as_text(read_turns(data, config))


def _record_form(config: Chat) -> str:
    """Returns the two forms of a record, for messages."""
    return (
        f'{{"{config.messages_field}": [{{"role": "user", "content": …}}, {{"role": "assistant", "content": …}}]}} or '
        f'{{"{config.prompt_field}": …, "{config.answer_field}": …}}'
    )


def _turn_ids(tokenizer: Tokenizer, start: int | None, end: int | None) -> tuple[int, int]:
    return _turn_id(tokenizer, "start_of_turn", start), _turn_id(tokenizer, "end_of_turn", end)


def _turn_id(tokenizer: Tokenizer, name: str, configured: int | None) -> int:
    token = tokenizer.named().get(name) if configured is None else configured
    # some tokenizers, such as Bytes, have no tokens for turns; then the config must have unused ids
    if token is None or not 0 <= token < tokenizer.vocab_size:
        raise UserError(
            f"{name} = {token}: the tokenizer has no such token; its named ones are {', '.join(tokenizer.named())}. "
            f"Give an id below {tokenizer.vocab_size} that means nothing else, such as a sentinel's, from "
            f"{tokenizer.special_tokens.first_sentinel} on: text.{name}"
        )
    return token
