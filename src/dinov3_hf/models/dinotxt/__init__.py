"""dino.txt: a frozen DINOv3 backbone whose features are aligned with text."""
