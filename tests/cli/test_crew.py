"""Slides shared out to workers: tries, progress in words, what cannot be asked for."""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dying_worker
import pytest
import torch
from tiny_run import tiny_model

import wsiseg.cli.crew_local as crew_local
from wsiseg.cli import main
from wsiseg.cli.cohort_progress import CohortProgress
from wsiseg.cli.crew import TRIES, Event, Job, Lost, Report, Running, share_out
from wsiseg.cli.crew_ray import RayCrew, run_slide
from wsiseg.cli.crew_worker import Orders, do
from wsiseg.cli.predict import command
from wsiseg.cli.predict_engine import devices
from wsiseg.cli.predict_known import first_files
from wsiseg.cli.predict_settings import Settings
from wsiseg.errors import CheckpointError, DeviceMemoryError, UsageError, WsisegError
from wsiseg.inference.cohort import ELSEWHERE, FAILED, Outcome, Task


def task(stem: str) -> Task:
    return Task(Path(f"/slides/{stem}.svs"), stem)


class Fakes:
    """A crew that loses the worker of each slide as often as is said."""

    def __init__(self, **losses: int) -> None:
        self.losses, self.jobs, self.given = losses, deque[Job](), list[Job]()

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def events(self) -> Iterator[Event]:
        job = self.jobs.popleft()
        self.given.append(job)
        stem = job.task.stem
        yield Running(stem, 0.5)
        if self.losses.get(stem, 0) > job.tries:
            yield Lost(job, "was ended by SIGKILL")
        else:
            yield Report(Outcome(job.task, "ok", 1.0), ((False, f"{stem}: said\n"),))

    def close(self) -> None:
        pass


def shared(crew: Fakes, *stems: str) -> dict[str, Outcome]:
    progress = CohortProgress(len(stems))
    tasks = [task(stem) for stem in stems]
    found = share_out(crew, tasks, patient=False, progress=progress)
    return {report.outcome.task.stem: report.outcome for report in found}


def test_a_slide_whose_worker_is_lost_is_done_again(capsys: pytest.CaptureFixture[str]) -> None:
    crew = Fakes(b=TRIES - 1)
    found = shared(crew, "a", "b", "c")
    assert {stem: o.status for stem, o in found.items()} == {"a": "ok", "b": "ok", "c": "ok"}
    again = [job for job in crew.given if job.task.stem == "b"]
    assert [(job.tries, job.patient) for job in again] == [(0, False), (1, True), (2, True)]
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["a: said", "b: said", "c: said"]
    warning = "wsiseg: warning: /slides/b.svs: its worker was ended by SIGKILL; begun again, try"
    assert err.splitlines() == [f"{warning} 2 of 3", f"{warning} 3 of 3"]


def test_a_slide_that_loses_every_worker_fails_and_the_others_are_done() -> None:
    crew = Fakes(b=99)
    found = shared(crew, "a", "b", "c")
    assert {stem: o.status for stem, o in found.items()} == {"a": "ok", "b": FAILED, "c": "ok"}
    assert found["b"].error.startswith("/slides/b.svs: its worker was ended by SIGKILL, 3 times; ")
    assert len([job for job in crew.given if job.task.stem == "b"]) == TRIES


def test_workers_that_never_start_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_local, "serve", dying_worker.dies)
    with pytest.raises(WsisegError, match=r"on device cpu was ended by SIGKILL .* 3 times"):
        hire_two()


def test_what_workers_cannot_set_up_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_local, "serve", dying_worker.refuses)
    with pytest.raises(CheckpointError, match="no such model"):
        hire_two()


