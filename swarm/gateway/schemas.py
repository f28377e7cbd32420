"""What clients may send and what they get, as OpenAI's API reference says. Every field is bounded.

Fields that only steer OpenAI's own service are accepted and have no effect; one that is not known is an error, so that
a mistyped option is not silently ignored. `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are extensions that
other servers share.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, model_validator

MAX_TEXT = 1 << 20
MAX_MESSAGES = 4096
MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_STOPS = 8
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_SEED = (1 << 63) - 1

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Short = Annotated[str, StringConstraints(max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TEXT)]
Schema = dict[str, JsonValue]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(max_length=256)]


class FunctionCall(Strict):
    name: Annotated[str, StringConstraints(max_length=256)]
    arguments: Text


class ToolCall(Strict):
    id: Annotated[str, StringConstraints(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn. `developer` is taken as `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message of role {self.role} needs content")
        return self


class Function(Strict):
    name: Name
    description: Annotated[str, StringConstraints(max_length=8192)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    name: Name = "answer"
    description: Annotated[str, StringConstraints(max_length=8192)] | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class PlainText(Strict):
    type: Literal["text"]


class AnyJson(Strict):
    type: Literal["json_object"]


class JsonAsDescribed(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainText | AnyJson | JsonAsDescribed, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class SwarmOptions(Strict):
    """What only a swarm has, and OpenAI's API has not."""

    route: bool = Field(
        default=False,
        description="In a stream: each chunk with new tokens says in an object `swarm` how they went through the swarm "
        "(see the answer's text/event-stream)",
    )


class Request(Strict):
    """What both kinds of request have."""

    model: Annotated[str, StringConstraints(max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 24, description="0 and −1: all")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(default=False, description="Go on behind the model's end token")
    user: Annotated[str, StringConstraints(max_length=1024)] | None = None
    swarm: SwarmOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        if self.wants_route and not self.stream:
            raise ValueError("swarm.route is for stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_route(self) -> bool:
        return self.swarm is not None and self.swarm.route


class CompletionRequest(Request):
    """`POST /v1/completions`"""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1 << 24, description="0 only with echo")] | None = None
    echo: Annotated[bool, Field(description="Begin with the prompt; with logprobs, its probabilities too")] | None = (
        None
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is at least 1, or 0 with echo")
        return self


class ChatRequest(Request):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    # without effect here
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, Short], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Annotated[str, StringConstraints(max_length=64)] | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=64)] | None = None
    verbosity: Annotated[str, StringConstraints(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, StringConstraints(max_length=1024)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if len({*names}) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice in ("required",) and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        return self


# --- answers: for the API's description; they are written as plain dictionaries ---


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Of the prompt, not computed again: the conversation's earlier turns")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatAnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class HopView(BaseModel):
    peer_id: str
    blocks: tuple[int, int] = Field(description="[start, end)")
    queue_s: float = Field(description="In which its other work went first, by its own clock")
    compute_s: float


class TraversalView(BaseModel):
    positions: int = Field(description="1 for a token; the new ones of a prompt, which may travel in parts at once")
    total_s: float = Field(description="Seen from here; what the hops' own seconds leave of it was spent between them")
    hops: list[HopView] = Field(
        description="Who worked on it, by their blocks; where a peer was lost meanwhile, some more or less often"
    )


class SwarmView(BaseModel):
    """Of a chunk, where the request has `swarm.route`."""

    steps: list[TraversalView] = Field(description="One for each token since the chunk before, the prompt's first")


def event_stream() -> dict[str, Any]:
    """How OpenAPI describes a stream: its events are the API's chunks, with one more field."""
    schema = SwarmView.model_json_schema()
    parts = schema.pop("$defs")

    def inlined(part: Any) -> Any:
        if isinstance(part, list):
            return [inlined(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inlined(parts[part["$ref"].rpartition("/")[2]])
        return {name: inlined(value) for name, value in part.items()}

    description = "With `stream`: the API's chunks as server-sent events, then `[DONE]`"
    return {"schema": {"type": "object", "description": description, "properties": {"swarm": inlined(schema)}}}


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class ModelState(BaseModel):
    active: int = Field(description="Answers under way")
    error: str | None = Field(description="Why nothing is answered any more")
    waiting: str | None = Field(description="For which blocks answers have been waiting for some seconds, and why")
    blocks: int
    peers: int = Field(description="That announce blocks of it")
    replication: int = Field(description="Peers that hold its rarest block")
    gaps: list[list[int]] = Field(description="Blocks that no peer serves now, as [start, end)")


class Health(BaseModel):
    status: Literal["ok", "degraded", "failed", "stopping"]
    models: dict[str, ModelState]
