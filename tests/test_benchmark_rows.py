from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner, Result
from torch import nn

from wsiseg.canvas import Canvas
from wsiseg.errors import SlideError, WsisegError
from wsiseg.geometry import Box, Size
from wsiseg.inference.predict import PredictOptions
from wsiseg.models.base import Features
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.heads.fcn import FCN
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.slide import open_slide

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name: str) -> ModuleType:
    """A benchmark as a module, found as when it is run as a script."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def folder_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PathSegDiff with next to no channels, tiles of 32 px and windows of 96 px."""
    torch.manual_seed(0)
    config = ModelConfig(
        extractor={
            "name": "pathsegdiff",
            "encoder": {"dim": 8, "depth": 1, "heads": 1},
            "first_stage": {"channels": [4, 4, 8], "groups": 4, "codes": 8, "layers": 1},
            "unet": {"channels": [4, 4, 8, 8], "context_dim": 8, "groups": 4},
            "region_dim": 0,
            "tile_px": 32,
        },
        head={"name": "fcn", "widths": [16, 8, 4]},
        classes=module("stand_in_classes").CLASSES,
        mpp=1.0,
        window_px=96,
    )
    segmenter = build_segmenter(config)
    module("stand_ins").spread(segmenter)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(path, segmenter.eval(), card={}, licence="none")
    return path


def invoked(name: str, *arguments: object) -> Result:
    return CliRunner().invoke(module(name).main, [str(a) for a in arguments])


