"""Where a compressed model goes to be served: the table of formats, and how a model becomes a folder of one of them."""

from __future__ import annotations

from hfcompress.export.base import Format, Source
from hfcompress.export.gguf import Gguf
from hfcompress.export.traced import Executorch, Onnx, Openvino

FORMATS: dict[str, type[Format]] = {one.key(): one for one in (Openvino, Onnx, Executorch, Gguf)}

__all__ = ["FORMATS", "Format", "Source"]
