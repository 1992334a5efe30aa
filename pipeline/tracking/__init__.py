"""Recording of runs in MLflow. The only package that imports mlflow, and only once a run starts or is read: that takes 2 s."""

from pipeline.tracking.lineage import CUT, LEFT_OUT, digests, threads
from pipeline.tracking.lineage import source_tags as surroundings
from pipeline.tracking.recorded import Recorded, embedded, find
from pipeline.tracking.run import reach, start, sync, terminable
from pipeline.tracking.ui import serve

__all__ = [
    "CUT",
    "LEFT_OUT",
    "Recorded",
    "digests",
    "embedded",
    "find",
    "reach",
    "serve",
    "start",
    "surroundings",
    "sync",
    "terminable",
    "threads",
]
