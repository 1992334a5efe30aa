"""Recording of runs in MLflow. The only package that imports mlflow, and only once a run starts or is read: that takes 2 s."""

from pipeline.tracking.lineage import CUT, LEFT_OUT, digests, threads
from pipeline.tracking.lineage import source_tags as surroundings
from pipeline.tracking.recorded import Recorded, embedded, find, named, whole
from pipeline.tracking.registry import CHAMPION, Candidate, Version, fetch, names_model, register
from pipeline.tracking.run import reach, start, sync, terminable
from pipeline.tracking.ui import serve

__all__ = [
    "CHAMPION",
    "CUT",
    "LEFT_OUT",
    "Candidate",
    "Recorded",
    "Version",
    "digests",
    "embedded",
    "fetch",
    "find",
    "named",
    "names_model",
    "reach",
    "register",
    "serve",
    "start",
    "surroundings",
    "sync",
    "terminable",
    "threads",
    "whole",
]
