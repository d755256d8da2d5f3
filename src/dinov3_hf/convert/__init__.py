"""Key tables and converters between the original checkpoints and the file format of the Hugging Face Hub."""
