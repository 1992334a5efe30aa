"""Start a command in several processes that share its training steps."""

import logging
import os
import sys
import tempfile
import uuid

from stages.orphan import LAUNCHER, stop_with_dvc


def launch(processes: int) -> None:
    """Run this command in so many processes on this machine, by torchrun's engine, and end as they do.

    Returns at once for one process, and in those that torchrun started, here or from outside for many machines.
    """
    if processes == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    stop_with_dvc()
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # Torch would warn where no parameter of a step is unused.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # What went wrong is said by the process in which it did.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="vqmoe-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)(*sys.argv)
            code = 0
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
        except SignalException as error:
            code = 128 + error.sigval
    sys.exit(128 - code if code < 0 else code)
