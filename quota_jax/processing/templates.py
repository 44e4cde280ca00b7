"""Conversations to prompt text: the built-in templates, and those that a folder ships.

A conversation is a list of messages {"role", "content"}; content is a string or a list of
{"type": "text", "text": ...} and {"type": "image", "image": ...}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.errors import QuotaError
from quota_jax.processing.hugging_face import first_line, quiet, read_json

ROLES = ("system", "user", "assistant")
PART_KEYS = {"image": ("image", "path"), "video": ("video",)}
CHATML_SYSTEM = "You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn: (kind, text) pairs in order, the text of an image or a video being empty."""

    role: str
    parts: tuple[tuple[str, str], ...]

    @property
    def texts(self) -> list[str]:
        return [text for kind, text in self.parts if kind == "text"]

    def visual(self, placeholders: Mapping[str, str]) -> list[str]:
        """The placeholder of each picture."""
        return [placeholders[kind] for kind, _ in self.parts if kind != "text"]


def llava(
    messages: Sequence[Message], placeholders: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The template of the llava-hf LLaVA-1.5 checkpoints: `USER: <image>\\nWhat? ASSISTANT:`.

    Pictures before texts, a space after every text, a system message without a role.
    """
    prompt = ""
    for message in messages:
        prompt += "" if message.role == "system" else f"{message.role.upper()}: "
        prompt += "".join(f"{image}\n" for image in message.visual(placeholders))
        prompt += "".join(f"{text} " for text in message.texts)
    return prompt + ("ASSISTANT:" if add_generation_prompt else "")


def vicuna_v1(
    messages: Sequence[Message], placeholders: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The template LLaVA-1.5 was trained and is evaluated with ("vicuna_v1" of the original code).

    A system prompt, which a system message replaces, then `USER: <image>\\nWhat? ASSISTANT:
    That.</s>` turn by turn. Several texts of one message are joined by a space.
    """
    system = VICUNA_SYSTEM
    if messages[0].role == "system":
        system, messages = " ".join(messages[0].texts), messages[1:]
    prompt = f"{system} "
    for place, message in enumerate(messages):
        expected = ("user", "assistant")[place % 2]
        if message.role != expected:
            raise QuotaError(
                f"template vicuna_v1: turn {place} must be the {expected}'s, "
                f"not the {message.role}'s"
            )
        text = plain_text(message, placeholders)
        prompt += f"{message.role.upper()}: {text}" + (" " if expected == "user" else "</s>")
    if not add_generation_prompt:
        return prompt
    if len(messages) % 2 == 0:
        raise QuotaError("template vicuna_v1: the last turn must be the user's to be answered")
    return prompt + "ASSISTANT:"


def chatml(
    messages: Sequence[Message], placeholders: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The template of Qwen2.5-VL: `<|im_start|>role\\n ... <|im_end|>`, parts in their order."""
    prompt = ""
    if messages[0].role != "system":
        prompt += f"<|im_start|>system\n{CHATML_SYSTEM}<|im_end|>\n"
    for message in messages:
        parts = [
            text if kind == "text" else f"<|vision_start|>{placeholders[kind]}<|vision_end|>"
            for kind, text in message.parts
        ]
        prompt += f"<|im_start|>{message.role}\n{''.join(parts)}<|im_end|>\n"
    return prompt + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def plain_text(message: Message, placeholders: Mapping[str, str]) -> str:
    """A line for each picture, then the texts, joined by spaces."""
    images = "".join(f"{image}\n" for image in message.visual(placeholders))
    return images + " ".join(message.texts)


TEMPLATES: dict[str, Callable[[Sequence[Message], Mapping[str, str], bool], str]] = {
    "llava": llava,
    "vicuna_v1": vicuna_v1,
    "chatml": chatml,
}
DEFAULT_TEMPLATES = {"llava": "llava", "qwen2_5_vl": "chatml"}
"""The template of each model family, where the folder ships none."""


def read_conversation(
    conversation: Any, placeholders: Mapping[str, str], where: str
) -> tuple[list[Message], list[Any]]:
    """Checks a conversation and parts it into messages and pictures in order of appearance.

    Text that holds a placeholder is refused: it would stand for a picture that is not there.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise QuotaError(
            f"{where} must be a non-empty list of messages, got {_brief(conversation)}"
        )
    messages, images = [], []
    for place, message in enumerate(conversation):
        at = f"{where}, message {place}"
        if not isinstance(message, Mapping):
            raise QuotaError(f"{at} must be a dict with role and content, got {_brief(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise QuotaError(f"{at}: role must be one of {ROLES}, got {role!r}")
        if role == "system" and place:
            raise QuotaError(f"{at}: a system message must come first")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple):
            raise QuotaError(
                f"{at}: content must be text or a list of parts, got {_brief(content)}"
            )
        read: list[tuple[str, str]] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            keys = [key for key in PART_KEYS.get(str(kind), ()) if part.get(key) is not None]
            if kind == "text" and isinstance(part.get("text"), str):
                for placeholder in placeholders.values():
                    if placeholder in part["text"]:
                        raise QuotaError(
                            f"{at}: text holds the placeholder {placeholder!r}; give pictures as "
                            "parts"
                        )
                read.append(("text", part["text"]))
            elif kind in placeholders and keys:
                images.append(part[keys[0]])
                read.append((kind, ""))
            else:
                known = " or ".join(
                    f'{{"type": "{k}", "{k}": ...}}' for k in ("text", *placeholders)
                )
                raise QuotaError(f"{at}: a part must be {known}, got {_brief(part)}")
        messages.append(Message(role=role, parts=tuple(read)))
    return messages, images


def read_shipped_templates(tokenizer: Any, folder: Path) -> dict[str, str]:
    """Jinja templates of a folder by name; the one without a name is "default".

    In transformers' order: processor_config.json, chat_template.json, then chat_template.jinja, the
    folder additional_chat_templates and tokenizer_config.json (these three by way of the
    tokenizer).
    """
    for name in ("processor_config.json", "chat_template.json"):
        found = (read_json(folder / name) or {}).get("chat_template")
        if found is not None:
            return _named(found, folder / name)
    return _named(tokenizer.chat_template or {}, folder / "tokenizer_config.json")


def _named(found: Any, path: Path) -> dict[str, str]:
    templates: Any = {"default": found} if isinstance(found, str) else found
    if isinstance(templates, list):
        templates = {
            entry.get("name"): entry.get("template")
            for entry in templates
            if isinstance(entry, dict)
        }
    if not isinstance(templates, dict) or not all(
        isinstance(text, str) for pair in templates.items() for text in pair
    ):
        raise QuotaError(f"{path}: chat_template must be text or templates by name")
    return templates


def render_shipped(
    tokenizer: Any,
    template: str,
    messages: Sequence[Message],
    placeholders: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """Renders a folder's template in transformers' sandbox.

    Templates take the content as a list of parts or as plain text, and silently drop or misprint
    the other form. Both are tried, and only a rendering that shows every text and every picture
    counts.
    """
    reason = "it leaves out a text or a picture of the conversation"
    for as_parts in (True, False):
        chat = [
            {"role": message.role, "content": _content(message, placeholders, as_parts)}
            for message in messages
        ]
        try:
            with quiet():
                prompt = tokenizer.apply_chat_template(
                    chat,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
        except Exception as error:  # a foreign program: it may raise anything
            reason = first_line(error)
            continue
        if _is_faithful(prompt, messages, placeholders, chat):
            return prompt
    raise QuotaError(f"the folder's chat template cannot render this conversation: {reason}")


def _content(message: Message, placeholders: Mapping[str, str], as_parts: bool) -> Any:
    if not as_parts:
        return plain_text(message, placeholders)
    return [
        {"type": "text", "text": text} if kind == "text" else {"type": kind}
        for kind, text in message.parts
    ]


def _is_faithful(
    prompt: str,
    messages: Sequence[Message],
    placeholders: Mapping[str, str],
    chat: Sequence[dict[str, Any]],
) -> bool:
    """Every text in order, all placeholders, and no list printed as Python prints it."""
    wanted = [image for message in messages for image in message.visual(placeholders)]
    if any(prompt.count(text) != wanted.count(text) for text in placeholders.values()):
        return False
    if any(isinstance(turn["content"], list) and str(turn["content"]) in prompt for turn in chat):
        return False
    place = 0
    for text in (text.strip() for message in messages for text in message.texts):
        place = prompt.find(text, place)
        if place < 0:
            return False
        place += len(text)
    return True


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
