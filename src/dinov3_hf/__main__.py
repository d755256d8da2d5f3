"""`python -m dinov3_hf` is `dinov3-hf`."""

from dinov3_hf.cli.main import main

main()
