"""CLIP's byte-pair encoding as dino.txt uses it: text is repaired and put into lower case, then cut into pieces."""

import gzip
import html
import json
import os
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig
from dinov3_hf.models.remote_code import RemoteCodeMixin, remote_name, write_code

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
# Entries of the published vocabulary file that are used; the file goes on.
NUM_MERGES = 49152 - 256 - 2
_SUFFIX = "</w>"  # of a piece that ends a word
# Words, single digits, runs of anything else; a contraction's end is a word of its own.
_WORDS = r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class DinoTxtTokenizer(RemoteCodeMixin, PreTrainedTokenizerFast):
    """
    Text to ids: the start, the text's pieces, the end, and zeros up to the length of the batch.

    Text beyond plain ASCII is repaired first by ftfy, which therefore has to be installed for it.

    The padding id 0 is that of "!", an ordinary piece: it is not among the special tokens. There is no attention mask.
    """

    model_input_names = ["input_ids"]
    # What tokenizer_config.json says, so that transformers finds this class without our package.
    _auto_map = {"AutoTokenizer": [None, remote_name("DinoTxtTokenizer")]}

    pad_token = "!"
    pad_token_id = 0

    @classmethod
    def from_vocabulary(cls, source: str | os.PathLike[str]) -> "DinoTxtTokenizer":
        """
        Args:
            source: CLIP's vocabulary file `bpe_simple_vocab_16e6.txt.gz` (packed or not), or a folder with a CLIP
                tokenizer of transformers: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no vocabulary of CLIP.
        """
        vocabulary, merges = read_vocabulary(Path(source))
        return cls(
            tokenizer_object=build_backend(vocabulary, merges),
            bos_token=START,
            eos_token=END,
            unk_token=END,
            model_max_length=CONTEXT_LENGTH,
            padding_side="right",
            clean_up_tokenization_spaces=False,
        )

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        return super()._encode_plus(_cleaned(text), None if text_pair is None else _cleaned(text_pair), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Save as [`PreTrainedTokenizerFast.save_pretrained`] does, after the code that opens it elsewhere."""
        modules = (DinoTxtConfig.remote_code_module, *DinoTxtConfig.remote_code_beside)
        write_code(save_directory, DinoTxtTokenizer.__module__.rpartition(".")[0], modules)
        # Padding of the last call would be saved, and make "!" a special token of whoever reads it.
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        files: tuple[str, ...] = super().save_pretrained(save_directory, *args, **kwargs)
        return files


def clean(text: str) -> str:
    """
    Repair encoding, resolve HTML entities twice, make white space single blanks, put into lower case.

    Raises:
        ImportError: The text is one that ftfy may change, and ftfy is not installed.
    """
    # ftfy leaves printable ASCII as it is, but for HTML entities, which may stand for anything.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        try:
            text = import_module("ftfy").fix_text(text)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{text[:40]!r} has characters beyond plain ASCII, which ftfy repairs, and ftfy is not installed; "
                "pip install ftfy."
            ) from error
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def read_vocabulary(source: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """
    Pieces with their ids, and pairs of pieces in the order in which they are merged.

    Raises:
        FileNotFoundError, ValueError: As `DinoTxtTokenizer.from_vocabulary`.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist; give CLIP's bpe_simple_vocab_16e6.txt.gz or a folder with a CLIP tokenizer."
        )
    if not source.is_dir():
        packed = source.read_bytes()
        text = gzip.decompress(packed) if packed.startswith(b"\x1f\x8b") else packed
        merges = _parse_merges(text.decode("utf-8"), source)[:NUM_MERGES]
        letters = byte_letters()
        pieces = chain(letters, (f"{letter}{_SUFFIX}" for letter in letters), map("".join, merges), (START, END))
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
    elif (source / "tokenizer.json").exists():
        model = json.loads((source / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
        vocabulary = model.get("vocab", {})
        pairs = model.get("merges", [])
        merges = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in pairs]
    elif (source / "vocab.json").exists() and (source / "merges.txt").exists():
        vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
        merges = _parse_merges((source / "merges.txt").read_text(encoding="utf-8"), source)
    else:
        raise FileNotFoundError(f"{source} has neither tokenizer.json nor vocab.json and merges.txt; give another.")
    if START not in vocabulary or END not in vocabulary or f"a{_SUFFIX}" not in vocabulary or not merges:
        raise ValueError(f"{source} holds no vocabulary of CLIP; give its file or a folder with a CLIP tokenizer.")
    if vocabulary[END] != max(vocabulary.values()) or vocabulary.get("!") != 0:
        raise ValueError(f"{source}: {END} has not the highest id, or '!' not the lowest; give CLIP's own vocabulary.")
    return vocabulary, merges


def build_backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer of `tokenizers`, for text that `clean` has gone over."""
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=_SUFFIX,
            fuse_unk=False,
            unk_token=END,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # The end of a word becomes a blank: as the letter that stands for a blank's byte, before bytes are read.
    backend.decoder = decoders.Sequence([decoders.Replace(Regex(f"{_SUFFIX}$"), "Ġ"), decoders.ByteLevel()])
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in (START, END)])
    ids = [(token, vocabulary[token]) for token in (START, END)]
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return backend


def byte_letters() -> list[str]:
    """The letter that stands for each byte, in the order of their ids: printable ones for themselves, first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(letter) for letter in chain(printable, range(256, 256 + num_others))]


def _parse_merges(text: str, source: Path) -> list[tuple[str, str]]:
    """The first line is a heading."""
    pairs = [line.split() for line in text.split("\n")[1:] if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{source} has a line that is no pair of pieces; give CLIP's vocabulary file.")
    return [(first, second) for first, second in pairs]


def _cleaned(text: Any) -> Any:
    """A text, or texts in lists of any depth."""
    return clean(text) if isinstance(text, str) else [_cleaned(each) for each in text]
