"""Answers lm-eval requests with a live model: prepared once, run as often as the weights change.

Knows nothing of parts, metrics and items. Log-likelihoods and greedy generation run on prepared
batches; whatever else a task asks for goes through lm-eval's own HFLM.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evomerge.errors import OutOfMemory, TaskError
from evomerge.scoring.generation import GenerationPlan, Prompt, Stopping, can_decode
from evomerge.scoring.likelihoods import Layout, Likelihoods, may_share
from evomerge.scoring.loglikelihood import Window, check_finite
from evomerge.scoring.near_ties import Choice
from evomerge.scoring.room import Room, name_of, out_of_memory, situation
from evomerge.scoring.tasks import seed_everything, silence

# The reply to a request as lm-eval's HFLM gives it: (log-likelihood, is greedy), a sum, or a text.
Reply = Any


class Engine:
    """A model and tokenizer behind lm-eval's HFLM, used for encoding and for the uncommon cases."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, share_context: bool | str = "auto"
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        with silence():
            self.lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.model = model
        self.room = Room(batch_size, model)
        self.share_context = may_share(model, share_context)
        self._decodes = can_decode(model)
        self._windows: dict[tuple[str, ...], list[Window]] = {}
        self._prompts: dict[tuple[str, int], Prompt] = {}

    @property
    def batch_size(self) -> int:
        """The batch size asked for; `room` knows the one that fits."""
        return self.room.asked

    def set_batch_size(self, batch_size: int) -> None:
        """Take this batch size for every program prepared from now on."""
        self.lm.batch_size_per_gpu = batch_size
        self.room = Room(batch_size, self.model)

    def prepare(self, instances: Sequence[Any]) -> Program:
        """Encode requests and lay them out in batches."""
        return Program(self, instances)

    def longest(self, instances: Sequence[Any]) -> int:
        """Tokens of the longest request, its continuation or the room for its answer included."""
        return max(map(self._length, instances), default=1)

    def windows(self, instance: Any) -> list[Window]:
        """The windows of a log-likelihood request; a rolling one may have several."""
        if instance.args not in self._windows:
            rolling = instance.request_type == "loglikelihood_rolling"
            windows = self._rolling(*instance.args) if rolling else [self._pair(*instance.args)]
            for window in windows:
                if not 0 < len(window.continuation) <= self.lm.max_length:
                    raise TaskError(
                        f"task {instance.task_name!r}: an answer to score has "
                        f"{len(window.continuation)} tokens, expected 1 to {self.lm.max_length}, "
                        f"the model's length: {instance.args[-1][:80]!r}"
                    )
            self._windows[instance.args] = windows
        return self._windows[instance.args]

    def prompt(self, text: str, max_tokens: int) -> Prompt:
        """A generation request's prompt, cut from the left to leave room for the answer."""
        key = (text, max_tokens)
        if key not in self._prompts:
            room = self.lm.max_length - max_tokens
            ids, _ = self.lm.tok_batch_encode([text], left_truncate_len=room)
            if not ids.numel():
                raise TaskError(f"a prompt to generate from has no tokens: {text!r}")
            self._prompts[key] = Prompt(tuple(ids[0].tolist()), text)
        return self._prompts[key]

    def stopping(self, instance: Any) -> Stopping | None:
        """The stopping rule of a plain greedy request; None where HFLM has to do it."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        if instance.request_type != "generate_until" or not self._decodes:
            return None
        lm = self.lm
        options = dict(normalize_gen_kwargs(instance.args[1], lm.max_gen_toks))
        end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        strings = handle_stop_sequences(options.pop("until", None), eos=end)
        max_tokens = int(options.pop("max_gen_toks"))
        greedy = not options.pop("do_sample", False) and not options.pop("temperature", 0.0)
        if max_tokens >= lm.max_length:
            raise TaskError(
                f"task {instance.task_name!r}: `max_gen_toks: {max_tokens}` leaves no room for a "
                f"prompt in the model's {lm.max_length} tokens; set a smaller one"
            )
        if options or not greedy or max_tokens < 1:
            return None
        return Stopping(tuple(strings), max_tokens)

    def _length(self, instance: Any) -> int:
        if instance.request_type == "generate_until":
            stopping = self.stopping(instance)
            room = stopping.max_tokens if stopping else 1
            return len(self.prompt(instance.args[0], room).tokens) + room
        return max(len(w.context) + len(w.continuation) for w in self.windows(instance))

    def _pair(self, context: str, continuation: str) -> Window:
        """As `TemplateLM.loglikelihood`: an empty context is the prefix token."""
        if context:
            before, after = self.lm._encode_pair(context, continuation)
            return Window(tuple(before), tuple(after))
        after = self.lm.tok_encode(continuation, add_special_tokens=False)
        if after and after[0] == self.lm.prefix_token_id:
            return Window(tuple(after[:1]), tuple(after[1:]))
        return Window((self.lm.prefix_token_id,), tuple(after))

    def _rolling(self, text: str) -> list[Window]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = get_rolling_token_windows(
            token_list=self.lm.tok_encode(text),
            prefix_token=self.lm.prefix_token_id,
            max_seq_len=self.lm.max_length,
            context_len=1,
        )
        pairs = map(make_disjoint_window, windows)
        return [Window(tuple(before), tuple(after)) for before, after in pairs]


class Program:
    """A fixed list of requests, ready to be answered by whatever weights the model has."""

    def __init__(self, engine: Engine, instances: Sequence[Any]) -> None:
        self._engine = engine
        self._instances = list(instances)
        self._scored: list[tuple[int, int, int]] = []  # request, first window, last window + 1
        self._written: list[tuple[GenerationPlan, list[list[int]]]] = []
        self._others: dict[str, list[int]] = {}
        self._likelihoods = self._lay_out_likelihoods()
        self._lay_out_generation()

    @torch.inference_mode()
    def run(self) -> list[Reply]:
        """One reply for each request. Raises NonFiniteModel or OutOfMemory."""
        replies: list[Reply] = [None] * len(self._instances)
        with out_of_memory_named(self._engine.model):
            self._run_likelihoods(replies)
            for plan, groups in self._written:
                texts = plan.run(self._engine.model, self._engine.lm.tokenizer)
                for text, group in zip(texts, groups, strict=True):
                    for request in group:
                        replies[request] = text
            self._run_others(replies)
        return replies

    def _lay_out_likelihoods(self) -> Likelihoods | None:
        if self._engine.lm.backend != "causal":
            return None
        windows: list[Window] = []
        tasks: dict[str, dict[int, list[Choice]]] = {}
        for request, instance in enumerate(self._instances):
            if instance.request_type in ("loglikelihood", "loglikelihood_rolling"):
                own = self._engine.windows(instance)
                self._scored.append((request, len(windows), len(windows) + len(own)))
                if self._engine.share_context and instance.request_type == "loglikelihood":
                    items = tasks.setdefault(instance.task_name, {})
                    choice = Choice(len(windows), *instance.args)
                    items.setdefault(instance.doc_id, []).append(choice)
                windows += own
        lm = self._engine.lm
        layout = Layout(self._engine.room, lm.max_length, lm.device)
        return Likelihoods(windows, [list(items.values()) for items in tasks.values()], layout)

    def _run_likelihoods(self, replies: list[Reply]) -> None:
        if self._likelihoods is None:
            return
        answers = self._likelihoods.run(self._engine.model)
        for request, start, stop in self._scored:
            if self._instances[request].request_type == "loglikelihood":
                replies[request] = answers[start]
            else:
                replies[request] = sum(value for value, _ in answers[start:stop])

    def _lay_out_generation(self) -> None:
        answered = {request for request, _, _ in self._scored}
        plans: dict[Stopping, dict[Prompt, list[int]]] = {}
        for request, instance in enumerate(self._instances):
            if request in answered:
                continue
            stopping = self._engine.stopping(instance)
            if stopping is None:
                self._others.setdefault(_kind(instance), []).append(request)
            else:
                prompt = self._engine.prompt(instance.args[0], stopping.max_tokens)
                plans.setdefault(stopping, {}).setdefault(prompt, []).append(request)
        for stopping, prompts in plans.items():
            plan = GenerationPlan(
                list(prompts),
                stopping,
                room=self._engine.room,
                pad_token=self._engine.lm.tokenizer.pad_token_id,
                device=self._engine.lm.device,
                share_prefix=self._engine.share_context,
            )
            self._written.append((plan, list(prompts.values())))

    def _run_others(self, replies: list[Reply]) -> None:
        """What the prepared batches do not cover, by lm-eval's HFLM, repeats and all.

        Always at the batch size asked for: beams and samples depend on it.
        """
        for requests in self._others.values():
            instances = [self._instances[request] for request in requests]
            repeated = [instance for instance in instances for _ in range(instance.repeats or 1)]
            seed_everything()
            with silence(), finite_logits(self._engine.model):
                answers = iter(
                    getattr(self._engine.lm, instances[0].request_type)(repeated, disable_tqdm=True)
                )
            for request, instance in zip(requests, instances, strict=True):
                replies[request] = Repeated(next(answers) for _ in range(instance.repeats or 1))


class Repeated(tuple[Any, ...]):
    """The replies to a request that was asked several times, not all of them the same."""

    __slots__ = ()


def _kind(instance: Any) -> str:
    options = instance.args[1:] if instance.request_type == "generate_until" else ()
    return json.dumps([instance.request_type, *options], default=str, sort_keys=True)


@contextlib.contextmanager
def finite_logits(model: Any) -> Iterator[None]:
    """Check every logit that the model computes meanwhile. Raises NonFiniteModel."""
    handle = model.register_forward_hook(lambda _m, _i, output: check_finite(output.logits))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def out_of_memory_named(model: Any) -> Iterator[None]:
    """Turn running out of memory where no smaller batch was tried into OutOfMemory."""
    with out_of_memory() as reasons:
        yield
    if reasons:
        raise OutOfMemory(
            f"scoring with {name_of(model)} does not fit: {situation(model.device, reasons[0])}, "
            "or set a smaller `batch_size` under `evaluation`"
        )
