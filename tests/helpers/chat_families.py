"""Chat templates with the quirks of the families in use, and a tokenizer that has their tokens.

The templates are written for the tests: each has what makes its family hard, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Contents are trimmed; tools go before the messages, calls in place of contents.
LLAMA3 = (
    "<|begin_of_text|>{% if tools %}<|start_header_id|>tools<|end_header_id|>\n\n"
    "{{ tools | tojson }}<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>"
    "{{ m['role'] }}<|end_header_id|>\n\n{% if m.tool_calls %}{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}<|eom_id|>{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
#: No system turn; users and the model alternate; contents are trimmed.
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
#: Earlier thoughts are stripped; the last answer has one even where it is empty; thinking can be
#: switched off.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set ns = namespace(c=m['content'], "
    "r=m.reasoning_content or '') %}{% if m['role'] == 'assistant' %}"
    "{% if '</think>' in ns.c %}{% set ns.r = ns.c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set ns.c = ns.c.split('</think>')[-1] %}{% endif %}{% if loop.last %}"
    "<think>\n{{ ns.r.strip('\\n') }}\n</think>\n\n{{ ns.c.lstrip('\\n') }}"
    "{% else %}{{ ns.c.lstrip('\\n') }}{% endif %}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% else %}{{ ns.c }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
#: Channels; only the last answer shows its thoughts and ends with <|return|>.
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% if loop.last %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
#: The prompt opens the thought, and every answer's is stripped.
DEEPSEEK = (
    "<|bos|>{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|>"
    "{{ m['content'].split('</think>')[-1] }}<|eos|>{% elif m['role'] == 'user' %}<|User|>"
    "{{ m['content'] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
#: No system turn; users and the assistant alternate; a space before each answer.
MISTRAL = (
    "<s>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A family of chat templates.

    Attributes:
        template: the chat template.
        said: what the target generates for a thought (empty for none) and a content, without its
            end.
        end: the token that ends a turn.
        system: whether a system turn is taken.
        thinks: whether answers have thoughts: never, perhaps or always.
        field: the field that the template reads thoughts from; None where they are in the content.
    """

    template: str
    said: Callable[[str, str], str]
    end: str
    system: bool = True
    thinks: tuple[bool, ...] = (False,)
    field: str | None = None


def _qwen3(thought: str, content: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{content}" if thought else content


def _harmony(thought: str, content: str) -> str:
    final = f"<|channel|>final<|message|>{content}"
    if not thought:
        return final
    return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant{final}"


FAMILIES = {
    "chatml": Family(CHATML, lambda thought, content: content, "<|im_end|>"),
    "llama3": Family(LLAMA3, lambda thought, content: content, "<|eot_id|>"),
    "gemma": Family(GEMMA, lambda thought, content: content, "<end_of_turn>", system=False),
    "qwen3": Family(QWEN3, _qwen3, "<|im_end|>", thinks=(False, True), field="reasoning_content"),
    "harmony": Family(HARMONY, _harmony, "<|return|>", thinks=(False, True), field="thinking"),
    "deepseek": Family(
        DEEPSEEK,
        lambda thought, content: f"{thought}\n</think>\n\n{content}",
        "<|eos|>",
        thinks=(True,),
    ),
    "mistral": Family(MISTRAL, lambda thought, content: f" {content}", "</s>", system=False),
}

_CONTROL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|bos|>", "<|eos|>"),
    *("<|User|>", "<|Assistant|>", "<s>", "</s>", "[INST]", "[/INST]"),
]
VOCAB_SIZE = len(_CONTROL) + 257


@cache
def _backend() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*_CONTROL, *letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def family_tokenizer(template: str, eos: str = "<|endoftext|>") -> Any:
    """One token per byte, one for two newlines, and every family's control tokens."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in _CONTROL if token != eos],
    )
    fast.chat_template = template
    return fast
