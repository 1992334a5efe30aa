"""Commands in forks of a process that has loaded the packages which take every command seconds to load.

    python tests/warm.py FOLDER

It puts clients into FOLDER that are called as `vqmoe`, `pytest` and `python` are, prints a line and serves. What is run
is the code of the folder that a client is called in, or of PYTHONPATH.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

CLIENT = """#!{python} -ISs
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    request = [sys.argv, os.getcwd(), dict(os.environ)]
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 1))
"""
LOADED = (
    *("matplotlib.pyplot", "mlflow.artifacts", "mlflow.store.tracking.rest_store", "mlflow.store.tracking.sqlalchemy_store"),
    *("scipy.stats", "sklearn.feature_extraction.text", "torch._dynamo", "torch.utils.flop_counter", "torchvision.transforms.v2"),
)


def run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        importlib.import_module("torch").set_num_threads(int(threads))
    os.chdir(folder)
    sys.path[:1] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    sys.argv = words
    if words[0].endswith("/vqmoe"):
        sys.exit(importlib.import_module("cli").main())
    if words[0].endswith("/pytest"):
        sys.exit(importlib.import_module("pytest").console_main())
    sys.argv = words[1:]
    if words[1] == "-c":
        sys.argv = ["-c", *words[3:]]
        exec(words[2], {"__name__": "__main__"})
    elif words[1] == "-m":
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[1], run_name="__main__")


def answer(connection: socket.socket) -> None:
    """Run what a client asks for, with its streams, and tell it the exit code."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if not (child := os.fork()):
        for stream in range(3):
            os.dup2(streams[stream], stream)
        # Those of Python know whether what they were opened on, and not whether this, can be sought in.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, errors="backslashreplace", closefd=False)
        run(*json.loads(message))
        sys.exit()
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os._exit(0)


def serve(folder: Path) -> None:
    address = str(folder / "socket")
    for name in ("vqmoe", "pytest", "python"):
        client = folder / name
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                if not os.fork():
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    answer(connection)


if __name__ == "__main__":
    for name in LOADED:
        importlib.import_module(name)
    # So that forks which have ended are gone.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    serve(Path(sys.argv[1]))
