"""The tokenizer: its ids are those of CLIP's own program, wherever its vocabulary comes from."""

import gzip
import json
import random
import sys

import pytest
from transformers import CLIPTokenizer

from dinov3_hf.models.dinotxt.tokenization_dinotxt import (
    CONTEXT_LENGTH,
    END,
    START,
    DinoTxtTokenizer,
    byte_letters,
    clean,
    read_vocabulary,
)
from tests.clip_vocabulary import VOCABULARY


@pytest.fixture(scope="module")
def tokenizer() -> DinoTxtTokenizer:
    return DinoTxtTokenizer.from_vocabulary(VOCABULARY)


def ids_of(tokenizer, texts) -> list[list[int]]:
    return tokenizer(texts, padding="max_length", truncation=True)["input_ids"]


ALPHABET = (
    *"abcXYZ019 .,'!?-_&;#<>/\\|\"`",
    *("  ", "\t", "\n", "'s", "'RE", "&amp;", "&lt;", "&eacute;", "&#8220;", "it's", "don't", "Cat", "photo"),
    *(
        "é",
        "ß",
        "Σ",
        "ς",
        "İ",
        "\u0131",
        "\u017f",
        "ﬁ",
        "\uff21",
        "½",
        "²",
        "Ⅳ",
        "日",
        "本",
        "\u0627",
        "ह",
        "ि",
        "😀",
        "\u200d",
        "\u00a0",
    ),
    *("\u2019", "\u201c", "\u2028", "\ufeff", "\x07", "\x7f", "Ã©", "e\u0301", "\u0130", "한", "\U0001f468"),
)


def random_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(ALPHABET, k=generator.randint(0, 40))) for _ in range(count)]


def test_ids_of_random_texts_are_those_of_open_clip(tokenizer):
    """That program calls the two ends of a text differently, which none of these texts holds."""
    open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")
    texts = random_texts(1500)
    expected = open_clip_tokenizer.SimpleTokenizer()(texts).tolist()
    for text, ours, theirs in zip(texts, ids_of(tokenizer, texts), expected, strict=True):
        assert ours == theirs, repr(text)


def test_long_texts_are_cut_and_keep_their_end(tokenizer):
    ids = tokenizer("word " * 200, truncation=True)["input_ids"]
    assert len(ids) == CONTEXT_LENGTH and ids[-1] == tokenizer.eos_token_id and ids.count(ids[-1]) == 1


def test_an_exclamation_mark_is_text_though_its_id_is_padding(tokenizer, tmp_path):
    padded = tokenizer(["a!", "what is it ?"], padding=True, return_tensors="pt")
    assert padded["input_ids"].shape == (2, 6) and set(padded) == {"input_ids"}
    tokenizer.save_pretrained(tmp_path)  # after a call that padded
    for each in (tokenizer, DinoTxtTokenizer.from_pretrained(tmp_path)):
        assert "!" not in each.all_special_tokens and each.pad_token_id == 0
        assert each("!!! a!")["input_ids"] == [49406, 995, 320, 256, 49407]
        assert each.decode([256, 0], skip_special_tokens=True) == "! !"
        assert each.pad({"input_ids": [[1, 2], [3]]})["input_ids"] == [[1, 2], [3, 0]]


def test_every_source_of_the_vocabulary_is_the_same(tokenizer, tmp_path):
    unpacked = tmp_path / "vocabulary.txt"
    unpacked.write_bytes(gzip.decompress(VOCABULARY.read_bytes()))
    vocabulary, merges = read_vocabulary(VOCABULARY)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (tmp_path / "old" / "merges.txt").write_text("\n".join(lines))
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "ours")
    texts = random_texts(50, seed=1)
    expected = ids_of(tokenizer, texts)
    for name in ("vocabulary.txt", "old", "clip", "ours"):
        assert ids_of(DinoTxtTokenizer.from_vocabulary(tmp_path / name), texts) == expected, name


def test_sources_that_are_no_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give CLIP's"):
        read_vocabulary(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.json"):
        read_vocabulary(tmp_path)
    (tmp_path / "text").write_text("heading\nthree parts here\n")
    with pytest.raises(ValueError, match="no pair of pieces"):
        read_vocabulary(tmp_path / "text")
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}}')
    with pytest.raises(ValueError, match="holds no vocabulary of CLIP"):
        read_vocabulary(tmp_path)
    vocabulary = {START: 2, END: 1, "a</w>": 3, "!": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": ["a </w>"]}}))
    with pytest.raises(ValueError, match="has not the highest id"):
        read_vocabulary(tmp_path)


def test_plain_text_needs_no_ftfy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean("  A photo\tof  a CAT's toy. ".replace("\t", " ")) == "a photo of a cat's toy."
    for text in ("café", "a &amp; b", "a\tb"):
        with pytest.raises(ImportError, match="pip install ftfy"):
            clean(text)


def test_ftfy_leaves_plain_text_alone():
    import ftfy

    printable = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices(printable, k=12))
        assert ftfy.fix_text(text) == text


def test_bytes_have_256_letters():
    assert len(set(byte_letters())) == 256 and byte_letters()[0] == "!"
