"""What a long benchmark has measured, kept in a file, so that it goes on where it was cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """JSON by key, a line each in a file: what was made before an interruption is kept."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        self._values = {key: value for key, value in map(json.loads, lines)}
        self._file = path.open("a")

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._values:
            self._values[key] = make()
            self._file.write(json.dumps([key, self._values[key]]) + "\n")
            self._file.flush()
        return self._values[key]