def test_a_gpu_that_is_short_of_memory_for_a_moment_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_local, "serve", dying_worker.lacks_memory_at_first)
    orders: Any = tmp_path / "met"
    with closing(crew_local.LocalCrew(orders, ["cpu"], threads=1)) as crew:
        crew.submit(Job(task("a")))
        found: list[Event] = []
        while not found:
            found = list(crew.events())
    assert [type(event) for event in found] == [Report]
    monkeypatch.setattr(crew_local, "serve", dying_worker.lacks_memory)
    with pytest.raises(DeviceMemoryError, match="cuda:0: out of memory"):
        hire_two()
    ray = SimpleNamespace(exceptions=SimpleNamespace(RayTaskError=(), OutOfMemoryError=()))
    ray.exceptions.RayError, ray.get = (), lambda given: DeviceMemoryError("cuda: out of memory")
    cluster = RayCrew.__new__(RayCrew)
    cluster._ray = ray
    lost = cluster._result(None, Job(task("a")))
    assert lost == Lost(Job(task("a")), "did not start (cuda: out of memory)")


def test_a_worker_whose_gpu_computes_nothing_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu = SimpleNamespace(device=torch.device("cuda:0"), info=tiny_model().info)
    slides: Any = SimpleNamespace(work=fail, segmenter=gpu)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    report = do(slides, Job(task("a")), lambda _: None)
    assert report.outcome.status == FAILED, "one that goes on computing stays"
    monkeypatch.setattr("torch.cuda.synchronize", fail)
    with pytest.raises(SystemExit, match=r"warning: /slides/a.svs: RuntimeError: CUDA error"):
        do(slides, Job(task("a")), lambda _: None)


def test_a_process_that_cannot_be_started_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(process: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", start)
    with pytest.raises(WsisegError, match=r"\(Resource temporarily .*\); give fewer --processes"):
        hire_two()


def hire_two() -> None:
    orders: Any = None
    with closing(crew_local.LocalCrew(orders, ["cpu", "cpu"], threads=1)) as crew:
        crew.submit(Job(task("a")))
        deque(event for _ in range(100) for event in crew.events())


def test_a_worker_tells_what_it_cannot_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    pipe: Any = SimpleNamespace(send=told.append)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    orders = Orders(settings_of(tmp_path, model="nosuch"), {})
    crew_local.serve(pipe, orders, "cpu", None)
    assert [str(error)[:28] for error in told] == ["model 'nosuch' is not known;"]
    error = run_slide(orders, Job(task("a")), None)
    assert isinstance(error, UsageError)
    assert str(error).endswith(f" (on {socket.gethostname()})")
    error = run_slide(replace(orders, version="0.0.1"), Job(task("a")), None)
    assert "not 0.0.1; install the same everywhere" in str(error)


def test_the_state_of_a_cohort_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = CohortProgress(12)
    assert progress.text() == "0 of 12 slides done"
    progress.ended(Outcome(task("old"), "ok", earlier=True))
    progress.running("a", 0.5)
    progress.running("b", 0.25)
    assert "2 running (a 50%, b 25%)" in progress.text()
    progress.ended(Outcome(task("a"), "ok"))
    progress.ended(Outcome(task("c"), FAILED))
    progress.ended(Outcome(task("d"), ELSEWHERE))
    now = 150.0  # for a and a quarter of b; 8 slides and three quarters are left
    expected = "2 of 12 slides done, 1 failed, 1 running elsewhere, 1 running (b 25%), about "
    assert progress.text() == expected + "5 min 10 s left"
    progress.stopped("b")
    assert "running (" not in progress.text()
    for k in range(6):
        progress.running(f"s{k}", 0.0)
    assert "6 running (s0 0%, s1 0%, s2 0%, s3 0%, ...)" in progress.text()


def test_where_no_terminal_is_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    for total, last in ((1, []), (2, ["wsiseg: 0 of 2 slides done, in 38.0 s"])):
        now = 0.0
        progress = CohortProgress(total)
        for now in range(0, 40, 2):  # noqa: B007
            progress.show()
        progress.end()
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"wsiseg: 0 of {total} slides done"] * 2 + last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "90,91"], "--gpus 90,91: "),
        (["--gpus", ""], "give numbers with commas between, as 0,1"),
        (["--gpus", "a"], "give numbers with commas between, as 0,1"),
        (["--gpus", "0,0"], "each once"),
        (["--gpus", "0", "--device", "cpu"], "not together with --device cpu"),
        (["--gpus", "0,1", "--processes", "1"], "fewer than the GPUs"),
        (["--processes", "0"], "must be at least 1"),
        (["--processes", "2", "--device", "cuda:99"], "device cuda:99: not there"),
        (["--address", "auto"], "is for --engine ray"),
        (["--gpu-share", "0.5"], "is for --engine ray"),
        (["--engine", "ray", "--gpus", "0"], "give --gpu-share"),
        (["--engine", "ray", "--device", "cuda:0"], "give --device cuda"),
        (["--engine", "ray", "--gpu-share", "2"], "must be over 0 and at most 1"),
        (["--engine", "ray", "--gpu-share", "1", "--device", "cpu"], "not together with"),
        (["--engine", "ray", "--address", "ray://a:1"], "give HOST:PORT"),
        (["--engine", "ray", "--address", "a:²"], "give HOST:PORT"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "nobody listens there"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))
    line = refused(options, tmp_path, monkeypatch, capsys)
    assert message in line


