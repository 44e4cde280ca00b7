"""Answers batches while the next ones are prepared: the device should never wait for the host.

Who does what at the same time:

    pool          several threads open pictures and run the image processor
    assembler     one thread lays batches out, sends them to the device, compiles new shapes
    main thread   starts the step of the next batch, turns tokens of the last but one into text
    watcher       one thread waits for the device and takes the time

JAX only queues a step when it is called, so one batch waits on the device while another runs.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from quota_jax.errors import QuotaError
from quota_jax.evaluate.parallel import answer_step, put_rows, replicated
from quota_jax.evaluate.schedule import Bucket, Group, Prompt
from quota_jax.generation import check_recipe
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.processing import Processor
from quota_jax.processing.pictures import Picture
from quota_jax.programs import many_programs, release_programs
from quota_jax.recipe import Recipe
from quota_jax.sampling import Sampling

CACHE_BYTES = 1 << 29
"""Read pictures that are kept for later questions about them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Text of an answer, without special tokens, outer spaces and stop texts, and how many tokens
    were generated."""

    text: str
    tokens: int


@dataclass(kw_only=True, slots=True)
class Timings:
    """Where the time went, in seconds.

    answering: from the first step's start to the last result, without the gaps in which the device
    waited for a program to be compiled. busy: the part of it in which a step ran on the device.
    compile: all compilation, also beside running steps.
    """

    samples: int = 0
    batches: int = 0
    new_tokens: int = 0
    answering: float = 0.0
    busy: float = 0.0
    compile: float = 0.0

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.answering if self.answering else 0.0

    @property
    def busy_share(self) -> float:
        return self.busy / self.answering if self.answering else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A batch on the device and the program for its shape.

    compiled: seconds that the program took to compile, if this batch was the first to need it.
    """

    program: Callable[..., Any]
    batch: Any
    sampling: Any
    compiled: float = 0.0

    def run(self, model: VisionLanguageModel) -> tuple[Any, Any]:
        """Queues the step; new tokens and their counts, on the device."""
        return self.program(model, self.batch, self.sampling)


