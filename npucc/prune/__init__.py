"""Pruning: a float graph and calibration samples in, a smaller float graph out, repaired without training.

In the order data passes through: slots (what stands or falls together), zeros (what goes for free), sites and moments (layers as matrix
products and their statistics), solve (least squares), channels (what goes), price (what it saves), shrink (the cut), repair (the mending).
"""

from npucc.prune.options import PruneOptions
from npucc.prune.prune import Pruned, prune
from npucc.prune.report import FamilyRow, LayerRow, PruneReport

__all__ = ["FamilyRow", "LayerRow", "PruneOptions", "PruneReport", "Pruned", "prune"]