def settings_of(tmp_path: Path, **options: Any) -> Settings:
    """Settings of the command with its defaults, but for some options."""
    context = command.make_context("predict", ["s.svs", "--out", str(tmp_path)])
    return Settings(**{**context.params, **options})


def test_processes_take_the_gpus_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsiseg.cli.predict_engine.pick_device", lambda name: None)
    names = devices(settings_of(tmp_path, gpus="0, 3"))
    assert names == ["cuda:0", "cuda:3"]
    names = devices(settings_of(tmp_path, gpus="0,1", processes=5, device="cuda"))
    assert names == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert devices(settings_of(tmp_path, processes=2, device="cpu")) == ["cpu", "cpu"]


def test_without_ray_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("os.environ", dict(os.environ))
    line = refused(["--engine", "ray"], tmp_path, monkeypatch, capsys)
    assert line == "wsiseg: error: ray is not installed; pip install 'wsiseg[ray]'"


@pytest.mark.parametrize("options", [[], ["--processes", "2"], ["--engine", "ray"]])
def test_without_openvino_it_is_said_how_to_get_it(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    line = refused(["--runtime", "openvino", *options], tmp_path, monkeypatch, capsys)
    assert line == "wsiseg: error: openvino is not installed; pip install 'wsiseg[openvino]'"


def refused(
    options: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The line that a request ends with which cannot be."""
    (folder / "s.png").write_bytes(b"")
    command = ["wsiseg", "predict", str(folder / "s.png"), "--out", str(folder / "out"), *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def test_a_signal_while_ray_waits_ends_the_run_as_elsewhere() -> None:
    class Stopped(BaseException):
        pass

    def wait(*args: Any, **more: Any) -> None:
        raise SystemError("a result with an exception set") from Stopped()

    crew = RayCrew.__new__(RayCrew)
    crew._ray, crew._given = SimpleNamespace(wait=wait), {}
    with pytest.raises(Stopped):
        crew._ended()


def test_files_of_one_dicom_slide_go_to_one_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Opened:
        def __init__(self, path: Path) -> None:
            if path.stem == "broken":
                raise WsisegError("no slide")
            self.properties = {"dicom.SeriesInstanceUID": "1.2.3" if path.stem < "c" else "1.2.4"}

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    class Opens:
        def open(self, task: Task) -> Opened:
            return Opened(task.path)

    tasks = [Task(tmp_path / f"{stem}.dcm", stem) for stem in ("a", "b", "broken", "c", "gone")]
    for one in tasks[:-1]:
        one.path.write_bytes(bytes(128) + b"DICM")
    settings: Any = Opens()
    assert [t.stem for t in first_files(tasks, settings)] == ["a", "broken", "c", "gone"]
    assert capsys.readouterr().out == "b: the same DICOM slide as a.dcm, skipped\n"
