from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.model.architecture import architecture_of
from compress.model.layerwise import LayerWalk, gathered_grams
from tests.tiny import TINY, VOCAB, tiny_model


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "mixtral"])
def test_a_walk_sees_what_the_whole_model_sees(kind: str) -> None:
    model = tiny_model(kind)
    arch = architecture_of(model.config.to_dict())
    ids = torch.randint(0, VOCAB, (7, 24), generator=torch.Generator().manual_seed(0))
    specs = dict.fromkeys(arch.linears)
    seen: dict[str, torch.Tensor] = {}
    names = [arch.module_name(layer, spec) for layer in range(arch.layers) for spec in arch.linears]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids[:6], use_cache=False)  # the seventh window is no whole batch of three
    for handle in handles:
        handle.remove()
    expected = {name: x.double().T @ x.double() for name, x in seen.items()}

    with torch.no_grad():
        walk = LayerWalk(model, arch, ids, batch=3)
        for layer in range(arch.layers):
            with gathered_grams(walk.layers[layer], specs) as looked:
                walk.look(layer)
            with gathered_grams(walk.layers[layer], specs) as advanced:
                walk.advance(layer)
            for spec in arch.linears:
                torch.testing.assert_close(looked[spec], advanced[spec])
                torch.testing.assert_close(
                    looked[spec], expected[arch.module_name(layer, spec)], rtol=1e-4, atol=1e-4
                )


def test_kept_columns_are_those_of_the_whole_gram() -> None:
    model = tiny_model("llama_gqa")
    arch = architecture_of(model.config.to_dict())
    ids = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
    down = next(spec for spec in arch.linears if spec.role == "down")
    kept = torch.tensor([1, 5, 6])
    with torch.no_grad():
        walk = LayerWalk(model, arch, ids, batch=2)
        with gathered_grams(walk.layers[0], {down: None}) as whole:
            walk.look(0)
        with gathered_grams(walk.layers[0], {down: kept}) as part:
            walk.look(0)
    torch.testing.assert_close(part[down], whole[down][:, kept], rtol=1e-4, atol=1e-4)


def test_too_few_windows_are_refused() -> None:
    model = tiny_model("llama_gqa")
    arch = architecture_of(model.config.to_dict())
    with pytest.raises(CompressError, match="fewer than one batch"):
        LayerWalk(model, arch, torch.zeros(1, 4, dtype=torch.long), batch=2)


@contextmanager
def counted_calls(model: nn.Module, names: list[str]) -> Iterator[Counter[str]]:
    """How often each module is called."""
    calls: Counter[str] = Counter()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, __, name=name: calls.update([name]))
        for name in names
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma3_text"])
def test_layers_are_asked_for_their_arguments_without_being_run(kind: str) -> None:
    model = tiny_model(kind)
    arch = architecture_of(model.config.to_dict())
    ids = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(1))
    down = next(spec for spec in arch.linears if spec.role == "down")
    names = [arch.module_name(layer, down) for layer in range(arch.layers)]
    modules = list(model.modules())
    with counted_calls(model, names) as calls, torch.no_grad():
        LayerWalk(model, arch, ids, batch=2)
    assert calls == {names[0]: 1}
    assert all(one is two for one, two in zip(modules, model.modules(), strict=True))


def test_a_look_ends_with_the_last_linear_that_is_watched() -> None:
    model = tiny_model("llama_gqa")
    arch = architecture_of(model.config.to_dict())
    ids = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(1))
    watched = {spec: None for spec in arch.linears if spec.role in ("q", "o")}
    names = [arch.module_name(0, spec) for spec in arch.linears if spec.role in ("o", "gate")]
    with torch.no_grad():
        walk = LayerWalk(model, arch, ids, batch=2)
        with gathered_grams(walk.layers[0], watched) as whole:
            walk.look(0)
        with (
            counted_calls(model, names) as calls,
            gathered_grams(walk.layers[0], watched, only=True) as short,
        ):
            walk.look(0)
    assert calls == {names[0]: 2}
    for spec in watched:
        assert torch.equal(whole[spec], short[spec])
        assert torch.equal(short[spec], short[spec].T)
