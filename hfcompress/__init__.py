"""Make Hugging Face Transformers smaller and faster.

Importing this registers the loader with transformers, so that plain `from_pretrained` loads compressed models, and does
nothing else; the other names are read when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import hfcompress.checkpoint.quantizer  # noqa: F401

if TYPE_CHECKING:
    from hfcompress.checkpoint.errors import CompressionError as CompressionError
    from hfcompress.layers.fast import fast as fast
    from hfcompress.methods import Adapters as Adapters
    from hfcompress.methods import Cast as Cast
    from hfcompress.methods import Distill as Distill
    from hfcompress.methods import Heal as Heal
    from hfcompress.methods import LayerDrop as LayerDrop
    from hfcompress.methods import LowRank as LowRank
    from hfcompress.methods import PruneExperts as PruneExperts
    from hfcompress.methods import PruneHeads as PruneHeads
    from hfcompress.methods import PruneLayers as PruneLayers
    from hfcompress.methods import PruneNeurons as PruneNeurons
    from hfcompress.methods import PruneVocab as PruneVocab
    from hfcompress.methods import PruneWeights as PruneWeights
    from hfcompress.methods import Quantize as Quantize
    from hfcompress.methods import QuantizeAware as QuantizeAware
    from hfcompress.methods import QuantizeCache as QuantizeCache
    from hfcompress.methods import Student as Student
    from hfcompress.methods import riding as riding
    from hfcompress.run.callback import CompressionCallback as CompressionCallback
    from hfcompress.run.callback import attach as attach
    from hfcompress.run.exporting import export_model as export_model
    from hfcompress.run.loop import compress as compress
    from hfcompress.run.low_memory import compress_while_loading as compress_while_loading
    from hfcompress.run.recipe import Recipe as Recipe
    from hfcompress.run.train import Train as Train

_HOMES = {
    "compress": "run.loop",
    "compress_while_loading": "run.low_memory",
    "CompressionError": "checkpoint.errors",
    "Recipe": "run.recipe",
    "CompressionCallback": "run.callback",
    "Train": "run.train",
    "attach": "run.callback",
    "export_model": "run.exporting",
    "fast": "layers.fast",
}
__all__ = [  # noqa: RUF022  in the order people meet them
    "compress",
    "compress_while_loading",
    "Recipe",
    "CompressionCallback",
    "attach",
    "riding",
    "Train",
    "Distill",
    "PruneHeads",
    "PruneNeurons",
    "PruneLayers",
    "PruneExperts",
    "PruneVocab",
    "PruneWeights",
    "LowRank",
    "Adapters",
    "Heal",
    "LayerDrop",
    "Quantize",
    "QuantizeAware",
    "QuantizeCache",
    "Cast",
    "Student",
    "fast",
    "export_model",
    "CompressionError",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name, "methods")
    if home == "methods" and name != "riding" and not name[:1].isupper():  # else every missing name would import them all
        raise AttributeError(f"module 'hfcompress' has no attribute {name!r}")
    if home.startswith("run."):  # where transformers' Trainer imports bitsandbytes, which would look over the network
        import_module("hfcompress.layers.bnb_library").import_first()
    try:
        return getattr(import_module(f"hfcompress.{home}"), name)
    except AttributeError:
        raise AttributeError(f"module 'hfcompress' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
