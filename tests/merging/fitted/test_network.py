"""Gradients by stored names are those that autograd gives of the live parameters."""

from __future__ import annotations

import pytest
import small_llama
import tiny_models
import torch

from evomerge.checkpoints.adapted import open_model
from evomerge.errors import MergeError
from evomerge.merging.binding import bind
from evomerge.merging.fitted.calibration import Example, batch
from evomerge.merging.fitted.network import Network

_BATCH = batch([Example((5, 6, 7, 8, 9)), Example((3, 4, 5), answer=2)])


def _loss(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[_BATCH.counted], _BATCH.targets[_BATCH.counted])


def _gradients(network: Network) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with network.gradients(lambda name, gradient: found.update({name: gradient.clone()})):
        network.backward(_loss(network.logits(_BATCH)), _BATCH, what="test")
    return found


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "qwen2", "phi3"])
def test_gradients_by_stored_name_are_autograds(family, tmp_path):
    tiny_models.causal(family, dtype=torch.float32).save_pretrained(tmp_path / "m")
    small_llama.tokenizer().save_pretrained(tmp_path / "m")
    checkpoint = open_model(str(tmp_path / "m"))
    network = Network(checkpoint)
    found = _gradients(network)
    # what autograd leaves in .grad, read back through a model whose weights are those gradients
    plain = Network(checkpoint).model.requires_grad_(True)
    out = plain(input_ids=_BATCH.tokens, attention_mask=_BATCH.attention, use_cache=False)
    _loss(out.logits).backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    targets = bind(plain, checkpoint)
    assert found
    for name, gradient in found.items():
        probe = torch.zeros_like(gradient)
        _read(targets[name], probe)
        torch.testing.assert_close(gradient, probe, rtol=1e-4, atol=1e-7, msg=name)
    assert set(found) == set(network.learned) - _idle(found, network)
    assert all(parameter.grad is None for parameter in network.model.parameters())


def _read(target, out: torch.Tensor) -> None:
    if isinstance(target, torch.Tensor):
        out.view(-1).copy_(target)
        return
    for live, start, strides in target.pieces:
        out.view(-1).as_strided(live.shape, strides, start).copy_(live)


def _idle(found, network: Network) -> set[str]:
    """Learned tensors that no token reached: experts that the router did not pick."""
    return {name for name in network.learned if name not in found and "experts" in name}


def test_checkpointing_changes_no_gradient(tmp_path):
    checkpoint = open_model(str(small_llama.save(tmp_path / "m")))
    plain, recomputed = (
        _gradients(Network(checkpoint)),
        _gradients(Network(checkpoint, checkpointing=True)),
    )
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name])


def test_written_weights_are_the_models(tmp_path):
    one, other = (open_model(str(small_llama.save(tmp_path / f"{s}", seed=s))) for s in (0, 1))
    network = Network(one)
    for name in network.learned:
        network.write(name, other.tensor(name))
    with torch.no_grad():
        assert torch.equal(network.logits(_BATCH), Network(other).logits(_BATCH))


def test_a_loss_that_is_no_number_is_an_error(tmp_path):
    network = Network(open_model(str(small_llama.save(tmp_path / "m"))))
    taken = []
    with network.gradients(lambda name, gradient: taken.append(name)):
        loss = network.logits(_BATCH).sum() * float("nan")
        with pytest.raises(MergeError, match="step 3: the loss is nan"):
            network.backward(loss, _BATCH, what="step 3")
    assert not taken


def test_padding_counts_nothing():
    assert _BATCH.counted.tolist() == [[True] * 4 + [False], [False, True] + [False] * 3]
    assert _BATCH.targets[1, 1] == 5


def test_a_model_behind_an_adapter_is_what_peft_merges(tmp_path):
    small_adapters = pytest.importorskip("small_adapters")
    base = small_adapters.llama(tmp_path / "base")
    adapter = small_adapters.train(base, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    small_adapters.merged(base, adapter, tmp_path / "whole")
    small_llama.tokenizer().save_pretrained(tmp_path / "whole")
    found, whole = (
        Network(open_model(path)).logits(_BATCH)
        for path in (f"{base}+{adapter}", str(tmp_path / "whole"))
    )
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
