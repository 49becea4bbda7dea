"""Float graph to float graph: fewer, larger operations with the same values.

The one big idea: a stage is a named list of rewrite rules, applied until none matches; the graph is verified after each. A rule that
nearly matched says why it did not.
"""

from npucc.passes.rewrite import Alias, Refusal, Rewrite, Rule, Stage, rewrite_graph
from npucc.passes.stages import STAGES

__all__ = ["STAGES", "Alias", "Refusal", "Rewrite", "Rule", "Stage", "rewrite_graph"]
