"""CLIP's vocabulary file, which the package open_clip_torch carries; nothing of that package is imported."""

from importlib.metadata import distribution
from pathlib import Path

VOCABULARY = Path(distribution("open_clip_torch").locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz"))
