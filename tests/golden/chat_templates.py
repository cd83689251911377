"""Chat templates like those of well-known models, and what uses the rest of the environment."""

import json
from pathlib import Path

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

_SYSTEM = {"role": "system", "content": 'Be <brief> & "kind".\n'}
_USER = {"role": "user", "content": " What's 1 < 2?\n\n  ünï 🙃 </s>"}
_AI = {"role": "assistant", "content": "Yes.  "}
CONVERSATIONS = (
  [_USER],
  [_SYSTEM, _USER],
  [_USER, _AI, _USER],
  [_SYSTEM, _USER, _AI, _USER],
  [_AI],
)

TEMPLATES = {
  "llama2": (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
  ),
  "llama3": (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
  ),
  "zephyr": (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
  ),
  "chatml": (
    "{%- if tools is not none %}tools: {{ tools | tojson }}{%- endif %}\n"
    "{%- for message in messages %}\n  {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "  {%- generation %}\n  {{- message.content + '<|im_end|>' + '\\n' }}\n  {%- endgeneration %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
  ),
  "mistral": (
    "{{- bos_token }}\n{%- for message in messages %}\n    {%- if message.role == 'user' %}\n"
    "        {{- '[INST] ' + message.content + '[/INST]' }}\n"
    "    {%- elif message.role == 'system' %}\n"
    "        {{- raise_exception('no ' + message.role) }}\n"
    "    {%- else %}\n        {{- ' ' + message.content|trim + eos_token }}\n    {%- endif %}\n"
    "{%- endfor %}\n"
  ),
  "json": (
    "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}"
    "{{ 'é' | tojson(ensure_ascii=true) }}"
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}"
  ),
  "loops": (
    "{% set ns = namespace(n=0, found=false) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{% if ns.n > 1 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}{{ ns.n }}{{ dict(a=1, b=[2])['b'] }}{{ range(3) | list }}"
  ),
  "nothing": (
    "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ cls_token is defined }}"
    "{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ date_string is defined }}"
    "{{ messages is iterable }}"
    "{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}"
  ),
  "white": "  {% if true %}\n  a\n  {% endif %}\n\n  b {# note #}\n{{ 'c' }}\n\n",
  "hidden": "{% set ns = namespace() %}{% set ns._x = 1 %}",
  "macro": (
    "{% macro show(m, end='.') -%}\n"
    "  {{ m.role | upper }}: {{ m.content | replace('\\n', ' ') }}{{ end }}\n"
    "{%- endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}{{ messages[::-1][0].role[0] }}"
    "{{ messages | map(attribute='role') | join('|') }}"
  ),
}


def golden() -> dict[str, list[str | None]]:
  """By template, the text of each conversation in transformers; None where it refuses."""
  return json.loads(Path(__file__).with_name("chat_templates.json").read_text("utf-8"))
