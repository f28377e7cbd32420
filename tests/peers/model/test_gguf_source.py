"""A GGUF file becomes a checkpoint like any other: once, with the values that transformers reads from it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from peers.errors import UnsupportedModel
from peers.model import gguf_source
from peers.model.catalog import Checkpoint, resolve
from peers.model.loading import check_folder, load_client, load_span
from routing.ids import BlockSpan
from tests.peers.model.test_builtin import write_gguf

BLOCKS, HIDDEN, EXPERTS, INNER = 2, 64, 4, 768  # transformers does not read the last one from the file
Q8_0, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16


def write_mixture(path: Path) -> None:
    """Qwen3-MoE, whose experts are merged from several tensors."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_expert_feed_forward_length(INNER)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(258)
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    tokens = [*map(chr, plain), *(chr(256 + number) for number in range(256 - len(plain))), "an", "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a n", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType = Q8_0) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) / 8
        if len(shape) == 1:
            writer.add_tensor(name, values)
        elif kind is F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", 258, HIDDEN)
    add("output.weight", 258, HIDDEN, kind=F16)
    add("output_norm.weight", HIDDEN)
    for block in range(BLOCKS):
        for name, *shape in (
            ("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", 16), ("attn_k_norm", 16),
            ("attn_q", 64, HIDDEN), ("attn_k", 32, HIDDEN), ("attn_v", 32, HIDDEN), ("attn_output", HIDDEN, 64),
            ("ffn_gate_exps", EXPERTS, INNER, HIDDEN), ("ffn_up_exps", EXPERTS, INNER, HIDDEN),
            ("ffn_down_exps", EXPERTS, HIDDEN, INNER),
        ):  # fmt: skip
            add(f"blk.{block}.{name}.weight", *shape)
        add(f"blk.{block}.ffn_gate_inp.weight", EXPERTS, HIDDEN, kind=F16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def found(path: Path, cache: Path) -> Checkpoint:
    return resolve(str(path), cache=cache, accept=check_folder)


@pytest.mark.parametrize("piece", [1, 3 * HIDDEN * INNER, gguf_source.PIECE])
@pytest.mark.parametrize("write", [write_gguf, write_mixture])
def test_a_converted_file_is_what_transformers_reads(
    write: Callable[[Path], None], piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "PIECE", piece)
    path = tmp_path / "tiny.gguf"
    write(path)
    checkpoint = found(path, tmp_path / "cache")
    assert checkpoint.name == "tiny"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16).eval()
    ours = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).eval()
    theirs = whole.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    ids = torch.tensor([[3, 4, 5, 6]])
    hidden = whole.get_input_embeddings()(ids).float()
    span = load_span(checkpoint, BlockSpan(0, 2), dtype=torch.float32, device="cpu")
    assert span.forward(hidden, torch.arange(4)[None]).shape == hidden.shape
    client = load_client(checkpoint, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(client.lm_head.weight, whole.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    from_file = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert tokenizer("an12")["input_ids"] == from_file("an12")["input_ids"]


def test_a_file_is_converted_once_and_its_bytes_are_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    first = found(path, tmp_path / "cache")
    elsewhere = found(path, tmp_path / "other")
    assert elsewhere.model_id == first.model_id
    monkeypatch.setattr(gguf_source, "_convert", lambda *_: pytest.fail("converted again"))
    path.rename(tmp_path / "renamed.gguf")
    again = found(tmp_path / "renamed.gguf", tmp_path / "cache")
    assert (again.model_id, again.name) == (first.model_id, "renamed")


def test_no_more_than_an_expert_is_in_memory_at_a_time_and_the_bytes_do_not_depend_on_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, dequantize = tmp_path / "tiny.gguf", [0], gguf_source.dequantize
    write_mixture(path)
    whole = found(path, tmp_path / "whole")

    def noted(data: Any, kind: gguf.GGMLQuantizationType) -> Any:
        values = dequantize(data, kind)
        read.append(values.size)
        return values

    monkeypatch.setattr(gguf_source, "dequantize", noted)
    monkeypatch.setattr(gguf_source, "PIECE", HIDDEN)
    written = gguf_source._written
    peaks = []

    def measured(*given: Any) -> bool:
        tracemalloc.reset_peak()
        before_bytes, _ = tracemalloc.get_traced_memory()
        done = written(*given)
        peaks.append(tracemalloc.get_traced_memory()[1] - before_bytes)
        return done

    monkeypatch.setattr(gguf_source, "_written", measured)
    tracemalloc.start()
    try:
        pieces = found(path, tmp_path / "pieces")
    finally:
        tracemalloc.stop()
    assert max(read) == INNER * HIDDEN, "an expert, of which the file holds four in each tensor"
    assert max(peaks) < 4 * 4 * INNER * HIDDEN, "NumPy's; torch holds as much again, as two halves"
    assert pieces.model_id == whole.model_id


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "poem.gguf"
    path.write_bytes(b"roses are red, violets are blue" * 10)
    with pytest.raises(UnsupportedModel, match=r"poem\.gguf") as caught:
        found(path, tmp_path / "cache")
    assert caught.value.hint


def test_an_architecture_that_nobody_maps_is_refused_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "abacus")
    writer.add_tensor("beads", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_source, "dequantize", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(UnsupportedModel, match="abacus"):
        found(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("write", "lacks", "named"),
    [
        (write_gguf, b"blk.2.attn_q.weight", r"model\.layers\.2\.self_attn\.q_proj\.weight"),
        (write_mixture, b"blk.1.ffn_up_exps.weight", r"model\.layers\.1\.mlp\.experts\.gate_up_proj"),
    ],
)
def test_a_file_that_lacks_a_tensor_is_refused_before_one_is_read(
    write: Callable[[Path], None], lacks: bytes, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.gguf"
    write(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(lacks, lacks.replace(b"_", b"-")))  # of the same length
    monkeypatch.setattr(gguf_source, "dequantize", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(UnsupportedModel, match=named):
        found(path, tmp_path / "cache")


@pytest.mark.parametrize(("inner", "step"), [(INNER - 32, 1), (INNER + 32, 1), (INNER + 32, 1 << 22)])
def test_a_weight_of_another_shape_is_refused(
    inner: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.gguf"
    monkeypatch.setattr(gguf_source, "PIECE", step)
    monkeypatch.setitem(globals(), "INNER", inner)
    write_mixture(path)
    with pytest.raises(UnsupportedModel, match=r"experts.* in that shape"):
        found(path, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "gguf").glob("*/")), "nothing of it is left"
