"""Data of one's own, looked into before training: what it holds, what deserves a warning, and the params to read it with."""

from pipeline.checking.findings import Findings, as_yaml
from pipeline.checking.kinds import check, known
from pipeline.checking.merge import together

__all__ = ["Findings", "as_yaml", "check", "known", "together"]
