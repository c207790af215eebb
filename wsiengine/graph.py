"""Plans as lazy Dask graphs: the only importer of Dask.

The leaves are blocks (:func:`wsiengine.job.score_block`). :func:`run_blocks` computes them in row-major order, as many
at a time as there are workers, and hands every finished block to the caller at once; :func:`map_array` hangs the
probability map on the same leaves; :func:`pixel_array` is a slide's pixels.

Threads pull the next block themselves (:mod:`wsiengine.workers`): given many independent tasks, Dask's threaded
scheduler picks them in the order of their names, not of the slide, and one window after another leaves threads idle at
the end of each.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import dask
import numpy as np

from wsiengine.geometry import Box, Lattice, Mpp
from wsiengine.grid import Block, TileGrid
from wsiengine.job import Job, score_block
from wsiengine.slides.base import Slide
from wsiengine.slides.reading import require_mpp
from wsiengine.tasks.base import Result, Task
from wsiengine.tasks.classify import MapLayout
from wsiengine.workers import Scoring, Workers, nothing_told

if TYPE_CHECKING:
    import dask.array as da
    from distributed import Client

    from wsiengine.planning import Plan

_AHEAD = 2  # blocks in flight per worker thread of a cluster
_MOST_LOSSES = 10  # times that a cluster may lose the job with a worker; it is handed out again


def score_tasks(job: Job, blocks: Iterable[Block], name: str) -> dict[Any, Any]:
    """The leaves: one task per block, keyed ``(name, tile row, tile col)`` by its first tile."""
    return {(name, block.tiles.y0, block.tiles.x0): (score_block, job, block) for block in blocks}


def run_blocks(
    job: Job,
    blocks: Iterable[Block],
    done: Callable[[Sequence[Any]], None],
    *,
    threads: int,
    at_once: int | None = None,
    client: "Client | None" = None,
    workers: Workers | None = None,
    spent: Callable[[Mapping[str, float]], None] = nothing_told,
) -> None:
    """Score blocks and call ``done`` with those that are finished, in this thread, as soon as one is.

    Args:
        job: What the workers need.
        blocks: Blocks in row-major order.
        done: Takes finished blocks (:class:`wsiengine.tasks.base.Result`), never none; what it raises stops the run.
        threads: Worker threads, where no client is given; shared workers become as many.
        at_once: Blocks under way in this process at most; other threads help with them, if blocks are dense ones.
        client: A ``distributed.Client``; its workers score, this process records.
        workers: Threads shared with other slides.
        spent: Told what each block took by stage, by the thread that scored it.
    """
    if client is not None:
        _run_on_cluster(job, blocks, done, spent, client)
        return
    scoring = Scoring(partial(_score, job), iter(blocks), job.runtime.working, spent, at_once)
    helped = job.runtime.helped(threads) if job.dense else nullcontext()
    with helped, Workers(threads) if workers is None else nullcontext(workers) as pool:
        pool.grow(threads)
        pool.run(scoring, done)


def _score(job: Job, block: Block) -> Any:
    """A block by its own graph of one leaf."""
    tasks = score_tasks(job, [block], "score")
    return dask.get(tasks, next(iter(tasks)))


def _run_on_cluster(
    job: Job,
    blocks: Iterable[Block],
    done: Callable[[Sequence[Any]], None],
    spent: Callable[[Mapping[str, float]], None],
    client: "Client",
) -> None:
    from distributed import as_completed
    from distributed.client import FutureCancelledError

    ahead = _AHEAD * max(1, sum(client.nthreads().values()))
    [shared] = client.scatter([job], broadcast=True, hash=False)
    waiting = iter(blocks)
    running = as_completed()
    under_way: dict[Any, tuple[Block, Any]] = {}

    def submit(block: Block) -> None:
        future = client.submit(score_block, shared, block, pure=False)
        under_way[future] = (block, shared)
        running.add(future)

    for block in itertools.islice(waiting, ahead):
        submit(block)
    losses = 0
    try:
        for future in running:
            block, given = under_way.pop(future)
            try:
                result = future.result()
            except FutureCancelledError:  # the scheduler keeps few copies of the job, and its worker was the last
                losses += given is shared
                if losses > _MOST_LOSSES or client.status != "running":
                    raise
                if given is shared:
                    [shared] = client.scatter([job], broadcast=True, hash=False)
                submit(block)
                continue
            spent(result.seconds)
            done([result])
            future.release()
            for block in itertools.islice(waiting, 1):
                submit(block)
    finally:
        client.cancel([future for future in under_way if not future.done()])


def map_array(plan: "Plan") -> "da.Array":
    """The probability map of a plan as a lazy array: (rows, cols, channels) uint8, chunked like the blocks."""
    grid, side, task = plan.grid, plan.block_tiles, plan.task
    name = f"wsiengine-map-{dask.base.tokenize(plan.job.key if plan.job else plan.fingerprint, side)}"
    scores = f"{name}-scores"
    blocks = {(b.tiles.y0 // side, b.tiles.x0 // side): b for b in plan.blocks()}
    tasks = score_tasks(_job_of(plan), blocks.values(), scores)
    row_edges, col_edges = task.edges(grid.rows, side), task.edges(grid.cols, side)
    channels = len(plan.layout.channels)
    for i, (y0, y1) in enumerate(itertools.pairwise(row_edges)):
        for j, (x0, x1) in enumerate(itertools.pairwise(col_edges)):
            cells = Box(y0, x0, y1, x1)
            around = task.around(cells, grid)
            keys = [
                (scores, blocks[at].tiles.y0, blocks[at].tiles.x0)
                for at in itertools.product(
                    range(around.y0 // side, (around.y1 - 1) // side + 1),
                    range(around.x0 // side, (around.x1 - 1) // side + 1),
                )
                if at in blocks
            ]
            tasks[(name, i, j, 0)] = (_map_chunk, (task, plan.layout, grid), plan.analysed[cells.slices], cells, keys)
    chunks = (tuple(np.diff(row_edges).tolist()), tuple(np.diff(col_edges).tolist()), (channels,))
    return _array(tasks, name, chunks)


def _array(tasks: dict[Any, Any], name: str, chunks: tuple[tuple[int, ...], ...]) -> "da.Array":
    """Tasks keyed ``(name, row, col, 0)`` as an array of uint8."""
    import dask.array as da  # slow to import, and a run needs none of it
    from dask.highlevelgraph import HighLevelGraph

    return da.Array(HighLevelGraph.from_collections(name, tasks, dependencies=[]), name, chunks, dtype=np.uint8)


def _job_of(plan: "Plan") -> Job:
    if plan.job is None:
        raise ValueError("this plan was made without a job: use wsiengine.plan(...)")
    return plan.job


def _map_chunk(
    how: tuple[Task, MapLayout, TileGrid], analysed: np.ndarray, cells: Box, blocks: list[Result]
) -> np.ndarray:
    """One chunk of the map from the blocks around it."""
    task, layout, grid = how
    return task.chunk(layout, grid, analysed, cells, blocks)


def pixel_array(slide: Slide, mpp: Mpp | float, chunk_px: int = 2048) -> "da.Array":
    """The slide's pixels at ``mpp`` as a lazy array: (rows, cols, 3) uint8.

    Raises:
        ResolutionError: The slide states no µm/px.
    """
    mpp = mpp if isinstance(mpp, Mpp) else Mpp.square(mpp)
    own = require_mpp(slide.info)
    size = Lattice(slide.info.size_l0, own, mpp, 1).extent_px
    facts = (slide.fingerprint(), slide.info.reader, own.y, own.x, mpp.y, mpp.x, chunk_px)
    name = f"wsiengine-pixels-{dask.base.tokenize(*facts)}"
    rows, cols = (tuple(min(chunk_px, n - at) for at in range(0, n, chunk_px)) for n in size.shape)
    tasks: dict[Any, Any] = {
        (name, box.y0 // chunk_px, box.x0 // chunk_px, 0): (slide.read, box, mpp)
        for box in Box.of(size).pieces(chunk_px, chunk_px)
    }
    return _array(tasks, name, (rows, cols, (3,)))


def stored_array(channels_first: Any) -> "da.Array":
    """An array on disk, stored (channels, rows, cols), as a lazy one of (rows, cols, channels)."""
    import dask.array as da

    return da.moveaxis(da.from_array(channels_first, chunks=channels_first.chunks), 0, -1)
