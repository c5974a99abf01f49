"""Chat templates in the manner of the models that they are named after, written for the default tokenizer.

FAMILIES: name -> (template, special tokens that it needs beyond bos and eos, end of a turn, what an answer's text
becomes, whether system turns are taken).
"""

from __future__ import annotations

import copy

QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set text = m.content %}"
    "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '')"
    " + '\n</think>\n\n' }}{% endif %}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN3_MARKED = (
    QWEN3.replace("{% if loop.index0 > ns.last %}", "{% generation %}{% if loop.index0 > ns.last %}")
    .replace("{% endif %}{% endif %}{{ text + '<|im_end|>\n' }}",
             "{% endif %}{{ text + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ text + '<|im_end|>\n' }}{% endif %}")
)  # fmt: skip
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{%- generation -%}{{ m['content'] + '<|im_end|>' }}"
    "{%- endgeneration -%}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}",
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set head = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ((head if loop.first else '') + m.content).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA32 = LLAMA3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '<|eot_id|>' }}",
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATGLM = (
    "{{ '[gMASK]sop' }}{% for m in messages %}{{ '<|' + m.role + '|>\n ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

same, stripped = (lambda text: text), str.strip
FAMILIES = {
    "chatml": (CHATML, (), "<|im_end|>", same, True),
    "chatml marked": (CHATML_MARKED, (), "<|im_end|>", same, True),
    "llama 2": (LLAMA2, (), "<|im_end|>", lambda text: f" {text.strip()} ", True),  # the default tokenizer's eos
    "llama 3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", stripped, True),
    "mistral": (MISTRAL, (), "<|im_end|>", same, False),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", stripped, False),
    "chatglm": (CHATGLM, ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"), "", lambda text: f"\n {text}", True),
    "qwen 3 marked": (QWEN3_MARKED, (), "<|im_end|>", same, True),
}


def with_template(tokenizer, template: str, special=()):
    """A copy of a tokenizer with this template and these special tokens."""
    own = copy.deepcopy(tokenizer)
    if special:
        own.add_special_tokens({"additional_special_tokens": list(special)})
    own.chat_template = template
    return own
