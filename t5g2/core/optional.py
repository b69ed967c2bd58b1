"""Optional dependencies."""

from typing import Any

from t5g2.core.errors import UserError


def require(module: str, extra: str, *, otherwise: str = "") -> Any:
    """Imports a module of an optional dependency, which t5g2's extra of this name installs, and returns it.

    Args:
      otherwise: what to do without it; the end of the message.

    Raises:
      UserError: the module is not installed; the message has the pip command.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        remedy = f"run `pip install 't5g2[{extra}]'`{otherwise and f', or {otherwise}'}"
        raise UserError(f"{module} is not installed; {remedy}") from None
