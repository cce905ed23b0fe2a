"""What every test needs: the data folder, no network, few threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start; theirs are set below

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
if "COMPRESS_DATA" not in os.environ and _DATA.is_dir():
    os.environ["COMPRESS_DATA"] = str(_DATA)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402  (the hub reads HF_HUB_OFFLINE when it is imported)

# Triton reads it when it is imported, which transformers does. Where there is a GPU the kernels run on it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.fresh import ForkServer  # noqa: E402
from tests.ranks import RankForks  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: two threads on a busy machine wait for each other, up to 100x slower

# No deadlines: on a busy machine they fail without a fault. `make test-all` asks for the long profile.
# The same examples every time: a change is not held up by what another one left behind. "long" looks further.
hypothesis.settings.register_profile("fast", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def rank_forks() -> Iterator[RankForks]:
    """Commands in several processes."""
    server = RankForks()
    yield server
    server.close()


@pytest.fixture
def forked_reopen(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages reopen what they wrote in a fork with stock libraries, not in a process that imports them anew."""
    monkeypatch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
