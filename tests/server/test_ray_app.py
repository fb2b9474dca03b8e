"""The API as a Ray Serve deployment and a batch through Ray Data, on a Ray of this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nano_vllm import LLM, SamplingParams
from tests.server.running_server import NUM_BLOCKS, RunningServer, sse_events

ray = pytest.importorskip("ray")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
GREEDY = {"prompt": "Once upon", "max_tokens": 12, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    """Of two replicas."""
    from ray import serve

    from nano_vllm.ray_app import build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=2**27,
        runtime_env={
            "env_vars": {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(paths),
                "NANO_VLLM_API_KEY": "secret",
            }
        },
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {
            "model": str(tiny_model),
            "served_model_name": "tiny",
            "device": "cpu",
            "num_blocks": str(NUM_BLOCKS),  # as `serve run` gives it
        }
        application = build(options)
        application._bound_deployment = application._bound_deployment.options(
            num_replicas=2,
            ray_actor_options={"num_cpus": 1},
            health_check_period_s=0.5,
            graceful_shutdown_timeout_s=2,
        )
        serve.run(application)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def post(url: str, **body: object) -> httpx.Response:
    headers = {"authorization": "Bearer secret"}
    return httpx.post(url + "/v1/completions", json=GREEDY | body, headers=headers, timeout=30)


def engines() -> list[int]:
    """Engine processes that Ray's replicas have started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            is_rays = b"ray::" in Path(f"/proc/{parent}/cmdline").read_bytes()
            if is_rays and b"nano_vllm.engine.engine_process" in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    """The example starts a Ray of its own."""
    prompts = [f"prompt {i}" for i in range(9)]
    lines = [json.dumps({"prompt": prompt, "id": i}) for i, prompt in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = {
        "model": tiny_model,
        "input": tmp_path / "in.jsonl",
        "output": tmp_path / "out",
        "device": "cpu",
        "max-tokens": 8,
        "batch-size": 4,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    script = ROOT / "docs" / "deployment" / "ray_batch.py"
    subprocess.run([sys.executable, str(script), *flags], check=True, timeout=120)
    rows = [
        json.loads(line)
        for path in (tmp_path / "out").iterdir()
        for line in path.read_text().splitlines()
    ]
    with LLM(str(tiny_model), device="cpu") as llm:
        params = SamplingParams(max_tokens=8, temperature=0)
        expected = [o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False)]
    assert [row["text"] for row in sorted(rows, key=lambda row: row["id"])] == expected


def test_the_same_api(url: str, server: RunningServer) -> None:
    expected = server.post("/v1/completions", GREEDY).json()
    got = [post(url) for _ in range(8)]
    assert {response.status_code for response in got} == {200}
    assert [response.json()["choices"] for response in got] == [expected["choices"]] * 8
    chunks = sse_events(post(url, stream=True))
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == expected["choices"][0]["text"]
    assert len(chunks) > 1
    refused = post(url, temperature=-1)
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]["message"]
    assert httpx.get(url + "/v1/models").status_code == 401


def test_a_replica_whose_engine_ends_is_replaced(url: str) -> None:
    before = engines()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    end = time.monotonic() + 60
    while len(now := engines()) < 2 or before[0] in now:
        assert time.monotonic() < end
        time.sleep(0.2)
    end = time.monotonic() + 60
    num_served = 0
    while num_served < 8:
        num_served = num_served + 1 if post(url).status_code == 200 else 0
        assert time.monotonic() < end
    assert before[1] in engines()


def test_options() -> None:
    from nano_vllm.ray_app import build

    def deployment(**options: object):
        return build({"model": "m", **options})._bound_deployment

    four = deployment(tensor_parallel_size="2", data_parallel_size="2", max_num_seqs=100)
    assert four.ray_actor_options["num_gpus"] == 4
    assert four.max_ongoing_requests == 200 + 256
    assert deployment(device="cpu").ray_actor_options["num_gpus"] == 0
    for options, message in (
        ({"max_num_seq": 1}, "unknown option 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"port": 80}, "unknown option 'port'"),
        ({"block_size": 7}, r"block_size must be a multiple of 8 in \[8, 256\], got 7"),
        ({"block_size": "x"}, "Expected `int`, got `str` - at `.*block_size`"),
    ):
        with pytest.raises(ValueError, match=message):
            deployment(**options)


def test_the_example_of_a_cluster() -> None:
    from ray.serve.schema import ServeDeploySchema

    from nano_vllm.ray_app import Server, build

    config = yaml.safe_load((ROOT / "docs/deployment/ray-serve.yaml").read_text())
    (application,) = ServeDeploySchema(**config).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    build(application.args)
    (deployment,) = application.deployments
    assert deployment.name == Server.name
    assert deployment.autoscaling_config["max_replicas"] == 8
