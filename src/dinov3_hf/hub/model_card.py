"""The README.md of a model folder, written from what is known about the run."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

_TEMPLATE = """
# {title}

A {architecture} ({parameters:.1f} M parameters), pre-trained without labels by the objective of
[DINOv3](https://arxiv.org/abs/2508.10104) with `dinov3_hf`.

```python
from transformers import AutoImageProcessor, AutoModel

folder = "."  # where this file is, or the name of its repository on the Hub
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
```

The image processor asks for torchvision. `pooler_output` is the normalised CLS token, one feature an image;
`last_hidden_state` holds [CLS, {num_registers} register tokens, patch tokens].

| | |
|---|---|
{rows}

`heads.safetensors` holds the DINO and iBOT prototype heads of the teacher, which a continued training starts from.
"""


def write_model_card(
    folder: Path,
    title: str,
    architecture: str,
    num_parameters: int,
    num_registers: int,
    facts: Mapping[str, object],
) -> None:
    """
    Write `README.md` for a backbone folder.

    Args:
        folder: the model folder.
        title: of the card, for example the name of the run.
        architecture: for example "ViT with 12 blocks of width 384 and patches of 16 px".
        num_parameters: of the backbone.
        num_registers: register tokens of the backbone.
        facts: rows of the card's table, for example the recipe, the steps, the evaluation results.
    """
    content = _TEMPLATE.format(
        title=title,
        architecture=architecture,
        parameters=num_parameters / 1e6,
        num_registers=num_registers,
        rows="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-feature-extraction", tags=["dinov3", "self-supervised"]
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{content}").save(folder / "README.md")
