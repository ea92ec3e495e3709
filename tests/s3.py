"""A store that speaks S3 over HTTP, in a process of its own, with users who may do much, little or nothing."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from tests.eventually import eventually
from tests.servers import free_port

_SERVE: Final = "import sys; from moto.server import main; main(sys.argv[1:])"
_READ: Final = (
    '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:Get*","s3:List*"],"Resource":"*"}]}'
)
_ALL: Final = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}'
_CALLS_OF_SETTING_UP: Final = 7
"""So many requests are let through before anybody is asked who they are."""


class Keys(NamedTuple):
    """What a user of the store signs requests with."""

    id: str
    secret: str


class S3Server:
    """An async context manager: entered means that it answers, has a bucket, and knows two users."""

    def __init__(self) -> None:
        self.bucket: Final = f"bucket-{secrets.token_hex(4)}"
        self.port: Final = free_port()
        self.writer = Keys("", "")
        self.reader = Keys("", "")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, keys: Keys | None = None, url: str = "") -> dict[str, str]:
        """What a process is told to use it, as the writer unless other keys are given."""
        keys = keys or self.writer
        return {
            "AWS_ACCESS_KEY_ID": keys.id,
            "AWS_SECRET_ACCESS_KEY": keys.secret,
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", _SERVE, "-H", "127.0.0.1", "-p", str(self.port)),
            env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(_CALLS_OF_SETTING_UP)},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await eventually(self._listens)
            await asyncio.to_thread(self._set_up)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    def _set_up(self) -> None:
        self._client("s3").create_bucket(Bucket=self.bucket)
        iam = self._client("iam")
        self.writer = _user(iam, "writer", _ALL)
        self.reader = _user(iam, "reader", _READ)

    def _client(self, service: str) -> Any:
        import boto3  # noqa: PLC0415 - it takes long, and every test imports this file

        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="setup",
            aws_secret_access_key="setup",  # noqa: S106 - nobody is asked yet
        )


def _user(iam: Any, name: str, policy: str) -> Keys:
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="theirs", PolicyDocument=policy)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return Keys(key["AccessKeyId"], key["SecretAccessKey"])
