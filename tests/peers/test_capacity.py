from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peers import capacity
from peers.capacity import FORWARD_BYTES, PROCESS_BYTES, plan_capacity
from peers.errors import PeerTooSmall
from peers.model.lora import open_adapter
from peers.model.support import examine
from peers.runtime.sizing import SESSIONS_MAX, TOKENS_MIN
from routing.errors import CallerError, InvalidSpan
from routing.ids import BlockSpan, BlockSpans
from tests.helpers.families import FAMILIES, NUM_BLOCKS

CONFIG = FAMILIES["llama"].config()


def test_a_peer_with_room_may_host_every_block_with_a_cache_for_several_of_the_longest_sessions() -> None:
    plan = plan_capacity(CONFIG, device="cpu", max_memory_bytes=4 << 30)
    most = SESSIONS_MAX * CONFIG.max_position_embeddings
    assert (plan.num_blocks, plan.max_blocks, plan.cache_tokens) == (NUM_BLOCKS, NUM_BLOCKS, most)
    assert plan.dtype == torch.float32


def test_memory_bounds_the_blocks_and_less_cache_makes_room_for_more() -> None:
    tight = PROCESS_BYTES + (5 << 20)
    roomy = plan_capacity(CONFIG, device="cpu", max_memory_bytes=tight, cache_tokens=1000)
    full = plan_capacity(CONFIG, device="cpu", max_memory_bytes=tight, cache_tokens=16_000)
    assert 1 <= full.max_blocks < roomy.max_blocks == NUM_BLOCKS


def test_by_default_a_part_of_what_is_free_now_is_taken_and_never_more_than_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = FAMILIES["llama"].config()
    config.max_position_embeddings = 1 << 30
    kv_bytes = sum(shape.elements for shape in examine(config).kv_shapes) * 4

    def pool_bytes(free_bytes: int, **options: Any) -> int:
        monkeypatch.setattr(capacity.psutil, "virtual_memory", lambda: SimpleNamespace(available=free_bytes))
        return kv_bytes * plan_capacity(config, device="cpu", **options).cache_tokens

    assert 0.85 * (3.2 * 2**30 - PROCESS_BYTES) < pool_bytes(4 << 30) <= 3.2 * 2**30 - PROCESS_BYTES
    assert pool_bytes(4 << 30, max_memory_bytes=2 << 30) <= (2 << 30) - PROCESS_BYTES
    assert pool_bytes(4 << 30, max_memory_bytes=64 << 30) <= (4 << 30) - PROCESS_BYTES


def test_the_journal_counts_and_takes_little_where_there_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=limit)
        for limit in (PROCESS_BYTES + (16 << 20), PROCESS_BYTES + (8 << 30))
    )
    assert (small.journal_bytes, large.journal_bytes) == (1 << 20, capacity.JOURNAL_BYTES)
    monkeypatch.setattr(capacity, "JOURNAL_SHARE", 0.0)
    without = plan_capacity(CONFIG, device="cpu", max_memory_bytes=PROCESS_BYTES + (16 << 20))
    assert without.request.sizes.process_bytes == small.request.sizes.process_bytes - small.journal_bytes


def test_what_is_in_flight_counts_but_for_the_little_that_every_peer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=limit)
        for limit in (PROCESS_BYTES + (16 << 20), PROCESS_BYTES + (8 << 30))
    )
    assert (small.in_flight_bytes, large.in_flight_bytes) == (capacity.IN_FLIGHT_BYTES_MIN, 256 << 20)
    monkeypatch.setattr(capacity, "IN_FLIGHT_SHARE", 0.0)
    without = plan_capacity(CONFIG, device="cpu", max_memory_bytes=PROCESS_BYTES + (8 << 30))
    taken_bytes = large.request.sizes.process_bytes - without.request.sizes.process_bytes
    assert taken_bytes == large.in_flight_bytes - capacity.IN_FLIGHT_BYTES_MIN


