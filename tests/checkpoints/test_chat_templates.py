"""Chat templates: chosen, written, and rendered by transformers to the published formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_llama
from transformers import AutoTokenizer

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.chat_templates import (
    TEMPLATES,
    chat_template,
    check_chat_template,
    template_of,
    write_chat_template,
)
from evomerge.errors import SpecError

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]

ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n"
)
# As the makers print them; special tokens of the small tokenizer are <s> and </s>.
FORMATS = {
    "alpaca": (
        f"{ALPACA_HEAD}### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n"
        "### Instruction:\nBye\n\n",
        "### Response:\n",
    ),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Hello![|endofturn|]\n[|user|]Bye\n",
        "[|assistant|]",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s> [INST] Hi [/INST] Hello!</s> [INST] Bye [/INST]", ""),
}
WITH_SYSTEM = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST]",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_llama.save(tmp_path_factory.mktemp("m") / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.save_pretrained(folder)
    return folder


def _render(model: Path, folder: Path, text: str, messages, **options) -> str:
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    write_chat_template(folder, text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_renders_the_published_format(
    model: Path, tmp_path: Path, name: str
) -> None:
    text = chat_template(name, [])
    assert text is not None
    written, prompt = FORMATS[name]
    assert _render(model, tmp_path, text, CHAT) == written
    assert _render(model, tmp_path, text, CHAT, add_generation_prompt=True) == written + prompt
    assert _render(model, tmp_path, text, [SYSTEM, CHAT[0]]) == WITH_SYSTEM[name]


def _with(model: Path, folder: Path, template: str | None) -> Checkpoint:
    small_llama.save(folder)
    if template is not None:
        write_chat_template(folder, template)
    return Checkpoint.open(str(folder))


def test_auto_is_what_most_models_have(model: Path, tmp_path: Path) -> None:
    texts = [None, "{{ 'a' }}", "{{ 'b' }}", "{{ 'b' }}", None, None]
    models = [_with(model, tmp_path / str(n), text) for n, text in enumerate(texts)]
    assert chat_template("auto", models) == "{{ 'b' }}"
    assert chat_template("auto", models[:3]) == "{{ 'a' }}"  # of equals the first
    assert chat_template("auto", models[:1]) is None


def test_a_template_is_found_where_older_files_have_it(model: Path, tmp_path: Path) -> None:
    checkpoint = _with(model, tmp_path / "m", None)
    several = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    for file, document, expected in (
        ("tokenizer_config.json", {"chat_template": several}, "d"),
        ("tokenizer_config.json", {"chat_template": "one"}, "one"),
        ("chat_template.json", {"chat_template": "json"}, "json"),
    ):
        (checkpoint.folder / file).write_text(json.dumps(document))
        assert template_of(checkpoint) == expected


def test_what_is_written_replaces_what_was_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    config = json.loads((model / "tokenizer_config.json").read_text())
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "old"}))
    write_chat_template(tmp_path, "{{ 'new' }}")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ 'new' }}"
    assert not (tmp_path / "chat_template.json").exists()


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ("chatlm", "chat_template: unknown 'chatlm'; did you mean 'chatml'?"),
        ("{% for x in y %}", "chat_template: line 1 is not Jinja: Unexpected end of template"),
    ],
)
def test_a_choice_that_is_no_template(choice: str, problem: str) -> None:
    assert (check_chat_template(choice) or "").startswith(problem)
    with pytest.raises(SpecError, match="chat_template"):
        chat_template(choice, [])


def test_a_text_is_taken_as_it_is() -> None:
    text = "{%- generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    assert check_chat_template("{{ messages[0]['content'] }}") is None
    assert check_chat_template(text) is None
    assert chat_template(text, []) == text
