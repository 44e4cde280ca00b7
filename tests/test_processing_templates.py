"""Prompt texts of conversations, letter by letter, and which template is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processing_folders import hf_processor, real_ids, tiny_config, write_folder
from tiny_models import draw_picture
from tiny_processor import CHAT_TEMPLATE

from quota_jax.errors import QuotaError
from quota_jax.processing import TEMPLATES, Processor

PICTURE = Image.new("RGB", (9, 9))
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The conversation of transformers' LLaVA documentation.
TWO_TURNS = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": PICTURE},
            {"type": "text", "text": "What's shown in this image?"},
        ],
    },
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "This image shows a red stop sign."}],
    },
    {"role": "user", "content": "Describe the image in more details."},
]
# Written after the layout that llava-hf's template documents, with its {% generation %} block.
LLAVA_HF = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}"
    "{% endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def user(*texts: str, images: int = 0) -> dict[str, Any]:
    pictures = [{"type": "image", "image": PICTURE}] * images
    return {"role": "user", "content": pictures + [{"type": "text", "text": t} for t in texts]}


def say(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """Of a folder that ships no template."""
    folder = write_folder(tmp_path_factory.mktemp("bare"), chat_template_jinja=None)
    return Processor.from_folder(folder, tiny_config())


def prompt_of(processor: Processor, conversation: list[Any], *args: Any) -> str:
    (prompt,), _ = processor.render([conversation], *args)
    return prompt


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([user("What is this?", images=1)], "USER: <image>\nWhat is this? ASSISTANT:"),
        (
            TWO_TURNS,
            "USER: <image>\nWhat's shown in this image? "
            "ASSISTANT: This image shows a red stop sign. "
            "USER: Describe the image in more details. ASSISTANT:",
        ),
        ([user("a", "b", images=2)], "USER: <image>\n<image>\na b ASSISTANT:"),
        ([say("system", "Be brief."), say("user", "Hi")], "Be brief. USER: Hi ASSISTANT:"),
        ([user(images=1)], "USER: <image>\nASSISTANT:"),
    ],
)
def test_llava_template(processor: Processor, conversation: list[Any], expected: str):
    assert prompt_of(processor, conversation) == expected
    assert prompt_of(processor, conversation, "llava") == expected
    shipped = dataclasses.replace(processor, chat_templates={"default": LLAVA_HF})
    assert prompt_of(shipped, conversation) == expected
    assert prompt_of(processor, conversation, "llava", False) == expected.removesuffix("ASSISTANT:")


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([user("What is this?", images=1)], f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"),
        (
            TWO_TURNS,
            f"{SYSTEM} USER: <image>\nWhat's shown in this image? "
            "ASSISTANT: This image shows a red stop sign.</s>"
            "USER: Describe the image in more details. ASSISTANT:",
        ),
        ([user("a", "b", images=2)], f"{SYSTEM} USER: <image>\n<image>\na b ASSISTANT:"),
        ([say("system", "Be brief."), say("user", "Hi")], "Be brief. USER: Hi ASSISTANT:"),
    ],
)
def test_vicuna_template(processor: Processor, conversation: list[Any], expected: str):
    assert prompt_of(processor, conversation, "vicuna_v1") == expected


def test_vicuna_without_generation_prompt(processor: Processor):
    finished = [say("user", "Hi"), say("assistant", "Hello.")]
    expected = f"{SYSTEM} USER: Hi ASSISTANT: Hello.</s>"
    assert prompt_of(processor, finished, "vicuna_v1", False) == expected


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([say("user", "a"), say("user", "b")], "turn 1 must be the assistant's, not the user's"),
        ([say("assistant", "a")], "turn 0 must be the user's"),
        ([say("user", "a"), say("assistant", "b")], "the last turn must be the user's"),
        ([say("system", "a")], "the last turn must be the user's"),
    ],
)
def test_vicuna_turns_alternate(processor: Processor, conversation: list[Any], message: str):
    with pytest.raises(QuotaError, match=message):
        processor.render([conversation], "vicuna_v1")


def test_chat_equals_the_rendered_prompt_and_transformers(tmp_path: Path):
    folder = write_folder(tmp_path, chat_template_jinja=LLAVA_HF)
    processor = Processor.from_folder(folder, tiny_config())
    first, second = draw_picture(1), draw_picture(2)
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": first},
                {"type": "text", "text": "what is this?"},
                {"type": "image", "image": second},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "describe it"}]},
    ]
    batch = processor.chat([conversation])
    oracle = hf_processor(folder)
    text = oracle.apply_chat_template(
        conversation, chat_template=LLAVA_HF, add_generation_prompt=True
    )
    expected = oracle(text=[text], images=[first, second])
    assert real_ids(batch) == expected["input_ids"]
    for slot in range(2):
        assert (batch.pixels[slot] == expected["pixel_values"][slot]).all()
    prompts, images = processor.render([conversation])
    assert prompts == [text]
    assert images == [[first, second]]
    assert real_ids(processor(images=images, prompts=prompts)) == real_ids(batch)


def shipped(tmp_path: Path, **files: Any) -> Processor:
    return Processor.from_folder(write_folder(tmp_path, **files), tiny_config())


def test_folder_templates_come_from_every_usual_place(tmp_path: Path):
    hello = "{{ 'one ' }}{{ messages[0].content[0].text }}"
    settings = json.loads((write_folder(tmp_path / "w") / "tokenizer_config.json").read_text())
    cases = {
        "jinja": {"chat_template_jinja": hello},
        "json": {"chat_template_json": {"chat_template": hello}},  # beside the .jinja: it wins
        "processor": {"processor_config_json": {"chat_template": hello}},
        "tokenizer": {
            "chat_template_jinja": None,
            "tokenizer_config_json": {**settings, "chat_template": hello},
        },
        "named": {
            "chat_template_jinja": None,
            "tokenizer_config_json": {
                **settings,
                "chat_template": [{"name": "default", "template": hello}],
            },
        },
    }
    for name, files in cases.items():
        processor = shipped(tmp_path / name, **files)
        assert prompt_of(processor, [say("user", "cat")]) == "one cat", name
    tiny = shipped(tmp_path / "tiny", chat_template_jinja=CHAT_TEMPLATE)
    assert prompt_of(tiny, TWO_TURNS) == TEMPLATES["llava"](*read_turns(tiny))


def read_turns(processor: Processor) -> tuple[Any, Any, bool]:
    from quota_jax.processing.templates import read_conversation

    messages, _ = read_conversation(TWO_TURNS, processor.placeholders, "conversation 0")
    return messages, processor.placeholders, True


def test_named_templates(tmp_path: Path):
    templates = {"short": "{{ messages[0].content[0].text }}!"}
    processor = shipped(tmp_path, chat_template_json={"chat_template": templates})
    assert prompt_of(processor, [say("user", "cat")], "short") == "cat!"
    # none is called "default", so the built-in one serves
    assert prompt_of(processor, [say("user", "cat")]) == "USER: cat ASSISTANT:"
    with pytest.raises(QuotaError, match="'long'; known: chatml, llava, short, vicuna_v1"):
        processor.render([[say("user", "cat")]], "long")


def test_templates_for_plain_text_get_plain_text(processor: Processor):
    prints = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    joins = "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}"
    for template in (prints, joins):
        text_only = dataclasses.replace(processor, chat_templates={"default": template})
        assert prompt_of(text_only, [user("cat", images=1)]) == "[<image>\ncat]"
        assert prompt_of(text_only, [say("user", "cat")]) == "[cat]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nothing", "it leaves out a text or a picture"),
        ("{{ messages[0].content[0].text }}", "it leaves out a text or a picture"),
        ("{% for %}", "the folder's chat template cannot render"),
        ("{{ raise_exception('only three turns') }}", "only three turns"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    ],
)
def test_templates_that_fail_or_forget(processor: Processor, template: str, message: str):
    broken = dataclasses.replace(processor, chat_templates={"default": template})
    with pytest.raises(QuotaError, match=message):
        broken.render([[user("cat", images=1)]])


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([say("user", "cat")], "chat takes a list of conversations, each a list of messages"),
        ("cat", "chat takes a list of conversations"),
        ([[]], r"conversation 0 must be a non-empty list of messages, got \[\]"),
        ([["cat"]], "conversation 0, message 0 must be a dict with role and content, got 'cat'"),
        ([[say("robot", "cat")]], "role must be one of .* got 'robot'"),
        ([[{"content": "cat"}]], "role must be one of .* got None"),
        ([[{"role": "user"}]], "content must be text or a list of parts, got None"),
        ([[say("user", "a"), say("system", "b")]], "message 1: a system message must come first"),
        ([[say("user", "see <image>")]], "text holds the placeholder '<image>'"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], "a part must be"),
        ([[{"role": "user", "content": [{"type": "video", "video": "x"}]}]], "a part must be"),
        ([[{"role": "user", "content": [{"type": "text", "text": 3}]}]], "a part must be"),
        ([[{"role": "user", "content": ["cat"]}]], "a part must be"),
    ],
)
def test_refused_conversations(processor: Processor, conversations: Any, message: str):
    with pytest.raises(QuotaError, match=message):
        processor.chat(conversations)


def test_an_empty_list_of_conversations_is_refused(processor: Processor):
    with pytest.raises(QuotaError, match="the list of prompts is empty"):
        processor.chat([])


@pytest.mark.parametrize("content", [[1], {"chat_template": 3}, {"chat_template": {"a": 1}}, "{"])
def test_damaged_template_files(tmp_path: Path, content: Any):
    with pytest.raises(QuotaError, match=r"chat_template.json"):
        shipped(tmp_path, chat_template_json=content)
