"""The OpenAPI document is true, and no request gets the better of the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from servers import Server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_no_request_breaks_the_server(server: Server, tmp_path: Path) -> None:
    schemathesis = str(Path(sys.executable).with_name("schemathesis"))
    arguments = ["run", f"{server.address}/openapi.json", "--checks", CHECKS, "--max-examples", "12", "--seed", "1"]
    # Those that wait for a video would take all the time.
    limits = [
        "--exclude-path-regex",
        "sync|vae",
        "--phases",
        "examples,coverage,fuzzing",
        "--max-time",
        "15",
        "--no-color",
    ]
    done = subprocess.run(
        [schemathesis, *arguments, *limits], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert server.health()["ready"]
    for job in server.client.get("/v1/videos?limit=100").json()["data"]:
        server.client.delete(f"/v1/videos/{job['id']}")
