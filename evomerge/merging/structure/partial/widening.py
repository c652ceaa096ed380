"""Which groups a checkpoint can hold wider than it did, what that costs, and in which shapes.

transformers' configs have one width for all layers: a narrower layer is filled up with zeros, which
change nothing. Reads configs and shapes; no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import MergeError
from evomerge.merging.structure.partial.budget import Costs, Term
from evomerge.merging.structure.permutations.permutation import Bind, Group, Spec
from evomerge.merging.structure.permutations.units import Shapes

_NEURONS = ("n_inner", "ffn_dim", "intermediate_size")


@dataclass(frozen=True)
class Widening:
    """The groups of an architecture that may be widened.

    MLP neurons, and key-value heads with their query heads where the config has a head dimension of
    its own. The residual stream is not among them: a norm over two models' channels would mix their
    scales; nor are heads under a norm over all of them (OLMo), units of which a tensor has several
    parts one after another (Phi-3), and shared experts, whose width is another key's. Source: none;
    PLeaS' own code widens convolutional networks.
    """

    config: Mapping[str, Any]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], spec: Spec) -> Widening:
        """Raises MergeError for an architecture of which nothing can be widened."""
        roles = {"mlp"} if _neurons_key(config) else set()
        if "num_key_value_heads" in config:
            roles.add("kv")
        groups = tuple(
            g for g in spec.groups if g.role in roles and g.parent is None and _has_room(g)
        )
        if not groups:
            raise MergeError(
                f"model_type {config.get('model_type')!r}: no group of its units can be widened in"
                " a checkpoint that transformers loads; bring the units into one order and average"
                " them (`git_rebasin`)"
            )
        return cls(config, groups)

    def widened(self, apart: Mapping[str, int]) -> dict[str, Any]:
        """The config with room for so many units of each group apart."""
        return self._with(self.units(apart))

    def units(self, apart: Mapping[str, int]) -> dict[str, int]:
        """The units that every group of a role has once filled up, by role: those of the widest,
        and as many heads more as the architecture's config insists on (Llama's: a divisor of the
        hidden size). Raises MergeError where it accepts no number."""
        most: dict[str, int] = {}
        for group in self.groups:
            width = group.size + apart.get(group.name, 0)
            most[group.role] = max(most.get(group.role, 0), width)
        if "kv" in most and most["kv"] > int(self.config["num_key_value_heads"]):
            most["kv"] = self._heads(most)
        return most

    def _heads(self, most: Mapping[str, int]) -> int:
        twice = 2 * int(self.config["num_key_value_heads"])
        for kv in range(most["kv"], twice + 1):
            if _is_accepted(self._with({**most, "kv": kv})):
                return kv
        raise MergeError(
            f"model_type {self.config['model_type']!r}: its config accepts no more key-value heads"
        )

    def _with(self, most: Mapping[str, int]) -> dict[str, Any]:
        config = dict(self.config)
        if "mlp" in most:
            config[str(_neurons_key(config))] = most["mlp"]
        if most.get("kv", 0) > int(config.get("num_key_value_heads") or 0):
            heads, kv = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
            config["head_dim"] = config.get("head_dim") or int(config["hidden_size"]) // heads
            config["num_attention_heads"] = heads // kv * most["kv"]
            config["num_key_value_heads"] = most["kv"]
        return config

    def filled(self, apart: Mapping[str, int]) -> dict[tuple[str, int], int]:
        """The length of each axis that units of these groups lie on, once filled up."""
        most = self.units(apart)
        return {
            (bind.param, bind.axis): bind.index.shape[1] * most[group.role]
            for group in self.groups
            for bind in _binds(group)
        }

    def costs(self, spec: Spec, shapes: Shapes, tokens: float) -> Costs:
        """What each token costs, of a sequence of so many: products of matrices and attention."""
        terms = list(_terms(self.groups, spec, shapes))
        terms += [Term(_attention(group, tokens), group.name) for group in self.groups]
        return Costs([t for t in terms if t.cost], {g.name: g.size for g in self.groups})


def _has_room(group: Group) -> bool:
    """Whether units can be added behind those that there are, and change nothing as zeros."""
    if "shared_expert" in group.name or any("_norm." in bind.param for bind in _binds(group)):
        return False
    return all(bool((bind.index.diff(dim=1) == 1).all()) for bind in _binds(group))


def _is_accepted(config: Mapping[str, Any]) -> bool:
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**config)
    except Exception:  # whatever a config of transformers may raise
        return False
    return True


def _neurons_key(config: Mapping[str, Any]) -> str | None:
    return next((key for key in _NEURONS if key in config), None)


def _binds(group: Group) -> Iterator[Bind]:
    for bind in group.binds:
        assert isinstance(bind, Bind)  # neurons and heads are no whole tensors
        yield bind


def _terms(groups: tuple[Group, ...], spec: Spec, shapes: Shapes) -> Iterator[Term]:
    """One for each matrix; a vector costs as good as nothing."""
    bound: dict[str, list[str]] = {}
    for group in groups:
        for bind in _binds(group):
            bound.setdefault(bind.param, []).append(group.name)
    for name, shape in shapes.items():
        if len(shape) != 2 or _is_looked_up(name, shapes):
            continue
        ends = [*bound.get(name, ()), None, None][:2]
        yield Term(float(shape[0] * shape[1]), ends[0], ends[1])


def _is_looked_up(name: str, shapes: Shapes) -> bool:
    """An embedding, unless it is the head as well."""
    is_embedding = "embed" in name or name.endswith(("wte.weight", "wpe.weight"))
    return is_embedding and ("lm_head.weight" in shapes or "position" in name or "wpe" in name)


def _attention(group: Group, tokens: float) -> float:
    """Scores and values of every query head: half of the sequence is behind a token."""
    if group.role != "kv":
        return 0.0
    queries = max(bind.index.shape[1] for bind in _binds(group))
    return queries * group.size * tokens
