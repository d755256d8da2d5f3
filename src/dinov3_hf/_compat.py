"""What differs between the supported versions of transformers, each with the condition for its removal."""

import dataclasses

from transformers import TrainingArguments

# Version 5.23 calls the field `gradient_checkpointing` `activation_checkpointing` and warns about the old name. Remove
# when the oldest supported version has the new name; the fields of ours are then renamed too.
HAS_ACTIVATION_CHECKPOINTING = "activation_checkpointing" in {f.name for f in dataclasses.fields(TrainingArguments)}


class UnseenByTrainer(str):
    """
    A text that is false. Where the field `gradient_checkpointing` is true, the Trainer of version 5.8 checkpoints
    whole blocks of all networks; `dinov3_hf.training.memory` does what the field says. Remove with the above.
    """

    def __bool__(self) -> bool:
        return False
