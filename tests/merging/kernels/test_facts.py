"""Where facts are kept: in memory, or in a folder that processes share."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.merging.compute import Operands
from evomerge.merging.kernels.facts import Facts, Memory, Store
from evomerge.merging.methods.base import Block
from evomerge.merging.methods.dropping import Drop
from evomerge.merging.methods.reductions import totals
from evomerge.merging.methods.selection import Quota
from evomerge.merging.prepared import Prepared


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Memory() if request.param == "memory" else Prepared(tmp_path / "facts")


def test_what_is_put_is_got(store: Store) -> None:
    assert store.get("a") is None
    store.put("a", np.arange(6).reshape(2, 3))
    store.put("b", np.array([0.1]))
    found = store.get("a")
    assert found is not None
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    store.put("a", np.zeros((2, 0)))
    assert np.shape(store.get("a")) == (2, 0)


def test_who_races_leaves_one_whole_file(tmp_path: Path) -> None:
    folder = Prepared(tmp_path)
    threads = [
        threading.Thread(target=folder.put, args=("a", np.full(10_000, i))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 1
    assert len(set(np.asarray(folder.get("a")).tolist())) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickle"):
        Prepared(tmp_path).put("a", np.array([object()]))
    assert list(tmp_path.iterdir()) == []


def test_a_fact_is_found_out_once(store: Store) -> None:
    base = torch.zeros(50, dtype=torch.bfloat16)
    source = torch.arange(50.0).bfloat16()
    first = Facts(base, (source,), store, "base", ("source",))
    cut, gram = first.cut(0, Quota(7)), first.gram(from_base=True)
    # the same keys promise the same values, so what lies there now is not read
    again = Facts(base, (torch.full_like(source, 3.0),), store, "base", ("source",))
    assert again.cut(0, Quota(7)) == cut
    assert again.gram(from_base=True) == gram
    other = Facts(base, (source,), store, "base", ("other",))
    assert other.gram(from_base=False) != []


@pytest.mark.parametrize("size", [1, 511, 512, 513, 131_072, 131_073, 300_000])
@pytest.mark.parametrize("density", [1e-12, 0.3, 0.999])
def test_norms_are_the_bits_of_the_reference(size: int, density: float) -> None:
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator).bfloat16()
    source = (base.float() + 1e-3 * torch.randn(size, generator=generator)).half()
    drop = Drop(key=-(2**60) + size, density=density, factor=1.0)
    blocks = Operands(base, (source,)).blocks(100_000)

    def terms(block: Block) -> torch.Tensor:
        tau = block.sources[0] - block.base
        return torch.stack([tau, drop.thinned(tau, block.start)]).double().abs_()

    assert drop.draw is not None
    assert list(Facts(base, (source,)).norms(0, drop.draw)) == totals(blocks, terms)