def test_adapters_count_those_of_clients_once_and_hosted_ones_in_every_block(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.2.mlp.down_proj": 8})
    get_peft_model(model, adapter).save_pretrained(tmp_path)
    own, hosting = (
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=PROCESS_BYTES + (16 << 20), hosted=hosted)
        for hosted in ((), [open_adapter(str(tmp_path))] * 2)
    )
    assert own.adapter_bytes == 1 << 20
    assert own.request.sizes.process_bytes == PROCESS_BYTES - FORWARD_BYTES + own.adapter_bytes + own.journal_bytes
    layer = model.model.layers[2]
    q, down = layer.self_attn.q_proj.base_layer, layer.mlp.down_proj.base_layer
    largest = 4 * (4 * (q.in_features + q.out_features) + 8 * (down.in_features + down.out_features))
    assert hosting.request.sizes.block_bytes == own.request.sizes.block_bytes + 2 * largest


def test_graphs_have_a_part_of_a_gpu_of_which_every_span_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 << 30, 64 << 30))
    plan = plan_capacity(CONFIG, device="cuda", max_memory_bytes=32 << 30, blocks=BlockSpans.parse("0:1,2:3"))
    assert plan.graph_bytes == 1 << 29
    own_bytes = plan.request.sizes.process_bytes - (PROCESS_BYTES - FORWARD_BYTES) - plan.adapter_bytes
    assert own_bytes == 2 * plan.graph_bytes
    assert plan_capacity(CONFIG, device="cpu", max_memory_bytes=32 << 30).graph_bytes == 0


def test_in_a_container_what_it_has_left_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.platform.CONTAINER", tmp_path)
    unlimited = capacity._free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("900000000\n")
    (tmp_path / "memory.current").write_text("800000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\nactive_file 50000000\ninactive_file 20000000\n")
    assert capacity._free_bytes(torch.device("cpu")) == 170_000_000 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity._free_bytes(torch.device("cpu")) > 170_000_000


def test_a_large_forward_leaves_less_room_and_a_small_one_no_more_than_was_planned() -> None:
    limit = PROCESS_BYTES + (2 << 20)
    plan = plan_capacity(CONFIG, device="cpu", max_memory_bytes=limit)
    assert plan.beside(0) == plan.beside(FORWARD_BYTES) == plan
    beside = plan.beside(FORWARD_BYTES + (1 << 20))
    assert (beside.max_blocks, beside.cache_tokens) < (plan.max_blocks, plan.cache_tokens)
    assert beside.forward_bytes == FORWARD_BYTES + (1 << 20)
    assert beside.beside(FORWARD_BYTES) == plan
    with pytest.raises(PeerTooSmall):
        plan.beside(FORWARD_BYTES + (3 << 20))


def test_later_a_peer_has_what_is_free_then_and_never_more_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "_free_bytes", lambda device: 4 << 30)
    blocks = BlockSpans.parse("0:2")
    plan = plan_capacity(CONFIG, device="cpu", blocks=blocks)
    asked = plan_capacity(CONFIG, device="cpu", blocks=blocks, max_memory_bytes=3 << 30)
    limits_bytes = plan.request.limits_bytes
    assert plan.within(limits_bytes) == plan
    monkeypatch.setattr(capacity, "_free_bytes", lambda device: 64 << 30)
    assert plan.within(limits_bytes) == plan
    monkeypatch.setattr(capacity, "_free_bytes", lambda device: 2 << 30)
    less = plan.within(limits_bytes)
    assert less.request.limits_bytes < limits_bytes
    assert sum(less.request.limits_bytes) == int((2 << 30) * capacity.MEMORY_SHARE)
    assert sum(asked.within(asked.request.limits_bytes).request.limits_bytes) == 2 << 30, "all of it, as was asked"
    assert less.max_blocks == 2
    monkeypatch.setattr(capacity, "_free_bytes", lambda device: 1 << 20)
    with pytest.raises(PeerTooSmall):
        plan.within(limits_bytes)
    monkeypatch.setattr(capacity, "_free_bytes", lambda device: 4 << 30)
    assert less.within(limits_bytes) == plan


