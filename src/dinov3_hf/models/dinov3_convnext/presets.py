"""The released ConvNeXt sizes: name -> fields of `DINOv3ConvNextConfig`.

No imports, so that the command line can list the names without loading torch.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]},
    "convnext_small": {"depths": [3, 3, 27, 3], "hidden_sizes": [96, 192, 384, 768]},
    "convnext_base": {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]},
    "convnext_large": {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]},
}
