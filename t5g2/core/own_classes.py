"""Classes of the user's own in configs: {"kind": "my_package.my_tasks.Rouge", …} instead of a kind's name.

A table of kinds that is an OpenTable takes such a class if it is a frozen dataclass of the table's base. Its module is
imported by name, here, in data workers and wherever the config is read again: it must be installed, or lie in a folder
of PYTHONPATH.
"""

import dataclasses
import importlib
import inspect
import sys
import typing
from collections.abc import Mapping

from t5g2.core.errors import UserError


class OpenTable(dict[str, type]):
    """Kinds by name, and the base of classes whose kind is their dotted path.

    Attributes:
      base: a base class, or a protocol of methods.
    """

    def __init__(self, base: type, kinds: Mapping[str, type]):
        super().__init__(kinds)
        self.base = base


def is_dotted(kind: object) -> bool:
    """True for a kind that is the dotted path of a class."""
    return isinstance(kind, str) and "." in kind and all(part.isidentifier() for part in kind.split("."))


def dotted_path(cls: type) -> str:
    """Returns the path under which a class is defined, which is the same however a config has named it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve(path: str, bases: tuple[type, ...], *, where: str = "config") -> type:
    """Returns the class at a dotted path.

    Args:
      bases: the class must derive from one of them, or have its methods if it is a protocol.
      where: the config's path, for messages.

    Raises:
      UserError: the module does not import or has no such class; it is no frozen dataclass, derives from none of the
        bases, is abstract, or cannot be found by the path that it says it has, which workers need.
    """
    name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a user's code can fail in any way
        raise UserError(
            f"{where}.kind = {path!r}: module {name} does not import ({type(error).__name__}: {error}); install it, or "
            f"put its folder into PYTHONPATH, so that data workers find it too"
        ) from error
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type):
        classes = sorted(key for key, value in vars(module).items() if isinstance(value, type))
        raise UserError(
            f"{where}.kind = {path!r}: module {name} has no class {attribute}; it has {', '.join(classes) or 'none'}"
        )
    if problem := _problem(cls, bases):
        raise UserError(f"{where}.kind = {path!r}: the class {problem}")
    return cls


def _problem(cls: type, bases: tuple[type, ...]) -> str:
    """Returns why a class cannot be a kind, and what to do; "" = it can."""
    names = " or ".join(dotted_path(base) for base in bases)
    if not dataclasses.is_dataclass(cls) or "__dataclass_params__" not in vars(cls):
        return "is no dataclass; decorate it with @dataclass(frozen=True)"
    if not vars(cls)["__dataclass_params__"].frozen:
        return "can be changed after it is made; decorate it with @dataclass(frozen=True)"
    if not issubclass(cls, bases):
        return f"is not what is expected there; derive it from {names}"
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))  # type: ignore[attr-defined]
        return f"lacks {missing}, which {names} declares; define them"
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return f"is not found as {dotted_path(cls)}; define it at the top of a module that is imported by name"
    try:
        typing.get_type_hints(cls)
    except (NameError, TypeError) as error:
        return f"has an annotation that means nothing when it is read ({error}); import the type where it runs"
    return ""
