from __future__ import annotations

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety short documents of made-up sentences: enough for three disjoint splits."""
    rng = random.Random(0)
    nouns = ["river", "engine", "matrix", "garden", "signal", "harbour", "kernel", "ledger"]
    verbs = ["carries", "measures", "prunes", "follows", "stores", "recovers"]
    documents = [
        " ".join(
            f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} of {rng.choice(nouns)}s."
            for _ in range(12)
        )
        for _ in range(90)
    ]
    path = tmp_path_factory.mktemp("text") / "made_up.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path
