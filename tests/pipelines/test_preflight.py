"""Each way in which a bucket cannot be used has its own message; a bucket that can is left as it was."""

import datetime
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipelines import preflight
from pipelines.preflight import check_place
from vqvae_core.storage import Folder, StorageError

Answer = tuple[int, str, dict[str, str]]  # status, code of the error, headers
LISTING = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Answer]], None]]:
    """A store that answers a method (GET is the listing, READ a file) as told, and else as S3 would."""
    told: dict[str, Answer] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            method = "READ" if self.command == "GET" and ".writable" in self.path else self.command
            status, code, headers = told.get(method, (200, "", {}))
            body = f"<Error><Code>{code}</Code><Message>why</Message></Error>".encode() if code else b""
            if not code and method in ("GET", "READ"):
                body = LISTING if method == "GET" else b"ready"
            self.send_response_only(status)
            for name, value in {"Date": format_datetime(datetime.datetime.now(datetime.UTC)), **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_DELETE = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "a-key",
                "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setattr(preflight, "_ATTEMPTS", 1)
    yield told.update
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(uri: str = "s3://bucket/runs/one") -> str:
    with pytest.raises(StorageError) as error:
        check_place(Folder.of(uri))
    assert "a-secret" not in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_bucket_that_can_be_used_is_left_as_it_was(s3_bucket: str) -> None:
    folder = Folder.of(f"{s3_bucket}/preflight")
    check_place(folder)
    assert (Folder.of(s3_bucket)).list("preflight") == []


def test_a_local_folder(tmp_path: Path) -> None:
    check_place(Folder.of(tmp_path / "new"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="choose another --root"):
        check_place(Folder.of(tmp_path / "file" / "root"))


def test_a_bucket_that_is_not_there(s3_bucket: str) -> None:
    text = refusal("s3://no-such-bucket/x")
    assert text.startswith("expected a bucket no-such-bucket at http://127.0.0.1:")
    assert "aws s3 mb s3://no-such-bucket" in text
    assert "expected s3://bucket/prefix" in refusal("s3:///x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "action", "place"),
    [
        ("GET", "s3:ListBucket", "bucket"),
        ("PUT", "s3:PutObject", "bucket/runs/one/*"),
        ("READ", "s3:GetObject", "bucket/runs/one/*"),
        ("DELETE", "s3:DeleteObject", "bucket/runs/one/*"),
    ],
)
def test_a_right_that_is_missing_is_named(store: Callable, method: str, action: str, place: str) -> None:
    store({method: (403, "AccessDenied", {})})
    assert f"expected the right to {action} on arn:aws:s3:::{place}, it was denied" in refusal()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "ExpiredToken", "found expired ones (ExpiredToken); get new ones"),
        (403, "InvalidAccessKeyId", "it answers InvalidAccessKeyId; are they those of another account"),
        (403, "SignatureDoesNotMatch", "it answers SignatureDoesNotMatch"),
        (403, "RequestTimeTooSkewed", "set the clock"),
        (503, "SlowDown", "it is busy or broken (SlowDown, asked 1 times); run the same command again in a while"),
        (418, "Teapot", "answers Teapot: why"),
    ],
)
def test_what_a_store_answers_is_told_apart(store: Callable, status: int, code: str, words: str) -> None:
    store({"GET": (status, code, {})})
    assert words in refusal()


@pytest.mark.parametrize(("minutes", "words"), [(-7, "ahead of"), (7, "behind")])
def test_a_clock_that_is_off(store: Callable, minutes: int, words: str) -> None:
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    store({"GET": (200, "", {"Date": format_datetime(then)})})
    text = refusal()
    assert f" s {words} the store's" in text and "set the clock" in text and "within 300 s" in text


@pytest.mark.slow
def test_a_bucket_of_another_region(store: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    store({"GET": (200, "", {"x-amz-bucket-region": "eu-west-1"})})
    check_place(Folder.of("s3://bucket/runs"))  # a store that is not AWS
    monkeypatch.setattr(preflight, "_own_endpoint", lambda: False)
    assert "expected the bucket bucket in us-east-1" in refusal() and "set AWS_REGION=eu-west-1" in refusal()
    store({"GET": (200, "", {"x-amz-bucket-region": "us-east-1"})})
    check_place(Folder.of("s3://bucket/runs"))


@pytest.mark.slow
def test_a_store_that_gives_back_something_else(store: Callable) -> None:
    store({"READ": (200, "x", {})})
    assert "expected a store at http://127.0.0.1" in refusal() and "is it an S3 store?" in refusal()


def test_a_store_that_is_not_there(store: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    text = refusal()
    assert text.startswith("expected an answer of http://127.0.0.1:9 for s3://bucket/runs/one, but: ")
    assert "AWS_ENDPOINT_URL right" in text
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1")
    assert "expected settings of AWS that can be used" in refusal()


def test_no_credentials(store: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "found none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refusal()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "expected settings of AWS that can be used" in refusal()
