"""The pipeline of float rewrites, in order."""

from __future__ import annotations

from npucc.passes.affine import DEPTHWISE_RULES, FOLD_RULES, FORWARD_RULES
from npucc.passes.infinities import INFINITY_RULES
from npucc.passes.layout import LAYOUT_RULES
from npucc.passes.padding import PADDING_RULES
from npucc.passes.parts import PART_RULES
from npucc.passes.patterns import PATTERN_RULES
from npucc.passes.powers import POWER_RULES
from npucc.passes.rewrite import Stage, stage
from npucc.passes.scales import ROUNDING_RULES, SCALES_STAGE
from npucc.passes.tables import TABLE_RULES

STAGES: tuple[Stage, ...] = (
    stage(
        "fold",
        (*ROUNDING_RULES, *INFINITY_RULES, *LAYOUT_RULES, *PADDING_RULES, *FOLD_RULES),
        "normalization, scales, clips and padding cost nothing inside a matrix operation",
        report=False,
    ),
    stage("tables", TABLE_RULES, "any function of one variable is one table, however it is written"),
    stage("patterns", (*LAYOUT_RULES, *PATTERN_RULES), "LayerNorm and Softmax keep their precision only as one operation"),
    stage(
        "finish",
        (*ROUNDING_RULES, *LAYOUT_RULES, *PADDING_RULES, *FOLD_RULES, *FORWARD_RULES, *DEPTHWISE_RULES, *PART_RULES, *POWER_RULES),
        "what has become foldable is folded; a scale per channel becomes a depthwise convolution; products are cut where their results are",
    ),
    SCALES_STAGE,
)
