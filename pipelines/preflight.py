"""Can a bucket be worked with, asked before any work: it answers, it may be written, it lies where it should, and this
machine's clock agrees with its own. The only file that knows boto3.

Credentials come from the environment, a shared profile or the instance's role, as boto3 finds them; none is taken from
a URI or printed.
"""

import datetime
import os
import uuid
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar

from vqvae_core.storage import Folder, StorageError

T = TypeVar("T")
_SECONDS_TO_CONNECT, _SECONDS_TO_READ, _ATTEMPTS = 5, 15, 3
_SECONDS_OF_SKEW = 300  # S3 refuses a request that is 15 minutes off
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure"}
_BUSY = {"500", "502", "503", "504", "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"}


def check_place(folder: Folder) -> None:
    """Check that a folder, local or on S3, can be written. Raises `StorageError` with what was expected, what was found
    and the way out."""
    if folder.is_local:
        folder.check_writable()
    else:
        _Bucket(folder).check()


class _Bucket:
    """The bucket of a folder, and what its answers mean."""

    def __init__(self, folder: Folder) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self._uri = folder.uri
        self._name, _, prefix = folder.uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        if not self._name:
            raise StorageError(f"expected s3://bucket/prefix, found {folder.uri!r}")
        retries: Any = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
        config = Config(connect_timeout=_SECONDS_TO_CONNECT, read_timeout=_SECONDS_TO_READ, retries=retries)
        try:
            session = boto3.Session()
            self._region = session.region_name
            self._client = session.client("s3", config=config)
            credentials = session.get_credentials()
        except (BotoCoreError, ValueError) as error:  # a profile that is not there, an endpoint that is no URL
            raise StorageError(f"expected settings of AWS that can be used for {self._uri}, but: {error}") from error
        self._endpoint = self._client.meta.endpoint_url
        if credentials is None:
            raise StorageError(
                f"expected credentials for {self._uri}, found none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE, or give the machine a role that may use the bucket"
            )

    def check(self) -> None:
        listed = self._ask(  # not a HEAD, whose errors have no text
            "s3:ListBucket",
            lambda: self._client.list_objects_v2(Bucket=self._name, Prefix=self._prefix, MaxKeys=1),
        )
        self._check_clock(listed)
        self._check_region(listed)
        key = f"{self._prefix}.writable-{uuid.uuid4().hex[:8]}"
        self._ask("s3:PutObject", lambda: self._client.put_object(Bucket=self._name, Key=key, Body=b"ready"))
        found = self._ask("s3:GetObject", lambda: self._client.get_object(Bucket=self._name, Key=key)["Body"].read())
        self._ask("s3:DeleteObject", lambda: self._client.delete_object(Bucket=self._name, Key=key))
        if found != b"ready":
            raise StorageError(
                f"expected a store at {self._endpoint} that gives back what was written, wrote 5 bytes and read "
                f"{len(found)} others; is it an S3 store?"
            )

    def _check_clock(self, answer: Any) -> None:
        said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if said is None:
            return
        seconds = (datetime.datetime.now(datetime.UTC) - parsedate_to_datetime(said)).total_seconds()
        if abs(seconds) > _SECONDS_OF_SKEW:
            self._refuse_clock(f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the store's, {said}")

    def _refuse_clock(self, found: str) -> NoReturn:
        raise StorageError(
            f"expected this machine's clock to agree with that of {self._endpoint} within {_SECONDS_OF_SKEW} s, since "
            f"requests are signed with the time, found it {found}; set the clock (chronyd, timedatectl set-ntp true)"
        )

    def _check_region(self, answer: Any) -> None:
        there = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        if there and self._region and there != self._region and not _own_endpoint():
            raise StorageError(
                f"expected the bucket {self._name} in {self._region} (AWS_REGION, AWS_DEFAULT_REGION or the profile), "
                f"found it in {there}; set AWS_REGION={there}, or take a bucket of {self._region}: traffic between "
                "regions is slow and costs money"
            )

    def _ask(self, action: str, request: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return request()
        except ClientError as error:
            self._refuse(action, error.response)
        except BotoCoreError as error:  # no connection, no answer in time, a name that is not found
            text = str(error).splitlines()[0]
            raise StorageError(
                f"expected an answer of {self._endpoint} for {self._uri}, but: {text}; is the network there, and "
                "AWS_ENDPOINT_URL right (unset it for AWS itself)?"
            ) from error
        raise AssertionError("unreachable")

    def _refuse(self, action: str, answer: Any) -> NoReturn:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(answer.get("Error", {}).get("Code", status))
        if code in ("RequestTimeTooSkewed", "RequestInTheFuture"):
            self._refuse_clock("far off")
        if code in _EXPIRED:
            raise StorageError(
                f"expected credentials that are valid for {self._uri}, found expired ones ({code}); get new ones, or "
                "use a role, which renews them"
            )
        if code in _UNKNOWN:
            raise StorageError(
                f"expected credentials that {self._endpoint} knows, for {self._uri}, it answers {code}; are they those "
                "of another account or another store?"
            )
        if status == 404 or code in ("NoSuchBucket", "404"):
            raise StorageError(
                f"expected a bucket {self._name} at {self._endpoint}, found none; make it (aws s3 mb "
                f"s3://{self._name}) or correct its name"
            )
        if status == 403 or code in ("AccessDenied", "403"):
            place = self._name if action == "s3:ListBucket" else f"{self._name}/{self._prefix}*"
            raise StorageError(
                f"expected the right to {action} on arn:aws:s3:::{place}, it was denied ({code}); this program needs "
                "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
            )
        if status in (301, 307, 400):
            self._check_region(answer)
        if status >= 500 or code in _BUSY:
            raise StorageError(
                f"expected {self._endpoint} to answer {action} for {self._uri}, it is busy or broken ({code}, asked "
                f"{_ATTEMPTS} times); run the same command again in a while"
            )
        message = str(answer.get("Error", {}).get("Message", "")).splitlines()[:1]
        raise StorageError(f"expected to {action} for {self._uri}, {self._endpoint} answers {code}: {''.join(message)}")


def _own_endpoint() -> bool:
    """A store that is not AWS: its regions mean nothing."""
    return bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
