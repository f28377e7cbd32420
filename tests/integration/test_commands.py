"""The command line against a real swarm."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from swarm.answers import encode_chat
from swarm.testing import LocalSwarm
from tests.helpers.traces import check_trace
from tests.integration.conftest import MODEL, SPANS, Commands, Greedy, Observer

QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"


def test_status_shows_blocks_peers_and_latency(command: Commands, swarm: LocalSwarm) -> None:
    model_id = swarm.peers[0].wait_for("ready")["model_id"]
    done = command("status", model_id[:8], "--invite", swarm.invite, "--json")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert (model["model"], model["model_id"], model["num_blocks"]) == (MODEL, model_id, 30)
    assert model["gaps"] == []
    spans = {peer["peer_id"]: peer["span"] for peer in model["peers"]}
    assert spans == {peer.peer_id: [*span] for peer, span in zip(swarm.peers, SPANS, strict=True)}
    for peer in model["peers"]:
        assert (peer["state"], peer["dtype"]) == ("online", "float32")
        assert 0 < peer["latency_ms"] < 5000


def test_status_of_a_model_that_nobody_announces_names_those_announced(command: Commands, swarm: LocalSwarm) -> None:
    done = command("status", "gpt-17", "--invite", swarm.invite)
    assert done.returncode == 1
    _, error, hint = done.stderr.splitlines()
    assert "nobody announces a model 'gpt-17'" in error
    assert MODEL in hint


def test_generate_gives_text_ids_route_and_timings(
    command: Commands, swarm: LocalSwarm, tokenizer: PreTrainedTokenizerBase, greedy: Greedy, tmp_path: Path
) -> None:
    common = (MODEL, "--initial-peers", *swarm.initial_peers, "--dtype", "float32", "--max-new-tokens", "8")
    trace = tmp_path / "trace.json"
    done = command("generate", *common, "--json", "--trace", str(trace), stdin=QUESTION)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    prompt = tuple(encode_chat(tokenizer, [{"role": "user", "content": QUESTION}]))
    assert result["token_ids"] == greedy(prompt, 8, ending=True)
    assert "Paris" in result["text"]
    assert result["route"] == [
        {"peer": peer.peer_id, "span": [*span]} for peer, span in zip(swarm.peers, SPANS, strict=True)
    ]
    timings = result["timings"]
    assert (timings["prompt_tokens"], timings["new_tokens"]) == (len(prompt), len(result["token_ids"]))
    assert 0 < timings["time_to_first_token_s"] < timings["total_s"]
    assert timings["tokens_per_s"] > 0
    tracks = check_trace(json.loads(trace.read_text()))
    assert sum(event["name"] == "forward" for event in tracks["client"]) == len(result["token_ids"])
    for peer in swarm.peers:
        assert any(event["name"] == "compute" for event in tracks[f"{peer.span} …{peer.peer_id[-8:]}"])
    assert QUESTION.split()[-1] not in trace.read_text()


def test_generate_raw_continues_the_prompt_as_it_is(
    command: Commands, swarm: LocalSwarm, tokenizer: PreTrainedTokenizerBase, greedy: Greedy
) -> None:
    arguments = ("--raw", "--prompt", BEGINNING, "--dtype", "float32", "--max-new-tokens", "6")
    done = command("generate", MODEL, "--invite", swarm.invite, *arguments)
    assert done.returncode == 0, done.stderr
    ids = greedy(tuple(tokenizer(BEGINNING).input_ids), 6, ending=True)
    assert done.stdout == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert done.stderr == ""


def test_chat_remembers_the_turns_before(
    command: Commands, swarm: LocalSwarm, tokenizer: PreTrainedTokenizerBase, greedy: Greedy
) -> None:
    turns = ["My name is Ada.", "What is my name?"]
    arguments = ("--dtype", "float32", "--max-new-tokens", "10")
    done = command("chat", MODEL, "--invite", swarm.invite, *arguments, stdin="\n".join([*turns, "/exit", "never"]))
    assert done.returncode == 0, done.stderr
    messages, expected = [], ""
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = tokenizer.decode(
            greedy(tuple(encode_chat(tokenizer, messages)), 10, ending=True), skip_special_tokens=True
        )
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert done.stdout == expected


def test_an_interrupted_generate_frees_its_pages_at_once(
    command: Commands, swarm: LocalSwarm, observer: Observer
) -> None:
    arguments = ("generate", MODEL, "--invite", swarm.invite, "--raw", "-p", "1, 2, 3,", "--max-new-tokens", "2000")
    peer = swarm.peers[1]
    with command.until_interrupted(*arguments, code=130) as generating:
        assert generating.stdout.read(1)
        assert observer.load(peer).sessions == 1
    assert generating.errors == ""
    assert observer.holds_nothing(peer)


def test_route_explains_why_the_only_three_peers_won(command: Commands, swarm: LocalSwarm) -> None:
    done = command("route", MODEL, "--explain", "--invite", swarm.invite, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [hop["span"] for hop in said["hops"]] == [list(span) for span in SPANS]
    assert [[option["chosen"] for option in options] for options in said["candidates"]] == [[True]] * 3
    assert all(option["measured"] for options in said["candidates"] for option in options)
    assert said["left_out"] == []
    text = command("route", MODEL, "--explain", "--invite", swarm.invite).stdout
    assert "ms per step expected" in text
    assert "blocks 10:20: 1 can serve them" in text
    assert said["without"] == [None] * 3
    assert text.count(": no route") == 3


def test_route_shows_who_lost_and_the_best_way_without_each_peer(command: Commands) -> None:
    with LocalSwarm(MODEL, [(0, 30), (0, 30), (0, 15)], dtype="float32") as swarm:
        arguments = ("route", MODEL, "--explain", "--bytes-per-token", "2304", "--invite", swarm.invite)
        done = command(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        # Whether one peer or two are faster, and which, is the machine's affair: whoever won can be replaced.
        assert len(said["hops"]) > 1 or len(said["candidates"][0]) > 1, "two hold everything"
        for hop, options, other in zip(said["hops"], said["candidates"], said["without"], strict=True):
            chosen, *losers = options
            assert chosen["chosen"]
            assert chosen["peer_id"] == hop["peer_id"]
            assert all(chosen["route_ms"] <= loser["route_ms"] for loser in losers)
            assert hop["peer_id"] not in {taken["peer_id"] for taken in other["hops"]}
            assert [block for taken in other["hops"] for block in range(*taken["span"])] == list(range(30))
            assert other["cost_ms"] >= said["cost_ms"]
        text = command(*arguments).stdout
        assert "chosen" in text
        assert " ms: " in text
        assert ": no route" not in text
