"""One image, answered: by the server, by every variant and by the original, held beside each other.

Everything is given as the page shows it, a message a step, as soon as it is known.
"""

import asyncio
import base64
import io
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from protos import bundle_pb2
from protos import inference_pb2 as pb
from service import agreement, command_line, pictures
from service.aio_client import AsyncClient
from service.bundle import Bundle
from service.errors import PictureError
from service.messages import Answer
from service.playground import served, variants
from service.playground.bundles import Reader
from service.playground.errors import PlaygroundError
from service.playground.variants import ORIGINAL, Said, Variants

MAX_PIXELS = pictures.MAX_PIXELS
PAGE_ROWS = 30  # test images shown at a time
SERVED = "served"
IDENTITY = ("run", "model.sha256")  # of a version, on whichever replica
TOO_MANY = "the pictures up to 0"  # how a sentence about a request of pictures begins
INTEGERS = "int8"  # the precision of a budget that is held against a whole test set only
BLACK = 32  # of 255: a border whose pixels are darker than this on average
MOST = 0.9  # of the test images


@dataclass(frozen=True, slots=True)
class Asked:
    """An image, and who is to answer."""

    model: str
    version: str = ""  # decimal, or an alias; empty: the server's choice
    content: bytes = b""  # of a PNG or JPEG; or else
    row: int | None = None  # of the golden set
    invert: bool = False  # swap light and dark


