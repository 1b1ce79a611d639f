"""Regions traced in a thread while inference still fills the canvas. Knows no networks.

Tracing follows the pieces of `wsiseg.outputs.tracer`; each is taken once the chunks in it that are
to be filled are done. What comes out is what tracing the complete canvas gives.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from wsiseg.canvas import Canvas
from wsiseg.outputs.geojson import PolygonOptions
from wsiseg.outputs.polygons import Regions, assemble
from wsiseg.outputs.tracer import Tracer

_LOOK_SECONDS = 0.05
"""How often it is looked whether a piece is there."""


class Tracing:
    """The tracing of one canvas; a context that ends it."""

    def __init__(self) -> None:
        """Nothing is traced before `follow`."""
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._found: Regions | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Tracing:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop once the piece in hand is traced or, after the last, the polygons are made."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def follow(
        self, canvas: Canvas, options: PolygonOptions, awaited: Collection[tuple[int, int]]
    ) -> None:
        """Begin to trace a canvas that gets no objects and whose labels are not changed later.

        Args:
            canvas: a canvas that is being filled by this process.
            options: those that the regions are written with.
            awaited: its chunks (row, column) that are to be done; others stay as they are.
        """
        smallest = options.min_area_px(canvas.grid)
        tracer = Tracer(canvas, band_px=options.band_px, min_area_px=smallest)
        arguments = (canvas, tracer, options.tolerance_px(canvas.grid), frozenset(awaited))
        self._thread = threading.Thread(
            target=self._run, args=arguments, name="tracing", daemon=True
        )
        self._thread.start()

    def regions(self) -> Regions | None:
        """The regions of the canvas, which is complete by now; None where none was followed.

        Raises:
            CanvasError: the canvas cannot be read.
        """
        if self._thread is None:
            return None
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(
        self,
        canvas: Canvas,
        tracer: Tracer,
        tolerance_px: float,
        awaited: frozenset[tuple[int, int]],
    ) -> None:
        try:
            for piece in tracer.pieces():
                missing = [key for key in piece.cells(canvas.chunk_px) if key in awaited]
                while missing := [key for key in missing if not canvas.is_done(*key)]:
                    if self._stopped.wait(_LOOK_SECONDS):
                        return
                if self._stopped.is_set():
                    return
                tracer.add(piece)
            self._found = assemble(tracer, tolerance_px=tolerance_px)
        except BaseException as e:  # raised again by who asks for the regions
            self._error = e
