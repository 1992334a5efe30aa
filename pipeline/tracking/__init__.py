"""Recording of runs in MLflow. The only package that imports mlflow, and only once a run starts: the import takes 2 s."""

from pipeline.tracking.run import start
from pipeline.tracking.ui import serve

__all__ = ["serve", "start"]
