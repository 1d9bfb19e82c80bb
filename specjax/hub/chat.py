"""Renders conversations as text with the Jinja chat template of an instruct model, in a sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from specjax.runtime.errors import UserError


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, variables: Mapping[str, str]
) -> str:
    """Returns the text of a conversation.

    The Jinja environment is that of transformers (Hugging Face, "Chat templates"): trimmed blocks, loop controls,
    `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` blocks. `tools` are
    the list under the key "tools" of the first message; `documents` are None. Reasoning text is used only if a message
    has it under the key that the template reads.

    Raises:
      UserError: if the template is invalid or refuses these messages, or there is no message.
    """
    import jinja2

    if not messages:
        raise UserError("the conversation has no message; give at least one")
    # A template is untrusted code, so it gets only plain JSON values, through which it cannot leave the sandbox.
    try:
        plain = json.loads(json.dumps(list(messages)))
    except TypeError as error:
        raise UserError(f"a message is not JSON-compatible ({error}); give texts, numbers, lists and dicts") from None
    try:
        return _compiled(template).render(
            messages=plain,
            tools=plain[0].get("tools") if isinstance(plain[0], dict) else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid ({error}); correct or replace it") from None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the chat template refuses this conversation: {error}; change the messages") from None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks the assistant's text for training; it renders as its body."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(number)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment.from_string(template)