def numbers(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    assert {"row", "command", "date", "machine", "versions", "equal", "passed"} <= set(result)
    return result


def with_lazy_head(result: Segmenter) -> Segmenter:
    """The same model whose rewritten convolution has one wrong weight."""
    head = result.head
    assert isinstance(head, FCN)
    right = head.first_convolution

    def wrong(features: Features) -> torch.Tensor:
        out = right(features).clone()
        out[:, 0, 5, 5] += 10
        return out

    head.first_convolution = wrong  # type: ignore[method-assign]
    return result


def test_sharing(checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "sharing.json"
    result = invoked("sharing", "--model", checkpoint, "--tiles", 5, "--json", report)
    assert result.exit_code == 0, result.output
    found = numbers(report)
    assert found["equal"]
    assert "stride 64 px: 25 tiles evaluated, 25 distinct tiles" in found["compared"]
    ratios = [v for k, v in found["numbers"].items() if k.endswith("ratio of tiles")]
    assert ratios == [4 * 9 / 25, 9 * 9 / 25]
    assert [j["target"] for j in found["judged"]] == [0.95, 0.95]
    for judged, ratio in zip(found["judged"], ratios, strict=True):
        where = judged["what"].split(":")[0]
        gain = found["numbers"][f"{where}: gain in wall time"]
        assert judged["measured"] == pytest.approx(gain / ratio)


def test_sharing_with_features_that_depend_on_the_order_ends_with_1(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = module("sharing")
    segmenter = module("stand_ins").stand_in(str(checkpoint))
    right, calls = segmenter.tile_features, []

    def drifting(*arguments: Any) -> Features:
        calls.append(1)
        return tuple(maps + 1e-4 * len(calls) for maps in right(*arguments))

    monkeypatch.setattr(segmenter, "tile_features", drifting)
    monkeypatch.setattr(sharing, "stand_in", lambda name: segmenter)
    report = tmp_path / "sharing.json"
    result = invoked("sharing", "--tiles", 3, "--stride", 2, "--json", report)
    assert result.exit_code == 1
    assert "NOT EQUAL" in result.output
    found = numbers(report)
    assert not found["equal"]
    assert not found["passed"]
    assert found["judged"] == []


def test_head(checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "head.json"
    result = invoked("head", "--model", checkpoint, "--no-memory", "--json", report)
    assert result.exit_code == 0, result.output
    found = numbers(report)
    flops = {j["what"]: j for j in found["judged"]}["FLOPs, plain / rewritten"]
    segmenter = module("stand_ins").stand_in(str(checkpoint))
    shapes = [(s.channels, 96 // s.stride) for s in segmenter.map_specs]
    channels, side = sum(c for c, _ in shapes), 96 // 4
    plain = 2 * 9 * side * side * channels * 16
    rewritten = sum(2 * 9 * n * n * c * 16 for c, n in shapes)
    for n in {n for _, n in shapes if n != side}:  # upsampled along one axis, then the other
        rewritten += 2 * 16 * 3 * n * side * (3 * n + side)
    assert flops["measured"] == pytest.approx(plain / rewritten)
    assert found["numbers"]["plain, GFLOP"] == pytest.approx(plain / 1e9)
    largest = found["numbers"]["plain, largest tensor in MiB"]
    assert largest == pytest.approx(4 * channels * side * side / (1 << 20))


def test_a_wrong_weight_of_the_head_ends_with_1(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = with_lazy_head(module("stand_ins").stand_in(str(checkpoint)))
    monkeypatch.setattr(module("head"), "stand_in", lambda name: segmenter)
    result = invoked("head", "--no-memory")
    assert result.exit_code == 1
    assert "NOT EQUAL" in result.output
    assert "FLOPs" not in result.output


def test_literal(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "literal.json"
    result = invoked("literal", "--model", checkpoint, "--tiles", 4, "--json", report)
    assert result.exit_code == 0, result.output
    found = numbers(report)
    assert len(found["compared"]) == 2
    assert all(text.endswith("0 of them by more than a tie") for text in found["compared"])
    assert all(found["numbers"][k] > 1 for k in found["numbers"] if k.endswith("classes seen"))
    assert found["judged"] == []  # not the full-size model
    monkeypatch.setattr(
        module("literal"), "JUDGED_MODEL", module("stand_ins").stand_in(str(checkpoint)).info.name
    )
    words = ["--model", checkpoint, "--tiles", 4, "--json", report, "--check"]
    monkeypatch.setattr(module("literal"), "TARGETS", {2: 0.001, 1: 1e6})
    assert invoked("literal", *words).exit_code == 1
    assert [j["met"] for j in numbers(report)["judged"]] == [True, False]


def test_literal_needs_windows_that_share_tiles() -> None:
    result = invoked("literal", "--model", "glas-small")
    assert isinstance(result.exception, WsisegError)
    assert "windows of one tile, which share none" in str(result.exception)


@pytest.mark.parametrize(("tiles", "stride"), [(5, 2), (5, 1), (24, 2), (7, 2)])
def test_a_ratio_is_brought_to_a_larger_slide(tiles: int, stride: int) -> None:
    literal = module("literal")
    segmenter = module("stand_ins").trivial_model(window_px=96, tile_px=32)
    done = literal.counts(segmenter, tiles, PredictOptions(overlap_px=(3 - stride) * 32))
    assert done == (tiles**2, (-(-(tiles - 3) // stride) + 1) ** 2)
    wanted = literal.Counts(3 * done.tiles, 4 * done.windows)
    assert literal.brought(10.0, 2.0, 3.0, done, wanted) == pytest.approx(40 / (6 + 12))


def test_labels_that_are_not_those_of_the_plain_pipeline_end_with_1(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = with_lazy_head(module("stand_ins").stand_in(str(checkpoint)))
    monkeypatch.setattr(module("literal"), "stand_in", lambda name, device: segmenter)
    result = invoked("literal", "--tiles", 3, "--stride", 2)
    assert result.exit_code == 1
    assert "NOT EQUAL" in result.output


def test_ties_are_no_difference() -> None:
    unlike = module("literal_pipeline").unlike
    probabilities = np.float32([[[0.5, 0.9, 0.2]], [[0.49999, 0.1, 0.8]]])
    assert unlike(np.uint8([[2, 1, 2]]), probabilities) == 0
    assert unlike(np.uint8([[1, 2, 1]]), probabilities) == 2


def test_overhead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "overhead.json"
    words = ["--side", 200, "--window", 96, "--json", report]
    result = invoked("overhead", *words)
    assert result.exit_code == 0, result.output
    assert numbers(report)["judged"][0]["target"] == 0.03
    overhead = module("overhead")
    right = overhead.predict_slide

    def planted(*arguments: Any, **options: Any) -> Canvas:
        canvas: Canvas = right(*arguments, **options)
        box = Box(0, 0, 200, 200)
        canvas.write_labels(box, canvas.labels(box) % 6 + 1)
        return canvas

    monkeypatch.setattr(overhead, "predict_slide", planted)
    result = invoked("overhead", *words)
    assert result.exit_code == 1
    assert "NOT EQUAL" in result.output
    assert not numbers(report)["equal"]


def test_time_of_the_model_is_taken_off() -> None:
    overhead, timing = module("overhead"), module("timing")
    segmenter = module("stand_ins").trivial_model(window_px=96, tile_px=32)
    span = timing.Span()
    with overhead.model_clock(segmenter, span):
        segmenter.tile_features(torch.zeros(1, 3, 32, 32), [], 0)
        once = span.cpu
        segmenter.tile_features(torch.zeros(1, 3, 32, 32), [], 0)
    assert 0 < once < span.cpu
    whole = span.cpu
    segmenter.tile_features(torch.zeros(1, 3, 32, 32), [], 0)
    assert span.cpu == whole


def test_a_peer_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    overhead, stand_ins = module("overhead"), module("stand_ins")
    model = stand_ins.trivial_model(window_px=96, tile_px=32)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(overhead.UsageError, match="the run failed \\(no such library\\)"):
        overhead.measure_peer(None, str(script), tmp_path / "slide.tif", model, 1.0, None)


@pytest.mark.parametrize("wrong", [0, 30])
def test_a_peer_is_judged_by_its_pipeline_alone(tmp_path: Path, wrong: int) -> None:
    overhead, timing = module("overhead"), module("timing")
    model = module("stand_ins").trivial_model(window_px=96, tile_px=32)
    found = {"version": "2", "cpu": 9.0, "model_cpu": 1.0, "megapixels": 4.0, "peak_mib": 1.0}
    script = tmp_path / "python"
    labels = np.arange(6, dtype=np.uint8).repeat(20)
    np.save(tmp_path / "theirs.npy", (labels + (np.arange(120) < wrong)) % 6)
    copy = f"cp {tmp_path}/theirs.npy $4.npy"
    script.write_text(f"#!/bin/sh\n{copy}\necho words\necho '{json.dumps(found)}'\n")
    script.chmod(0o755)
    report = tmp_path / "row.json"
    row = timing.Row("overhead", json_path=report, check=False)
    with pytest.raises(SystemExit) if wrong else nullcontext():
        overhead.measure_peer(row, str(script), tmp_path / "slide.tif", model, 0.5, labels + 1)
        row.finish()
    judged = [(j["measured"], j["met"]) for j in numbers(report)["judged"]]
    assert judged == ([] if wrong else [(4.0, False)])


def test_memory(tmp_path: Path, folder_on_path: None) -> None:
    report = tmp_path / "memory.json"
    words = ["--size", 2560, 1100, "--feature-mib", 1, "--threads", 1, "--json", report]
    result = invoked("memory", *words)
    assert result.exit_code == 0, result.output
    found = numbers(report)
    judged = found["judged"][0]
    assert judged["target"] == 1536
    assert 1 < judged["measured"] < 1536


def test_memory_of_slides_of_two_heights(tmp_path: Path) -> None:
    memory, timing = module("memory"), module("timing")
    report = tmp_path / "memory.json"
    row = timing.Row("memory", json_path=report, check=True)
    peaks = {Size(10, 10): 100.0, Size(10, 20): 110.0, Size(20, 20): 100.0}
    memory.judge_heights(row, peaks)
    with pytest.raises(SystemExit):
        row.finish()
    (judged,) = numbers(report)["judged"]
    assert judged["measured"] == pytest.approx(0.1)
    assert judged["met"] is False


def test_memory_with_a_wrong_label_ends_with_1() -> None:
    memory, timing = module("memory"), module("timing")
    row = timing.Row("memory", json_path=None, check=False)
    found = {"mib": {"predict": 1.0}, "wall": {"predict": 1.0}, "compared": 5, "wrong": 1}
    with pytest.raises(SystemExit) as stop:
        memory.judge(row, Size(10, 10), found)
    assert stop.value.code == 1
    with pytest.raises(SystemExit):  # nothing was looked at
        memory.judge(row, Size(10, 10), {**found, "compared": 0, "wrong": 0})


def test_a_sparse_slide_is_tissue_where_it_says(tmp_path: Path) -> None:
    data = module("stand_in_data")
    path = tmp_path / "sparse.tif"
    data.write_sparse_slide(path, Size(2300, 1200))
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)
        grid = slide.grid(0.5)
        glass = slide.read(Box(0, 0, 1024, 1200), grid)
        first = slide.read(Box(1024, 0, 1024, 1024), grid)
        again = slide.read(Box(2048, 0, 250, 1024), grid)
        small = slide.read(Box(0, 0, 287, 150), slide.grid(4.0))
    assert np.abs(glass.astype(int) - 243).max() <= 2
    assert first.std() > 20
    assert np.abs(first[:, :240].astype(int) - again[:, :240]).max() <= 40
    assert np.abs(first.mean((0, 1)) - small[:127, 130:250].mean((0, 1))).max() < 4


def test_pyramid(tmp_path: Path, folder_on_path: None) -> None:
    report = tmp_path / "pyramid.json"
    result = invoked("pyramid", "--size", 1100, 900, "--block", 512, "--json", report)
    assert result.exit_code == 0, result.output
    assert numbers(report)["numbers"]["gigapixels"] == pytest.approx(0.00099)


def test_a_pyramid_with_one_wrong_pixel_is_caught(tmp_path: Path) -> None:
    data, pyramid = module("stand_in_data"), module("pyramid")
    block = data.sparse_labels(512)
    assert 0.25 < (block > 0).mean() < 0.35
    canvas = data.fill_canvas(tmp_path / "canvas", Size(1100, 900), block)
    path = tmp_path / "mask.tif"
    pyramid.write(str(canvas.path), str(path))
    assert pyramid.levels_equal(path, canvas)
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.series[0].levels) > 1
    box = Box(700, 800, 1, 1)
    canvas.write_labels(box, canvas.labels(box) + 1)
    assert not pyramid.levels_equal(path, canvas)


def test_polygons(tmp_path: Path, folder_on_path: None) -> None:
    report = tmp_path / "polygons.json"
    result = invoked("polygons", "--side", 700, "--part", 512, "--json", report)
    assert result.exit_code == 0, result.output
    found = numbers(report)
    assert [j["target"] for j in found["judged"]] == [0.035, 1300]
    assert found["numbers"]["polygons"] > 20


def test_polygons_that_are_wrong_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, polygons, timing = module("stand_in_data"), module("polygons"), module("timing")
    canvas = data.fill_canvas(tmp_path / "canvas", Size(300, 200), data.dense_labels(512))
    row = timing.Row("polygons", json_path=None, check=False)
    polygons.check(row, canvas, canvas, tmp_path)
    right = polygons.trace

    def shrunk(*arguments: Any) -> Any:
        regions = right(*arguments)
        regions.polygons[0] = regions.polygons[0].buffer(-0.01)
        return regions

    monkeypatch.setattr(polygons, "trace", shrunk)
    with pytest.raises(SystemExit):
        polygons.check(row, canvas, canvas, tmp_path)
    squares = [[[[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]], [[[3, 0], [9, 0], [9, 4], [3, 0]]]]
    features = [{"geometry": {"type": "Polygon", "coordinates": c}} for c in squares]
    assert not polygons.is_coverage(json.dumps({"features": features}).encode())
    assert polygons.is_coverage(json.dumps({"features": features[:1]}).encode())


def test_memory_is_that_of_the_block() -> None:
    timing = module("timing")
    memory = timing.Memory()
    with timing.watched(memory):
        kept = np.ones(64 << 20, np.uint8)
        del kept
    assert 60 < memory.mib < 100


def test_a_child_that_fails_is_one_line(folder_on_path: None) -> None:
    timing, pyramid = module("timing"), module("pyramid")
    with pytest.raises(timing.UsageError, match=r"write: the process failed \(.*no/such"):
        timing.in_child(pyramid.write, "no/such", "mask.tif")


def test_check_ends_with_1_where_a_target_is_missed(tmp_path: Path) -> None:
    timing = module("timing")
    for measured, check, ends in ((1.0, True, False), (0.5, True, True), (0.5, False, False)):
        path = tmp_path / "row.json"
        row = timing.Row("row", json_path=path, check=check)
        row.equal("all", True)
        row.judge("gain", measured, ">=", 1.0)
        if ends:
            with pytest.raises(SystemExit):
                row.finish()
        else:
            row.finish()
        assert numbers(path)["passed"] is (measured == 1.0)
    assert not timing.Judged("gain", float("nan"), ">=", 1.0).met
    assert not timing.Judged("memory", float("nan"), "<=", 1.0).met


def result_of(row: str, *, equal: bool = True, measured: float = 2.0) -> dict[str, Any]:
    timing = module("timing")
    judged = {"what": "gain", "measured": measured, "sense": ">=", "target": 2.3, "met": False}
    return {
        "row": row,
        "command": f"python benchmarks/{row}.py",
        "date": "2020-02-02",
        "machine": timing.machine(),
        "versions": timing.versions(),
        "equal": equal,
        "compared": ["labels"],
        "judged": [judged] if equal else [],
        "numbers": {},
        "passed": False,
    }


def test_the_table_of_collected_rows(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text("# Speed\n<!-- table begins -->old<!-- table ends -->\nend\n")
    words = ["--collect", "--folder", tmp_path, "--row", "head", "--write", document]
    result = invoked("table", *words)
    assert result.exit_code == 1
    assert "head: left no numbers" in result.output
    assert "No row has been measured yet" in document.read_text()
    (tmp_path / "head.json").write_text(json.dumps(result_of("head")))
    result = invoked("table", *words)
    assert result.exit_code == 0, result.output
    text = document.read_text()
    assert "| head | yes | gain | >= 2.3 | 2 | missed |" in text
    assert "- head: `python benchmarks/head.py` (2020-02-02, " in text
    assert text.startswith("# Speed\n")
    assert text.endswith("\nend\n")
    assert "old" not in text
    assert invoked("table", *words, "--check").exit_code == 1
    (tmp_path / "head.json").write_text(json.dumps(result_of("head", equal=False)))
    result = invoked("table", *words)
    assert result.exit_code == 1
    assert "| head | NO | labels | equal | not equal | missed |" in document.read_text()


def test_a_document_without_markers_is_left_alone(tmp_path: Path) -> None:
    table, document = module("table"), tmp_path / "doc.md"
    document.write_text("words\n")
    with pytest.raises(table.UsageError, match="needs one <!-- table begins -->"):
        table.write_into(document, "table")
    assert document.read_text() == "words\n"
    (tmp_path / "head.json").write_text("{}")
    with pytest.raises(table.UsageError, match="not the numbers of a row"):
        table.collected(tmp_path)


def test_every_row_of_the_table_is_a_script_with_such_options(monkeypatch: Any) -> None:
    for name, command in module("table").COMMANDS.items():
        assert (FOLDER / command.script).is_file()
        main = module(Path(command.script).stem).main
        for full in (False, True):
            context = main.make_context(name, command.words(full=full))
            assert context.params["json_path"] is None


def test_the_trivial_model_carries_its_ballast() -> None:
    model = module("stand_ins").trivial_model(window_px=96, tile_px=32, feature_mib=1)
    features = model.tile_features(torch.zeros(2, 3, 32, 32), [], 0)
    ballast = features[1:]
    assert {maps.shape for maps in ballast} == {(2, 316, 8, 8)}
    assert 1 << 20 <= sum(maps[0].nbytes for maps in ballast) < 1.01 * (1 << 20)
    assert isinstance(model.head, nn.Module)


def test_reading_is_judged_on_aligned_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, reading = module("reading_row"), module("reading")
    speeds = [
        reading.Speed(reader, aligned, threads, speed * threads if aligned else 1.0)
        for reader, speed in (("direct", 240.0), ("openslide", 60.0), ("decode limit", 300.0))
        for aligned in (True, False)
        for threads in (1, 2)
    ]
    monkeypatch.setattr(row, "measure", lambda path, **options: speeds)
    report = tmp_path / "reading.json"
    result = invoked("reading_row", "--slide", "slide.svs", "--json", report, "--check")
    assert result.exit_code == 0, result.output
    assert [j["measured"] for j in numbers(report)["judged"]] == pytest.approx([0.8, 2.0])

    def unlike(path: Path, **options: Any) -> None:
        raise WsisegError("direct differs from openslide")

    monkeypatch.setattr(row, "measure", unlike)
    result = invoked("reading_row", "--slide", "slide.svs", "--json", report)
    assert result.exit_code == 1
    assert not numbers(report)["equal"]

    def missing(path: Path, **options: Any) -> None:
        raise SlideError("slide.svs: cannot be read")

    monkeypatch.setattr(row, "measure", missing)
    result = invoked("reading_row", "--slide", "slide.svs")
    assert isinstance(result.exception, SlideError)


def test_the_table_runs_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = module("table")
    tiny = table.Command("pyramid.py", "--size 600 400 --block 512", "--size 1 1")
    monkeypatch.setattr(table, "COMMANDS", {"pyramid": tiny})
    result = invoked("table", "--short", "--folder", tmp_path / "new", "--threads", 1)
    assert result.exit_code == 0, result.output
    found = numbers(tmp_path / "new" / "pyramid.json")
    assert found["command"] == (
        "python benchmarks/pyramid.py --size 600 400 --block 512 --threads 1"
    )
    assert [line for line in result.output.splitlines() if line.startswith("mask  ")]
    monkeypatch.setattr(table, "COMMANDS", {"pyramid": tiny._replace(short="--size nothing 1")})
    result = invoked("table", "--folder", tmp_path / "new")
    assert result.exit_code == 1  # the numbers of the run before are not taken for those of this
    assert "pyramid: left no numbers" in result.output
