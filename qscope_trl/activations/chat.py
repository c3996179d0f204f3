"""Conversations as texts, by a tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from qscope_trl.activations.opening import open_tokenizer
from qscope_trl.activations.sources import ChatRenderer
from qscope_trl.errors import DataError


def chat_renderer(tokenizer: Any, *, name: str, add_generation_prompt: bool = False) -> ChatRenderer:
    """Renders conversations to texts that `encode.tokenize` turns into the template's own token ids.

    A BOS token that both the template writes and the tokenizer adds is taken off the text, so that it comes once.

    Args:
        tokenizer: A transformers tokenizer.
        name: Name of its model, for messages.
        add_generation_prompt: Whether the text ends where the assistant is to answer.

    Returns:
        A function that raises `DataError` if there is no template, or it refuses a conversation.
    """
    bos = getattr(tokenizer, "bos_token", None)
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]

    def render(messages: list[Any]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"The data holds conversations, but the tokenizer of '{name}' has no chat template. Name a column of "
                f"texts by `text_column`, or use a tokenizer with one."
            )
        from jinja2 import TemplateError

        try:
            text = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except (TemplateError, TypeError, ValueError, KeyError) as err:
            raise DataError(f"The chat template of '{name}' refuses a conversation: {err}") from err
        return text.removeprefix(bos) if adds_bos and bos is not None else text

    return render


def model_chat_renderer(
    model: str, *, revision: str | None = None, add_generation_prompt: bool = False
) -> ChatRenderer:
    """`chat_renderer` for commands that read texts before they load the model.

    The tokenizer is loaded when the first conversation comes, so data without any need none.

    Args:
        model: Hub id, folder, or `demo` for the bundled one.
        revision: Its commit, tag or branch.
        add_generation_prompt: As in `chat_renderer`.

    Returns:
        As `chat_renderer`; raises `ConfigError` too, if the tokenizer cannot be loaded.
    """
    found: list[ChatRenderer] = []

    def render(messages: list[Any]) -> str:
        if not found:
            tokenizer = open_tokenizer(model, revision=revision)
            found.append(chat_renderer(tokenizer, name=model, add_generation_prompt=add_generation_prompt))
        return found[0](messages)

    return render
