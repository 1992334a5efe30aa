"""Quantizers by the name that `methods.vqmoe.quantizer` in params.yaml gives them.

A quantizer is a module `(settings, width)` whose forward takes tokens (N, D) and returns a `Quantized`; see `base.py`.
"""

from pipeline.moe.quantizers.cosine import Cosine
from pipeline.moe.quantizers.ema import Ema
from pipeline.moe.quantizers.fsq import Fsq
from pipeline.moe.quantizers.low_dim import LowDim
from pipeline.moe.quantizers.nearest import Nearest
from pipeline.moe.quantizers.task import Task

QUANTIZERS = {
    "nearest": Nearest,
    "task": Task,
    "ema": Ema,
    "cosine": Cosine,
    "low_dim": LowDim,
    "fsq": Fsq,
}
