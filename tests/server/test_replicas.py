"""Two engines behind one port."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nano_vllm import LLM, BeamSearchParams, SamplingParams
from nano_vllm.config import EngineConfig
from nano_vllm.distributed.launch import Launch
from nano_vllm.engine.async_llm import AsyncLLM
from nano_vllm.engine.messages import Ready, RequestDelta
from nano_vllm.engine.output_stream import EngineError, OutputStream
from nano_vllm.engine.rank_processes import rank_variables
from nano_vllm.engine.replicas import Replicas
from nano_vllm.engine.router import SEQUENCE_TOKENS
from nano_vllm.server.server_config import ServerConfig
from tests.server.running_server import RunningServer, running_server
from tests.server.test_faults import LONG, OpenStream
from tests.server.test_tenants import BLOCK_SIZE, cached_tokens

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
LONG_PROMPT = "the beginning that all of them share " * 40


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("pair") / "log"
    with running_server(tiny_model, log, "--dp", "2") as server:
        yield server


def by_replica(server: RunningServer, name: str) -> list[float]:
    """After the next sign of life."""
    time.sleep(1.1)
    return [server.metric(f'{name}{{engine="{engine}",model_name="tiny"}}') for engine in (0, 1)]


def test_the_same_results_from_both(pair: RunningServer, server: RunningServer) -> None:
    body = {"prompt": [f"prompt {i} of several" for i in range(6)], **GREEDY}
    one, two = (s.post("/v1/completions", body).json() for s in (server, pair))
    assert two["choices"] == one["choices"]
    assert two["usage"] == one["usage"]
    assert "in each of 2 replicas" in pair.log
    assert by_replica(pair, "vllm:generation_tokens_total") == [36, 36]
    assert by_replica(pair, "vllm:request_generation_tokens_count") == [3, 3]
    ended = pair.metrics("vllm:request_success_total", 'finished_reason="length"')
    assert ended == [3, 3]


def test_equal_requests_draw_their_own_tokens(pair: RunningServer) -> None:
    body = {"prompt": "a", "max_tokens": 40, "temperature": 5.0, "ignore_eos": True}
    texts = [pair.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(4)]
    assert len(set(texts)) == 4


def test_a_prefix_is_found_where_it_was_computed(pair: RunningServer) -> None:
    full = len(LONG_PROMPT) // BLOCK_SIZE * BLOCK_SIZE
    with ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> int:
            body = {"prompt": f"{LONG_PROMPT}{number}", **GREEDY}
            return cached_tokens(pair.post("/v1/completions", body).json())

        assert ask(0) == 0
        # Fewer at a time than would make it quicker elsewhere.
        assert full > 4 * SEQUENCE_TOKENS
        assert list(pool.map(ask, range(1, 13))) == [full] * 12


def test_a_client_that_leaves_holds_nothing(pair: RunningServer) -> None:
    with pair.connect(LONG | {"prompt": ["a", "b", "c"], "n": 2}) as client:
        assert client.recv(1)
        time.sleep(1.1)
        running = pair.metrics("vllm:num_requests_running")
        assert sorted(running) == [2, 4]
    pair.wait_until_idle(5)


def test_the_feed_of_each(pair: RunningServer) -> None:
    pair.post("/v1/completions", {"prompt": ["a", "b"], **GREEDY})
    time.sleep(1.1)  # signs of life come once a second
    for engine in (0, 1):
        with pair.client.stream("GET", f"{pair.url}/debug/state?engine={engine}") as response:
            state = json.loads(next(response.iter_lines()).removeprefix("data: "))
            assert state["num_engines"] == 2
            assert state["metrics"]["num_finished_requests"] > 0
    for wrong in ("2", "-1", "x"):
        refused = pair.get(f"/debug/state?engine={wrong}")
        assert refused.status_code == 400
        assert f"engine must be in [0, 1], got '{wrong}'" in refused.text


def test_one_of_them_killed(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path, "--dp", "2") as server:
        streams = [OpenStream(server, max_tokens=1500) for _ in range(4)]
        pids = server.engine_pids
        os.kill(pids[1], signal.SIGKILL)
        time.sleep(0.2)
        for refused in (server.get("/health"), server.post("/v1/completions", {"prompt": "a"})):
            assert refused.status_code == 503
            assert "the engine ended" in refused.text
        for stream in streams:
            stream.wait()
            assert stream.error is None
            assert stream.lines[-1] == "data: [DONE]"
        ends = ["the engine process ended" in stream.lines[-2] for stream in streams]
        assert ends == [False, True, False, True]
        assert all('"finish_reason":"length"' in stream.lines[-2] for stream in streams[::2])
        assert server.process.wait(10) == 1
        assert "error: replica 1: the engine process ended\ndraining 2 prompts" in server.log
        assert not Path(f"/proc/{pids[0]}").exists()


def test_replicas_of_two_ranks(tiny_model: Path, log_path: Path, pair: RunningServer) -> None:
    body = {"prompt": [f"prompt {i} of several" for i in range(4)], **GREEDY}
    with running_server(tiny_model, log_path, "--dp", "2", "--tp", "2") as server:
        pids = server.engine_pids
        assert len(pids) == 4
        got = [choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]]
        expected = pair.post("/v1/completions", body).json()["choices"]
        assert got == [choice["text"] for choice in expected]
        assert by_replica(server, "vllm:generation_tokens_total") == [24, 24]
        streams = [OpenStream(server, max_tokens=60) for _ in range(2)]
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.wait()
            assert '"finish_reason":"length"' in stream.lines[-2]
        assert server.process.wait(10) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_rank_that_ends_while_it_loads(tiny_model: Path) -> None:
    """The first would wait minutes for it."""

    async def scenario() -> None:
        llm = AsyncLLM(EngineConfig(str(tiny_model), device="cpu", tensor_parallel_size=2))
        loading = asyncio.create_task(llm.start())
        while len(llm._processes._processes) < 2:
            await asyncio.sleep(0.01)
        llm._processes._processes[1].kill()
        with pytest.raises(EngineError, match="ended while it loaded"):
            await asyncio.wait_for(loading, 5)
        await llm.close()
        assert all(process.poll() is not None for process in llm._processes._processes)

    asyncio.run(scenario())


def test_each_rank_finds_its_own_gpus() -> None:
    config = EngineConfig(tensor_parallel_size=2)
    both = [rank_variables(config, i, 2, {"CUDA_VISIBLE_DEVICES": "7,5,3,1"}) for i in (0, 1)]
    assert [[v["CUDA_VISIBLE_DEVICES"] for v in ranks] for ranks in both] == [
        ["7,5", "7,5"],
        ["3,1", "3,1"],
    ]
    assert [[Launch.from_environment(v) for v in ranks] for ranks in both] == [
        [
            Launch(rank, 2, rank, "127.0.0.1", int(ranks[0]["MASTER_PORT"]), attempt="0")
            for rank in (0, 1)
        ]
        for ranks in both
    ]
    (alone,) = rank_variables(EngineConfig(), 1, 2, {})
    assert alone["CUDA_VISIBLE_DEVICES"] == "1"
    assert "RANK" not in alone
    assert rank_variables(EngineConfig(), 0, 1, {}) == [{}]
    (on_cpu,) = rank_variables(EngineConfig(device="cpu"), 1, 2, {})
    assert on_cpu == {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert rank_variables(EngineConfig(device="cpu"), 1, 2, {"OMP_NUM_THREADS": "3"}) == [{}]
    torchrun = both[0][0]
    assert rank_variables(config, 0, 1, torchrun) == [{}]
    with pytest.raises(ValueError, match=r"2 replicas of 2 GPUs need 4, .* has 3: '7,5,3'"):
        rank_variables(config, 0, 2, {"CUDA_VISIBLE_DEVICES": "7,5,3"})


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="data_parallel_size must be an integer of at least 1"):
        ServerConfig(data_parallel_size=0)
    with pytest.raises(ValueError, match="data_parallel_size must be 1 under torchrun, got 2"):
        Launch(0, 4).check_replicas(2)
    Launch(0, 4).check_replicas(1)
    Launch().check_replicas(2)
    with pytest.raises(ValueError, match="data_parallel_size must be 1, got 2"):
        Replicas(EngineConfig(record="trace.jsonl"), 2)
    with pytest.raises(ValueError, match="data_parallel_size is an option of the server"):
        LLM(data_parallel_size=2)


class FakeLLM:
    """An AsyncLLM without an engine."""

    devices: ClassVar = ["cuda:0", "cuda:0"]

    def __init__(self, config: EngineConfig, step_timeout: float, replica: int, count: int) -> None:
        self.replica = replica
        self.added: list[tuple[OutputStream, int]] = []
        self.death: asyncio.Future[str] | None = None
        self.num_unfinished, self.is_stuck, self.pong = 0, False, None

    async def start(self) -> Ready:
        self.death = asyncio.get_running_loop().create_future()
        if self.devices[self.replica] == "broken":
            raise ValueError("broken")
        return Ready(1000, 256, 64 - self.replica, BLOCK_SIZE, self.devices[self.replica])

    def add(self, output: OutputStream, place: int, *args: Any) -> None:
        self.added.append((output, place))

    def abort(self, output: OutputStream) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr("nano_vllm.engine.replicas.AsyncLLM", FakeLLM)
    return FakeLLM


def test_what_ends_is_no_load_any_more(fakes: type[FakeLLM]) -> None:
    async def scenario() -> None:
        replicas = Replicas(EngineConfig(), 2)
        assert (await replicas.start()).num_blocks == 63
        params = [SamplingParams(n=2), BeamSearchParams(3, 4), SamplingParams(best_of=4)]
        output = replicas.submit([([1, 2, 3], p) for p in params], stream=True)
        assert output.engines == [0, 1, 0]
        loads = replicas._router.loads
        assert loads == (6 * SEQUENCE_TOKENS + 6, 3 * SEQUENCE_TOKENS + 3)
        output.put(0, RequestDelta(output.request_ids[0], [], finished=False))
        assert replicas._router.loads == (6 * SEQUENCE_TOKENS + 3, loads[1])
        output.put(1, RequestDelta(output.request_ids[1], [], finished=True))
        assert replicas._router.loads == (6 * SEQUENCE_TOKENS + 3, 0)
        replicas.abort(output)
        assert replicas._router.loads == (0, 0)

    asyncio.run(scenario())


def test_behind_the_end_of_one_nothing_is_taken_in(fakes: type[FakeLLM]) -> None:
    async def scenario() -> None:
        replicas = Replicas(EngineConfig(), 2)
        await replicas.start()
        death = replicas._llms[1].death
        assert death is not None
        death.set_result("why")
        with pytest.raises(EngineError, match="not running"):
            replicas.submit([([1], SamplingParams())])
        assert not replicas._llms[0].added
        assert replicas.death is not None
        assert await replicas.death == "replica 1: why"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["cuda:0", "cpu"], "all have a GPU, or none of them; they got: 0 cuda:0, 1 cpu"),
        (["cuda:0", "broken"], "broken"),
    ],
)
def test_replicas_that_cannot_be(
    fakes: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, devices: list[str], message: str
) -> None:
    monkeypatch.setattr(fakes, "devices", devices)
    with pytest.raises(ValueError, match=message):
        asyncio.run(Replicas(EngineConfig(), 2).start())
