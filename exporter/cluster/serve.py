"""A Ray Serve application around an artifact: pictures are posted, embeddings come back.

    serve run msn_export.cluster.serve:app model=vit-msn-small.onnx replicas=2

Requests that come together are run together (``@serve.batch``), decoded in processes of their own
before. The HTTP server, the routing, the restarts are Ray Serve's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.responses import JSONResponse

from msn_export.cluster.replica import Replica, Serving
from msn_export.errors import DeviceError, ImageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ray.serve import Application
    from starlette.requests import Request

# Ray's default of 5 is less than a batch: no batch would ever fill
_ONGOING = 128


def app(arguments: dict[str, Any]) -> Application:
    """Build the application for ``serve run``, ``serve build`` and ``serve deploy``.

    Args:
        arguments: ``model``, and what else ``Serving`` has a field for.

    Raises:
        SpecError: an argument is missing, unknown, or does not fit.
    """
    serving = Serving.of(arguments)
    ongoing = max(_ONGOING, 2 * (serving.batch or 0))
    deployment: Any = Embedding
    sized = deployment.options(
        num_replicas=serving.replicas,
        ray_actor_options=serving.share,
        max_ongoing_requests=ongoing,
    )
    bound: Application = sized.bind(serving)
    return bound


@serve.deployment(name="Embedding")
class Embedding:
    """One replica; other deployments call ``embed`` on its handle."""

    def __init__(self, serving: Serving) -> None:
        self._replica = Replica(serving)
        self._fault: DeviceError | None = None
        together: Any = self.together
        together.set_max_batch_size(self._replica.batch)
        together.set_batch_wait_timeout_s(serving.wait / 1000)

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer POST with a picture's embedding, and anything else with what is served."""
        if request.method != "POST":
            return JSONResponse(self._replica.about())
        try:
            answer = await self.embed(await request.body())
        except ImageError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse(answer, status_code=500 if "error" in answer else 200)

    async def embed(self, picture: bytes) -> dict[str, Any]:
        """Decode one picture file and run it, with others that wait.

        Raises:
            ImageError: it is no picture.
            MsnExportError: the model failed.
        """
        answer: dict[str, Any] = await self.together(await self._replica.decode(picture))
        return answer

    @serve.batch  # type: ignore[untyped-decorator]
    async def together(self, pictures: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """Run what came together, out of the loop that takes requests."""
        try:
            return await asyncio.to_thread(self._replica.run, pictures)
        except DeviceError as error:
            self._fault = error
            raise

    def check_health(self) -> None:
        """Have Ray replace a replica whose device failed: a context that broke stays broken.

        Raises:
            DeviceError: the one that it failed with.
        """
        if self._fault is not None:
            raise self._fault

    def __del__(self) -> None:
        if hasattr(self, "_replica"):
            self._replica.close()
