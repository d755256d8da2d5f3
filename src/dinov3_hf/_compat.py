"""What differs between the supported versions of transformers, each with the condition for its removal."""

import dataclasses

from transformers import TrainingArguments

# Version 5.23 calls the field `gradient_checkpointing` `activation_checkpointing` and warns about the old name. Remove
# when the oldest supported version has the new name; the fields of ours are then renamed too.
HAS_ACTIVATION_CHECKPOINTING = "activation_checkpointing" in {f.name for f in dataclasses.fields(TrainingArguments)}
