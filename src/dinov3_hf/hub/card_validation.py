"""What the Hub demands of the front matter of a model card, checked without the Hub.

`huggingface_hub.ModelCard.validate` asks the Hub itself; the rules here are those of its documentation
(https://huggingface.co/docs/hub/model-cards), so that a card is refused before anything is created or sent.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

from dinov3_hf.errors import did_you_mean

OTHER = "other"
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses.
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
LICENSES = frozenset(_LICENSES.split())
# Tasks of vision models among https://huggingface.co/tasks.
_PIPELINE_TAGS = """
    image-feature-extraction image-classification image-segmentation object-detection depth-estimation mask-generation
    keypoint-detection zero-shot-image-classification zero-shot-object-detection feature-extraction image-to-image
    visual-document-retrieval video-classification any-to-any other
"""
PIPELINE_TAGS = frozenset(_PIPELINE_TAGS.split())
# ISO 639 codes have two or three letters; a region or script may follow.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_TEXT_LISTS = ("tags", "datasets", "metrics", "base_model")
_TEXTS = ("license", "license_name", "license_link", "library_name", "pipeline_tag")


def check_model_card(text: str) -> None:
    """
    Check the front matter of a model card.

    Args:
        text: of README.md.

    Raises:
        ValueError: it is no YAML mapping, a known field has a wrong type, the licence or the pipeline
            tag is not known, `license: other` has no `license_name`, or `model-index` lacks something.
    """
    check_metadata(read_metadata(text))


def read_metadata(text: str) -> dict[str, Any]:
    """
    The front matter of a model card, in plain types; empty where there is none.

    Raises:
        ValueError: it is no YAML mapping.
    """
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}
    try:
        metadata = yaml.safe_load(match[2])
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter of README.md is no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(metadata, dict):
        raise ValueError("the front matter of README.md is no YAML mapping; write for example `license: mit`.")
    return metadata


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """
    Check the fields of a front matter.

    Raises:
        ValueError: as `check_model_card` does.
    """
    for name in _TEXTS:
        if not isinstance(metadata.get(name, ""), str):
            raise _wrong(name, metadata[name], "a text")
    for name in _TEXT_LISTS:
        if not _are_texts(metadata.get(name, [])):
            raise _wrong(name, metadata[name], "a list of texts")
    if "license" in metadata:
        check_license(metadata["license"], metadata.get("license_name"))
    if "pipeline_tag" in metadata and metadata["pipeline_tag"] not in PIPELINE_TAGS:
        remedy = did_you_mean(metadata["pipeline_tag"], PIPELINE_TAGS)
        raise ValueError(f"pipeline_tag {metadata['pipeline_tag']!r} of README.md is none of the Hub's; {remedy}")
    languages = metadata.get("language", [])
    for language in languages if isinstance(languages, list) else [languages]:
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            raise ValueError(f"language {language!r} of README.md is no code of ISO 639; write for example en.")
    if "model-index" in metadata:
        _check_model_index(metadata["model-index"])


def check_license(license: str, license_name: str | None = None) -> None:
    """
    Check a licence identifier.

    Args:
        license: the identifier.
        license_name: of a licence that is none of the Hub's.

    Raises:
        ValueError: the Hub does not know it, or it is "other" without a name.
    """
    if license not in LICENSES:
        remedy = did_you_mean(
            license.lower(), LICENSES, "for one that is not in the Hub's list write `license: other`."
        )
        raise ValueError(f"license {license!r} is none that the Hub knows; {remedy}")
    if license == OTHER and not license_name:
        raise ValueError("license: other in README.md needs a license_name; add license_name and license_link.")


def _check_model_index(model_index: Any) -> None:
    if not model_index:
        raise ValueError("model-index of README.md is empty; leave it out.")
    try:
        _, results = model_index_to_eval_results(model_index)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"model-index of README.md lacks or misplaces {error}.") from error
    for result in results:
        fields = (result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(f"model-index of README.md names a task, data set or metric that is no text: {fields}.")
        if isinstance(result.metric_value, float) and result.metric_value != result.metric_value:
            raise ValueError(f"model-index of README.md has NaN as {result.metric_type}; leave it out.")


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name} {value!r} of README.md is not {expected}; correct its front matter.")
