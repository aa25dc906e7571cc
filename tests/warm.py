"""A Python that has imported Detectron2, for tests that run many programs."""

import json
import os
import subprocess
import sys
import tempfile

from conftest import ROOT

# Detectron2 takes 3 s to import, most of the time of a short program. Nothing of this project is
# imported here: a program that forgets to import or register something fails as it does otherwise.
SERVER = """
import json, os, runpy, sys
import cv2, detectron2.engine, detectron2.evaluation, detectron2.model_zoo

for line in sys.stdin:
    words, directory, output = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for file, mode, fd in ((os.devnull, os.O_RDONLY, 0), (output, os.O_WRONLY, 1)):
        os.dup2(os.open(file, mode), fd)
    os.dup2(1, 2)
    os.chdir(directory)
    sys.argv, sys.path[0] = words[1:], os.path.dirname(os.path.realpath(words[1]))
    runpy.run_path(words[1], run_name="__main__")
    break
"""


class WarmPython:
    """Runs ``python SCRIPT ...``, each in a process that is forked from one with the imports."""

    def __enter__(self):
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        environ.pop("DETECTRON2_DATASETS", None)
        environ["FVCORE_CACHE"] = "cache"  # of the directory that a program runs in
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environ, text=True, **pipes
        )
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def run(self, words, directory, status=0):
        assert words[0] == "python"
        with tempfile.NamedTemporaryFile("r") as output:
            job = json.dumps([words, str(directory), output.name])
            print(job, file=self.server.stdin, flush=True)
            returncode = int(self.server.stdout.readline())
            text = output.read()
            assert returncode == status and "Traceback" not in text, f"{words}\n{text[-6000:]}"
