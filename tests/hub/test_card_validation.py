"""Front matter is judged as the Hub judges it, without the Hub."""

import pytest

from dinov3_hf.hub.card_validation import LICENSES, PIPELINE_TAGS, check_model_card, read_metadata

INDEX = """
model-index:
- name: m
  results:
  - task: {type: image-classification}
    dataset: {type: digits, name: Digits}
    metrics: [{type: accuracy, value: %s}]
"""


def front(yaml: str) -> str:
    return f"---\n{yaml}\n---\n# Title\n"


@pytest.mark.parametrize(
    "yaml",
    [
        "license: apache-2.0",
        "license: other\nlicense_name: dinov3-license\nlicense_link: LICENSE.md",
        "language: en",
        "language: [en, de, zh-Hans, multilingual]",
        "tags: [a, b]\ndatasets: [me/pets]\nbase_model: me/other\npipeline_tag: image-feature-extraction",
        "anything: {of: the user}",
        INDEX % 0.9,
        INDEX % "'90.1 ± 0.3'",
    ],
)
def test_what_the_hub_takes(yaml):
    check_model_card(front(yaml))


def test_a_card_without_front_matter_is_one():
    check_model_card("# Title\n")
    assert read_metadata("# Title\n") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (front("a: [1"), r"front matter of README.md is no YAML \(while parsing"),
        (front("- a\n- b"), r"front matter of README.md is no YAML mapping"),
        (front("license: apache 2"), r"license 'apache 2' is none that the Hub knows; did you mean apache-2.0\?"),
        (front("license: mine"), r"write `license: other`"),
        (front("license: other"), r"license: other in README.md needs a license_name"),
        (front("license: [mit]"), r"license \['mit'\] of README.md is not a text"),
        (front("license: other\nlicense_name: 3"), r"license_name 3 of README.md is not a text"),
        (front("tags: [1, 2]"), r"tags \[1, 2\] of README.md is not a list of texts"),
        (front("tags: {a: b}"), r"tags .* of README.md is not a list of texts"),
        (front("datasets: 3"), r"datasets 3 of README.md is not a list of texts"),
        (
            front("pipeline_tag: image-features"),
            r"pipeline_tag 'image-features' .* did you mean image-feature-extraction",
        ),
        (front("language: English"), r"language 'English' of README.md is no code of ISO 639"),
        (front("language: no"), r"language False .* is no code"),  # YAML's no
        (front("model-index: []"), r"model-index of README.md"),
        (front("model-index:\n- name: m"), r"model-index of README.md lacks or misplaces 'results'"),
        (front(INDEX.replace("name: Digits", "id: 3") % 1), r"lacks or misplaces 'name'"),
        (front(INDEX % ".nan"), r"has NaN as accuracy"),
    ],
)
def test_what_the_hub_refuses(text, says):
    with pytest.raises(ValueError, match=says) as error:
        check_model_card(text)
    assert "\n" not in str(error.value)


def test_lists_have_what_is_used_here():
    assert {"apache-2.0", "other", "mit"} <= LICENSES
    assert "image-feature-extraction" in PIPELINE_TAGS
