"""Small configs of the autoencoders for images, for the table in `families`.

Each keeps the structure of a real checkpoint's config: only channels, layers per block and codebooks shrink.
Where a class fixes its GroupNorms at 32 groups, there are 32 channels.
"""

_DOWN = ("DownEncoderBlock2D",) * 4
_UP = ("UpDecoderBlock2D",) * 4

KL = {
    "down_block_types": _DOWN,
    "up_block_types": _UP,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
FLUX2 = KL | {"latent_channels": 8}
ASYMMETRIC = {
    "down_block_types": _DOWN,
    "up_block_types": _UP,
    "down_block_out_channels": (8, 16, 16, 16),
    "up_block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 4,
}
TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
KVAE = {"channels": 32, "ch_mult": (1,) * 4, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4}
HUNYUAN_IMAGE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": (32,) * 4,
    "layers_per_block": 1,
    "spatial_compression_ratio": 8,
    "sample_size": 384,
}
CONSISTENCY = {
    "encoder_block_out_channels": (8, 16, 16, 16),
    "encoder_layers_per_block": 1,
    "encoder_norm_num_groups": 4,
    "decoder_block_out_channels": (8, 16, 16, 16),
    "decoder_layers_per_block": 1,
    "decoder_norm_num_groups": 4,
}

VQ = KL | {
    "down_block_types": _DOWN[:3],
    "up_block_types": _UP[:3],
    "block_out_channels": (8, 16, 16),
    "num_vq_embeddings": 32,
}
MOVQ = {
    "down_block_types": (*_DOWN[:3], "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *_UP[:3]),
    "block_out_channels": (32,) * 4,
    "latent_channels": 4,
    "num_vq_embeddings": 32,
    "vq_embed_dim": 4,
    "norm_type": "spatial",
}

_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_WIDTHS = (8, 16, 16, 32, 32, 32)
_DC = {
    "latent_channels": 8,
    "encoder_block_types": _BLOCKS,
    "decoder_block_types": _BLOCKS,
    "encoder_block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
}
DC = _DC | {
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
    "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
}
DC_SANA = _DC | {
    "attention_head_dim": 8,
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}
