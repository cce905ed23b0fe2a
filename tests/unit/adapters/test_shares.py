from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.adapters.run import seeded
from compress.adapters.shares import Piece, RowDropout, shares
from compress.errors import UsageError


def places(pieces: tuple[Piece, ...], micro_batch: int) -> list[int]:
    """The windows of a step that the pieces are."""
    return [p.index * micro_batch + p.first + row for p in pieces for row in range(p.count)]


@given(micro_batch=st.integers(1, 9), accumulation=st.integers(1, 9), data=st.data())
def test_every_window_is_computed_once_in_order_and_in_its_micro_batch(
    micro_batch: int, accumulation: int, data: st.DataObject
) -> None:
    windows = micro_batch * accumulation
    ranks = data.draw(st.integers(1, windows))
    found = shares(windows, micro_batch, ranks)
    assert [place for pieces in found for place in places(pieces, micro_batch)] == list(range(windows))
    sizes = [len(places(pieces, micro_batch)) for pieces in found]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    for pieces in found:
        assert all(0 < p.count <= p.of == micro_batch for p in pieces)
        assert all(p.first >= 0 and p.first + p.count <= p.of for p in pieces)
        assert len(pieces) <= -(-sum(p.count for p in pieces) // micro_batch) + 1


def test_one_process_makes_the_passes_that_it_always_made() -> None:
    assert shares(6, 2, 1) == (tuple(Piece(index=i, first=0, count=2, of=2) for i in range(3)),)


def test_a_process_without_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="5 processes were launched, and a step trains 4 windows"):
        shares(4, 2, 5)


class Net(nn.Module):
    """Two dropouts, in and after a linear layer, as adapters have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Dropout(0.3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * 2 + 1)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 64), (5, 33, 17)])
@pytest.mark.parametrize("cut", [(0, 1), (1, 4), (4, 5), (0, 5)])
def test_dropout_of_some_rows_is_what_the_whole_batch_gives_them(
    shape: tuple[int, ...], cut: tuple[int, int]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    plain, net = Net(), Net()
    dropout = RowDropout(net)
    with seeded("7/1/0", torch.device("cpu")):
        expected = plain(x)
    first, last = cut
    rows = x[first:last].clone().requires_grad_()
    with (
        seeded("7/1/0", torch.device("cpu")),
        dropout.rows(Piece(index=0, first=first, count=last - first, of=5)),
    ):
        found = net(rows)
    assert torch.equal(found, expected[first:last])
    found.sum().backward()
    assert rows.grad is not None
    kept = (expected[first:last] != 0) & (rows.grad != 0)
    torch.testing.assert_close(rows.grad[kept], torch.full_like(rows.grad[kept], 2 / 0.7 / 0.5))


def test_dropout_is_left_alone_outside_of_a_piece_and_in_evaluation() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    net = Net()
    dropout = RowDropout(net)
    with seeded("1", torch.device("cpu")):
        expected = Net()(x)
    with seeded("1", torch.device("cpu")):
        assert torch.equal(net(x), expected)
    net.eval()
    with dropout.rows(Piece(index=0, first=0, count=3, of=9)):
        assert torch.equal(net(x), x * 2 + 1)
