"""Tiny random-weight checkpoints of many architectures, saved as a hub would serve them.

Weights are drawn large enough that attention is far from uniform: with transformers' default standard deviation of 0.02
a wrong mask or a wrong position would hardly show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 97
NUM_BLOCKS = 4
WIDE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": NUM_BLOCKS}
COMMON: dict[str, Any] = {
    **WIDE,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to make one architecture small."""

    name: str
    config_class: str
    settings: Mapping[str, Any]
    pluggable: bool = True
    """Whether its attention goes through transformers' registry."""

    def config(self) -> PretrainedConfig:
        return getattr(transformers, self.config_class)(**self.settings)


def _families() -> Iterable[Family]:
    def family(name: str, config_class: str, *, pluggable: bool = True, **settings: Any) -> Family:
        return Family(name=name, config_class=config_class, settings=settings, pluggable=pluggable)

    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 3.0, 6.0, 12.0],
        "original_max_position_embeddings": 16,
    }
    experts = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24}
    mixture = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
    }
    yield family("llama", "LlamaConfig", **GROUPED)
    yield family("llama-tied", "LlamaConfig", **GROUPED, tie_word_embeddings=True)
    yield family("llama-dynamic", "LlamaConfig", **{**GROUPED, "max_position_embeddings": 16}, rope_parameters=dynamic)
    yield family(
        "phi3-longrope", "Phi3Config", **GROUPED, rope_parameters=longrope, original_max_position_embeddings=16
    )
    yield family("phi3", "Phi3Config", **GROUPED)
    yield family("qwen2", "Qwen2Config", **GROUPED)
    yield family("qwen3", "Qwen3Config", **GROUPED, head_dim=12)
    yield family("mistral", "MistralConfig", **GROUPED, head_dim=8, sliding_window=4)
    yield family("gemma2", "Gemma2Config", **GROUPED, head_dim=8, sliding_window=4, layer_types=ALTERNATING)
    yield family("gemma3", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=4, layer_types=ALTERNATING)
    yield family("mixtral", "MixtralConfig", **GROUPED, num_local_experts=4)
    yield family("qwen3-moe", "Qwen3MoeConfig", **GROUPED, **experts, head_dim=12, mlp_only_layers=[1])
    yield family("olmoe", "OlmoeConfig", **GROUPED, num_experts=4, num_experts_per_tok=2)
    yield family(
        "jetmoe",
        "JetMoeConfig",
        **WIDE,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    yield family(
        "gpt-oss",
        "GptOssConfig",
        **GROUPED,
        head_dim=8,
        sliding_window=4,
        layer_types=ALTERNATING,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    yield family(
        "deepseek-v3",
        "DeepseekV3Config",
        **COMMON,
        **LATENT,
        **mixture,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        rope_interleave=True,
    )
    yield family(
        "llama4",
        "Llama4TextConfig",
        **GROUPED,
        head_dim=8,
        attention_chunk_size=4,
        intermediate_size_mlp=48,
        num_local_experts=4,
        pluggable=False,
    )
    yield family("stablelm", "StableLmConfig", **GROUPED, partial_rotary_factor=0.5)
    yield family("gpt-neox", "GPTNeoXConfig", **COMMON, use_parallel_residual=True)
    yield family("phi", "PhiConfig", **GROUPED)
    yield family("persimmon", "PersimmonConfig", **COMMON)
    yield family("cohere", "CohereConfig", **GROUPED)
    yield family("cohere2", "Cohere2Config", **GROUPED, sliding_window=4, layer_types=ALTERNATING)
    yield family("olmo2", "Olmo2Config", **GROUPED)
    yield family("olmo3", "Olmo3Config", **GROUPED, sliding_window=4, layer_types=ALTERNATING)
    yield family("starcoder2", "Starcoder2Config", **GROUPED)
    yield family(
        "granite",
        "GraniteConfig",
        **GROUPED,
        residual_multiplier=0.7,
        attention_multiplier=0.5,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
    )
    yield family("glm4", "Glm4Config", **GROUPED, head_dim=8)
    yield family("smollm3", "SmolLM3Config", **GROUPED)
    yield family("modernbert-decoder", "ModernBertDecoderConfig", **COMMON, local_attention=6)
    yield family("biogpt", "BioGptConfig", **COMMON)
    yield family(
        "gpt2",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=NUM_BLOCKS,
        n_head=4,
        n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
    )
    yield family(
        "gpt-bigcode",
        "GPTBigCodeConfig",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=NUM_BLOCKS,
        n_head=4,
        n_positions=64,
    )
    yield family("opt", "OPTConfig", **COMMON, ffn_dim=48, word_embed_proj_dim=20)
    yield family(
        "ctrl", "CTRLConfig", vocab_size=VOCABULARY, n_embd=32, n_layer=NUM_BLOCKS, n_head=4, n_positions=64, dff=48
    )
    vision = {"hidden_size": 16, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 2, "image_size": 28}
    yield family(
        "gemma3-vision",
        "Gemma3Config",
        mm_tokens_per_image=4,
        vision_config={**vision, "patch_size": 14},
        text_config={**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ALTERNATING},
    )
    yield family(
        "gemma4",
        "Gemma4UnifiedTextConfig",
        **GROUPED,
        head_dim=8,
        global_head_dim=12,
        sliding_window=4,
        layer_types=ALTERNATING,
    )
    yield family(
        "gemma4-moe",
        "Gemma4TextConfig",
        **GROUPED,
        hidden_size_per_layer_input=0,
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=4,
        layer_types=ALTERNATING,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    )
    yield family(
        "mimo-v2",
        "MiMoV2FlashConfig",
        **GROUPED,
        **mixture,
        head_dim=12,
        v_head_dim=8,
        sliding_window=4,
        layer_types=ALTERNATING,
    )
    dots3: dict[str, Any] = {
        **COMMON,
        **LATENT,
        **mixture,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "sliding_window": 4,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 6,
    }
    yield family("dots3-note", "Dots3NoteTextConfig", **dots3, use_dsa=False, layer_types=ALTERNATING)
    yield family(
        "dots3-note-indexed",
        "Dots3NoteTextConfig",
        **dots3,
        layer_types=[kind.replace("full", "indexed") for kind in ALTERNATING],
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        pluggable=False,
    )
    yield family(
        "deepseek-v32",
        "DeepseekV32Config",
        **COMMON,
        **LATENT,
        **mixture,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        pluggable=False,
    )
    yield family("diffllama", "DiffLlamaConfig", **GROUPED, pluggable=False)
    yield family("doge", "DogeConfig", **GROUPED, pluggable=False)
    yield family(
        "bloom", "BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=NUM_BLOCKS, n_head=4, pluggable=False
    )
    yield family(
        "mpt",
        "MptConfig",
        vocab_size=VOCABULARY,
        d_model=32,
        n_layers=NUM_BLOCKS,
        n_heads=4,
        max_seq_len=64,
        expansion_ratio=2,
        pluggable=False,
    )
    yield family("falcon", "FalconConfig", **WIDE, num_attention_heads=4, pluggable=False)
    yield family(
        "falcon-alibi",
        "FalconConfig",
        **WIDE,
        num_attention_heads=4,
        alibi=True,
        new_decoder_architecture=True,
        num_kv_heads=2,
        pluggable=False,
    )
    yield family(
        "gptj",
        "GPTJConfig",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=NUM_BLOCKS,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        pluggable=False,
    )
    yield family(
        "codegen",
        "CodeGenConfig",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=NUM_BLOCKS,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        pluggable=False,
    )
    yield family(
        "gpt-neo",
        "GPTNeoConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=NUM_BLOCKS,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pluggable=False,
    )
    yield family(
        "xglm",
        "XGLMConfig",
        vocab_size=VOCABULARY,
        d_model=32,
        num_layers=NUM_BLOCKS,
        attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
        pluggable=False,
    )


FAMILIES = {family.name: family for family in _families()}


def save_checkpoint(family: Family, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Save a random checkpoint of `family` in `folder`, and return the whole model in float32."""
    model = random_model(family.config(), seed=seed)
    model.save_pretrained(folder)
    return model


def random_model(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """The whole model of `config`, in float32 and evaluation mode, with weights at which mistakes show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.add_(noise * 0.2)
    return model
