import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

# As dvc does it: a shell between the two.
DVC = """
import os, subprocess, sys
subprocess.run([sys.argv[1] + " -c 'from stages.orphan import stop_with_dvc; import time; stop_with_dvc(); print(1, flush=True);"
                " time.sleep(60)'; true"], shell=True, env=os.environ | {"DVC_STAGE": "pretrain"})
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_with_its_dvc(tmp_path, stop):
    script = tmp_path / "dvc"
    script.write_text(DVC)
    dvc = subprocess.Popen(
        [sys.executable, str(script), sys.executable],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert dvc.stdout.readline() == "1\n"
    time.sleep(1.5)
    assert dvc.poll() is None
    os.kill(dvc.pid, stop)
    # The pipe closes once nobody is left to write into it.
    assert "is gone" in dvc.stderr.read()


def test_a_stage_whose_dvc_was_gone_before_it_could_look_ends_too(tmp_path):
    script = tmp_path / "dvc"
    script.write_text(DVC.replace("from stages", "import time; print(0, flush=True); time.sleep(1); from stages"))
    dvc = subprocess.Popen(
        [sys.executable, str(script), sys.executable],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert dvc.stdout.readline() == "0\n"
    os.kill(dvc.pid, signal.SIGKILL)
    assert "is gone" in dvc.stderr.read()


def test_without_dvc_nothing_is_watched():
    code = "import threading; from stages.orphan import stop_with_dvc; stop_with_dvc(); print(threading.active_count())"
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"} | {"PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.stdout == "1\n"