def test_several_devices_share_the_blocks_and_the_memory() -> None:
    plan = plan_capacity(CONFIG, device="cpu,cpu", max_memory_bytes=4 << 30, blocks=BlockSpans.parse("1:4"))
    assert [span for _, span in plan.parts(BlockSpans.parse("1:4"))] in (
        [BlockSpan(1, 2), BlockSpan(2, 4)],
        [BlockSpan(1, 3), BlockSpan(3, 4)],
    )
    assert plan.request.limits_bytes == (2 << 30, 2 << 30)
    one = plan_capacity(CONFIG, device="cpu,cpu", max_memory_bytes=4 << 30, num_blocks=1)
    assert len(one.parts(BlockSpans.parse("3:4"))) == 1


def test_by_itself_a_peer_takes_every_gpu_of_the_first_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("large", "large", "small")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: kinds[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 << 30, 64 << 30))
    plan = plan_capacity(CONFIG, num_blocks=2, dtype="float32")
    assert plan.device_names == "cuda:0,cuda:1"
    assert plan.share.blocks == (1, 1)


def test_several_spans_are_cut_at_their_own_ends_and_between_devices() -> None:
    spans = BlockSpans.parse("0:1,2:4")
    alone = plan_capacity(CONFIG, device="cpu", max_memory_bytes=4 << 30, blocks=spans)
    assert [part for _, part in alone.parts(spans)] == [BlockSpan(0, 1), BlockSpan(2, 4)]
    both = plan_capacity(CONFIG, device="cpu,cpu", max_memory_bytes=4 << 30, blocks=spans)
    blocks = [list(part) for _, part in both.parts(spans)]
    assert sum(blocks, []) == [0, 2, 3]  # noqa: RUF017
    assert len(blocks) in (2, 3)
    joined = plan_capacity(CONFIG, device="cpu", max_memory_bytes=4 << 30, blocks=BlockSpans.parse("0:3"))
    assert alone.forward_bytes == joined.forward_bytes == FORWARD_BYTES
    extra = alone.request.sizes.forward_bytes - joined.request.sizes.forward_bytes
    assert extra == FORWARD_BYTES, "each span's engine may run a forward at the same time"


def test_a_cache_too_small_to_be_useful_is_refused_unless_it_was_asked_for() -> None:
    one_block = sum(size for name, size in examine(CONFIG).weights.items() if ".layers.0." in name)
    tight = PROCESS_BYTES + one_block + 100_000
    with pytest.raises(PeerTooSmall, match=f"cache of {TOKENS_MIN}"):
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=tight)
    asked = plan_capacity(CONFIG, device="cpu", max_memory_bytes=tight, cache_tokens=256)
    assert (asked.max_blocks >= 1, asked.cache_tokens) == (True, 256)


def test_a_peer_too_small_for_one_block_is_told_the_sizes() -> None:
    with pytest.raises(PeerTooSmall, match="may use 668 MiB") as raised:
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=PROCESS_BYTES)
    assert "--max-memory" in raised.value.hint


def test_asked_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PeerTooSmall, match="3 block"):
        plan_capacity(
            CONFIG,
            device="cpu",
            max_memory_bytes=PROCESS_BYTES + 100_000,
            cache_tokens=256,
            blocks=BlockSpans.parse("0:3"),
        )


@pytest.mark.parametrize(
    "wrong", [{"blocks": BlockSpans.of(BlockSpan(2, NUM_BLOCKS + 1))}, {"num_blocks": 99}, {"num_blocks": 0}]
)
def test_blocks_that_the_model_does_not_have_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidSpan, match=str(NUM_BLOCKS)):
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=4 << 30, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"device": name} for name in ("cpu,", "cpu,abacus", "cpu,cuda:77")),
        *({"device": name} for name in ("abacus", "meta", "xpu", "cpu:7", "cuda:", "cuda:-1", "cuda:77")),
        {"dtype": "int3", "device": "cpu"},
        *({"device": "cpu", "cache_tokens": tokens} for tokens in (-1, 0, 1, 15)),
    ],
)
def test_a_device_or_dtype_that_is_not_here_or_no_cache_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CallerError) as caught:
        plan_capacity(CONFIG, max_memory_bytes=4 << 30, **wrong)
    assert caught.value.hint
