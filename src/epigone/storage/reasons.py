"""What went wrong in a store, in one line: each client has errors of its own, and wraps those of others."""

import re
from pathlib import PurePath
from typing import Any

_REASONS = (
    (
        r"NoSuchBucket|bucket does not exist|FileNotFoundError",
        "there is no bucket '{bucket}' in {scheme}://: make it first",
    ),
    (
        r"NoCredentials|DefaultCredentials|Unable to locate credentials|PartialCredentials",
        "no credentials for {scheme}://{bucket}: sign in first ({how})",
    ),
    (
        r"AccessDenied|Forbidden|PermissionError|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|\b401\b|\b403\b",
        "no permission for {scheme}://{bucket}: ask for read and write access to its objects, or sign in anew ({how})",
    ),
    (
        r"EndpointConnection|ConnectTimeout|ReadTimeout|ClientConnector|Cannot connect|ConnectionError|TransportError"
        r"|Could not resolve|CONNECT|UNAVAILABLE|timed out|Timeout",
        "{scheme}://{bucket} cannot be reached: is there a network, and the right endpoint?",
    ),
)
_HOW = {"s3": "aws configure, or AWS_ACCESS_KEY_ID", "gs": "gcloud auth application-default login"}
_CLIENTS = ("botocore", "aiobotocore", "gcsfs", "google", "aiohttp", "s3fs", "requests")


def explained(error: BaseException, path: PurePath | None = None) -> str | None:
    """One line for what went wrong in a store; None for an error that is none of its."""
    links = list(_chain(error))
    if path is None and not any(type(link).__module__.split(".")[0] in _CLIENTS for link in links):
        return None
    text = " ".join(f"{type(link).__name__} {link}" for link in links)
    scheme, bucket = _named(text if path is None else str(path))
    for pattern, line in _REASONS:
        if re.search(pattern, text):
            return line.format(scheme=scheme, bucket=bucket, how=_HOW.get(scheme, "credentials"))
    return f"the object store failed: {first_line(error)}" if path is None else None


def _named(text: str) -> tuple[str, str]:
    found = re.search(r"(gs|s3)://([\w.-]+)", text)
    return (found[1], found[2]) if found else ("the store", "")


def _chain(error: BaseException) -> Any:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__
