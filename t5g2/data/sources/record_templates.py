"""Records and templates: a text is made from the fields of a record, as str.format does."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t5g2.core.errors import UserError

Record = Mapping[str, Any]
# classes that a boolean of JSON may be, as str.format writes it; BoolQ's answers are true and false
BOOLEAN_CLASSES = {"True": ("true", "yes"), "False": ("false", "no")}


@dataclass(frozen=True)
class RecordList:
    """Records themselves, as a config may have them; in Python a task takes the list of them too.

    Attributes:
      records: the fields of each record by name.
    """

    records: tuple[dict, ...]


class Template:
    """A text with fields of a record in braces, as str.format has them: "Q: {question}\\nA:", "{answers[0]}".

    Raises:
      UserError: it is not a format of str.format, or has a field without a name.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"template {text!r}: {error}; write {{{{ and }}}} for braces themselves") from None
        self.fields = [name for _, name, _, _ in self._parts if name is not None]
        if not all(name and not name[0].isdigit() for name in self.fields):
            raise UserError(f"template {text!r} has a field without a name; name fields of the record: {{question}}")

    def fill(self, record: Record) -> str:
        """Returns the text of a record.

        Raises:
          UserError: the record lacks a field, or has null there.
        """
        try:
            # format_map would write "None"
            for _, name, _, conversion in self._parts:
                if name is not None and not conversion:
                    self._value(record, name)
            return self.text.format_map(record)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise self._problem(record, error) from None

    def values(self, record: Record) -> list[Any]:
        """Returns the values that a template stands for: those of the list, if it is one field that holds a list.

        "{answers}" of {"answers": ["a", "b"]} are ["a", "b"]; "{answer}." of {"answer": 3} are ["3."].

        Raises:
          UserError: as `fill`.
        """
        literal, name, spec, conversion = self._parts[0] if len(self._parts) == 1 else ("", None, None, None)
        if literal or name is None or spec or conversion:
            return [self.fill(record)]
        try:
            value = self._value(record, name)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise self._problem(record, error) from None
        return list(value) if isinstance(value, list | tuple) else [value]

    def texts(self, record: Record) -> list[str]:
        """Returns `values` as texts."""
        return [str(value) for value in self.values(record)]

    def _value(self, record: Record, name: str) -> Any:
        value, _ = string.Formatter().get_field(name, (), record)
        if value is None or (isinstance(value, list | tuple) and any(item is None for item in value)):
            raise ValueError(f"{name} is null")
        return value

    def _problem(self, record: Record, error: Exception) -> UserError:
        missing = [name for name in self.fields if name.partition("[")[0].partition(".")[0] not in record]
        what = f"no field {missing[0]!r}" if missing else f"fields that do not fit ({error})"
        return UserError(f"the record has {what} for the template {self.text!r}; it has {', '.join(record) or 'none'}")


def class_name(label: str, classes: Sequence[str]) -> str:
    """Returns a label, or the class that it means as a boolean of JSON: true or yes, false or no, if there is one.

    >>> class_name("True", ["no", "yes"])
    'yes'
    """
    return next((name for name in (label, *BOOLEAN_CLASSES.get(label, ())) if name in classes), label)


def class_number(label: str, classes: Sequence[str]) -> int:
    """Returns the number of the class that a label names, or of which it is the number from 0.

    Raises:
      UserError: the label is none of these.
    """
    # names come first: classes may be numbers themselves
    if (name := class_name(label, classes)) in classes:
        return classes.index(name)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    names = BOOLEAN_CLASSES.get(label)
    boolean = f"; a boolean of JSON is the class {' or '.join(names)}" if names else ""
    raise UserError(
        f"the label {label!r} is no class; classes are {', '.join(classes)[:200]}, or their numbers from 0 to "
        f"{len(classes) - 1}{boolean}"
    )
