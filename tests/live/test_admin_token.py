"""The secret of llm_admin stays one, on a server that other machines can reach."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from tests.launch.helpers import Launch

pytestmark = pytest.mark.live
SECRET = "not-for-everyone"


def test_a_public_server_does_not_tell_its_secret(tmp_path: Path) -> None:
    launch = Launch.of_echo(tmp_path, "--host", "0.0.0.0", "--set", f"admin_token={SECRET}", "--no-sample")
    try:
        launch.endpoint().close()
        http, grpc = re.findall(r"127\.0\.0\.1:(\d+)", launch.output)[:2]
        assert SECRET not in over_http(f"http://127.0.0.1:{http}/v2/models/llm/config")
        with grpcclient.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            assert SECRET not in over_grpc(client)
    finally:
        launch.close()


def over_http(url: str) -> str:
    """The body of an answer, whether the server gives it or refuses."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


def over_grpc(client: grpcclient.InferenceServerClient) -> str:
    try:
        return str(client.get_model_config("llm"))
    except InferenceServerException as error:
        return str(error)
