"""The DINOv3 vision transformer, in the file format of the Hugging Face Hub."""
