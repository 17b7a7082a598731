from __future__ import annotations

from typing import ClassVar

from hfcompress.methods.units import UnitPruning


class PruneHeads(UnitPruning):
    """Cut attention heads out; under grouped-query attention, whole key-value groups.

    Needs: a family in the anatomy; training data for gradient scores.
    Buys: parameters and time of the attention projections in proportion.
    Costs: more with every head; training with a teacher heals (docs/quickstart.md has it measured).
    Paper: Michel, Levy, Neubig 2019, Are Sixteen Heads Really Better than One? (arXiv 1905.10650)
    """

    kind: ClassVar[str] = "heads"
