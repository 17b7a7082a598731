"""YAML read as plain data, and no more."""

from __future__ import annotations

from typing import Any

import yaml

from hfcompress.checkpoint.errors import CompressionError


def read_yaml(text: str | bytes, where: str) -> Any:
    """Plain data; CompressionError for what is no YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompressionError(f"{where}: not valid YAML: {' '.join(str(error).split())}; mend that line.") from error
