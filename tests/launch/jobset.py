"""JobSet's schema, by which its manifests are checked."""

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())


def problems(manifest: Any) -> list[str]:
    """Returns a line for each thing in a manifest that the schema does not allow."""
    errors = jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in errors]
