from __future__ import annotations

import os
from pathlib import Path

import pytest

from knowstore.config import SplitConfig
from knowstore.sources import Source, find_sources, read_passages


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def names_of(sources: list[Source], folder: Path) -> list[str]:
    return [source.path.relative_to(folder.resolve()).as_posix() for source in sources if source.path]


def test_a_folder_gives_its_known_files_in_depth_sorted_without_hidden_ones(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/c.MD", "a/d.csv.gz", "e.exe", ".hidden.txt", ".git/f.txt", "g", "h.gz")
    sources, failures = find_sources([str(tmp_path)])
    assert names_of(sources, tmp_path) == ["a/c.MD", "a/d.csv.gz", "b.txt"]
    assert failures == []


def test_the_name_of_a_source_is_its_absolute_path_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/b.txt")
    monkeypatch.chdir(tmp_path)
    sources, failures = find_sources(["a/b.txt", "a/../a/b.txt", str(tmp_path / "a"), "a/*.txt"])
    assert [source.name for source in sources] == [(tmp_path / "a/b.txt").resolve().as_posix()]
    assert failures == []


def test_patterns_match_files_and_two_stars_match_any_folders(tmp_path: Path) -> None:
    make(tmp_path, "a/1.txt", "a/b/2.txt", "a/b/c/3.txt", "a/b/4.md", "a/.h/5.txt")
    assert names_of(find_sources([f"{tmp_path}/a/*.txt"])[0], tmp_path) == ["a/1.txt"]
    assert names_of(find_sources([f"{tmp_path}/a/**/*.txt"])[0], tmp_path) == ["a/1.txt", "a/b/2.txt", "a/b/c/3.txt"]
    assert names_of(find_sources([f"{tmp_path}/a/?/[34].*"])[0], tmp_path) == ["a/b/4.md"]
    assert names_of(find_sources([f"{tmp_path}/*/b"])[0], tmp_path) == ["a/b/2.txt", "a/b/4.md", "a/b/c/3.txt"]
    assert names_of(find_sources([f"{tmp_path}/*"])[0], tmp_path) == [
        "a/1.txt",
        "a/b/2.txt",
        "a/b/4.md",
        "a/b/c/3.txt",
    ]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt")
    assert names_of(find_sources([f"{tmp_path}/a[1].txt"])[0], tmp_path) == ["a[1].txt"]


def test_a_dash_is_stdin_and_comes_once() -> None:
    assert find_sources(["-", "-"]) == ([Source("-", None)], [])


def test_loops_of_links_end_and_linked_files_come_once(tmp_path: Path) -> None:
    make(tmp_path, "a/1.txt")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a/here").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "same.txt").symlink_to(tmp_path / "a/1.txt")
    for path in (str(tmp_path), f"{tmp_path}/**/*.txt", f"{tmp_path}/**"):
        sources, failures = find_sources([path])
        assert names_of(sources, tmp_path) == ["a/1.txt"]
        assert failures == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.txt", "does not exist"),
        ("*.nothing", "matches no file"),
        ("empty", "the folder has no file of a known suffix"),
        ("broken.txt", "leads nowhere"),
        ("circle.txt", "in a circle"),
        ("file.txt/below.txt", "cannot be opened"),
        ("nul\0.txt", "cannot be a path"),
    ],
)
def test_what_cannot_be_listed_is_reported_and_the_rest_is_listed(tmp_path: Path, path: str, reason: str) -> None:
    make(tmp_path, "file.txt", "empty/readme")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "circle.txt").symlink_to(tmp_path / "circle.txt")
    sources, [failure] = find_sources([str(tmp_path / path), str(tmp_path / "file.txt")])
    assert names_of(sources, tmp_path) == ["file.txt"]
    assert failure.source == str(tmp_path / path)
    assert reason in failure.error


def test_a_link_says_what_a_target_without_a_suffix_is(tmp_path: Path) -> None:
    make(tmp_path, "blobs/abc123", "blobs/plain.md", "snap/other.txt")
    (tmp_path / "snap" / "some-notes.txt").symlink_to("../blobs/abc123")
    (tmp_path / "snap" / "linked.txt").symlink_to("../blobs/plain.md")
    sources, failures = find_sources([str(tmp_path / "snap")])
    assert failures == []
    assert [(Path(one.name).name, one.shown and one.shown.name) for one in sources] == [
        ("plain.md", None), ("other.txt", None), ("abc123", "some-notes.txt")
    ]  # fmt: skip
    [passage] = read_passages(sources[2], split=SplitConfig(), columns=None, on_failure=pytest.fail)
    assert (passage.title, passage.source) == ("some notes", (tmp_path / "blobs" / "abc123").as_posix())


def test_an_empty_path_is_reported() -> None:
    sources, [failure] = find_sources([""])
    assert (sources, failure.error) == ([], "the path is empty")


def test_a_name_that_is_not_utf8_becomes_one_that_can_be_stored(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    [source], _ = find_sources([str(tmp_path)])
    assert source.name.endswith("/caf\\xe9.txt")
    assert source.path is not None
    assert source.path.read_text() == "text"


def test_broken_links_inside_a_folder_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "c.txt")
    sources, failures = find_sources([str(tmp_path)])
    assert names_of(sources, tmp_path) == ["a.txt"]
    assert [Path(failure.source).name for failure in failures] == ["b.txt", "c.txt"]


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    sources, [failure] = find_sources([str(tmp_path)])
    assert names_of(sources, tmp_path) == ["a.txt"]
    assert failure.source.endswith("locked")
    assert "Permission denied" in failure.error
