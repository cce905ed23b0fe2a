from __future__ import annotations

import pytest
import torch

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
