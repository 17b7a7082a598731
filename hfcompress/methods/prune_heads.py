from __future__ import annotations

from typing import ClassVar

from hfcompress.methods.prune_units import UnitPruning


class PruneHeads(UnitPruning):
    """Cut attention heads out; under grouped-query attention, whole key-value groups.

    Needs: heads that can be proven; data for repair and for scores on it, with labels where these use the loss.
    Buys: parameters and time of the attention projections in proportion.
    Costs: more with every head; repair wins some back without training, and training with a teacher more (docs/pruning.md).
    Paper: Michel, Levy, Neubig 2019, Are Sixteen Heads Really Better than One? (arXiv 1905.10650); fading: Zhu, Gupta 2017
        (arXiv 1710.01878); repair: Kurtic et al. 2023, ZipLM (arXiv 2302.04089)
    """

    kind: ClassVar[str] = "heads"
