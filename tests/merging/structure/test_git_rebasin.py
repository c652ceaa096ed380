"""Git Re-Basin from models on disk to the merge: a model and its shuffled copies merge into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_families
import small_llama
import torch
from safetensors.torch import load_file, save_file
from structure_configs import CONFIGS

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import fit
from evomerge.merging.fitted.registry import get
from evomerge.merging.merge import open_merge
from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.architectures.trial_network import TrialNetwork
from evomerge.merging.structure.permutations.permutation import apply, inverse, random_permutations


@pytest.fixture(scope="module", params=["llama-tied", "gpt2", "mixtral"])
def shuffled(request, tmp_path_factory):
    """A problem whose source a is the base and b the base with its units out of order."""
    folders = small_families.folders(request.param, tmp_path_factory.mktemp("models"))
    base = Checkpoint.open(folders["base"])
    state = {name: base.tensor(name).clone() for name in base.names}
    spec = spec_of(base.config, {n: tuple(t.shape) for n, t in state.items()})
    p = random_permutations(spec, torch.Generator().manual_seed(1))
    for name, tensors in (("a", state), ("b", apply(spec, state, p))):
        _overwrite(Path(folders[name]), tensors)
    return small_families.opened(folders), spec, p, state


def _overwrite(folder, tensors):
    (file,) = folder.glob("*.safetensors")
    save_file(
        load_file(file) | {n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"}
    )


def fitted(problem, folder, **settings):
    fitter = get("permutation")
    fit(fitter, problem, fitter.settings(**settings), folder)
    return open_artifact(folder)


@pytest.mark.parametrize("similarity", ["weights", "correlation"])
def test_shuffled_copies_merge_into_the_model(shuffled, tmp_path, similarity):
    problem, spec, p, state = shuffled
    artifact = fitted(problem, tmp_path / "artifact", similarity=similarity)
    for group, order in inverse(spec, p).items():
        assert torch.equal(artifact.tensor(f"b/{group}").long(), order)
        assert torch.equal(artifact.tensor(f"a/{group}").long(), torch.arange(len(order)))
    merge = open_merge(small_families.recipe(problem, "git_rebasin", tmp_path / "artifact"))
    linear = replace(merge.recipe, method="linear", artifact=None)
    naive = open_merge(linear)
    assert all(torch.equal(merge.tensor(name), tensor) for name, tensor in state.items())
    assert not all(torch.equal(naive.tensor(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["clip", "switch"])
def test_what_is_no_decoder_is_merged_by_weights(name, tmp_path):
    network = TrialNetwork(CONFIGS[name], dtype=torch.float32)
    spec, state = network.spec, network.random_state()
    p = random_permutations(spec, torch.Generator().manual_seed(3))
    folders = {name: str(tmp_path / name) for name in ("base", "a", "b")}
    for name, folder in folders.items():
        network.write(apply(spec, state, p) if name == "b" else state)
        network.model.save_pretrained(folder)
        small_llama.tokenizer().save_pretrained(folder)
    problem = small_families.opened(folders)
    fitted(problem, tmp_path / "artifact")
    merge = open_merge(small_families.recipe(problem, "git_rebasin", tmp_path / "artifact"))
    assert all(torch.equal(merge.tensor(name), tensor) for name, tensor in state.items())


def test_an_expert_is_read_where_its_like_lies(shuffled, tmp_path):
    """What is read ahead, and what a tensor is known by, are of the tensor that stands there."""
    problem, spec, p, _ = shuffled
    experts = [group for group in spec.groups if group.role == "experts"]
    if not experts:
        return
    artifact = fitted(problem, tmp_path / "artifact")
    merge = open_merge(small_families.recipe(problem, "git_rebasin", tmp_path / "artifact"))
    for group in experts:
        stands = inverse(spec, p)[group.name].tolist()
        for place, params in enumerate(zip(*(b.params for b in group.binds[1:]), strict=True)):
            for bind, name in zip(group.binds[1:], params, strict=True):
                own = bind.params[stands[place]]
                _, first, second = merge.inputs(name)
                assert (first[1], second[1]) == (name, own)
                assert artifact.facts["tensors"]["b"].get(name, name) == own
    assert artifact.facts["tensors"]["a"] == {}
    assert len({merge.fingerprint(name) for name in group.binds[-1].params}) == group.size


def test_weights_count_after_the_permutation(shuffled, tmp_path):
    problem, spec, _, state = shuffled
    fitted(problem, tmp_path / "artifact")
    recipe = small_families.recipe(problem, "git_rebasin", tmp_path / "artifact")
    a, b = recipe.sources
    merge = open_merge(replace(recipe, sources=(a, replace(b, parameters={"weight": 3.0}))))
    name = spec.groups[0].binds[0].param
    torch.testing.assert_close(merge.tensor(name), state[name])


def test_an_architecture_without_a_specification_is_refused(shuffled, tmp_path):
    problem = shuffled[0]
    problem.anchor.config["model_type"], before = "mamba", problem.anchor.config["model_type"]
    try:
        with pytest.raises(MergeError, match="no permutation specification for model_type 'mamba'"):
            fitted(problem, tmp_path / "artifact")
    finally:
        problem.anchor.config["model_type"] = before
    assert not (tmp_path / "artifact").exists()
