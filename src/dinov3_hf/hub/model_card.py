"""The README.md of a model folder, from its configuration and from what is known about how it came to be.

The last line of a card that we wrote carries a checksum of the rest. While the two agree the card is ours to write
anew; once somebody has edited it, it stays.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from dinov3_hf.hub.architecture import Architecture, count_parameters, read_architecture, read_json
from dinov3_hf.hub.card_validation import OTHER, check_license, read_metadata

CARD = "README.md"
# The licence of the released weights, and of what is derived from them; the Hub has no identifier for it.
DINOV3_LICENSE = "dinov3-license"
_DINOV3_LICENSE_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
_RELEASED = re.compile(r"dinov3.*(lvd1689m|sat493m)")
# Files that a model folder may have besides what transformers reads.
_BESIDE = {
    "heads.safetensors": "the DINO and iBOT heads, from which a continued training starts",
    "extras.safetensors": "what acts in training only, and what a conversion back needs",
}
_SIGNATURE = re.compile(r"\n<!-- dinov3_hf (?P<checksum>[0-9a-f]{16}):[^\n]*-->\n?$")

_TEMPLATE = """
# {title}

A {architecture} ({parameters} parameters), the architecture of
[DINOv3](https://arxiv.org/abs/2508.10104).{provenance}

{facts}

## How to use it

{usage}

`pooler_output` is one feature an image, {pooled}; `last_hidden_state` holds
{tokens}. The image processor asks for torchvision.
{sections}
## What it is for

Features of images, used frozen: nearest neighbours, linear classification, retrieval, segmentation, depth, matching.
It has no classifier and knows no words. Test it on your own data before you rely on it.

## Limitations

- **Text in images.** Training has neither captions nor text: features are not made for reading what an image says.
  The [DINOv3 paper](https://arxiv.org/abs/2508.10104) measures road signs, logos and packages in appendix B.4.
- **Regions and incomes.** Accuracy is uneven. Of household objects in low, middle and high income homes the released
  7B model recognises 69.6, 85.7 and 90.9 %; in Africa, Asia, the Americas and Europe 76.7, 83.0, 88.0 and 90.7 % (the
  same paper, appendix B.5, table 26). Expect the like of other models trained on images from the web.

## Citation

```bibtex
@article{{simeoni2025dinov3,
  title={{DINOv3}},
  author={{Siméoni, Oriane and Vo, Huy V. and Seitzer, Maximilian and Baldassarre, Federico and others}},
  journal={{arXiv preprint arXiv:2508.10104}},
  year={{2025}}
}}
```
"""

# What the image processor takes, by the number of channels.
_IMAGES = {1: 'a grey PIL image (mode "L")', 3: "a PIL image"}
_WITH_TRANSFORMERS = """```python
from transformers import AutoImageProcessor, AutoModel

folder = "."  # where this file is, or the name of its repository on the Hub
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder{options})
outputs = model(**processor(images=image, return_tensors="pt"))  # image: {image}, or a list of them
```"""
_WITH_THIS_PACKAGE = """```python
from dinov3_hf import {model_class}

model = {model_class}.from_pretrained(folder)
```"""
_WITH_THIS_PACKAGE_ALONE = """```python
from dinov3_hf import {model_class}
from transformers import AutoImageProcessor

folder = "."  # where this file is, or the name of its repository on the Hub
processor = AutoImageProcessor.from_pretrained(folder)
model = {model_class}.from_pretrained(folder)
outputs = model(**processor(images=image, return_tensors="pt"))  # image: {image}, or a list of them
```"""


def write_model_card(
    folder: Path,
    *,
    title: str | None = None,
    license: str | None = None,
    provenance: str = "",
    sections: Mapping[str, str] | None = None,
    results: Sequence[EvalResult] = (),
    datasets: Sequence[str] = (),
) -> bool:
    """
    Write `README.md` for a model folder that has its `config.json` and weights already.

    Args:
        folder: the model folder.
        title: of the card; the folder's name by default.
        license: an identifier of the Hub's list, or `DINOV3_LICENSE` for what is derived from the released weights.
            None, where it is not known, leaves it out.
        provenance: one sentence on where the weights come from, for example "Converted from a.pth."
        sections: further sections, heading -> Markdown.
        results: measurements for the front matter.
        datasets: data sets of the Hub that the model was trained on.

    Returns:
        Whether the card was written; a card that somebody has edited is left alone.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: the Hub does not know the licence, or the folder holds no backbone.
    """
    if _has_edited_card(folder):
        return False
    card = model_card(
        folder,
        title=title or folder.resolve().name,
        license=license,
        provenance=provenance,
        sections=sections,
        results=results,
        datasets=datasets,
    )
    (folder / CARD).write_text(card, encoding="utf-8")
    return True


def model_card(
    folder: Path,
    *,
    title: str,
    license: str | None = None,
    provenance: str = "",
    sections: Mapping[str, str] | None = None,
    results: Sequence[EvalResult] = (),
    datasets: Sequence[str] = (),
) -> str:
    """The text of a card, with its signature; arguments as `write_model_card` has them."""
    network = read_architecture(folder)
    num_parameters, dtype = count_parameters(folder)
    metadata = {
        **license_fields(license),
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dinov3", "self-supervised", "arxiv:2508.10104"],
        "datasets": list(datasets) or None,
        "model-index": eval_results_to_model_index(title, list(results)) if results else None,
    }
    beside = {f"`{name}`": content for name, content in _BESIDE.items() if (folder / name).is_file()}
    facts = {"weights": dtype, **network.details, **_images(folder), **beside}
    body = _TEMPLATE.format(
        title=title,
        architecture=network.summary,
        parameters=_in_millions(num_parameters),
        provenance=f"\n{provenance}" if provenance else "",
        facts=table(facts),
        usage=_usage(network),
        pooled=network.pooled,
        tokens=network.tokens,
        sections="".join(f"\n## {heading}\n\n{text}\n" for heading, text in (sections or {}).items()),
    )
    return _signed(_front_matter(metadata) + body)


def keep_edited_card(old: Path, new: Path) -> None:
    """
    Before the model folder `new` replaces `old`: take over a card that somebody has edited.

    Args:
        old: need not exist.
        new: exists.
    """
    if _has_edited_card(old):
        shutil.copyfile(old / CARD, new / CARD)


def _has_edited_card(folder: Path) -> bool:
    path = folder / CARD
    # A card in another encoding than ours is somebody's own.
    return path.is_file() and not is_generated(path.read_text(encoding="utf-8", errors="replace"))


def is_generated(text: str) -> bool:
    """Whether a card is as we wrote it, to the letter."""
    match = _SIGNATURE.search(text)
    return match is not None and match["checksum"] == _checksum(text[: match.start()])


def with_license(text: str, license: str) -> str:
    """A card that we wrote, under another licence.

    Raises:
        ValueError: the Hub does not know the licence.
    """
    metadata = {name: value for name, value in read_metadata(text).items() if not name.startswith("license")}
    body = ModelCard(text).text
    return _signed(_front_matter(license_fields(license) | metadata) + _SIGNATURE.sub("", body))


def license_of(name: str) -> str | None:
    """
    The licence of weights by the name of their file or folder: known of the released ones, which say "dinov3" and the
    data that they were trained on, as in "dinov3_vits16_pretrain_lvd1689m-08c60483.pth".
    """
    return DINOV3_LICENSE if _RELEASED.search(name) else None


def license_fields(license: str | None) -> dict[str, Any]:
    """
    The front matter's fields for a licence.

    Raises:
        ValueError: the Hub does not know it.
    """
    if license is None:
        return {}
    if license == DINOV3_LICENSE:
        return {"license": OTHER, "license_name": DINOV3_LICENSE, "license_link": _DINOV3_LICENSE_LINK}
    check_license(license)
    return {"license": license}


def table(rows: Mapping[str, object]) -> str:
    """A Markdown table of two columns without headings."""
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _front_matter(metadata: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in metadata.items() if value is not None}
    return f"---\n{yaml_dump(fields, sort_keys=False)}---\n"


def _signed(text: str) -> str:
    unsigned = text.rstrip("\n")
    note = "written by the program; it leaves this card alone once anything in it is changed"
    return f"{unsigned}\n<!-- dinov3_hf {_checksum(unsigned)}: {note} -->\n"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _images(folder: Path) -> dict[str, object]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    processor = read_json(path)
    facts: dict[str, object] = {}
    match processor.get("size"):
        case {"height": height, "width": width}:
            facts["image size"] = f"{height} x {width} px; others work too"
        case {"shortest_edge": side}:
            facts["image size"] = f"{side} px, the short side; others work too"
    match processor:
        case {"image_mean": mean, "image_std": std}:
            facts["normalisation"] = f"mean {mean}, standard deviation {std}"
    return facts


def _usage(network: Architecture) -> str:
    ours = _WITH_THIS_PACKAGE.format(model_class=network.model_class)
    # The image processor recognises the channels of an array by their number, which is 1 or 3.
    others = f'with input_data_format="channels_first" a tensor ({network.num_channels}, height, width)'
    image = _IMAGES.get(network.num_channels, others)
    if network.is_stock:
        stock = _WITH_TRANSFORMERS.format(options="", image=image)
        return f"{stock}\n\nThe class of `dinov3_hf`, to train it further:\n\n{ours}"
    reason = "transformers has no class for this variant."
    if network.has_remote_code:
        stock = _WITH_TRANSFORMERS.format(options=", trust_remote_code=True", image=image)
        return f"{stock}\n\nThe code comes with the model: {reason} With `dinov3_hf` installed:\n\n{ours}"
    alone = _WITH_THIS_PACKAGE_ALONE.format(model_class=network.model_class, image=image)
    return f"Install `dinov3_hf`: {reason}\n\n{alone}"
