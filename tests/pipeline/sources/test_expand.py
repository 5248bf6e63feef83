from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cmae.errors import CmaeError
from cmae.pipeline.remote.schemes import is_local
from cmae.pipeline.sources import expand
from cmae.pipeline.sources.expand import expand_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train-000002.tar", "train-000000.tar", "train-000001.tar", "val-000000.tar"):
        (tmp_path / name).touch()
    for name in ("train-000000.index.npz", "classes.json"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.tar").touch()
    return tmp_path


def names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


def test_a_glob_gives_tar_files_only_and_sorted(folder: Path) -> None:
    expected = ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert names(expand_shards(f"{folder}/train-*")) == expected
    assert names(expand_shards(f"{folder}/**/*.tar")) == ["deep.tar", *expected, "val-000000.tar"]


def test_a_folder_stands_for_its_tars(folder: Path) -> None:
    assert len(expand_shards(folder)) == 4
    assert expand_shards(str(folder)) == expand_shards(f"{folder}/*.tar")


def test_braces_expand_as_ranges_and_lists_in_order(folder: Path) -> None:
    assert names(expand_shards(f"{folder}/{{val,train}}-{{000000..000000}}.tar")) == [
        "val-000000.tar",
        "train-000000.tar",
    ]
    assert names(expand_shards(f"{folder}/train-00000{{2..0}}.tar")) == [
        "train-000002.tar",
        "train-000001.tar",
        "train-000000.tar",
    ]


def test_a_list_keeps_its_order(folder: Path) -> None:
    listed = [folder / "val-000000.tar", f"{folder}/train-*.tar"]
    assert names(expand_shards(listed))[:2] == ["val-000000.tar", "train-000000.tar"]


def test_urls_are_kept_and_only_their_braces_expand() -> None:
    assert expand_shards("https://host/a-{08..10}.tar?x=*") == [
        "https://host/a-08.tar?x=*",
        "https://host/a-09.tar?x=*",
        "https://host/a-10.tar?x=*",
    ]
    pipe = "pipe:aws s3 cp s3://bucket/a.tar - | awk '{print}'"
    assert expand_shards(pipe) == [pipe]


def test_local_files_are_told_from_urls(folder: Path) -> None:
    assert is_local("/data/a.tar")
    assert is_local("data/a:b.tar")
    assert is_local(expand_shards(f"file://{folder}/val-000000.tar")[0])
    assert not any(map(is_local, ["pipe:cat a.tar", "s3://b/a.tar", "http://h/a.tar"]))


def test_a_file_name_with_brackets_is_found(tmp_path: Path) -> None:
    (tmp_path / "a[1].tar").touch()
    assert names(expand_shards(f"{tmp_path}/a[1].tar")) == ["a[1].tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing-*.tar", r"nothing-\*\.tar' matches nothing; .* is the last part that exists"),
        ("no/such/a.tar", "matches nothing"),
        ("train-{000000..000009}.tar", r"7 of 10 files are missing, such as .*000003\.tar"),
        ("empty", "it is empty"),
    ],
)
def test_what_is_missing_is_named(folder: Path, pattern: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        expand_shards(f"{folder}/{pattern}")


def test_a_folder_without_tars_says_what_it_holds(folder: Path) -> None:
    (folder / "sub" / "deep.tar").rename(folder / "sub" / "deep.zip")
    with pytest.raises(ValueError, match=r"holds no \.tar file, only deep\.zip"):
        expand_shards(folder / "sub")


def test_a_shard_listed_twice_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"lists 3 file\(s\) twice.*train-000000\.tar"):
        expand_shards([str(folder), f"{folder}/train-*.tar"])


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="empty list"):
        expand_shards([])


def test_compressed_tars_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    for pattern in (tmp_path, tmp_path / "a.tar.gz", f"{tmp_path}/*", "https://host/a.tgz?x=1"):
        with pytest.raises(ValueError, match=r"1 compressed tar.*unpack them"):
            expand_shards(pattern)
    assert expand_shards("pipe:gunzip -c a.tar.gz") == ["pipe:gunzip -c a.tar.gz"]


def test_compressed_tars_beside_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar.gz").touch()
    (tmp_path / "b.tar").touch()
    assert names(expand_shards(tmp_path)) == ["b.tar"]
    assert "1 compressed tar(s) such as a.tar.gz are not read" in caplog.text


@pytest.mark.parametrize(
    "pattern",
    ["x-{000000000..999999999}.tar", "{0..999}{0..999}{0..99}.tar", "{1..9" + "9" * 5000 + "}"],
)
def test_braces_that_name_too_many_files_are_refused_before_they_are_made(pattern: str) -> None:
    with pytest.raises(ValueError, match="names more than"):
        expand_shards(pattern)


@pytest.mark.parametrize("start", ["x-", "http://h/x-"])
def test_a_range_whose_ends_are_braces_is_bounded(start: str) -> None:
    with pytest.raises(CmaeError, match=r"names more than|are missing"):
        expand_shards(start + "{{1,2}..{3,999999999999}}.tar")
    with pytest.raises(CmaeError, match="more than 18 digits"):
        expand_shards(start + "{{1,2}..{3," + "9" * 5000 + "}}.tar")


def test_the_search_for_missing_files_ends_before_all_names_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = 0

    def counted(text: str) -> Iterator[str]:
        nonlocal made
        for name in expand_braces(text):
            made += 1
            yield name

    expand_braces = expand._expand_braces
    monkeypatch.setattr(expand, "_expand_braces", counted)
    with pytest.raises(CmaeError, match="others were not looked for"):
        expand_shards("-{000..003}.-{" * 9 + "s}n-y000..{000..00" * 4 + "}.tar")
    assert made < 4**9, "all 262,144 names"


def test_no_file_name_is_taken_for_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipe:touch x;.tar").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for pattern in ("*.tar", "file:pipe:touch x;.tar", "file:*.tar"):
        assert expand_shards(pattern) == ["./pipe:touch x;.tar"]
    with pytest.raises(CmaeError, match="matches nothing"):
        expand_shards("file:pipe:touch y")


def test_shards_that_are_listed_twice_are_named_without_secrets() -> None:
    for url in ("https://h/a.tar?k=SECRET", "pipe:curl SECRET"):
        with pytest.raises(CmaeError, match="twice") as caught:
            expand_shards([url, url])
        assert "SECRET" not in str(caught.value)


def test_a_name_too_long_for_the_file_system_is_an_error_of_its_pattern(tmp_path):
    with pytest.raises(CmaeError, match=r"cannot be looked up .File name too long"):
        expand_shards(str(tmp_path / ("x" * 5000 + ".tar")))
