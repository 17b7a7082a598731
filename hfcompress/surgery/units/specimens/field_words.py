"""What a field of a config counts or measures, by the words in its name: patterns of many architectures' names."""

from __future__ import annotations

import re

# Words at the end of a field's name, tried in this order. `_` stands for the start of the name as well.
KEY_VALUE = re.compile(r"(key_value|_kv)(_n)?_heads$|^kv_n_heads$|multi_query_group_num$")
QUERY = re.compile(r"(^|_)(attention_|n_|num_|query_|cross_|self_)*(heads|head|query_groups)(_per_layer)?$")
NO_HEADS = re.compile(
    r"per_head|lm_head|ngram|separate_head|use_|_loss_|no_head|hidden|ratio|skip|tie|mtp|with_|size|scale|dim"
)
MAMBA_HEADS = re.compile(r"mamba.*heads$")
LAYERS = re.compile(r"(^|_)(layers?|num_blocks|depth|num_layers_per_stack)$")
NO_LAYERS = re.compile(
    r"conv|feat_extract|lstm|residual|feature_layer|window|nextn|mtp|prenet|postnet|per_attn|memory|mem_|norm"
)
STAGES = re.compile(r"^(depths?|stage_num_blocks|num_block_repeats|n_attn_blocks|stage_numb_of_layers|block_sizes)$")
PERIOD = re.compile(r"(period|interval|every_n_layers|sparse_step|window_pattern|moe_layer_step|layer_group_size|frequency)$")
EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$|^zero_expert_num$|^num_local_experts$")
CHOSEN = re.compile(r"experts_per_tok(en)?$|^(moe_)?top_?k(_experts)?$|^moe_k$")
NEURONS = re.compile(
    r"intermediate_size|ffn_dim|^d_ff$|^n_inner$|^d_inner$|^dff$|^dim_ff$|ffn_hidden_size|feed_forward_size|mlp_dim|"
    r"^ffn_hidden|^hidden_dim$|feedforward_dim|encoder_ffn|decoder_ffn"
)
HIDDEN = re.compile(r"^(decoder_|encoder_|cross_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|dim|hidden_dim|embedding_dim)$")
HEAD = re.compile(r"(^|_)(head_dim|head_size|d_kv|d_head|dim_head|key_dim|headdim|kv_channels|attention_head_dim)$")
POSITIONS = re.compile(
    r"(max_position|_positions$|max_seq_len|n_ctx|n_positions|^context_length|max_pos_emb|max_2d_pos|position_embeddings$|"
    r"max_relative_pos|model_max_length|^max_length|^num_landmarks)"
)
WINDOW = re.compile(
    r"window|chunk_length|chunk_size$|block_size$|local_attention$|^local_radius$|context_size$|_topk$|chunk_len"
)
WIDTH = re.compile(
    r"(size|dim|dims|channels?|rank|units|width|filters|_in|_out|_d_state|_d_ssm|d_latents|bins_dim|latents|dimension|"
    r"_embed|num_centroids|codevectors_per_group)$"
)
NO_WIDTH = re.compile(
    r"kernel|group_size|^num_channels$|^in_chans|in_channels$|^input_channels|audio_channels|batch|patch|image_size|crop|_conv$|"
    r"code_len|merge|^stride|hop|frame|coordinate|sample|conv_dim$|cond_|chunk|bbox|pool_size|grid|_shift|^channels$|pos_bins|"
    r"train_size|conv_L|swa_window|expansion|tie|use_|^type_vocab|vocab|attention_window|out_channels_|block_size|fft|type_|scale"
)
