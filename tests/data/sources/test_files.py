"""Patterns name the files that the shell would; the words in file names tell the splits."""

from pathlib import Path

import pytest

from dinov3_hf.data.sources.base import NoSuchSplit
from dinov3_hf.data.sources.files import expand_braces, files_of_split, matching_files


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plain.tar", ["plain.tar"]),
        ("s-{008..011}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("s-{9..10}.tar", ["s-9.tar", "s-10.tar"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{x,{0..1}}", ["x", "0", "1"]),
    ],
)
def test_braces(pattern, expected):
    assert sorted(expand_braces(pattern)) == sorted(expected)


@pytest.mark.parametrize("pattern", ["a{0..3", "a0..3}", "a{}", "a{3..0}", "a{x}"])
def test_braces_that_mean_nothing(pattern):
    with pytest.raises(ValueError, match="brace"):
        expand_braces(pattern)


def test_matching_files(tmp_path, monkeypatch):
    for name in ("a/1.tar", "a/2.tar", "b/c/3.tar", "a/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [str(path) for path in matching_files("a/*.tar")] == ["a/1.tar", "a/2.tar"]
    assert matching_files("~/a/{2..2}.tar") == [tmp_path / "a" / "2.tar"]
    assert matching_files(str(tmp_path / "**" / "*.tar")) == [
        tmp_path / name for name in ("a/1.tar", "a/2.tar", "b/c/3.tar")
    ]
    with pytest.raises(FileNotFoundError, match=r"no file matches a/3\.tar"):
        matching_files("a/{1..3}.tar")
    with pytest.raises(FileNotFoundError, match=r"no file matches b/\*\.tar"):
        matching_files("b/*.tar")


def test_splits_by_the_words_in_file_names():
    files = [Path(name) for name in ("x_train-0.parquet", "x_train-1.parquet", "X-Validation.parquet", "training.md")]
    assert files_of_split(files, "train", None, "x") == files[:2]
    assert files_of_split(files, "test", None, "x") == [files[2]]
    assert files_of_split(files, None, None, "x") == files
    assert files_of_split(files, None, "validation", "x") == [files[2]]
    with pytest.raises(NoSuchSplit, match="x has no split dev: no file with that word"):
        files_of_split(files, None, "dev", "x")


def test_files_of_one_word_have_no_splits():
    files = [Path("a_val-0.tar"), Path("a_val-1.tar")]
    assert files_of_split(files, "train", None, "a_val-*.tar") == files
    with pytest.raises(NoSuchSplit, match="has no test images: no file with the word test or val or validation"):
        files_of_split(files, "test", None, "a_val-*.tar")
    unmarked = [Path("a.tar"), Path("test.tar")]
    assert files_of_split(unmarked, "train", None, "x") == unmarked[:1]
    assert files_of_split(unmarked, "test", None, "x") == unmarked[1:]
