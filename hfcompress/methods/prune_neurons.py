from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hfcompress.methods.units import UnitPruning


class PruneNeurons(UnitPruning):
    """Cut feed-forward neurons out, in plain and gated layers.

    Needs: a family in the anatomy; training data for gradient scores.
    Buys: parameters and time of the feed-forward layers in proportion: two thirds of an encoder's layer.
    Costs: more with every neuron; training with a teacher heals (docs/quickstart.md has it measured).
    Paper: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning (arXiv 1906.10771)
    """

    kind: ClassVar[str] = "neurons"

    round_to: int = Field(8, ge=1, description="Keep a multiple of this many neurons in every layer; kernels like 8 and more.")