class Answers:
    """Answers images for the page."""

    def __init__(self, client: AsyncClient, reader: Reader, others: Variants) -> None:
        self._client, self._reader, self._others = client, reader, others
        self._decoding = asyncio.Lock()  # a large picture takes 400 MB meanwhile

    async def test_images(self, model: str, version: str, start: int) -> dict[str, Any]:
        """Return some images of a version's golden set, with their classes.

        Raises:
            PlaygroundError: they cannot be had.
            ServerError: the server refused, or nobody answered.
        """
        about = await served.metadata(self._client, model, version)
        number = version or await self._chosen(about)
        content = await asyncio.to_thread(self._reader.read, about, number)
        golden, labels = content.golden, list(content.manifest.labels)
        return {
            "version": number,
            "rows": len(golden.inputs),
            "light_on_black": light_on_black(golden.inputs),
            "images": [
                {
                    "row": int(row),
                    "label": labels[golden.labels[row]],
                    "source": source(golden.inputs[row].astype(np.uint8)),
                }
                for row in mixed(golden.labels)[start : start + PAGE_ROWS]
            ],
        }

    async def answer(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        """Give what the server answers, then what everybody does.

        Raises:
            PlaygroundError, PictureError, ServerError: at first, if there is no answer. What goes
                wrong later is a message.
        """
        about = await served.metadata(self._client, asked.model, asked.version)
        pixels, truth = await self._pixels(asked, about)
        answer, latency = await served.ask(
            self._client, pixels, model=asked.model, version=asked.version
        )
        probabilities = answer.probabilities[0].astype(float)
        if not np.isfinite(probabilities).all():
            raise PlaygroundError(
                f"{answer.model} {answer.version} answers probabilities that are not finite"
            )
        yield {
            "served": {
                "model": answer.model,
                "version": answer.version,
                "labels": _labels(answer),
                "probabilities": probabilities.tolist(),
                "truth": truth,
                "seen": source(pixels),
                "shape": list(pixels.shape),
                "light_border": not asked.invert and pictures.has_light_border(pixels),
                "latency": asdict(latency),
            }
        }
        try:
            content = await self._bundle(about, answer.version)
            compared = self._compared(
                content, answer, pixels, latency, tested=asked.row is not None and not asked.invert
            )
            async with aclosing(compared) as found:
                async for message in found:
                    yield message
        except PlaygroundError as error:
            yield {"missing": str(error)}

    async def _bundle(self, about: pb.ModelMetadataResponse, version: str) -> Bundle:
        """Return the files of the version that answered, if its variants can answer here."""
        if reason := variants.missing():
            raise PlaygroundError(reason)
        return await asyncio.to_thread(self._reader.read, about, version)

    async def _compared(
        self,
        content: Bundle,
        answer: Answer,
        pixels: NDArray[np.uint8],
        latency: served.Latency,
        *,
        tested: bool,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Give a row for each variant, again whenever one has answered."""
        reports = {one.variant: one for one in content.manifest.parity}
        output = "logits" if "logits" in answer.outputs else "probabilities"
        said = {
            SERVED: Said(
                SERVED,
                tuple(answer.outputs[output][0].astype(float).tolist()),
                latency.compute_ms / 1000 if latency.requests else 0.0,
            )
        }
        names: tuple[str, ...] = ()
        async with aclosing(self._others.ask(content.path, pixels)) as answers:
            async for one in answers:
                if isinstance(one, Said):
                    said[one.variant] = one
                else:
                    names = one
                served_variant = content.manifest.served_variant
                yield {"variants": rows(names, said, reports, served_variant, tested=tested)}

    async def _chosen(self, about: pb.ModelMetadataResponse) -> str:
        """Return the version that the server means when none is named."""
        for version in reversed(about.versions):
            named = await self._client.metadata(about.name, version)
            if all(named.properties[one] == about.properties[one] for one in IDENTITY):
                return version
        raise PlaygroundError(f"the server does not say which version of {about.name} answers")

    async def _pixels(
        self, asked: Asked, about: pb.ModelMetadataResponse
    ) -> tuple[NDArray[np.uint8], str]:
        """Return the image as the model takes it, and its class where it is known."""
        if asked.row is not None:
            version = asked.version or await self._chosen(about)
            content = await asyncio.to_thread(self._reader.read, about, version)
            golden = content.golden
            if not 0 <= asked.row < len(golden.inputs):
                raise PlaygroundError(f"there is no test image {asked.row}")
            label = content.manifest.labels[golden.labels[asked.row]]
            pixels = golden.inputs[asked.row].astype(np.uint8)
            return (255 - pixels if asked.invert else pixels), label
        height, width, channels = about.inputs[0].shape[1:]
        async with self._decoding:
            shape = height, width, channels
            return await asyncio.to_thread(decode, asked.content, shape, asked.invert), ""


def mixed(classes: NDArray[np.integer]) -> NDArray[np.intp]:
    """Return the places of rows so that their classes take turns."""
    turns = np.zeros(len(classes), np.int64)
    for one in np.unique(classes):
        turns[classes == one] = np.arange(np.count_nonzero(classes == one))
    return np.lexsort((classes, turns))


def light_on_black(inputs: NDArray[np.generic]) -> bool:
    """Tell whether test images, (rows, height, width, channels), are light things on black."""
    edges = (inputs[:, 0], inputs[:, -1], inputs[:, :, 0], inputs[:, :, -1])
    borders = np.mean([edge.reshape(len(inputs), -1).mean(axis=1) for edge in edges], axis=0)
    return bool(np.mean(borders < BLACK) >= MOST)


def decode(content: bytes, shape: tuple[int, int, int], invert: bool) -> NDArray[np.uint8]:
    """Return a picture that a stranger may have made as a model's input, as `pictures` does.

    Raises:
        PictureError: it is not a picture, is damaged, or is meant to waste time or memory.
    """
    try:
        pixels = pictures.decode_all([content], shape, MAX_PIXELS)
    except PictureError as error:
        said = str(error)
        if said.startswith(TOO_MANY):
            said = f"the picture has over {MAX_PIXELS:,} pixels; make it smaller"
        raise PictureError(said.replace("picture 0", "the file")) from error
    if not invert:
        return np.asarray(pixels[0])
    with tempfile.NamedTemporaryFile() as file:  # what fills up the shape stays black
        file.write(content)
        file.flush()
        return pictures.read(Path(file.name), shape, invert=True)


def source(pixels: NDArray[np.uint8]) -> str:
    """Return an image as the address of an <img>: a PNG of its own size."""
    written = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def rows(
    names: tuple[str, ...],
    said: dict[str, Said],
    reports: dict[str, bundle_pb2.ParityReport],
    served_variant: str,
    *,
    tested: bool = True,
) -> list[dict[str, Any]]:
    """Return a row for each who answers, the original and the server first.

    Args:
        names: of the variants that will answer.
        said: what those who did have answered, by their names.
        reports: of the manifest, by the same names.
        served_variant: which of them the server runs.
        tested: whether the image is one of the test set, which budgets are for.
    """
    original = _finite(said.get(ORIGINAL))
    first = [name for name in (ORIGINAL, SERVED) if name == SERVED or name in reports]
    order = [*first, *(name for name in reports if name != ORIGINAL)]
    found = []
    for name in order:
        report = reports.get(served_variant if name == SERVED else name)
        row: dict[str, Any] = {"variant": name, "refused": "", "error": ""}
        if report is not None:
            row |= {"size": command_line.size(report.size_bytes)}
        if name in said:
            row |= _answered(said[name])
            if original is not None and "probabilities" in row:
                row |= _held(said[name], original, report, tested=tested)
        elif name not in names and report is not None:
            row["refused"] = report.failure or "it is not in the bundle"
        found.append(row)
    return found


def _answered(said: Said) -> dict[str, Any]:
    if said.error:
        return {"error": said.error}
    if _finite(said) is None:
        return {"error": "a logit is not finite"}
    return {"probabilities": _softmax(np.array(said.outputs)).tolist(), "ms": said.seconds * 1000}


def _finite(said: Said | None) -> NDArray[np.float64] | None:
    """Return what was answered, if it was anything that others can be held against."""
    logits = np.array(said.outputs if said is not None else (), np.float64)
    return logits if len(logits) and np.isfinite(logits).all() else None


def _held(
    said: Said,
    original: NDArray[np.float64],
    report: bundle_pb2.ParityReport | None,
    *,
    tested: bool,
) -> dict[str, Any]:
    """Return how far an answer is from the original's, and what on one image is an alarm.

    The largest difference is one of floats only: of integers some are allowed to be over the
    budget. A class may change where the original's margin is within twice what is allowed.
    """
    logits = np.array(said.outputs, np.float64)
    apart, same = float(np.abs(logits - original).max()), logits.argmax() == original.argmax()
    found = {"apart": apart, "same": bool(same)}
    if report is None or not report.budget.max_logit:
        return found
    allowed = _allowed(report.budget, original, tested=tested)
    integers = report.budget.precision == INTEGERS
    margin = agreement.margins(original[np.newaxis].astype(np.float32))[0]
    return found | {
        "allowed": allowed,
        "integers": integers,
        "over": not integers and apart > allowed,
        "unexplained": bool(not same and margin > 2 * allowed),
    }


def _allowed(budget: bundle_pb2.Budget, original: NDArray[np.float64], *, tested: bool) -> float:
    """Return what a logit may differ by: of a strange image more where its logits are larger.

    As `agreement.hostile_limits` has it. Rounding grows with what is added up.
    """
    if tested or not budget.scale:
        return budget.max_logit
    return budget.max_logit * max(1.0, float(np.abs(original).max()) / budget.scale)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def _labels(answer: Answer) -> list[str]:
    count = answer.probabilities.shape[1]
    return list(answer.labels) or [str(place) for place in range(count)]
