"""Pretraining: one network per depth, from plain text or from images, resumable at any checkpoint.

With `grow`, a deeper network starts from the finished shallower one: new blocks are spread evenly between the old
ones, each a copy of the block before it with its two output projections at zero, so the function is unchanged at
first. (Stacking trained layers to start deeper networks: Gong et al., ICML 2019; starting new blocks as the identity:
Chen et al., Net2Net, ICLR 2016. We combine the two.) What a shallow network learned is not paid for again.
"""

from lamina.pretrain.images import ImageProgress, PretrainImages
from lamina.pretrain.job import Pretrain, Progress
from lamina.pretrain.loop import REPORT, grow, learning_rate, pretrain
from lamina.pretrain.text import PretrainText, TextProgress, held_out, validate

__all__ = [
    "REPORT",
    "ImageProgress",
    "Pretrain",
    "PretrainImages",
    "PretrainText",
    "Progress",
    "TextProgress",
    "grow",
    "held_out",
    "learning_rate",
    "pretrain",
    "validate",
]
