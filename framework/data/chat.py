"""Chat templates: how a tokenizer's model expects the messages of a chat to be written, as in transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import InputError
from .tar import BadSample

TOKENIZER_CONFIG, TEMPLATE = (
    "tokenizer_config.json",
    "chat_template.jinja",
)  # beside a tokenizer.json; the second is preferred
MAX_FILE = 4 << 20  # bytes of either file


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of chats.

    Args:
        template: in Jinja, with what transformers adds to it: ``raise_exception``, ``tojson``, ``{% generation %}``,
            ``{% break %}`` and ``{% continue %}``.
        special_tokens: the texts of ``bos_token`` and the like, by these names.
    """

    template: str
    special_tokens: dict[str, str]

    @classmethod
    def beside(cls, tokenizer: Path) -> ChatTemplate | None:
        """The chat template in the directory of a ``tokenizer.json``; None if there is none.

        Raises:
            InputError: a file is damaged or cannot be read.
        """
        path, found = tokenizer.with_name(TOKENIZER_CONFIG), dict[str, Any]()
        try:
            if path.is_file():
                found = json.loads(_content(path))
            template = found.get("chat_template")
            if isinstance(template, list):  # several by their names
                template = next((one["template"] for one in template if one["name"] == "default"), None)
            if tokenizer.with_name(TEMPLATE).is_file():
                path = tokenizer.with_name(TEMPLATE)
                template = _content(path).decode()
        except OSError as error:
            raise InputError("chat template", str(path), f"cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError("chat template", str(path), "is damaged: it does not hold the expected fields") from None
        tokens = {
            name: value["content"] if isinstance(value, dict) and "content" in value else value
            for name, value in found.items()
            if name.endswith("_token")
        }
        texts = {name: text for name, text in tokens.items() if isinstance(text, str)}
        return cls(template, texts) if isinstance(template, str) else None

    @property
    def content(self) -> str:
        """The text of a ``tokenizer_config.json``."""
        return json.dumps({"chat_template": self.template, **self.special_tokens}, sort_keys=True, indent=1) + "\n"

    def render(self, messages: list[dict[str, Any]], place: str) -> str:
        """The text of a chat.

        Args:
            messages: each with its ``role`` and ``content``.
            place: of the chat, for errors.

        Raises:
            BadSample: the template does not accept them.
            InputError: the template is not Jinja.
        """
        template = self._compiled
        try:
            return template.render(messages=messages, add_generation_prompt=False, **self.special_tokens)
        except Exception as error:  # a template can raise whatever Python's operators do
            why = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BadSample("record", place, f"does not fit the chat template: {why}", reason="not a chat") from None

    @cached_property
    def _compiled(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.template)
        except TemplateError as error:
            why = f"is not a Jinja template: {str(error)[:200]}"
            raise InputError("chat template", self.template[:80], why) from None


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant writes; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # jinja2's own escapes HTML


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _content(path: Path) -> bytes:
    with open(path, "rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError
    return content
