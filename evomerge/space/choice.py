"""A searched choice: one of a few words, or of true and false.

Reads its YAML form and makes its one gene. Knows nothing of recipes or of the merge method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict, model_validator

from evomerge.space.factor import Gene

Word = Annotated[bool, Strict()] | Annotated[str, Strict()]


class Choice(BaseModel):
    """A parameter that is one of `choices`, as a space's YAML writes it; the search starts at
    `init`. Neighbours in the list are near each other to a sampler that knows distances."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[Word, ...]
    init: Word

    @model_validator(mode="after")
    def _consistent(self) -> Choice:
        if faults := list(self._faults()):
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        if len(self.choices) < 2:
            yield "choices holds fewer than two; write the one as the parameter's fixed value"
        twice = [word for word in self.choices if self.choices.count(word) > 1]
        if twice:
            yield f"choices lists {twice[0]!r} twice"
        if self.init not in self.choices:
            yield f"init {self.init!r} is none of the choices"

    def gene(self, label: str) -> Gene:
        """Its gene, whose values are places in `choices`."""
        last, init = float(len(self.choices) - 1), float(self.choices.index(self.init))
        places = tuple(map(float, range(len(self.choices))))
        return Gene(label, 0.0, last, init, "linear", f"which {label}", places, self.choices)

    def chosen(self, label: str, values: Mapping[str, float]) -> bool | str:
        """The word that the genes' values stand for."""
        return self.choices[int(values[label])]
