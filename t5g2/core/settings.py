"""Conversion of plain dicts to frozen dataclasses and back: unknown keys and wrong types are errors.

A field's annotation is its type: int, float, bool, str, Literal[…], X | None, tuple[X, …], a dataclass, or several
dataclasses (a union, or their base class), of which the dict's "kind" chooses one by its name in a table. A class may
have several names in a table, {"sft": SFT, "answers": SFT}: the first is the one that is dumped and shown, the others
are aliases for configs written before a name was changed. An OpenTable (own_classes.py) also takes classes of the
user's own, whose "kind" is their dotted path.
"""

import ast
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5g2.core import files, own_classes
from t5g2.core.errors import UserError, unknown
from t5g2.core.own_classes import OpenTable

KindTable = Mapping[str, type]
PLAIN = (bool, int, float, str)


def build(annotation: Any, node: Any, *, where: str = "config", tables: Sequence[KindTable] = ()) -> Any:
    """Returns the value of type `annotation` that the plain data `node` describes.

    Raises:
      UserError: an unknown or missing key, a wrong type, an unknown kind; names the dotted path and what is allowed.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _build_union(arguments, node, where, tables)
    if origin is typing.Literal:
        if node not in arguments:
            raise unknown("value", str(node), map(str, arguments), where=f"of {where}")
        return node
    if origin is tuple:
        if isinstance(node, str) or not isinstance(node, Sequence):
            raise _wrong_type(where, node, "a list")
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(node)
        elif len(arguments) != len(node):
            raise _wrong_type(where, node, f"a list of {len(arguments)}")
        pairs = zip(arguments, node, strict=True)
        return tuple(build(kind, item, where=f"{where}.{i}", tables=tables) for i, (kind, item) in enumerate(pairs))
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, node, where, tables)
    if annotation not in PLAIN and (_members((annotation,), tables) or _open_bases((annotation,), tables)):
        return _build_kind((annotation,), node, where, tables)
    if annotation is float and isinstance(node, int) and not isinstance(node, bool):
        return float(node)
    # bool is an int in Python, not in a config
    if not isinstance(node, annotation) or (isinstance(node, bool) and annotation is not bool):
        raise _wrong_type(where, node, f"of type {annotation.__name__}")
    return node


def checked_types(value: Any, *, where: str, tables: Sequence[KindTable] = ()) -> Any:
    """Returns a dataclass that Python code has made, with the types that its fields declare, as `build` makes them.

    Lists become tuples, and numbers of NumPy Python's. Of the user's own class the fields that it inherits count: those
    that it adds may have types that no config has.

    Raises:
      UserError: a field has a wrong type; names its dotted path.
    """
    cls = next(c for c in type(value).__mro__ if c.__module__.startswith("t5g2."))
    if not dataclasses.is_dataclass(cls):
        return value
    hints, changes = _hints(cls), {}
    for field in dataclasses.fields(cls):
        item = getattr(value, field.name)
        node = item.item() if isinstance(item, np.generic) else item
        built = build(hints[field.name], node, where=f"{where}.{field.name}", tables=tables)
        if isinstance(item, list | np.generic):
            changes[field.name] = built
    return dataclasses.replace(value, **changes) if changes else value


def dump(value: Any, *, tables: Sequence[KindTable] = ()) -> Any:
    """Returns `value` as plain data that JSON can hold and `build` turns back into an equal value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # the first of several names: an alias that was read is written under the current name
        kinds = [name for table in tables for name, cls in table.items() if cls is type(value)]
        if not kinds and _open_bases((type(value),), tables):
            kinds = [own_classes.dotted_path(type(value))]
        fields = {f.name: dump(getattr(value, f.name), tables=tables) for f in dataclasses.fields(value) if f.init}
        return {"kind": kinds[0], **fields} if kinds else fields
    if isinstance(value, tuple | list):
        return [dump(item, tables=tables) for item in value]
    return value


def override(node: Any, path: str, text: str) -> None:
    """Sets the entry at the dotted `path` of nested dicts and lists to the value that `text` spells.

    `text` is a Python literal (3, 1e-4, None, "a", (1, 2)), true or false, or else a plain string. Missing dicts along
    the path are created; unknown keys are left for `build` to refuse, which knows the types.

    Raises:
      UserError: the path leads through a value that has no entries, or past the end of a list.
    """
    # dicts get missing entries and lists do not, because the place of a new list entry would be a guess
    *parents, last = path.split(".")
    for i, key in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, key, path)]
            continue
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            here = ".".join(parents[: i + 1])
            raise UserError(f"cannot set {path}: {here} is {node!r}, which has no entries; set {here} itself")
    if isinstance(node, list):
        node[_index(node, last, path)] = parse(text)
    else:
        node[last] = parse(text)


