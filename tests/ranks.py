"""Commands, or functions, in several processes at once, as torchrun would start them, without its start-up.

``python -m tests.ranks`` answers requests, one JSON object a line: it forks as many processes, each of which finds
RANK, WORLD_SIZE and the address of the first in its environment.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 120.0
"""Seconds until a run is taken to hang."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to run.

    Attributes:
        size: How many processes.
        arguments: Of ``compress``.
        call: Instead of them, ``module:function``: called with a `compress.adapters.ranks.Ranks`, prints.
        faults: ``[rank, step, kind]``: what befalls a rank (None: every one) when it has computed that many steps.
            ``fail``: an error it reports; ``bug``: one it does not expect; a signal's name: the signal.
        variables: Further environment.
    """

    size: int
    arguments: Sequence[str] = ()
    call: str = ""
    faults: Sequence[Sequence[Any]] = ()
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How it ended, by rank.

    Attributes:
        codes: Exit codes; minus the signal's number if one ended it; None: it hung, and was killed.
        out: What was printed.
        err: On standard error.
    """

    codes: Sequence[int | None]
    out: Sequence[str]
    err: Sequence[str]


class RankForks:
    """The process that forks, and requests to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )

    def run(self, request: Request) -> Answer:
        """Run it to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _hurt(faults: Sequence[Sequence[Any]]) -> None:
    from compress.adapters.together import Together
    from compress.errors import CompressError

    compute = Together.gradients

    def gradients(self: Any, ids: Any, labels: Any, step: int) -> float:
        for rank, when, kind in faults:
            if step != when or rank not in (None, self.ranks.rank):
                continue
            if kind == "fail":  # as an error in the model would come
                self.objective = _raising(CompressError("The lamp is out.", "Light it."))
            elif kind == "bug":
                self.objective = _raising(ValueError("the lamp\nis out"))
            else:
                os.kill(os.getpid(), getattr(signal, kind))
        return compute(self, ids, labels, step)

    Together.gradients = gradients  # type: ignore[method-assign]


def _raising(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def _child(request: Request, rank: int, port: int, out: Any, err: Any) -> int:
    import torch

    from compress.__main__ import app
    from compress.pipelines import reopen
    from tests.faults.forks import _forked

    torch.set_num_threads(1)
    reopen.run_fresh = _forked
    said = {"RANK": rank, "WORLD_SIZE": request.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": request.size}
    os.environ |= {name: str(value) for name, value in said.items()} | request.variables
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _hurt(request.faults)
    code = 1
    with io.TextIOWrapper(out) as stdout, io.TextIOWrapper(err) as stderr:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                if request.call:
                    _call(request.call)
                    code = 0
                else:
                    app(list(request.arguments))
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 0
            except BaseException:
                traceback.print_exc(file=stderr)
        stdout.flush()
        stderr.flush()
    return code


def _call(name: str) -> None:
    from compress.pipelines.launch import join

    module, _, function = name.partition(":")
    launch = join()
    getattr(importlib.import_module(module), function)(launch.ranks("cpu"))
    launch.leave()
    launch.post(f"done/{launch.rank}", {})
    if launch.rank == 0:  # it keeps the board
        launch.wait_all([f"done/{rank}" for rank in range(launch.size)], 60.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answer(request: Request) -> Answer:
    with ExitStack() as stack:
        return _run(
            request,
            [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in range(request.size)],
        )


def _run(request: Request, files: Sequence[Sequence[Any]]) -> Answer:
    port, children = _free_port(), {}
    for rank, (out, err) in enumerate(files):
        child = os.fork()
        if child == 0:
            os.setsid()
            code = 1
            try:
                code = _child(request, rank, port, out, err)
            finally:
                os._exit(code)
        children[child] = rank
    codes: list[int | None] = [None] * request.size
    until = time.monotonic() + LIMIT
    while children and time.monotonic() < until:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    for child in children:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = [
        [os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace") for file in pair] for pair in files
    ]
    return Answer(codes=codes, out=[text[0] for text in texts], err=[text[1] for text in texts])


def _serve() -> None:
    import torch

    torch.set_num_threads(1)  # a fork must not find a pool of threads that it did not inherit
    import torch.distributed.fsdp
    from transformers import LlamaForCausalLM  # noqa: F401

    from compress.__main__ import app  # noqa: F401
    from compress.pipelines import prune, serve, team  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background are born deaf to it
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        replies.write(json.dumps(asdict(_answer(Request(**json.loads(line))))) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
