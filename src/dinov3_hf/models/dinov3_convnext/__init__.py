"""The DINOv3 ConvNeXt, in the file format of the Hugging Face Hub."""
