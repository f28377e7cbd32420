"""One model as the gateway serves it: its engine, its words, and what its checkpoint says about both.

Owns the way from a request to token ids and sampling, and the checkpoint's own defaults. Knows no HTTP.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from peers.model.support import one_line
from routing.errors import CallerError
from swarm.errors import ContextTooLong
from swarm.gateway.constraints import Grammars
from swarm.gateway.engine import Engine, Processors, eos_ids
from swarm.gateway.kept import KeptLimits
from swarm.gateway.sampling import Sampling
from swarm.gateway.schemas import Message, Request
from swarm.gateway.tools import Style, keeping, system_text

NO_CONTEXT_TOKENS = 16_384
"""Where nothing says how long a sequence may be."""


class Served:
    """A model behind the gateway. Everything but the constructor and `close` is quick or may run in any thread."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_answers: int = 256,
        kept: KeptLimits | None = None,
    ) -> None:
        """`model`: a SwarmModel, the caller's to close after this; with what adapter of one's own is in its layers."""
        self.name, self.model, self.tokenizer = name, model, tokenizer
        try:
            self._processes = bool(self._processors(1, 2))
        except (TypeError, ValueError) as error:
            raise CallerError(
                f"{name}: its generation_config.json cannot be used: {one_line(error)}", hint="mend or remove that file"
            ) from error
        self.created = int(time.time())
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = context
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.num_blocks: int = model._remote_layers.num_blocks
        self.grammars = Grammars(tokenizer, eos_ids(model))
        self.engine = Engine(
            model, self.decode, max_answers=max_answers, kept=kept, adapter=model._remote_layers.own_adapter()
        )
        self._encoding = threading.Lock()  # tokenizers change their own settings while they encode
        self._defaults = _checkpoint_defaults(model)
        self._template_knows_tools = _template_knows_tools(tokenizer)
        self.call_style = _call_style(tokenizer) if self._template_knows_tools else Style.HERMES
        self.decode_calls = keeping(self.decode, _marks(tokenizer, self.call_style))
        """As `decode`, with the special tokens by which calls are written."""

    def close(self) -> None:
        self.engine.close()

    # --- words ---

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token as it is, special or not."""
        return str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def token_bytes(self, token_id: int) -> list[int]:
        """What the token stands for; it may be a part of a character."""
        try:
            raw = self.grammars.prepare().decode_bytes([token_id])
        except CallerError:  # a tokenizer that llguidance cannot read
            raw = b"\xff"
        return list(self.token_text(token_id).encode() if b"\xff" in raw else raw)  # ff: its mark of special tokens

    def encode_text(self, text: str) -> list[int]:
        with self._encoding:
            return list(self.tokenizer(text).input_ids)

    def encode_chat(self, messages: Sequence[Message], tools: list[dict[str, Any]]) -> list[int]:
        """A conversation whose next turn is the model's. Raises CallerError."""
        if not self.tokenizer.chat_template:
            raise CallerError(f"{self.name} has no chat template", hint="it continues texts: use /v1/completions")
        turns = [_turn(message) for message in messages]
        arguments: dict[str, Any] = {}
        if tools and self._template_knows_tools:
            arguments["tools"] = tools
        elif tools:
            described = system_text(tools)
            if turns[0]["role"] == "system":
                turns[0] = {**turns[0], "content": f"{described}\n\n{turns[0]['content']}"}
            else:
                turns.insert(0, {"role": "system", "content": described})
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **arguments)
            text.encode()  # a schema or a call's arguments may hold halves of characters, which nothing can read
        except (TemplateError, TypeError, ValueError, KeyError) as error:  # a template may raise what it likes
            raise CallerError(
                f"the model's chat template does not take these messages: {error}",
                hint="most templates want user and assistant in turn, with one system message at the start",
            ) from error
        with self._encoding:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    # --- limits and defaults ---

    def room(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Tokens that may be generated behind `prompt`. Raises CallerError."""
        if not prompt:
            raise CallerError("the prompt is empty", hint="give at least one token to go on from")
        if max(prompt) >= self.vocabulary:
            raise CallerError(
                f"the prompt has token {max(prompt)}; this model has {self.vocabulary}",
                hint="give ids of this model's own tokenizer, or text",
            )
        room = (self.context or NO_CONTEXT_TOKENS) - len(prompt)
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens; the model's context has {self.context or NO_CONTEXT_TOKENS}",
                hint="shorten the messages",
            )
        return room if max_tokens is None else min(room, max_tokens)

    def sampling(self, request: Request) -> Sampling:
        """What the request asks; what it leaves out is the checkpoint's, or else OpenAI's, default."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        asked = {
            name: value for name in (*names, "repetition_penalty") if (value := getattr(request, name)) is not None
        }
        chosen = {**self._defaults, **asked}
        chosen["top_k"] = max(0, chosen.get("top_k", 0))
        bias = {int(token_id): value for token_id, value in (request.logit_bias or {}).items()}
        if bias and max(bias) >= self.vocabulary:
            raise CallerError(
                f"logit_bias names token {max(bias)}; this model has {self.vocabulary}",
                hint="give ids of this model's own tokenizer",
            )
        return Sampling(**chosen, logit_bias=bias, seed=request.seed)

    def processors(self, prompt: Sequence[int], max_tokens: int) -> Processors | None:
        """What else the checkpoint's `generation_config` has `generate` do to logits, for an answer so long."""
        return self._processors(len(prompt), len(prompt) + max_tokens) if self._processes else None

    def _processors(self, prompt_tokens: int, max_length: int) -> LogitsProcessorList:
        """Made by transformers itself. Penalties of repetition are `Sampling`'s, as requests may change them."""
        given = {"do_sample": False, "num_beams": 1, "repetition_penalty": None, "guidance_scale": None}
        config, _ = self.model._prepare_generation_config(None, **given)
        config.repetition_penalty, config.max_length = None, max_length
        self.model._prepare_special_tokens(config, True, device=self.model.device)
        return self.model._get_logits_processor(
            config, input_ids_seq_length=prompt_tokens, device=self.model.device, model_kwargs={}
        )


def _turn(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content if content is not None else message.refusal or "",
    }
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _parsed(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _parsed(arguments: str) -> Any:
    """Templates write arguments as JSON themselves; what is none stays a string."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _template_knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return True  # several, one of them for tools
    if not template:
        return False
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:
        return "tools" in template  # tags of transformers' own
    return "tools" in meta.find_undeclared_variables(parsed)


def _call_style(tokenizer: PreTrainedTokenizerBase) -> Style:
    template = tokenizer.chat_template
    text = "".join(template.values()) if isinstance(template, dict) else str(template)
    return Style.of(text, [token.content for token in tokenizer.added_tokens_decoder.values()])


def _marks(tokenizer: PreTrainedTokenizerBase, style: Style) -> dict[int, str]:
    """Those of the style's marks that are special tokens, by id: decoders leave them out."""
    added = tokenizer.added_tokens_decoder.items()
    return {token_id: token.content for token_id, token in added if token.special and token.content in style.value}


def _checkpoint_defaults(model: Any) -> dict[str, Any]:
    """What `generate` would use; the options of sampling only where the checkpoint asks for sampling."""
    config = model.generation_config
    chosen: dict[str, Any] = {}
    if config.repetition_penalty is not None:
        chosen["repetition_penalty"] = config.repetition_penalty
    if config.do_sample:
        names = ("temperature", "top_p", "top_k", "min_p")
        chosen |= {name: value for name in names if (value := getattr(config, name, None)) is not None}
    return chosen
