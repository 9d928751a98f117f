"""The web application: one page, one endpoint, one model."""

from __future__ import annotations

import base64
import ipaddress
import tempfile
import threading
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import python_multipart  # noqa: F401 - FastAPI finds out too late that it is missing
from fastapi import FastAPI, File, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fewmask.data.reading import PICTURE_SUFFIXES, read_image
from fewmask.deploy.pictures import describe_mask, mask_png, overlay_jpeg
from fewmask.deploy.predictor import ImagePredictor
from fewmask.types import UserError

MAX_UPLOAD = 50_000_000
_LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "::1"]
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(predictor: ImagePredictor, host: str = "127.0.0.1", max_upload: int = MAX_UPLOAD) -> FastAPI:
    """Return the application: GET / is the page, POST /predict takes a multipart file "image".

    /predict answers JSON (size, area, `mask_png` and `overlay_jpeg` in base64) or, with ?format=png, the mask as PNG of
    0 and 255. A mistake is answered with a status of 400 and above and {"error": one sentence}. `max_upload` is in
    bytes. On loopback only requests addressed to loopback are answered, so that no foreign page can reach it by name.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # One image at a time: two would share the cores and the memory, and neither would be sooner.
    turn = threading.Lock()

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})

    @app.post("/predict", response_model=None)
    def predict(
        image: Annotated[UploadFile, File()], answer: Annotated[Literal["json", "png"], Query(alias="format")] = "json"
    ) -> Response:
        with turn:
            return _answer(predictor, image, answer)

    _add_limits(app, max_upload)
    _add_error_handlers(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_allowed_hosts(host))
    return app


def _allowed_hosts(host: str) -> list[str]:
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return [*_LOOPBACK, host] if loopback else ["*"]


def _page() -> str:
    return resources.files("fewmask.deploy").joinpath("page.html").read_text(encoding="utf-8")


def _answer(predictor: ImagePredictor, upload: UploadFile, answer: str) -> Response:
    image = _read_upload(upload)
    probability = predictor(image)
    mask = probability >= predictor.threshold
    if answer == "png":
        return Response(mask_png(mask), media_type="image/png")
    return JSONResponse(
        {
            "image": _name(upload),
            **describe_mask(probability, predictor.threshold),
            "mask_png": base64.b64encode(mask_png(mask)).decode(),
            "overlay_jpeg": base64.b64encode(overlay_jpeg(image, mask)).decode(),
        }
    )


def _read_upload(upload: UploadFile) -> Any:
    """Read an uploaded file as any other image file; errors name the upload, not where it lay meanwhile."""
    name = _name(upload)
    with tempfile.TemporaryDirectory(prefix="fewmask-") as folder:
        suffix = Path(name).suffix.lower()
        path = Path(folder) / f"upload{suffix if suffix in PICTURE_SUFFIXES else ''}"
        path.write_bytes(upload.file.read())
        try:
            return read_image(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), name)) from None


def _name(upload: UploadFile) -> str:
    return Path((upload.filename or "the upload").replace("\\", "/")).name[:200] or "the upload"


def _add_limits(app: FastAPI, max_upload: int) -> None:
    @app.middleware("http")
    async def limit(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal():
                return _error(411, "The upload must state its length.")
            # The multipart wrapping is counted too, hence the small allowance.
            if int(length) > max_upload + 10_000:
                return _error(413, f"The file is larger than {max_upload / 1e6:g} MB; make it smaller.")
        return await proceed(request)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    def mistake(request: Request, error: UserError) -> JSONResponse:
        return _error(400, str(error))

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, "Send one file named 'image' as multipart form data; ?format may be json or png.")


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)
