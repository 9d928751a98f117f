"""The web application, through HTTP."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from fewmask.commands.serve import is_loopback, serve
from fewmask.deploy.predictor import Predictor
from fewmask.deploy.serve import create_app
from fewmask.types import UserError
from tests.deploy.darkness import dark_square, write_darkness


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(write_darkness(tmp_path_factory.mktemp("model") / "model.onnx"))


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    with TestClient(create_app(predictor, max_upload=100_000), base_url="http://127.0.0.1:8000") as client:
        yield client


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_an_upload_gets_the_predictors_answer(client: TestClient, predictor: Predictor) -> None:
    image, _ = dark_square(60, 90)
    reply = client.post("/predict", files={"image": ("lesion.png", png(image))})
    assert reply.status_code == 200
    answer, mask = reply.json(), predictor.mask(image)
    assert answer["area_px"] == mask.sum()
    assert (answer["height"], answer["width"], answer["image"]) == (60, 90, "lesion.png")
    assert np.array_equal(decoded(base64.b64decode(answer["mask_png"])), mask * np.uint8(255))
    assert decoded(base64.b64decode(answer["overlay_jpeg"])).shape == image.shape


def test_the_mask_alone_as_png(client: TestClient, predictor: Predictor) -> None:
    image, _ = dark_square(60, 90)
    reply = client.post("/predict?format=png", files={"image": ("lesion.png", png(image))})
    assert reply.headers["content-type"] == "image/png"
    assert np.array_equal(decoded(reply.content) > 0, predictor.mask(image))


@pytest.mark.parametrize(
    ("files", "query", "status"),
    [
        ({"image": ("notes.txt", b"hello")}, "", 400),
        ({"image": ("cut.png", png(dark_square(60, 90)[0])[:100])}, "", 400),
        ({"image": ("big.bin", bytes(200_000))}, "", 413),
        ({"other": ("a.png", b"x")}, "", 422),
        ({"image": ("a.png", b"x")}, "?format=gif", 422),
    ],
)
def test_a_mistake_is_one_sentence(client: TestClient, files: dict, query: str, status: int) -> None:
    reply = client.post("/predict" + query, files=files)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert "\n" not in reply.json()["error"]


def test_an_error_names_the_upload_and_no_folder_of_the_server(client: TestClient) -> None:
    reply = client.post("/predict", files={"image": ("../../secret/notes.txt", b"hello")})
    assert "notes.txt" in reply.json()["error"]
    assert "/" not in reply.json()["error"]


def test_an_upload_of_unstated_length_is_refused(client: TestClient) -> None:
    reply = client.post("/predict", content=iter([b"x" * 10]), headers={"content-type": "application/octet-stream"})
    assert reply.status_code == 411


def test_the_page_is_whole_and_asks_nobody_else(client: TestClient) -> None:
    reply = client.get("/")
    assert reply.status_code == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", reply.text)
    assert client.get("/docs").status_code == 404


def test_a_page_under_a_foreign_name_reaches_nothing(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("name", ["a.p%00ng", "a.\x00png", "a.jpg\x00"])
def test_a_name_no_file_may_bear_is_no_fault_of_the_server(client: TestClient, name: str) -> None:
    content = png(dark_square(60, 90)[0])
    head = f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--x--\r\n"
    reply = client.post("/predict", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert reply.status_code in (200, 400, 422)


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_every_loopback_address_keeps_foreign_names_out(predictor: Predictor, host: str) -> None:
    client = TestClient(create_app(predictor, host), base_url="http://127.0.0.1:8000")
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    own = f"[{host}]:8000" if ":" in host else f"{host}:8000"
    assert client.get("/", headers={"host": own}).status_code == 200


def test_loopback_and_a_taken_port(tmp_path: Path) -> None:
    import socket

    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            serve(write_darkness(tmp_path / "m.onnx"), taken.getsockname()[1])
