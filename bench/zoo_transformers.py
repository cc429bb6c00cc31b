"""The transformers models of the zoo: (config class, model class, what differs from the defaults)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from zoo_models import Build, Entry, Inputs

if TYPE_CHECKING:
    import torch

VOCABULARY, BATCH, LENGTH = 96, 2, 12
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {
    **DECODER, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "experts_implementation": "batched_mm",
}  # fmt: skip
EXPERTS = {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}  # names differ by model
MLA: dict[str, Any] = {
    **MOE, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
    "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip
GEMMA = {**DECODER, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
TOWER: dict[str, Any] = {"text": {**DECODER, "projection_dim": 16}, "vision": {**VISION, "projection_dim": 16}}

Row = tuple[str, str, Mapping[str, Any]]

DECODERS: dict[str, Row] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "llama-eager": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "attn_implementation": "eager"}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 6, "head_dim": 8}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", MOE),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "qwen2-moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 40}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MOE, "head_dim": 8, "norm_topk_prob": True}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
    "phi": ("PhiConfig", "PhiForCausalLM", DECODER),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {**MOE, "attention_bias": True, "lm_head_bias": True}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**DECODER, "new_decoder_architecture": False,
        "parallel_attn": True, "bias": True}),
    "falcon-new": ("FalconConfig", "FalconForCausalLM", {**DECODER, "new_decoder_architecture": True,
        "num_kv_heads": 2}),
    "falcon-alibi": ("FalconConfig", "FalconForCausalLM", {**DECODER, "alibi": True, "parallel_attn": False,
        "multi_query": False, "bias": True}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**GPT2_LIKE, "hidden_size": 32}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-post-norm": ("OPTConfig", "OPTForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 16,
        "do_layer_norm_before": False}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2_LIKE),
    "gpt-neo": ("GPTNeoConfig", "GPTNeoForCausalLM", {**DECODER, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "window_size": 6}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**DECODER, "rotary_pct": 0.5}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT2_LIKE, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT2_LIKE, "rotary_dim": 4, "n_ctx": 64}),
    "gpt-bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT2_LIKE),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {**DECODER, "use_qkv_bias": True, "qk_layernorm": True,
        "partial_rotary_factor": 0.5}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", DECODER),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", DECODER),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {**DECODER, "sliding_window": 6}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**MOE, "intermediate_size": 24}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**DECODER, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**DECODER, "sliding_window": 6}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**DECODER, "embedding_multiplier": 12.0,
        "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", MOE),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {**DECODER, "head_dim": 8}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**DECODER, "use_bias": True}),
    "deepseek-v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**MLA, "topk_method": "group_limited_greedy"}),
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA),
    "glm": ("GlmConfig", "GlmForCausalLM", {**DECODER, "head_dim": 8}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {**DECODER, "head_dim": 8}),
    "glm4-moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**MLA, "use_qk_norm": True, "num_key_value_heads": 2}),
    "mpt": ("MptConfig", "MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2,
        "max_seq_len": 64}),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", DECODER),
    "xglm": ("XGLMConfig", "XGLMForCausalLM", {**DECODER, "d_model": 32, "ffn_dim": 48, "num_layers": 2,
        "attention_heads": 4}),
    "biogpt": ("BioGptConfig", "BioGptForCausalLM", DECODER),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", DECODER),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**MOE, "head_dim": 8, "sliding_window": 6}),
    "helium": ("HeliumConfig", "HeliumForCausalLM", {**DECODER, "head_dim": 8}),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {**DECODER, "sliding_window": 6}),
    "arcee": ("ArceeConfig", "ArceeForCausalLM", DECODER),
    "seed-oss": ("SeedOssConfig", "SeedOssForCausalLM", {**DECODER, "head_dim": 8}),
    "ernie4-5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {**DECODER, "use_bias": True, "head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {**DECODER, "head_dim": 8}),
    "minimax-m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {**MOE, "head_dim": 8, "rotary_dim": 4}),
    "diffllama": ("DiffLlamaConfig", "DiffLlamaForCausalLM", DECODER),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", DECODER),
    "nanochat": ("NanoChatConfig", "NanoChatForCausalLM", DECODER),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {**MOE, "head_dim": 8, "intermediate_size_mlp": 48,
        "attention_chunk_size": 8, "interleave_moe_layer_step": 2}),
}  # fmt: skip

ENCODERS: dict[str, Row] = {
    "bert": ("BertConfig", "BertModel", DECODER),
    "bert-eager": ("BertConfig", "BertForMaskedLM", {**DECODER, "attn_implementation": "eager"}),
    "roberta": ("RobertaConfig", "RobertaModel", DECODER),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48,
        "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    "deberta-v2": ("DebertaV2Config", "DebertaV2Model", {**DECODER, "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}),
    "electra": ("ElectraConfig", "ElectraModel", {**DECODER, "embedding_size": 16}),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {**DECODER, "local_attention": 6, "norm_bias": True,
        "cls_token_id": 1, "sep_token_id": 2}),
    "albert": ("AlbertConfig", "AlbertModel", {**DECODER, "embedding_size": 16}),
    "mpnet": ("MPNetConfig", "MPNetModel", DECODER),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", DECODER),
    "roberta-prelayernorm": ("RobertaPreLayerNormConfig", "RobertaPreLayerNormModel", DECODER),
    "esm": ("EsmConfig", "EsmModel", {**DECODER, "position_embedding_type": "rotary", "emb_layer_norm_before": True,
        "mask_token_id": 3}),
    "nomic-bert": ("NomicBertConfig", "NomicBertModel", DECODER),
    "squeezebert": ("SqueezeBertConfig", "SqueezeBertModel", {**DECODER, "embedding_size": 32, "q_groups": 2,
        "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2}),
    "funnel": ("FunnelConfig", "FunnelBaseModel", {"vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": 32,
        "n_head": 4, "d_head": 8, "d_inner": 48}),
    "fnet": ("FNetConfig", "FNetModel", DECODER),
}  # fmt: skip

ENCODER_DECODERS: dict[str, Row] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48,
        "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
    "t5-gated": ("T5Config", "T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8,
        "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False}),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "marian": ("MarianConfig", "MarianMTModel", BART),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", BART),
    "m2m-100": ("M2M100Config", "M2M100ForConditionalGeneration", BART),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", BART),
}  # fmt: skip

IMAGES: dict[str, Row] = {
    "vit": ("ViTConfig", "ViTForImageClassification", VISION),
    "deit": ("DeiTConfig", "DeiTModel", VISION),
    "swin": ("SwinConfig", "SwinModel", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1],
        "num_heads": [2, 4], "window_size": 4}),
    "swinv2": ("Swinv2Config", "Swinv2Model", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1],
        "num_heads": [2, 4], "window_size": 4}),
    "convnext": ("ConvNextConfig", "ConvNextModel", {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2}),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2Model", {"hidden_sizes": [16, 32], "depths": [1, 2],
        "num_stages": 2}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**VISION, "mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2Config", "Dinov2Model", {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {**VISION, "num_register_tokens": 2}),
    "clip-vision": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**VISION, "projection_dim": 16}),
    "siglip-vision": ("SiglipVisionConfig", "SiglipVisionModel", VISION),
    "beit": ("BeitConfig", "BeitModel", {**VISION, "use_relative_position_bias": True}),
    "resnet": ("ResNetConfig", "ResNetModel", {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [1, 2]}),
    "mobilenet-v2": ("MobileNetV2Config", "MobileNetV2Model", {"image_size": 32, "depth_multiplier": 0.25}),
    "regnet": ("RegNetConfig", "RegNetModel", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2],
        "groups_width": 8, "layer_type": "y"}),
    "segformer": ("SegformerConfig", "SegformerForSemanticSegmentation", {"num_encoder_blocks": 2, "depths": [1, 1],
        "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2],
        "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}),
    "pvt-v2": ("PvtV2Config", "PvtV2Model", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1],
        "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2],
        "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}),
    "poolformer": ("PoolFormerConfig", "PoolFormerModel", {"num_encoder_blocks": 2, "depths": [1, 1],
        "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "mlp_ratio": 2.0}),
    "levit": ("LevitConfig", "LevitModel", {"image_size": 32, "hidden_sizes": [16, 32, 32], "num_attention_heads": [2,
        4, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8,
        4, 4, 2, 2]], "drop_path_rate": 0}),
    "efficientnet": ("EfficientNetConfig", "EfficientNetModel", {"image_size": 32, "width_coefficient": 0.25,
        "depth_coefficient": 0.2, "hidden_dim": 320}),
    "depth-anything": ("DepthAnythingConfig", "DepthAnythingForDepthEstimation", {}),
}  # fmt: skip

STATE_SPACE: dict[str, Row] = {
    "mamba": ("MambaConfig", "MambaForCausalLM", {**DECODER, "state_size": 8, "time_step_rank": 4, "conv_kernel": 3}),
    "falcon-mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", {**DECODER, "state_size": 8, "time_step_rank": 4}),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {**DECODER, "state_size": 8, "num_heads": 8, "head_dim": 8,
        "n_groups": 2, "chunk_size": 4, "expand": 2}),
    "jamba": ("JambaConfig", "JambaForCausalLM", {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_d_conv": 3,
        "use_mamba_kernels": False}),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**DECODER, "attn_layer_indices": [1], "mamba_n_heads": 8,
        "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 4}),
    "zamba2": ("Zamba2Config", "Zamba2ForCausalLM", {**DECODER, "num_hidden_layers": 3, "layers_block_type": ["mamba",
        "hybrid", "mamba"], "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8,
        "mamba_ngroups": 1, "chunk_size": 4, "num_mem_blocks": 1, "use_mamba_kernels": False}),
    "falcon-h1": ("FalconH1Config", "FalconH1ForCausalLM", {**DECODER, "mamba_d_ssm": 64, "mamba_n_heads": 8,
        "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {**DECODER, "attention_hidden_size": 32, "context_length": 64}),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {**DECODER, "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 8}),
}  # fmt: skip


def _model(row: Row) -> torch.nn.Module:
    import transformers

    config_name, model_name, options = row
    options = dict(options)
    attention, experts = options.pop("attn_implementation", None), options.pop("experts_implementation", None)
    config_class = getattr(transformers, config_name)
    known = {*(f.name for f in dataclasses.fields(config_class)), *config_class.attribute_map}
    config = config_class(**{k: v for k, v in options.items() if k in known or k not in EXPERTS})
    if experts is not None:
        config._experts_implementation = experts
    cls = getattr(transformers, model_name)
    return cls._from_config(config, **({} if attention is None else {"attn_implementation": attention}))  # type: ignore[no-any-return]


def _ids(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    import torch

    return torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)


def _mask() -> torch.Tensor:
    import torch

    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[-1, -3:] = 0
    return mask


def decoder_inputs(generator: torch.Generator) -> Inputs:
    return {"input_ids": _ids(generator), "use_cache": False}


def encoder_inputs(generator: torch.Generator) -> Inputs:
    return {"input_ids": _ids(generator), "attention_mask": _mask()}


def pair_inputs(generator: torch.Generator) -> Inputs:
    decoder = _ids(generator, 8)
    return {"input_ids": _ids(generator), "attention_mask": _mask(), "decoder_input_ids": decoder, "use_cache": False}


def image_inputs(size: int) -> Callable[[torch.Generator], Inputs]:
    import torch

    return lambda generator: {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator)}


def audio_inputs(generator: torch.Generator) -> Inputs:
    import torch

    features = torch.randn(BATCH, 16, 24, generator=generator)
    return {"input_features": features, "decoder_input_ids": _ids(generator, 8), "use_cache": False}


def _two_towers(config: str, model: str, text: str, vision: str) -> Build:
    def make() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
        import transformers

        options: dict[str, Any] = {
            "text_config": {**TOWER["text"], "hidden_act": "quick_gelu"} if text else {},
            "vision_config": TOWER["vision"],
        }
        if text == "projection":
            options["projection_dim"] = 16
        module = getattr(transformers, model)._from_config(getattr(transformers, config)(**options))
        return module, lambda g: {"input_ids": _ids(g), **image_inputs(16)(g)}

    return make


def _whisper() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    options = {**BART, "num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 16}
    return _model(("WhisperConfig", "WhisperForConditionalGeneration", options)), audio_inputs


def _depth() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    import transformers

    backbone = transformers.Dinov2Config(
        **{**VISION, "mlp_ratio": 2}, out_features=["stage1", "stage2"], reshape_hidden_states=False
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=4, reassemble_hidden_size=32, reassemble_factors=[2, 1],
        neck_hidden_sizes=[16, 16], fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config), image_inputs(16)


def _plain(row: Row, draw: Callable[[torch.Generator], Inputs]) -> Build:
    return lambda: (_model(row), draw)


def entries() -> Iterator[Entry]:
    """The models of this file."""
    spellings = {"llama-eager", "llama-tied", "bert-eager", "falcon-new", "falcon-alibi", "opt-post-norm"}
    spellings |= {"t5-gated", "dinov2-swiglu"}
    for kind, rows, draw in (
        ("decoder", DECODERS, decoder_inputs),
        ("encoder", ENCODERS, encoder_inputs),
        ("encoder-decoder", ENCODER_DECODERS, pair_inputs),
        ("state-space", STATE_SPACE, decoder_inputs),
    ):
        for name, row in rows.items():
            yield Entry(name, kind, _plain(row, draw), name not in spellings)
    yield Entry("whisper", "encoder-decoder", _whisper)
    for name, row in IMAGES.items():
        if name == "depth-anything":
            yield Entry(name, "vision", _depth)
            continue
        size = row[2].get("image_size", 32)
        yield Entry(name, "vision", lambda row=row, size=size: (_model(row), image_inputs(size)), name not in spellings)
    yield Entry("clip", "vision", _two_towers("CLIPConfig", "CLIPModel", "projection", "clip"))
    yield Entry("siglip", "vision", _two_towers("SiglipConfig", "SiglipModel", "plain", "siglip"))
