"""Runs `vqmoe` and `pytest` in forks of a process that has loaded the packages that take them longest to load.

Reads a JSON line for each command, with its words, the folder it runs in and the file it prints into; writes its exit code.
"""

import importlib
import json
import os
import sys

for name in ("matplotlib.pyplot", "mlflow", "scipy.stats", "sklearn.feature_extraction.text", "torchvision.transforms.v2"):
    importlib.import_module(name)
for line in sys.stdin:
    words, folder, printed = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(folder)
    sys.path[0], sys.argv = folder, words
    module, function = ("pytest", "console_main") if words[0] == "pytest" else ("cli", "main")
    sys.exit(getattr(importlib.import_module(module), function)())
