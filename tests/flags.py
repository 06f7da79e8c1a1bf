"""The flags of every command: a promise. Whoever changes this table breaks somebody's script."""

FLAGS = {
    name: set(flags.split())
    for name, flags in {
        "image-to-video": """
            --attention-backend --axis --boundary-ratio --compile --crf --device --dry-run --dtype
            --enable-cpu-offload --enable-layerwise-offload --flow-shift --fps --guidance-scale
            --guidance-scale-high --height --image --json --last-image --lossless --model --negative-prompt
            --no-vae-decode --no-vae-encode --num-frames --num-inference-steps --output --prompt --ranks
            --report --ring-degree --seed --ulysses-degree --vae-decode --vae-decode-dtype --vae-dtype --vae-encode
            --vae-encode-dtype --vae-mode --vae-patch-parallel-size --vae-untiled --vae-use-slicing --vae-use-tiling
            --width -o
        """,
        "text-to-video": """
            --attention-backend --axis --boundary-ratio --compile --crf --device --dry-run --dtype
            --enable-cpu-offload --enable-layerwise-offload --flow-shift --fps --guidance-scale
            --guidance-scale-high --height --json --lossless --model --negative-prompt --no-vae-decode --num-frames
            --num-inference-steps --output --prompt --ranks --report --ring-degree --seed --ulysses-degree
            --vae-decode --vae-decode-dtype --vae-dtype --vae-mode --vae-patch-parallel-size --vae-untiled
            --vae-use-slicing --vae-use-tiling --width -o
        """,
        "image-to-image": """
            --attention-backend --axis --compile --device --dry-run --dtype --enable-cpu-offload
            --enable-layerwise-offload --flow-shift --guidance-scale --height --image --json --model
            --negative-prompt --no-vae-decode --no-vae-encode --num-inference-steps --output --prompt
            --ranks --report --ring-degree --seed --strength --true-cfg-scale --ulysses-degree --vae-decode
            --vae-decode-dtype --vae-dtype --vae-encode --vae-encode-dtype --vae-mode --vae-patch-parallel-size
            --vae-untiled --vae-use-slicing --vae-use-tiling
            --width -o
        """,
        "serve": """
            --api-key-file --attention-backend --axis --boundary-ratio --compile --crf --device --dtype
            --enable-cpu-offload --enable-layerwise-offload --flow-shift --host --keep --lossless --max-frames
            --max-pixels --max-queue --max-steps --max-upload --model --no-vae-decode --no-vae-encode --port
            --ranks --ring-degree --served-model-name --store --task --ulysses-degree --vae-decode
            --vae-decode-dtype --vae-dtype --vae-encode --vae-encode-dtype --vae-mode --vae-patch-parallel-size
            --vae-untiled --vae-use-slicing --vae-use-tiling
        """,
        "make-demo-model": "--kind",
        "roundtrip": """
            --axis --compare --device --dtype --frames --height --json --lossless --mode --model --output --ranks
            --report --tile-overlap --tile-size --untiled --vae-decode-dtype --vae-encode-dtype
            --vae-patch-parallel-size --vae-use-tiling --vae_patch_parallel_size --vae_use_tiling --width -o
        """,
        "encode": """
            --axis --device --dtype --frames --height --json --mode --model --output --ranks --tile-overlap
            --tile-size --untiled --vae-patch-parallel-size --vae-use-tiling --vae_patch_parallel_size
            --vae_use_tiling --width -o
        """,
        "decode": """
            --axis --device --dtype --json --lossless --mode --model --output --ranks --tile-overlap --tile-size
            --untiled --vae-patch-parallel-size --vae-use-tiling --vae_patch_parallel_size --vae_use_tiling -o
        """,
        "encode-dataset": """
            --bucket --bucket-area --bucket-step --device --devices --dry-run --dtype --fail-fast --format --fps --json
            --memory --model --output --ray-address --report --shard-size --store --store-dtype -o
        """,
        "compare": "--grid --json --max-l2 --min-psnr --min-ssim --report --trim",
        "plan": """
            --bandwidth --device --dtype --flops --height --json --link --memory --model --num-frames
            --ranks --vae-decode-dtype --vae-encode-dtype --width
        """,
        "warm-up": "--axis --device --dtype --height --model --num-frames --ranks --width",
        "doctor": "--clear-cache --device --ranks",
    }.items()
}
