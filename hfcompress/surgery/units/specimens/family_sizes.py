"""Sizes of tiny models that the rules of `miniature` can't tell: what a family means by a name of its own."""

from __future__ import annotations

from typing import Any

_BLT = tuple(f"blt_{part}" for part in ("local_encoder", "local_decoder", "global_transformer", "patcher"))

# What a family means by names of its own, or can't do with the sizes above; by model type, or by the name of the part.
ODD: dict[str, dict[str, Any]] = {
    **{key: {"head_dim": 16} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{key: {"head_dim": 8} for key in (*_BLT, "esmc", "helium")},
    **{key: {"coordinate_size": 5, "shape_size": 6} for key in ("layoutlmv2", "layoutlmv3")},
    **{key: {"vocab_size": 97} for key in ("wav2vec2-bert", "wav2vec2-conformer")},
    **{key: {"window_size": 2} for key in ("swin", "donut-swin")},
    **{key: {"num_filters": 2} for key in ("vibevoice_acoustic_tokenizer_encoder", "vibevoice_acoustic_tokenizer")},
    "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "bit": {"num_groups": 8},
    "blt": {"use_cache": False},
    "bros": {"hidden_size": 64, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        }
    },
    "cvt": {"depth": [1, 2, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"head_dim": 16, "partial_rotary_factor": 0.25},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "adaptor_config": {"intermediate_size": 8},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
    "esm": {"vocab_size": 97, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "hgnet_v2": {"stem_channels": [3, 8, 16], "stage_in_channels": [16, 16, 32, 64], "stage_mid_channels": [8, 8, 16, 16],
                 "stage_out_channels": [16, 32, 64, 128], "hidden_sizes": [16, 32, 64, 128]},
    "levit": {"patch_size": 16},
    "lilt": {"hidden_size": 48, "intermediate_size": 56},
    "mimi": {"codebook_size": 32, "upsample_groups": 8},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mistral4": {"qk_nope_head_dim": 4, "qk_head_dim": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"num_cross_attention_heads": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "reformer": {"hash_seed": 0, "axial_pos_shape": (4, 4), "axial_pos_embds_dim": (8, 24), "hidden_size": 32},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64},
    "zamba2": {"attention_hidden_size": 64},
}  # fmt: skip
# The same where layers are cut: what can't be told from the lists.
ODD_LAYERS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
