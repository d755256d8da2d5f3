"""Forward of the ViT: ours against transformers and timm, same weights' shapes, same precision, same process.

    python benchmarks/model_forward.py [--sizes vits16 vitb16] [--batches 1 16] [--dtypes float32 bfloat16]

Prints milliseconds (median of interleaved runs) and ours / peer (median and quartiles of the rounds): below 1 is
faster than the peer.
"""

import argparse
from functools import partial

import timm
import torch
import transformers
from harness import append_results, paired_times

from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

TIMM_NAMES = {
    "vits16": "vit_small_patch16_dinov3",
    "vitb16": "vit_base_patch16_dinov3",
    "vitl16": "vit_large_patch16_dinov3",
}


def build(size: str, dtype: str, device: str) -> dict[str, torch.nn.Module]:
    config = DINOv3ViTConfig.from_preset(size)
    models = {
        # Equal precision: transformers rotates queries and keys in the images' dtype, ours in float32 unless told so.
        "ours": DINOv3ViTModel(DINOv3ViTConfig.from_dict({**config.to_dict(), "rope_dtype": dtype})),
        "transformers": transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig.from_dict(config.to_dict())),
        "timm": timm.create_model(TIMM_NAMES[size], pretrained=False, num_classes=0),
    }
    return {name: model.to(device, torch.__dict__[dtype]).eval() for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["vits16", "vitb16"], choices=TIMM_NAMES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=20, help="time for each row of the table")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    rows = []
    for size in args.sizes:
        for dtype in args.dtypes:
            models = build(size, dtype, device)
            for batch in args.batches:
                images = torch.randn(batch, 3, args.image_size, args.image_size, device=device).to(
                    torch.__dict__[dtype]
                )
                with torch.inference_mode():
                    calls = {
                        "ours": partial(models["ours"], images),
                        "transformers": partial(models["transformers"], images),
                        "timm": partial(models["timm"].forward_features, images),
                    }
                    times = paired_times(calls, args.seconds)
                rows.append(
                    [size, dtype, str(batch)]
                    + [f"{1000 * times.median(name):.1f}" for name in calls]
                    + [times.ratio_text("ours", peer) for peer in ("transformers", "timm")]
                )
                print(*rows[-1])
    header = ["model", "dtype", "batch", "ours ms", "transformers ms", "timm ms", "ours / transformers", "ours / timm"]
    append_results("Forward, eager, inference mode", header, rows, ["transformers", "timm"])


if __name__ == "__main__":
    main()
