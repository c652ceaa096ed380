"""How far a fit has come that is part of a folder in the making, so that a crash costs little.

Knows nothing of what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.merging.aside import Aside, flush


class AsideSaves:
    """The last state that was saved under a label, in an `Aside`.

    `state` is what an earlier attempt left: tensors by name, and notes; None for a fit that begins.
    """

    def __init__(self, aside: Aside, label: str) -> None:
        self._aside, self._start = aside, f"{label}-"
        self.state = self._read()

    def save(
        self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], *, flops: float = 0.0
    ) -> None:
        """Keep this in place of what was saved before."""
        before = self._files()
        number = 1 + max((int(n.split("-")[-1].split(".")[0]) for n in before), default=0)
        path = self._aside.folder / f"{self._start}{number}.safetensors"
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)
        flush(path)
        self._aside.finish(path.name, dict(notes))
        for old in before:
            self._aside.drop(old)

    def drop(self) -> None:
        """Remove what was saved: it is needed no more."""
        for old in self._files():
            self._aside.drop(old)

    def _files(self) -> list[str]:
        return [name for name in self._aside.finished if name.startswith(self._start)]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not (files := self._files()):
            return None
        return load_file(self._aside.folder / files[-1]), self._aside.finished[files[-1]]
