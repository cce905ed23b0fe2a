"""Commands in forks of one process with everything imported: a run of a tiny model takes a second, not ten.

``python -m tests.faults.forks`` answers requests, one JSON object a line. A forked command is a process of its own, in
a process group of its own, that dies as any other does: by SIGKILL, at a moment or in front of a chosen change to the
files of its workspace. What it computed is counted in a log that outlives it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
COUNTED = {
    "backward passes": "compress.importance.moments:OutputGradients.gather",
    "scored layer": "compress.importance.gram_store:GramStore.put",
    "trial": "compress.pipelines.prune_trial:mean_loss",
    "refitted matrix": "compress.prune.compensate:refit",
    "training step": "compress.adapters.run:Run.update",
    "sensitivities": "compress.pipelines.quantize:sensitivities",
    "error table": "compress.pipelines.error_tables:table_of",
    "decomposed matrix": "compress.pipelines.lq_writer:decomposed",
    "perplexity": "compress.pipelines.measure:perplexity",
    "recovered module": "compress.adapters.recover:_write",
    "merged matrix": "compress.adapters.merged:merged",
}
"""What is counted, by the function whose end completes one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command.

    Attributes:
        arguments: Of ``compress``.
        root: Folder whose changes count.
        log: Gets a line for every unit of work that is completed.
        kill_before: Die in front of this change, from 1 on; 0: at none.
        kill_after: Die after so many seconds; 0: at no time.
        signal: What is sent then.
        threads: Of torch.
    """

    arguments: Sequence[str]
    root: str
    log: str
    kill_before: int = 0
    kill_after: float = 0.0
    signal: int = int(signal.SIGKILL)
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How it ended.

    Attributes:
        code: Its exit code; minus the signal's number if one ended it.
        out: What it printed.
        err: On standard error.
        changes: To files below the root, as far as it came to count them.
        seconds: It took.
        memory: Peak resident bytes.
    """

    code: int
    out: str
    err: str
    changes: int
    seconds: float
    memory: int = field(default=0)


class Forks:
    """The process that forks, and requests to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def run(self, request: Request) -> Answer:
        """Run a command to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _logged(function: Callable[..., Any], name: str, log: list[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        handle = os.open(log[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{name}\n".encode())
        os.close(handle)
        return result

    return call


def _count_work(log: list[str]) -> None:
    import importlib

    for name, place in COUNTED.items():
        module_name, _, path = place.partition(":")
        owner: Any = importlib.import_module(module_name)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, _logged(getattr(owner, last), name, log))


class _Changes:
    """Counts what is about to change below a folder, and dies in front of one of them."""

    def __init__(self, root: str, kill_before: int, number: int, tally: Path) -> None:
        self.root, self.kill_before, self.number, self.tally = root, kill_before, number, tally
        self.count = 0
        self.parent = os.getpid()
        self.fsync = os.fsync
        os.fsync = self._fsync  # raises no event of its own
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not flags & WRITING:
                return
            self._changes(path)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._changes(args[1])
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            folder = args[-1]
            self._changes(self.root if isinstance(folder, int) and folder >= 0 else args[0])

    def _fsync(self, handle: int) -> None:
        self._changes(os.readlink(f"/proc/self/fd/{handle}"))
        self.fsync(handle)

    def _changes(self, path: Any) -> None:
        if not os.fsdecode(os.fspath(path)).startswith(self.root) or os.getpid() != self.parent:
            return
        self.count += 1
        if self.count == self.kill_before:
            os.kill(os.getpid(), self.number)


def _forked(script: str) -> subprocess.CompletedProcess[str]:
    """A stand-in for a fresh process: a fork that dies with the group of its parent."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (
                    io.TextIOWrapper(os.fdopen(1, "wb")),
                    io.TextIOWrapper(os.fdopen(2, "wb")),
                )
                exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return subprocess.CompletedProcess(["fork"], code, *texts)


def _child(request: Request, out: Any, err: Any, tally: Path) -> int:
    import torch

    from compress.__main__ import app
    from compress.pipelines import reopen

    torch.set_num_threads(request.threads)
    reopen.run_fresh = _forked
    changes = _Changes(request.root, request.kill_before, request.signal, tally)
    code = 1
    with io.TextIOWrapper(out) as stdout, io.TextIOWrapper(err) as stderr:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                app(list(request.arguments))
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 0
            except BaseException:
                traceback.print_exc(file=stderr)
        stdout.flush()
        stderr.flush()
    tally.write_text(str(changes.count))
    return code


def _serve() -> None:
    import torch

    torch.set_num_threads(1)  # a fork must not find a pool of threads that it did not inherit
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import scipy.optimize  # noqa: F401
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from compress.__main__ import app  # noqa: F401
    from compress.pipelines import align, evaluate, prune, quantize, recover, train  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background are born deaf to it
    log = [""]
    _count_work(log)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = Request(**json.loads(line))
        log[0] = request.log
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            tempfile.NamedTemporaryFile() as tally,
        ):
            begun = time.monotonic()
            child = os.fork()
            if child == 0:
                os.setsid()
                code = 1
                with suppress(BaseException):
                    code = _child(request, out, err, Path(tally.name))
                os._exit(code)
            status, memory = _wait(child, request)
            seconds = time.monotonic() - begun
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # a fresh process that it left behind
            out.seek(0)
            err.seek(0)
            count = Path(tally.name).read_text()
            answer = Answer(
                code=os.waitstatus_to_exitcode(status),
                out=os.pread(out.fileno(), 1 << 20, 0).decode(errors="replace"),
                err=os.pread(err.fileno(), 1 << 20, 0).decode(errors="replace"),
                changes=int(count) if count else request.kill_before,
                seconds=seconds,
                memory=memory,
            )
        replies.write(json.dumps(asdict(answer)) + "\n")
        replies.flush()


def _wait(child: int, request: Request) -> tuple[int, int]:
    if request.kill_after > 0:
        end = time.monotonic() + request.kill_after
        while time.monotonic() < end:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                return status, _peak(usage)
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            if request.signal == signal.SIGKILL:
                os.killpg(child, request.signal)
            else:
                os.kill(child, request.signal)
    _, status, usage = os.wait4(child, 0)
    return status, _peak(usage)


def _peak(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    _serve()
