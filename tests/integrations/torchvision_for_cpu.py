"""Makes torchvision's wheel for another torch, such as one with CUDA, importable for timm, fastai and Lightning.

Its operators cannot be loaded then, and it fails where it describes two of them. None of these tools uses any here.
"""

from torch import library

try:
    import torchvision
except ImportError:  # not installed
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision  # noqa: F401
