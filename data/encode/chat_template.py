"""What `chat.py` renders, as a Jinja template for transformers and servers; for tokenizers that come without one.

It writes a video as `<|video_pad|>` alone: transformers then puts each temporal patch's time and vision block there, as training
has them, and from 5.10 on it would keep a block around them. Servers that look for that block get it with the template's
variable `wrap_videos`.
"""

import re
from typing import Final

from visionloom.data.config import INSTRUCT, THINKING

_ALL: Final = r"""
{%- macro said(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content %}
        {%- for part in content %}
            {%- if part.type in ('image', 'image_url') %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type in ('video', 'video_url') %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' if wrap_videos else '<|video_pad|>' }}
            {%- elif part.text %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- said(messages[0].content) + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
@BEFORE@
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + said(message.content) + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- set text = said(message.content) %}
        @THOUGHT@
        {{- text }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {{- '\n' if text or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n@PROMPT@' }}
{%- endif %}
""".strip()
_INSTRUCT: Final = {
    "@BEFORE@\n": "",
    "@THOUGHT@": r"""
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {%- endif %}
""".strip(),
    "@PROMPT@": "",
}
_THINKING: Final = {
    "@BEFORE@": r"""
{%- set chat = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set chat.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
""".strip(),
    "@THOUGHT@": r"""
        {%- if message.role == 'assistant' and loop.index0 > chat.question %}
            {%- set thought = (message.reasoning_content or '').strip('\n') %}
            {%- if loop.last or thought %}
                {{- '<think>\n' + thought + '\n</think>\n\n' }}
                {%- set text = text.lstrip('\n') %}
            {%- endif %}
        {%- endif %}
""".strip(),
    "@PROMPT@": r"<think>\n",
}
"""What stands in the places of the template that differ."""
_THINKS: Final = re.compile(r"assistant\\+n<think>\\+n[\"']")
"""The end of a generation prompt in a template that is a file of Jinja, or text in one of JSON."""


def template_of(chat_format: str) -> str:
    """Return the template of a format of chats; see data.chat_format."""
    text = _ALL
    for place, words in (_THINKING if chat_format == THINKING else _INSTRUCT).items():
        text = text.replace(place, words)
    return text


def format_of(template: str) -> str:
    """Return the format of chats that a template writes, as its prompts for an answer show."""
    return THINKING if _THINKS.search(template) else INSTRUCT
