from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peers.model.catalog import resolve
from routing.errors import CallerError
from swarm.answers import Answer, Sampling, answer, encode_chat, encode_prompt, load_tokenizer
from swarm.errors import ContextTooLong

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<end>", *(f"w{i}" for i in range(62))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


Ask = Callable[..., tuple[Answer, list[str]]]


@pytest.fixture
def ask(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Ask:
    def run(prompt: str = "w3 w14 w15", *, max_new_tokens: int = 8, **sampling: float) -> tuple[Answer, list[str]]:
        pieces: list[str] = []
        result = answer(
            model,
            tokenizer,
            encode_prompt(tokenizer, prompt),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),  # type: ignore[arg-type]
            write=pieces.append,
        )
        return result, pieces

    return run


def test_the_text_is_streamed_and_measured(ask: Ask) -> None:
    result, pieces = ask()
    assert len(pieces) > 1
    assert "".join(pieces).split() == result.text.split()
    assert len(result.token_ids) == 8
    timings = result.timings
    assert (timings.prompt_tokens, timings.new_tokens) == (3, 8)
    assert 0 < timings.time_to_first_token_s < timings.total_s
    assert timings.tokens_per_s is not None
    assert timings.tokens_per_s > 0


def test_it_is_greedy_unless_chance_is_asked_for(ask: Ask) -> None:
    greedy = [ask()[0].token_ids for _ in range(2)]
    assert greedy[0] == greedy[1] == ask(temperature=0.0, seed=3)[0].token_ids
    assert not Sampling(repetition_penalty=1.2, num_beams=3).by_chance
    for option in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"seed": 1}):
        assert Sampling(**option).by_chance


def test_a_seed_repeats_an_answer(ask: Ask) -> None:
    wild = [ask(temperature=5.0, seed=seed)[0].token_ids for seed in (1, 1, 2)]
    assert wild[0] == wild[1] != wild[2]


def test_beam_search_comes_as_a_whole(ask: Ask) -> None:
    result, pieces = ask(num_beams=3)
    assert pieces == [result.text]
    assert result.timings.tokens_per_s is not None


def test_an_answer_ends_with_the_context(ask: Ask) -> None:
    result, _ = ask(max_new_tokens=500)
    assert len(result.token_ids) == 29


def test_a_prompt_that_fills_the_context_is_refused(ask: Ask) -> None:
    with pytest.raises(ContextTooLong, match="32 tokens; the model's context has 32"):
        ask("w1 " * 32)


def test_a_chat_needs_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "w1 w2"}]
    with pytest.raises(CallerError, match="no chat template") as caught:
        encode_chat(tokenizer, messages)
    assert "--raw" in caught.value.hint
    tokenizer.chat_template = TEMPLATE
    try:
        assert json.dumps(encode_chat(tokenizer, messages)) == json.dumps([0, 3, 4, 0])
    finally:
        tokenizer.chat_template = None


def test_a_tokenizer_that_needs_a_strangers_code_is_refused_without_asking(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stranger"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint = resolve(str(folder), cache=tmp_path / "cache")
    assert load_tokenizer(checkpoint)("w3").input_ids == [5]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(CallerError, match="no tokenizer that can be loaded") as caught:
        load_tokenizer(checkpoint)
    assert caught.value.hint
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_no_file_of_ours_lets_a_tokenizer_run_code() -> None:
    root = Path(__file__).parents[2]
    sources = [path for folder in ("scripts", "swarm", "peers") for path in (root / folder).rglob("*.py")]
    calls = [
        {argument.arg: ast.unparse(argument.value) for argument in node.keywords}
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "AutoTokenizer.from_pretrained"
    ]
    assert len(calls) >= 3  # of swarm.answers, of the examples, and of GGUF files
    for call in calls:
        assert (call["local_files_only"], call["trust_remote_code"]) == ("True", "False")
