"""What a user may say about the merging of experts.

    experts:
      keep: 4                     # per layer on average, or a list of one count for each layer
      method: m_smoe              # m_smoe, hc_smoe, prune
      similarity: router_logits
      alignment: first            # first (as published), dominant, none
      alignment_by: weights       # weights, activations
      form: replicated            # replicated, remapped, collapsed

Data only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

Similarity = Literal[
    "router_logits",
    "router_weights",
    "router_weight_features",
    "features",
    "absolute_features",
    "expert_weights",
    "expert_weight_features",
    "gradients",
    "weight_gradients",
    "neuron_correlation",
    "neuron_correlation_max",
    "outputs",
    "output_mse",
    "random",
]


Rank = Annotated[int, Field(ge=1)]


class CompressSettings(BaseModel):
    """How what was merged is made smaller: every matrix of an expert as U V + S (MC-SMoE).

    `rank` of U V, or a list with one for every layer that has experts. `density` is the share of S,
    over all matrices together, that stays in whole rows. With 0 `steps` nothing is trained, and the
    data's gradients only choose the rows; with more the model is trained while rows go: for
    `dense_steps` none do, and the last `settled_steps` have as few as there will be (published: 4
    and 16 of 100). `train` says whether all but the routers is trained, as published, or the
    experts alone. `teacher` weighs the divergence from the model before the merge, at
    `temperature`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: Rank | tuple[Rank, ...] = 32
    density: float = Field(default=0.1, ge=0.0, le=1.0)
    steps: int = Field(default=0, ge=0)
    train: Literal["all", "experts"] = "all"
    learning_rate: float = Field(default=1e-4, gt=0.0)
    warmup: int = Field(default=16, ge=0)
    dense_steps: int | None = Field(default=None, ge=0)
    settled_steps: int | None = Field(default=None, ge=0)
    teacher: float = Field(default=0.2, ge=0.0)
    temperature: float = Field(default=2.0, gt=0.0)

    @model_validator(mode="after")
    def _fits(self) -> CompressSettings:
        dense, settled = self.phases
        if dense + settled > self.steps:
            raise ValueError(
                f"dense_steps and settled_steps: {dense} and {settled} are more than {self.steps}"
                " steps"
            )
        return self

    def ranks(self, layers: int) -> tuple[int, ...]:
        """The rank of every layer, if it is one for all; else as they are listed."""
        return (self.rank,) * layers if isinstance(self.rank, int) else self.rank

    @property
    def phases(self) -> tuple[int, int]:
        """The first steps, in which S is whole, and the last, in which it is as it will be."""
        dense, settled = self.dense_steps, self.settled_steps
        return (
            round(0.04 * self.steps) if dense is None else dense,
            round(0.16 * self.steps) if settled is None else settled,
        )


class ExpertSettings(BaseModel):
    """How experts are grouped and merged, and in what form the result is written.

    `keep` is the average for each merged layer (`allocation: adaptive`, the published rule), the
    number in each (`uniform`), or a list with a number for every layer that has experts. `m_smoe`
    groups experts around the most used ones, `hc_smoe` by hierarchical clustering, `prune` groups
    as m_smoe does and keeps the most used expert of each group as it is. `exponent` is γ of the
    weights aᵢ = usageᵢ^γ: 0 weighs all alike. `skip` names layers, counted among those with
    experts, that are left as they are. `similarity`: see `similarity_gram`. Neurons are aligned
    by their weights or by what they do on the data. `router` is for the collapsed form, but for
    `distilled`, which trains those of any form for `router_steps`; `router_learning_rate` is a
    share of each router's root mean square. `compress` makes the experts of all layers that are not
    skipped smaller.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: StrictInt | tuple[StrictInt, ...]
    method: Literal["m_smoe", "hc_smoe", "prune"] = "m_smoe"
    similarity: Similarity | None = None
    allocation: Literal["adaptive", "uniform"] | None = None
    usage: Literal["count", "gate_mass"] = "count"
    exponent: float = Field(default=1.0, ge=0.0)
    alignment: Literal["first", "dominant", "none"] | None = None
    alignment_by: Literal["weights", "activations"] = "weights"
    skip: tuple[int, ...] = ()
    form: Literal["replicated", "remapped", "collapsed"] = "replicated"
    router: Literal["dominant", "mean", "logsumexp", "distilled"] = "dominant"
    router_steps: int = Field(default=100, ge=1)
    router_learning_rate: float = Field(default=0.1, gt=0.0)
    batch_size: int = Field(default=8, ge=1)
    compress: CompressSettings | None = None

    @model_validator(mode="after")
    def _fits(self) -> ExpertSettings:
        counts = (self.keep,) if isinstance(self.keep, int) else self.keep
        if not counts or min(counts) < 1:
            raise ValueError("keep: a layer keeps at least one expert")
        if self.skip and not isinstance(self.keep, int):
            raise ValueError("skip: leave it out where keep lists a count for every layer")
        if self.form == "collapsed" and (self.skip or len(set(counts)) > 1):
            raise ValueError(
                "form: collapsed: needs the same number of experts in every layer; take remapped"
            )
        if self.form == "collapsed" and self.allocation == "adaptive":
            raise ValueError("allocation: adaptive: the collapsed form needs uniform")
        if self.router in ("mean", "logsumexp") and self.form != "collapsed":
            raise ValueError(
                f"router: {self.router}: is for the collapsed form; {self.form} keeps the routers"
            )
        if self.compress is not None and self.router == "distilled":
            raise ValueError(
                "router: distilled: leave it out with compress, which takes routers as they are"
            )
        return self

    @property
    def compared_by(self) -> Similarity:
        """What experts are compared by: the published base of the method unless one is given."""
        return self.similarity or ("outputs" if self.method == "hc_smoe" else "router_logits")

    @property
    def aligned_to(self) -> Literal["first", "dominant", "none"]:
        """Whose order of neurons experts take: as published unless one is given."""
        return self.alignment or ("first" if self.method == "m_smoe" else "none")

    @property
    def needs_outputs(self) -> bool:
        """Whether every expert has to compute every token."""
        return self.compared_by in ("outputs", "output_mse")

    @property
    def needs_inputs(self) -> bool:
        """Whether inputs of experts have to be kept, for what their neurons make of them."""
        by_activations = self.alignment_by == "activations" and self.aligned_to != "none"
        return by_activations or self.compared_by.startswith("neuron_correlation")

    @property
    def needs_gradients(self) -> bool:
        """Whether the model has to be run backwards."""
        return self.compared_by in ("gradients", "weight_gradients")

    @property
    def adaptive(self) -> bool:
        """Whether layers keep different numbers of experts, by their usage."""
        if self.allocation is not None or not isinstance(self.keep, int):
            return self.allocation == "adaptive" and isinstance(self.keep, int)
        return self.method != "hc_smoe" and self.form != "collapsed"