def parse(text: str) -> Any:
    """Returns the value that the text of a flag spells: a Python literal, JSON, or else the text.

    true, false and null are JSON's; within lists and dicts too.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    try:
        return files.parse_json(text.encode())
    except ValueError:
        return text


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Returns nested dicts and lists as {dotted path: leaf value}; an empty dict or list is a leaf."""
    # a scalar has no items, so the recursion ends with itself as the leaf
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    flat = {}
    for key, value in items:
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat or {path: node}


def _build_union(arguments: tuple, node: Any, where: str, tables: Sequence[KindTable]) -> Any:
    # plain data does not carry its type, so the cases go from the most to the least specific
    if node is None and type(None) in arguments:
        return None
    choices = [a for a in arguments if a is not type(None)]
    classes: list[type] = [
        a for a in choices if isinstance(a, type) and (dataclasses.is_dataclass(a) or _open_bases((a,), tables))
    ]
    if isinstance(node, tuple(classes)):
        return node
    if isinstance(node, Mapping) and len(classes) == 1:
        return build(classes[0], node, where=where, tables=tables)
    if isinstance(node, Mapping) and classes:
        return _build_kind(tuple(classes), node, where, tables)
    if len(choices) == 1:
        return build(choices[0], node, where=where, tables=tables)
    # what remains are plain types, such as float | Literal["uniform"]: the first that takes the value
    for choice in choices:
        if not dataclasses.is_dataclass(choice):
            try:
                return build(choice, node, where=where, tables=tables)
            except UserError:
                continue
    names = ", ".join(getattr(a, "__name__", str(a)) for a in choices)
    raise _wrong_type(where, node, f"one of: {names}")


def _members(classes: tuple[type, ...], tables: Sequence[KindTable]) -> KindTable:
    """Returns the entries of all tables whose class is one of `classes` or derives from one."""
    return {name: cls for table in tables for name, cls in table.items() if issubclass(cls, classes)}


def _open_bases(classes: tuple[type, ...], tables: Sequence[KindTable]) -> tuple[type, ...]:
    """Returns the bases of open tables that one of `classes` is or derives from."""
    bases = tuple(table.base for table in tables if isinstance(table, OpenTable))
    return tuple(base for base in bases if any(issubclass(cls, base) for cls in classes))


def _without_aliases(members: KindTable) -> list[str]:
    """Returns the first name of each class, sorted."""
    names: dict[type, str] = {}
    for name, cls in members.items():
        names.setdefault(cls, name)
    return sorted(names.values())


def _build_kind(classes: tuple[type, ...], node: Any, where: str, tables: Sequence[KindTable]) -> Any:
    members = _members(classes, tables)
    if isinstance(node, (*members.values(), *classes)):
        return node
    if not isinstance(node, Mapping):
        raise _wrong_type(where, node, f"settings with a 'kind', one of: {', '.join(_without_aliases(members))}")
    if "kind" not in node:
        raise UserError(f"{where} has no 'kind'; give one of: {', '.join(_without_aliases(members))}")
    kind = node["kind"]
    if not isinstance(kind, str):
        raise _wrong_type(f"{where}.kind", kind, f"one of: {', '.join(_without_aliases(members))}")
    if kind not in members and own_classes.is_dotted(kind) and _open_bases(classes, tables):
        cls = own_classes.resolve(kind, classes, where=where)
        return _build_dataclass(cls, {key: node[key] for key in node if key != "kind"}, where, tables)
    if kind not in members:
        raise unknown(f"{where}.kind", kind, _without_aliases(members))
    return _build_dataclass(members[kind], node, where, tables)


def _build_dataclass(cls: type, node: Any, where: str, tables: Sequence[KindTable]) -> Any:
    if isinstance(node, cls):
        return node
    kinds = {name for table in tables for name, other in table.items() if other is cls}  # aliases too
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if not isinstance(node, Mapping):
        raise _wrong_type(where, node, f"the settings of {cls.__name__}, a mapping with some of {', '.join(fields)}")
    for key in node:
        if key not in fields and not (key == "kind" and isinstance(node[key], str) and node[key] in kinds):
            raise unknown("key", key, fields, where=f"in {where} ({cls.__name__})")
    # checked here and not by the constructor, whose TypeError would name no path
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and n not in node]
    if required:
        raise UserError(f"{where} lacks {', '.join(required)}, which {cls.__name__} has no default for; add them")
    hints = _hints(cls)
    values = {k: build(hints[k], node[k], where=f"{where}.{k}", tables=tables) for k in node if k in fields}
    try:
        return cls(**values)
    except UserError as error:  # from the class's own checks, which do not know the path
        raise UserError(f"{where}: {error}") from None


@functools.lru_cache(maxsize=1024)  # to evaluate annotations that are text takes a sixth of reading a config
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _index(node: list, key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"cannot set {path}: {key!r} is not an entry; give a number below {len(node)}")
    return int(key)


def _wrong_type(where: str, node: Any, expected: str) -> UserError:
    return UserError(f"{where} is {node!r} of type {type(node).__name__}; it must be {expected}")
