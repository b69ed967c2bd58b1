"""Packages that only some users have installed."""

from typing import Any

from t5g2.core.errors import UserError


def require(module: str, extra: str) -> Any:
    """A module that only some users have.

    Raises:
      UserError: it is not installed; says what to install.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module} is not installed, which reads such files; pip install 't5g2[{extra}]'") from None
