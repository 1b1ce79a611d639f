"""Inputs to slides, their output names, and failures that stay with their slide."""

import os
import zlib
from pathlib import Path

import pytest

from wsiseg.errors import LeaseLostError, SlideError, UsageError
from wsiseg.inference.cohort import Outcome, Task, collect, keep_stems, run_tasks
from wsiseg.names import LONGEST_STEM

SUFFIXES = frozenset({".svs", ".tif", ".png"})


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(tasks: list[Task], root: Path) -> list[str]:
    return [t.path.relative_to(root).as_posix() for t in tasks]


def test_a_folder_gives_its_slides_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "A.TIF", ".c.svs", "notes.txt", "deep/d.svs", ".hidden/e.svs")
    touch(tmp_path, "b.mask.ome.tif", "b.overview.png")
    tasks = collect([str(tmp_path)], suffixes=SUFFIXES)
    assert names(tasks, tmp_path) == ["A.TIF", "b.svs"]
    assert [t.stem for t in tasks] == ["A", "b"]


def test_a_folder_without_slides_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "notes.md")
    with pytest.raises(UsageError, match=r"no slide in this folder; slides end in .png .svs .tif"):
        collect([str(tmp_path)], suffixes=SUFFIXES)


def test_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "b1.svs", "b2.svs", "b3.txt", "deep/b4.svs", ".b5.svs")
    found = collect([str(tmp_path / "b*")], suffixes=SUFFIXES)
    assert names(found, tmp_path) == ["b1.svs", "b2.svs"]
    found = collect([str(tmp_path / "**" / "*.svs")], suffixes=SUFFIXES)
    assert names(found, tmp_path) == ["b1.svs", "b2.svs", "deep/b4.svs"]
    with pytest.raises(UsageError, match="no slide matches"):
        collect([str(tmp_path / "x*")], suffixes=SUFFIXES)
    with pytest.raises(UsageError, match=r"gone.svs: no such file or folder"):
        collect([str(tmp_path / "gone.svs")], suffixes=SUFFIXES)


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].svs")
    assert names(collect([str(tmp_path / "a[1].svs")], suffixes=SUFFIXES), tmp_path) == ["a[1].svs"]


def test_text_lists(tmp_path: Path) -> None:
    touch(tmp_path, "slides/a.svs", "b#2.svs")
    path = tmp_path / "list.txt"
    path.write_text("\ufeff# all of them\nslides/a.svs  # the first\n\nb#2.svs\ngone.svs\n")
    tasks = collect([str(path)], suffixes=SUFFIXES)
    assert names(tasks, tmp_path) == ["slides/a.svs", "b#2.svs", "gone.svs"]
    path.write_text("# nothing\n")
    with pytest.raises(UsageError, match="names no slide"):
        collect([str(path)], suffixes=SUFFIXES)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read the list"):
        collect([str(path)], suffixes=SUFFIXES)


def test_names_in_lists_may_have_a_hash_and_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "Case #12/a.svs", "Case", "home/b.svs")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "list.txt"
    path.write_text("Case #12/a.svs\n~/b.svs # at home\n#12/a.svs\n")
    tasks = collect([str(path)], suffixes=SUFFIXES)
    assert names(tasks, tmp_path) == ["Case #12/a.svs", "home/b.svs"]
    table = tmp_path / "table.csv"
    table.write_text("path,tissue\n~/b.svs,~/mask.png\n")
    assert collect([str(table)], suffixes=SUFFIXES) == [
        Task(tmp_path / "home/b.svs", "b", None, str(tmp_path / "home/mask.png"))
    ]


def test_patterns_in_a_folder_with_brackets(tmp_path: Path) -> None:
    touch(tmp_path, "b [old]/a.svs", "b [old]/deep/c.svs", "b o/no.svs")
    found = collect([str(tmp_path / "b [old]" / "*.svs")], suffixes=SUFFIXES)
    assert names(found, tmp_path) == ["b [old]/a.svs"]
    found = collect([str(tmp_path / "b [old]" / "**" / "*.svs")], suffixes=SUFFIXES)
    assert names(found, tmp_path) == ["b [old]/a.svs", "b [old]/deep/c.svs"]
    found = collect([str(tmp_path / "b [o]" / "*.svs")], suffixes=SUFFIXES)
    assert names(found, tmp_path) == ["b o/no.svs"]