@dataclass(kw_only=True)
class Engine:
    """A model on all devices of a mesh, and one compiled program for each bucket.

    batch_size: rows on one device, so a batch has ``batch_size`` times the devices. The program of
    a device does not depend on how many there are, nor do its answers. workers: threads that read
    pictures. programs: compiled so far, one for each bucket met.
    """

    model: VisionLanguageModel
    processor: Processor
    recipe: Recipe
    mesh: Mesh
    batch_size: int = 16
    workers: int = 4
    timings: Timings = field(default_factory=Timings)
    programs: int = field(default=0, init=False)
    _programs: dict[Bucket, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self):
        if self.batch_size < 1 or self.workers < 1:
            raise QuotaError("batch size and workers must be at least 1")
        self.recipe = check_recipe(self.model, self.recipe)
        self.model = jax.device_put(self.model, replicated(self.mesh))

    @property
    def rows(self) -> int:
        """Rows of a batch over all devices."""
        return self.batch_size * self.mesh.size

    def answer(
        self, prompts: Sequence[Prompt], groups: Sequence[Group]
    ) -> Iterator[tuple[Group, list[Answer]]]:
        """Answers the groups in their order; yields each with the answers of its rows."""
        with ExitStack() as stack:

            def threads(count: int, name: str) -> ThreadPoolExecutor:
                pool = ThreadPoolExecutor(count, thread_name_prefix=name)
                # After an error or an early end nothing that still waits is begun.
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
                return pool

            watcher = _Watcher(threads(1, "watcher"), self.timings)
            assembler = threads(1, "assembler")
            pictures = PictureCache(self.processor, threads(self.workers, "pictures"))
            waiting = iter(groups)
            prepared: deque[tuple[Group, Future[Prepared]]] = deque()
            running: deque[tuple[Group, Future[Any]]] = deque()

            def feed() -> None:
                if group := next(waiting, None):
                    rows = [prompts[row] for row in group.filled(self.rows)]
                    read = [[pictures.read(each) for each in row.pictures] for row in rows]
                    prepared.append((group, assembler.submit(self._prepare, group, rows, read)))

            for _ in range(max(2, -(-2 * self.workers // self.rows))):
                feed()
            while prepared or running:
                if prepared:
                    group, item = prepared.popleft()
                    ready = item.result()
                    feed()
                    running.append((group, watcher.start(ready, self.model)))
                if len(running) > 1 or not prepared:
                    group, result = running.popleft()
                    yield group, self._texts(prompts, group, *result.result())

    def prepare(self, prompts: Sequence[Prompt], group: Group) -> Prepared:
        """One group on the device, when this returns."""
        rows = [prompts[row] for row in group.filled(self.rows)]
        with ThreadPoolExecutor(self.workers) as pool:
            pictures = PictureCache(self.processor, pool)
            read = [[pictures.read(each) for each in row.pictures] for row in rows]
            prepared = self._prepare(group, rows, read)
        jax.block_until_ready((prepared.batch, prepared.sampling))
        return prepared

    def _prepare(
        self, group: Group, rows: Sequence[Prompt], read: Sequence[Sequence[Future[Picture]]]
    ) -> Prepared:
        pictures = [[future.result() for future in row] for row in read]
        size, pins = self.batch_size, group.bucket.pins(self.batch_size)
        shards = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = self.processor.lay_out(
                [row.ids for row in part], pictures[start : start + size], **pins
            )
            shards.append((batch, self._sampling(part)))
        batch, sampling = put_rows(self.mesh, shards)
        begun = time.perf_counter()
        new = group.bucket not in self._programs
        if new:
            if many_programs():
                self._programs.clear()
                release_programs()
            self._programs[group.bucket] = self._compile(group.bucket, batch, sampling)
            self.programs += 1
        return Prepared(
            program=self._programs[group.bucket],
            batch=batch,
            sampling=sampling,
            compiled=time.perf_counter() - begun if new else 0.0,
        )

    def _sampling(self, rows: Sequence[Prompt]) -> Sampling:
        requests = [row.request for row in rows]
        return Sampling.make(
            len(rows),
            temperature=[request.temperature for request in requests],
            top_p=[request.top_p for request in requests],
            top_k=[request.top_k for request in requests],
            seed=[request.seed for request in requests],
            stop_ids=self.processor.stop_ids,
            max_new=[row.max_new for row in rows],
        )

    def _compile(self, bucket: Bucket, batch: Any, sampling: Any) -> Callable[..., Any]:
        lowered = answer_step.lower(
            self.model,
            batch,
            sampling,
            mesh=self.mesh,
            recipe=self.recipe,
            room=bucket.room,
            sampled=bucket.sampled,
        )
        return lowered.compile()

    def _texts(
        self, prompts: Sequence[Prompt], group: Group, tokens: np.ndarray, counts: np.ndarray
    ) -> list[Answer]:
        real = len(group.rows)
        texts = self.processor.decode(tokens[:real], counts[:real])
        self.timings.samples += real
        self.timings.batches += 1
        self.timings.new_tokens += int(counts[:real].sum())
        return [
            Answer(text=cut(text, prompts[row].request.until), tokens=int(count))
            for text, row, count in zip(texts, group.rows, counts[:real], strict=True)
        ]


class _Watcher:
    """Starts steps and notes when each ended; the device runs them one after the other."""

    def __init__(self, thread: ThreadPoolExecutor, timings: Timings):
        self._thread, self._timings = thread, timings
        self._ended: float | None = None

    def start(self, ready: Prepared, model: Any) -> Future[tuple[np.ndarray, np.ndarray]]:
        """Queues a step; the future holds its tokens and their counts."""
        begun = time.perf_counter()
        return self._thread.submit(self._fetch, ready.run(model), begun, ready.compiled)

    def _fetch(self, made: Any, begun: float, compiled: float) -> tuple[np.ndarray, np.ndarray]:
        tokens, counts = (np.asarray(array) for array in made)
        ended, times = time.perf_counter(), self._timings
        last = begun if self._ended is None else self._ended
        times.busy += ended - max(begun, last)
        times.answering += ended - last - min(max(0.0, begun - last), compiled)
        times.compile += compiled
        self._ended = ended
        return tokens, counts


class PictureCache:
    """Reads pictures on a pool and keeps the last ones: several questions share a picture.

    Only one thread may call `read`.
    """

    def __init__(self, processor: Processor, pool: ThreadPoolExecutor, limit: int = CACHE_BYTES):
        self._reader, self._pool, self._limit = processor.pictures, pool, limit
        self._read: OrderedDict[Any, Future[Picture]] = OrderedDict()

    def read(self, source: Any) -> Future[Picture]:
        """The picture as the vision tower takes it; begun at once, unless it is at hand."""
        if source in self._read:
            self._read.move_to_end(source)
            return self._read[source]
        while len(self._read) > 1 and self._bytes() > self._limit:
            self._read.popitem(last=False)
        self._read[source] = self._pool.submit(self._open, source)
        return self._read[source]

    def _open(self, source: Any) -> Picture:
        return self._reader.read(source.load(), source.name)

    def _bytes(self) -> int:
        done = (future for future in self._read.values() if future.done())
        return sum(future.result().pixels.nbytes for future in done if not future.exception())


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop texts, without outer spaces."""
    places = [text.find(stop) for stop in until if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))].strip()
