"""Fresh processes without their start-up: each script runs in a fork of one process with stock libraries loaded.

A real ``python -c`` spends five seconds on imports; a fork of a process that has torch, transformers and peft
(and nothing of ours) is as ignorant of this test process, and takes milliseconds.
"""

from __future__ import annotations

import json
import subprocess
import sys

SERVER = """
import json, os, sys, tempfile, traceback
import torch
torch.set_num_threads(1)  # a fork must not find a pool of threads that it did not inherit
import peft, safetensors.torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
assert "compress" not in sys.modules
replies = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                exec(compile(json.loads(line), "<script>", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    replies.write(json.dumps([code, *texts]) + "\\n")
    replies.flush()
"""


class ForkServer:
    """Runs Python scripts in forks; a stand-in for ``compress.pipelines.reopen.run_fresh``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run ``script`` and return its exit code and output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(script) + "\n")
        self._process.stdin.flush()
        code, out, err = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(["fork"], code, out, err)

    def close(self) -> None:
        """End the server."""
        self._process.communicate()
