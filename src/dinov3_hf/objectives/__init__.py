"""The terms of the training objective: tensors in, scalar out."""
