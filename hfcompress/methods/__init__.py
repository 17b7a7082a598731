"""The one table of methods: a line a method."""

from hfcompress.methods.adapters import Adapters
from hfcompress.methods.base import Method, Step
from hfcompress.methods.cast import Cast
from hfcompress.methods.distill import Distill
from hfcompress.methods.heal import Heal
from hfcompress.methods.layer_drop import LayerDrop
from hfcompress.methods.low_rank import LowRank
from hfcompress.methods.prune_experts import PruneExperts
from hfcompress.methods.prune_heads import PruneHeads
from hfcompress.methods.prune_layers import PruneLayers
from hfcompress.methods.prune_neurons import PruneNeurons
from hfcompress.methods.prune_vocab import PruneVocab
from hfcompress.methods.prune_weights import PruneWeights
from hfcompress.methods.quantize import Quantize
from hfcompress.methods.quantize_aware import QuantizeAware
from hfcompress.methods.quantize_cache import QuantizeCache
from hfcompress.methods.riding import riding
from hfcompress.methods.student import Student

METHODS: dict[str, type[Method]] = {
    method.key(): method
    for method in (
        Distill,
        PruneHeads,
        PruneNeurons,
        PruneLayers,
        PruneExperts,
        PruneVocab,
        PruneWeights,
        LowRank,
        Adapters,
        Heal,
        LayerDrop,
        Quantize,
        QuantizeAware,
        QuantizeCache,
        Cast,
        Student,
    )
}

__all__ = ["METHODS", "Method", "Step", "riding", *(method.__name__ for method in METHODS.values())]
