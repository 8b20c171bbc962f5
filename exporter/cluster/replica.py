"""A replica of a service, which answers posted pictures. Plain code, nothing of Ray."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np

from msn_export.embedding.decode import Decoder, decoded_or_reason
from msn_export.embedding.inference import (
    SHA256,
    PictureBatch,
    read_rows,
    reading_of,
    require_selftest,
)
from msn_export.errors import ImageError, SpecError
from msn_export.feed import feed_of
from msn_export.preprocessing import Exif
from msn_export.processor_config import require_choice
from msn_export.runtime import open_runner
from msn_export.spec import Scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from msn_export.embedding.decode import Decoded
    from msn_export.preprocessing import Preprocessing


LARGEST = 64 * 2**20  # bytes of one posted picture: each is in memory, in the proxy too


@dataclass(frozen=True, slots=True)
class Serving:
    """The options of a service; each field is an argument ``name=value`` of ``serve run``.

    ``cpus`` are a replica's processors and threads, ``gpus`` its graphics processors (None: one for
    an engine). ``batch`` None is what the model is tuned for; ``wait`` is how many milliseconds a
    picture waits for others.
    """

    model: Path
    replicas: int = 1
    cpus: int = 1
    gpus: int | None = None
    batch: int | None = None
    wait: int = 5
    decoders: int = 1
    output: str | None = None
    preprocess: str | None = None
    exif: Exif | None = None
    providers: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Read the arguments of ``serve run``, or of a configuration's ``args``."""
        names = tuple(cls.__dataclass_fields__)
        unknown = [name for name in arguments if name not in names]
        if unknown:
            raise SpecError(f"argument {unknown[0]!r} is none; expected {', '.join(names)}")
        if "model" not in arguments:
            raise SpecError("argument 'model' is missing; give model=FILE, an .onnx or an engine")
        values: dict[str, Any] = dict(arguments)
        # absolute: a replica's folder is Ray's, on whatever machine it is
        model = Path(str(values.pop("model"))).absolute()
        preprocess = values.get("preprocess")
        require_choice(preprocess)
        if preprocess is not None and preprocess.endswith(".json"):
            values["preprocess"] = str(Path(preprocess).absolute())
        if values.get("exif") not in {None, *get_args(Exif)}:
            raise SpecError(
                f"argument exif={values['exif']}: expected {' or '.join(get_args(Exif))}"
            )
        providers = values.pop("providers", ())
        if isinstance(providers, str):
            providers = providers.split(",")
        for name in ("replicas", "cpus", "gpus", "batch", "wait", "decoders"):
            if name in values:
                values[name] = _number(name, values[name])
        return cls(model, providers=tuple(providers), **values)

    @property
    def share(self) -> dict[str, int]:
        """Resources that Ray is asked for each replica."""
        gpus = self.gpus if self.gpus is not None else int(self.model.suffix != ".onnx")
        return {"num_cpus": self.cpus, **({"num_gpus": gpus} if gpus else {})}


def _number(name: str, given: Any) -> int:
    least = 0 if name in {"gpus", "wait"} else 1
    if isinstance(given, str) and given.isascii() and given.isdigit():
        given = int(given)
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise SpecError(f"argument {name}={given}: expected a whole number from {least} on")
    return given


class Posted(bytes):
    """A picture file as it came; it has no name."""

    def __str__(self) -> str:
        return "the posted picture"


def read_posted(posted: Posted, *, preprocessing: Preprocessing) -> Decoded:
    return decoded_or_reason(io.BytesIO(posted), str(posted), preprocessing)


class Replica:
    """An open model with decoders in front; ``batch`` is how many pictures to run together."""

    def __init__(self, serving: Serving) -> None:
        threads = serving.cpus if serving.model.suffix == ".onnx" else None
        name = serving.model.name
        with ExitStack() as stack:
            self._runner = runner = stack.enter_context(
                open_runner(serving.model, providers=serving.providers or None, threads=threads)
            )
            self.selftest = require_selftest(runner, check=True)
            self._feed = feed_of(
                name,
                runner.inputs,
                runner.stated,
                preprocess=serving.preprocess,
                exif=serving.exif,
                size=serving.model,
            )
            self._reading = reading_of(name, runner.outputs, serving.output, runner.scores)
            self.batch = serving.batch or runner.batch.opt
            read = partial(read_posted, preprocessing=self._feed.preprocessing)
            self._decoder = Decoder(read, workers=serving.decoders, ahead=self.batch)
            self._retry = asyncio.Lock()
            stack.pop_all()  # all went well: the runner stays open until close()

    def about(self) -> dict[str, Any]:
        return {
            "output": self._reading.vector,
            "batch": self.batch,
            "labels": list(self._runner.labels),
            "scores": self._reading.scores,
            "preprocessing": str(self._feed.preprocessing),
            "runner": self._runner.name,
            "selftest": self.selftest,
        }

    async def decode(self, content: bytes) -> NDArray[np.uint8]:
        """Decode a picture to [h, w, c], in a process that it may end."""
        if len(content) > LARGEST:
            raise ImageError(f"the posted picture has {len(content)} bytes; at most {LARGEST}")
        posted = Posted(content)
        try:
            decoded = await asyncio.wrap_future(self._decoder.begin(posted))
        except BrokenProcessPool:
            async with self._retry:
                decoded = await asyncio.to_thread(self._decoder.once_more, posted)
        if isinstance(decoded, str):
            raise ImageError(decoded)
        return decoded.pixels

    def run(self, pictures: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """Run decoded pictures together; give each one's answer."""
        pixels = np.stack(pictures)
        unknown = np.zeros((len(pixels), SHA256), np.uint8)
        batch = PictureBatch(pixels, {}, 0, unknown)
        rows = read_rows(self._runner(self._feed(pixels)), self._reading, batch)
        answers: list[dict[str, Any]] = []
        for index, vector in enumerate(rows.vectors):
            if index in rows.errors:
                answers.append({"error": rows.errors[index]})
                continue
            answer: dict[str, Any] = {"embedding": vector.tolist(), "batch": len(pictures)}
            if rows.best is not None:
                number, score = rows.best[index, 0]
                labels = self._runner.labels
                answer["label"] = labels[number] if number < len(labels) else str(number)
                answer["score"] = float(score)
                is_raw = self._reading.scores is Scores.RAW
                answer["probability"] = None if is_raw else float(score)
            answers.append(answer)
        return answers

    def close(self) -> None:
        self._decoder.close()
        self._runner.close()
