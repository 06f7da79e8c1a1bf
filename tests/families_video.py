"""Small configs of the autoencoders for video, for the table in `families`; see also `families_image`."""

GROUPED = {
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
"""HunyuanVideo, CogVideoX, Magvit and Allegro, which differ in their blocks only."""

WAN21 = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 2, 4, 4]}
WAN22 = WAN21 | {
    "decoder_base_dim": 12,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
QWENIMAGE21 = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "decoder_base_dim": 12}

HUNYUAN15 = {"block_out_channels": (8, 16, 16, 32, 32), "layers_per_block": 1, "latent_channels": 4}

LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 16, 16),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
}
LTX091 = LTX | {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (True, True, True, False),
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
LTX095 = LTX091 | {
    "block_out_channels": (8, 16, 32, 32, 32),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "spatio_temporal_scaling": (True,) * 4,
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
}
LTX2 = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 32, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 4,
    "decoder_causal": False,
}
LTX2_DIFFUSION = {
    "latent_channels": 8,
    "patch_size": 2,
    "decoder_head_dim": 8,
    "decoder_stage_channels": (16, 16, 16, 16, 8),
    "decoder_stage_depths": (1, 1, 1, 1, 2),
    "decoder_stage_kernels": ((3, 3, 3),) * 4,
    "decoder_stage5_kernel": (3, 5, 5),
    "decoder_upsample_strides": ((1, 1, 1),) * 3 + ((2, 2, 2),),
    "decoder_upsample_channel_reductions": (1, 1, 1, 2),
    "decoder_t_emb_dim": 16,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}
"""Few upsamplings: without a compiler, attention writes out every pair of tokens."""

MOCHI = {
    "encoder_block_out_channels": (32,) * 4,
    "decoder_block_out_channels": (32,) * 4,
    "layers_per_block": (1,) * 5,
}
COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 16, 16, 16),
    "decode_block_out_channels": (8, 16, 16, 16),
    "num_layers": 1,
}
TEMPORAL_DECODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "block_out_channels": (32,) * 4,
    "layers_per_block": 2,
}
"""Two layers: with one, the decoder never reaches its attention."""
VIDTOK = {"ch": 8, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1}
VIDTOK_FSQ = VIDTOK | {"regularizer": "fsq", "z_channels": 6, "double_z": False}
KVAE_VIDEO = {"ch": 32, "ch_mult": (1,) * 4, "num_res_blocks": 1, "z_channels": 4}
KANDINSKY6 = {
    "latent_channels": 4,
    "encoder_block_out_channels": (4, 8, 8, 16, 16),
    "decoder_block_out_channels": (4, 8, 8, 16, 16),
    "layers_per_block": 1,
}
MINIMAX_H3 = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 16,
    "latents_mean": (0.0,) * 4,
    "latents_std": (1.0,) * 4,
}
