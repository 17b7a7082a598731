from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hfcompress.methods.prune_units import UnitPruning


class PruneNeurons(UnitPruning):
    """Cut feed-forward neurons out, in plain and gated layers.

    Needs: neurons that can be proven; data for repair and for scores on it, with labels where these use the loss.
    Buys: parameters and time of the feed-forward layers in proportion: two thirds of an encoder's layer.
    Costs: more with every neuron; repair wins some back without training, and training with a teacher more (docs/pruning.md).
    Paper: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning (arXiv 1906.10771); fading: Zhu, Gupta 2017
        (arXiv 1710.01878); repair: Kurtic et al. 2023, ZipLM (arXiv 2302.04089)
    """

    kind: ClassVar[str] = "neurons"

    round_to: int = Field(
        default=8, ge=1, description="Keep a multiple of this many neurons in every layer; kernels like 8 and more."
    )
