"""What a score depends on besides the weights and the items.

Two scores may be compared, and one used for the other, only under the same digest. Knows nothing
of studies and recipes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from typing import Any

from evomerge.scoring.tasks import OTHER_SEED, RANDOM_SEED, LoadedTask, LoadedTasks

# Raise it whenever the scorer's own code changes what the same weights score.
_SCORER = 3
_PACKAGES = ("lm_eval", "torch", "transformers")


def scorer_fingerprint(
    tasks: LoadedTasks,
    *,
    batch_size: int | str,
    dtype: str,
    device: str,
    threads: int,
    share_context: bool | str = "auto",
) -> dict[str, Any]:
    """JSON data: library versions, tasks, seeds, batch size, dtype, device type and threads.

    Sharing contexts is in it too: log-likelihoods, and so perplexities, follow its rounding.

    Needs no model, so that it is known before one is loaded; which attention a model takes follows
    from its config, the versions and the device.
    """
    return {
        "scorer": _SCORER,
        "packages": {name: version(name) for name in _PACKAGES},
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "tasks": {task.name: _task(task) for task in tasks.tasks},
        "seeds": [RANDOM_SEED, OTHER_SEED],
        "batch_size": batch_size,
        "share_context": share_context,
        "dtype": dtype,
        "device": device.partition(":")[0],
        "threads": threads,
    }


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """SHA-256 of a fingerprint's canonical JSON, as hexadecimal digits."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _task(task: LoadedTask) -> dict[str, Any]:
    return {
        "metric": task.metric,
        "filter": task.filter,
        "num_fewshot": task.task.get_config("num_fewshot"),
        "config": _config_digest(task),
        "prompts": _prompts_digest(task),
    }


def _config_digest(task: LoadedTask) -> str:
    """Digest of the task's config without where it was read from; functions by their source."""
    config = dict(task.task.dump_config())
    metadata = dict(config.get("metadata") or {})
    metadata.pop("config_source", None)
    config["metadata"] = metadata
    config.pop("dataset_kwargs", None)  # file paths; what was read is in the prompts
    return _digest(config)


def _prompts_digest(task: LoadedTask) -> str:
    """Digest of every request's text: data, prompt templates and few-shot choice in one."""
    requests = [[list(r.args), r.repeats] for item in task.requests for r in item]
    return _digest([requests, task.hashes])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
