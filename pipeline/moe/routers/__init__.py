"""Routers by the name of their section under `methods` in params.yaml.

A router is a module `(settings, width, experts)` whose forward takes tokens (N, D) and returns a `Routing`, with a
`Settings` class for its params. To add one: a file beside `smoe.py`, and a line here.
"""

from pipeline.moe.routers.smoe import SMoE

ROUTERS = {
    "smoe": SMoE,
}
