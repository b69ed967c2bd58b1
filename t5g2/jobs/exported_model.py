"""Export of a model to a folder, to a repository of Hugging Face's hub, or to both."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from t5g2.checkpoint import export_folder, hub
from t5g2.core import files
from t5g2.core.errors import UserError


def export(model: str, *, out: str | None = None, push: str | None = None, dtype: Any = None) -> None:
    """Exports a model, uploads the result, and prints where it is and on which inputs transformers differs.

    Args:
      model, dtype: as in export_folder.export_model.
      out: folder to write; it must not exist; None = a temporary one, which is uploaded.
      push: address of a repository, which is created if it is missing; None = nothing is uploaded.

    Raises:
      UserError: neither out nor push is given; as export_model, hub.create_repository and hub.push.
      MachineError: the hub has a failure.
    """
    if out is None and push is None:
        raise UserError("--out is missing: give a folder to write, or --push=hf://OWNER/NAME, or both")
    if push is not None:
        if not hub.is_address(push):
            raise UserError(f"--push={push} is no address of Hugging Face's hub; write hf://OWNER/NAME[@BRANCH]")
        if out is not None:
            files.refuse_existing(out)
        # first what can be wrong here, which must not leave an empty repository
        export_folder.check_model(model, dtype=dtype)
        # before the export, which takes minutes
        hub.create_repository(push)
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="t5g2-export-")) if out is None else ""
        folder = Path(temporary, "model") if out is None else Path(out)
        deviations = export_folder.export_model(model, folder, dtype=dtype)
        if out is not None:
            print(f"wrote {out}")
        if push is not None:
            print(f"pushed {hub.push(folder, push)}")
    for deviation in deviations:
        print(f"transformers computes this model differently for {deviation}")