def test_previews_beside_a_slide_are_left_out_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "case1.svs", "Case1.png", "other.png")
    with pytest.warns(UserWarning, match=r"Case1\.png: left out, .* a picture of case1\.svs"):
        found = collect([str(tmp_path)], suffixes=SUFFIXES)
    assert names(found, tmp_path) == ["case1.svs", "other.png"]
    assert [t.stem for t in found] == ["case1", "other"]
    named = collect([str(tmp_path / "Case1.png")], suffixes=SUFFIXES)
    assert names(named, tmp_path) == ["Case1.png"]


def test_the_parts_of_a_vms_slide_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.vms", "a(1,0).jpg", "a_map2.jpg", "b.jpg", "a-B.jpg", "a2.svs")
    with pytest.warns(UserWarning, match=r"left out, .* a picture of a\.vms") as said:
        found = collect([str(tmp_path)], suffixes=SUFFIXES | {".vms", ".jpg"})
    assert len(said) == 2
    assert names(found, tmp_path) == ["a-B.jpg", "a.vms", "a2.svs", "b.jpg"]


def test_dicom_files_are_known_without_a_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "notes")
    (tmp_path / "1.2.840.1").write_bytes(bytes(128) + b"DICM" + bytes(8))
    found = collect([str(tmp_path)], suffixes=SUFFIXES | {".dcm"})
    assert names(found, tmp_path) == ["1.2.840.1"]
    with pytest.raises(UsageError, match="no slide in this folder"):
        collect([str(tmp_path)], suffixes=SUFFIXES)


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('path, mpp ,tissue\na.svs,0.25,\n"b, c.svs",,masks/b.png\nd.svs,,none\n')
    assert collect([str(path)], suffixes=SUFFIXES) == [
        Task(tmp_path / "a.svs", "a", 0.25, None),
        Task(tmp_path / "b, c.svs", "b, c", None, str(tmp_path / "masks/b.png")),
        Task(tmp_path / "d.svs", "d", None, "none"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.svs\nb.svs\n", "the first line must name the columns"),
        ("path,mppx\na.svs,1\n", "the first line must name the columns"),
        ("", "the first line must name the columns"),
        ("path,mpp\n", "names no slide"),
        ("path,mpp\na.svs,half\n", "line 2: mpp 'half' is not a number"),
        ("path,mpp\na.svs,1,2\n", "line 2: not one cell a column"),
        ("path,mpp\n,1\n", "line 2: not one cell a column"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        collect([str(path)], suffixes=SUFFIXES)


def test_inputs_that_cannot_be_looked_at(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('path\n"' + "a.svs\n" * 40_000)
    with pytest.raises(UsageError, match="not a table"):
        collect([str(table)], suffixes=SUFFIXES)
    with pytest.raises(UsageError, match="~nobody-has-this-name"):
        collect(["~nobody-has-this-name/a.svs"], suffixes=SUFFIXES)
    with pytest.raises(UsageError, match="cannot be looked at"):
        collect([str(tmp_path / ("a" * 300 + ".svs"))], suffixes=SUFFIXES)


def test_stems_are_what_every_file_can_be_called(tmp_path: Path) -> None:
    odd = [os.fsdecode(b"gr\xf6sse"), "a" * 230, "a" * 229 + "b", "gr\u00f6sse"]
    touch(tmp_path, *(f"{name}.svs" for name in odd))
    stems = {t.path.stem: t.stem for t in collect([str(tmp_path)], suffixes=SUFFIXES)}
    assert stems[odd[3]] == odd[3]
    assert len(set(stems.values())) == 4
    for stem in stems.values():
        assert len(stem.encode()) <= LONGEST_STEM
        assert "\\" not in stem
    assert stems[odd[0]].startswith("gr_udcf6sse-")


def test_each_slide_once_and_shared_stems_get_a_digest(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.svs", "two/A.tif", "b.ome.tif", "c.d.svs")
    inputs = [str(tmp_path / n) for n in ("one/a.svs", "two", "b.ome.tif", "c.d.svs", "one")]
    tasks = collect(inputs, suffixes=SUFFIXES)
    assert names(tasks, tmp_path) == ["one/a.svs", "two/A.tif", "b.ome.tif", "c.d.svs"]
    stems = [t.stem for t in tasks]
    assert stems[2:] == ["b", "c.d"]
    assert stems[0].startswith("a-")
    assert stems[1].startswith("A-")
    assert stems[0][2:] != stems[1][2:]
    assert len(stems[0]) == len("a-") + 8
    assert [t.stem for t in collect(inputs, suffixes=SUFFIXES)] == stems


@pytest.mark.parametrize(
    ("name", "stem"), [("..png", "png"), ("...x.png", "...x"), ("..", "slide"), (".tif", ".tif")]
)
def test_names_of_dots_give_outputs_a_name(tmp_path: Path, name: str, stem: str) -> None:
    table = tmp_path / "slides.txt"
    table.write_text(f"folder/{name}\n")
    assert [t.stem for t in collect([str(table)], suffixes=SUFFIXES)] == [stem]


def test_one_failure_does_not_stop_the_others() -> None:
    errors = {
        "a": SlideError("a.svs: broken"),
        "e": zlib.error("bad stream"),
        "f": KeyError("tag"),
        "g": LeaseLostError("g.lock: lost"),
        "b": OSError(28, "No space left on device"),
        "c": RuntimeError("CUDA error: bad\nmore\nlines"),
        "d": MemoryError(),
    }
    done = []

    def work(task: Task) -> Outcome:
        if task.stem in errors:
            raise errors[task.stem]
        done.append(task.stem)
        return Outcome(task, "ok")

    tasks = [Task(Path(f"{s}.svs"), s) for s in "abxcdyefg"]
    results = list(run_tasks(tasks, work))
    assert done == ["x", "y"]
    statuses = [r.status for r in results if r is not None]
    failed = "failed"
    assert statuses[:6] == [failed, failed, "ok", failed, failed, "ok"]
    assert statuses[6:] == [failed, failed, "running elsewhere"]
    reasons = [r.error for r in results if r is not None and r.error]
    assert reasons[0] == "a.svs: broken"
    assert reasons[1] == "b.svs: No space left on device"
    assert reasons[2] == "c.svs: RuntimeError: CUDA error: bad"
    assert reasons[3].startswith("d.svs: out of memory")
    assert reasons[4:] == ["e.svs: error: bad stream", "f.svs: KeyError: 'tag'", "g.lock: lost"]


def test_the_names_of_the_files_of_the_run_are_not_taken(tmp_path: Path) -> None:
    touch(tmp_path, "run.svs", "runs.svs", "Run.ome.tif")
    stems = sorted(t.stem for t in collect([str(tmp_path)], suffixes=SUFFIXES))
    assert [len(s) for s in stems] == [12, 12, 4]
    assert stems[0].startswith("Run-")
    assert stems[1].startswith("run-")


def test_an_interruption_ends_the_run() -> None:
    def work(task: Task) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_tasks([Task(Path("a.svs"), "a")], work))


def test_links_to_nothing_are_not_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    (tmp_path / "gone.svs").symlink_to(tmp_path / "elsewhere.svs")
    for text in (str(tmp_path), str(tmp_path / "*.svs")):
        assert names(collect([text], suffixes=SUFFIXES), tmp_path) == ["a.svs", "gone.svs"]


def test_what_is_stated_of_a_slide_holds_wherever_else_it_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    table = tmp_path / "t.csv"
    table.write_text("path,mpp,tissue\na.svs,0.25,\n,,\nb.svs,,none\na.svs,,\n,,\n")
    tasks = collect([str(tmp_path), str(table)], suffixes=SUFFIXES)
    assert [(t.path.name, t.mpp, t.tissue) for t in tasks] == [
        ("a.svs", 0.25, None),
        ("b.svs", None, "none"),
    ]
    table.write_text("path,mpp\na.svs,0.25\na.svs,0.5\n")
    with pytest.raises(UsageError, match=r"a.svs: stands twice in lists, with mpp 0.25 and 0.5"):
        collect([str(table)], suffixes=SUFFIXES)


def test_outputs_that_a_shell_names_among_slides_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.tif", "a.mask.ome.tif")
    paths = [str(tmp_path / "a.mask.ome.tif"), str(tmp_path / "a.tif")]
    with pytest.warns(UserWarning, match=r"a.mask.ome.tif: left out, by its name an output"):
        assert names(collect(paths, suffixes=SUFFIXES), tmp_path) == ["a.tif"]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(UsageError, match="give the slide"),
    ):
        collect(paths[:1], suffixes=SUFFIXES)


def test_an_input_that_is_empty_is_not_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.svs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="an INPUT is empty"):
        collect([""], suffixes=SUFFIXES)


def test_only_names_that_a_slide_could_have_are_kept(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.svs", "two/a.svs")
    both = collect([str(tmp_path / "one"), str(tmp_path / "two")], suffixes=SUFFIXES)
    (alone,) = collect([str(tmp_path / "one")], suffixes=SUFFIXES)
    path, other = (os.path.realpath(task.path) for task in both)
    assert [t.stem for t in keep_stems([alone], {path: both[0].stem})] == [both[0].stem]
    assert [t.stem for t in keep_stems(both, {path: "a"})] == ["a", both[1].stem]
    assert keep_stems(both, {path: "../a", other: "b"}) == both
    assert keep_stems(both, {path: "a", other: "a"}) == both
