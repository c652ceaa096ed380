"""Heads of two networks with different label spaces, as units that all stay apart.

Both heads are filled up with zeros to the same number of labels, so that the merged head gives
first a's labels and then b's; the zeros are cut off again at the end. Knows nothing of matching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evomerge.errors import MergeError
from evomerge.merging.structure.networks.resizing import resized
from evomerge.merging.structure.permutations.permutation import Bind, Group, Spec, State
from evomerge.merging.structure.permutations.units import blocks

Labels = tuple[int, int]
"""How many labels a head has in a and in b."""

ROLE = "labels"


@dataclass(frozen=True)
class Separate:
    """The heads, by module name, that two networks do not share."""

    labels: Mapping[str, Labels]
    biases: frozenset[str]

    @classmethod
    def of(cls, a: nn.Module, b: nn.Module, heads: Sequence[str]) -> Separate:
        """Raises MergeError for a name that is no linear layer of both networks."""
        labels = {}
        for name in heads:
            found = [dict(model.named_modules()).get(name) for model in (a, b)]
            one, two = (m if isinstance(m, nn.Linear) else None for m in found)
            if one is None or two is None:
                raise MergeError(f"heads: {name!r} is no linear layer of both networks; those of a"
                                 f" are {', '.join(_linear(a))}")  # fmt: skip
            if (one.bias is None) != (two.bias is None) or one.in_features != two.in_features:
                raise MergeError(
                    f"heads: {name!r} reads {one.in_features} features in one network"
                    f" and {two.in_features} in the other, or has a bias in one alone"
                )
            labels[name] = one.out_features, two.out_features
        biases = frozenset(h for h in heads if f"{h}.bias" in a.state_dict())
        return cls(labels, biases)

    @property
    def apart(self) -> dict[str, int]:
        """Units of each head's group, of which none is merged."""
        return {f"{head} {ROLE}": max(both) for head, both in self.labels.items()}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the heads' tensors."""
        return tuple(name for head in self.labels for name in self._tensors(head))

    def _tensors(self, head: str) -> tuple[str, ...]:
        return (f"{head}.weight", *([f"{head}.bias"] if head in self.biases else []))

    def without(self, state: State) -> dict[str, Tensor]:
        """A state without the heads."""
        return {name: tensor for name, tensor in state.items() if name not in self.tensors}

    def body(self, spec: Spec) -> Spec:
        """The groups without what they are bound to in the heads."""
        kept = {name: [b for b in spec[name].binds if not {*b.params} & {*self.tensors}]
                for name in (group.name for group in spec.groups)}  # fmt: skip
        return Spec(tuple(replace(g, binds=tuple(kept[g.name])) for g in spec.groups))

    def with_labels(self, spec: Spec) -> Spec:
        """The groups, and one of each head's labels."""
        found = []
        for head, (name, size) in zip(self.labels, self.apart.items(), strict=True):
            binds = tuple(Bind(tensor, 0, blocks(size)) for tensor in self._tensors(head))
            found.append(Group(name, ROLE, size, binds))
        return Spec((*spec.groups, *found))

    def filled(self, model: nn.Module, side: int) -> nn.Module:
        """A network with as many labels as the larger head has; `side` 0 for a, 1 for b."""
        return _with_rows(
            model,
            {
                name: list(range(self.labels[head][side]))
                + [-1] * (max(self.labels[head]) - self.labels[head][side])
                for head in self.labels
                for name in self._tensors(head)
            },
        )

    def cut(self, model: nn.Module) -> nn.Module:
        """The merged network without the labels that were filled up."""
        rows = {}
        for head, (one, two) in self.labels.items():
            filled = max(one, two)
            for name in self._tensors(head):
                rows[name] = [*range(one), *range(filled, filled + two)]
        return _with_rows(model, rows)


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _with_rows(model: nn.Module, rows: Mapping[str, Sequence[int]]) -> nn.Module:
    """A network with these rows of some tensors; zeros for -1."""
    state = model.state_dict()
    changed = {}
    for name, places in rows.items():
        padded = torch.cat([state[name], torch.zeros_like(state[name][:1])])
        changed[name] = padded[torch.tensor(places)]
    made = resized(model, {name: tuple(t.shape) for name, t in changed.items()})
    made.load_state_dict(changed, strict=False)
    return made
