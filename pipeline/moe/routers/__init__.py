"""Routers by the name of their section under `methods` in params.yaml.

A router is a `Router(settings, sizes)` whose forward takes tokens (N, D) and their ids and returns a `Routing`, with a
`Settings` class for its params. To add one: a file beside `smoe.py`, and a line here.
"""

from pipeline.moe.routers.competesmoe import CompeteSMoE
from pipeline.moe.routers.hyperrouter import HyperRouter
from pipeline.moe.routers.smoe import SMoE
from pipeline.moe.routers.smoe_dropout import SMoEDropout
from pipeline.moe.routers.stablemoe import StableMoE
from pipeline.moe.routers.vmoe import VMoE
from pipeline.moe.routers.xmoe import XMoE

ROUTERS = {
    "smoe": SMoE,
    "xmoe": XMoE,
    "stablemoe": StableMoE,
    "smoe_dropout": SMoEDropout,
    "hyperrouter": HyperRouter,
    "competesmoe": CompeteSMoE,
    "vmoe": VMoE,
}
