"""A request's tokens do not depend on its company, and are those of the task's merged model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import (
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
    MemoryPlanRefused,
    PromptTooLong,
)
from oneplusn.server.engine.engine import Engine, EngineConfig
from oneplusn.server.engine.families import stack_of
from oneplusn.server.messages import Sampling, Submit
from tiny_engines import (
    Job,
    alone,
    cluster,
    clusters,
    merged,
    mixed_jobs,
    record_logits,
    run,
    tiny_engine,
)
from tiny_models import tiny_model
from tolerances import assert_close

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3")
# Nine sequences of up to 76 tokens want 34 blocks of 16.
FEW_BLOCKS = 14


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def bundles(family: str):
    return clusters(tiny_model(family))


@pytest.fixture(scope="module")
def jobs(bundles) -> list[Job]:
    return mixed_jobs(bundles)


@pytest.fixture(scope="module")
def solo(family: str, bundles, jobs) -> list[list[int]]:
    """Each job by itself, every one with a cold cache of its own task."""
    return [answer.decided for answer in alone(tiny_engine(family, bundles), jobs)]


def assert_same(answers, solo: list[list[int]]) -> None:
    for answer, expected in zip(answers, solo, strict=True):
        assert answer.tokens[: len(expected)] == expected


def test_solo_runs_are_rarely_undecided(solo) -> None:
    assert sum(map(len, solo)) > 0.9 * 8 * len(solo)


def test_tasks_answer_differently(solo) -> None:
    assert len({tuple(tokens) for tokens in solo}) == len(solo)


def test_same_tokens_in_a_mixed_batch(family, bundles, jobs, solo) -> None:
    engine = tiny_engine(family, bundles)
    answers, stats = run(engine, jobs)
    assert_same(answers, solo)
    assert max(step.distinct_tasks for step in stats) == 8
    assert max(step.distinct_clusters for step in stats) == 3
    layers = len(engine.model.layers)
    assert engine.runner.hook.calls == [len(stats)] * layers


def test_same_tokens_with_prompts_in_chunks(family, bundles, jobs, solo) -> None:
    answers, stats = run(tiny_engine(family, bundles, token_budget=11, max_num_seqs=9), jobs)
    assert_same(answers, solo)
    assert max(step.num_tokens for step in stats) == 11
    assert any(step.num_decode_rows and step.num_prefill_tokens for step in stats)


def test_same_tokens_when_preempted(family, bundles, jobs) -> None:
    long = [replace(job, max_tokens=40) for job in jobs]
    roomy = tiny_engine(family, bundles)
    expected, calm = run(roomy, long)
    answers, stats = run(
        tiny_engine(family, bundles, kv_memory=FEW_BLOCKS * roomy.memory.block_bytes), long
    )
    assert_same(answers, [answer.decided for answer in expected])
    assert sum(step.preemptions for step in calm) == 0
    assert sum(step.preemptions for step in stats) > 0


def test_same_tokens_with_a_warm_prefix(family, bundles, jobs, solo) -> None:
    engine = tiny_engine(family, bundles)
    cold, _ = run(engine, jobs)
    warm, _ = run(engine, jobs)
    assert_same(warm, solo)
    assert [answer.cached_tokens for answer in cold] == [0] * len(jobs)
    assert [answer.cached_tokens for answer in warm] == [
        (len(job.prompt) - 1) // 16 * 16 for job in jobs
    ]


def test_four_answers_to_one_prompt_compute_it_once(family, bundles) -> None:
    job = Job(tuple(range(40)), ((bundles[0], "a1"),))
    (expected,) = alone(tiny_engine(family, bundles), [job])
    answers, stats = run(tiny_engine(family, bundles), [job] * 4)
    assert_same(answers, [expected.decided] * 4)
    assert [answer.cached_tokens for answer in answers] == [0, 32, 32, 32]
    assert sum(step.num_prefill_tokens for step in stats) == 40 + 3 * 8


def test_tokens_and_logits_of_the_merged_model(family, bundles, jobs, solo, monkeypatch) -> None:
    engine = tiny_engine(family, bundles)
    rows = record_logits(engine, monkeypatch)
    answers, _ = run(engine, jobs)
    base = tiny_model(family)
    for index, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
        model = merged(base, *((*part, 1.0) for part in job.parts))
        prompt = torch.tensor([job.prompt])
        with torch.inference_mode():
            generated = model.generate(
                prompt, max_new_tokens=8, do_sample=False, eos_token_id=None
            )[0, len(job.prompt) :].tolist()
            whole = torch.tensor([[*job.prompt, *answer.tokens[:-1]]])
            expected = model(whole).logits[0, len(job.prompt) - 1 :]
        assert generated[: len(solo[index])] == solo[index]
        assert_close(torch.stack(rows[str(index)]), expected)


@pytest.fixture(scope="module")
def llama_bundles():
    return clusters(tiny_model("llama"))


def test_blend_over_two_clusters_is_the_sum_of_its_parts(llama_bundles) -> None:
    a, b, _ = llama_bundles
    engine = tiny_engine("llama", llama_bundles)
    refs = (TaskRef(a.digest, "a1", 0.7), TaskRef(b.digest, "b2", -0.4))
    prompt = list(range(5, 25))
    engine.submit(Submit("x", prompt, refs, Sampling(max_tokens=6, ignore_eos=True)))
    tokens = [output.token for _ in range(6) for output in engine.step().outputs]
    model = merged(tiny_model("llama"), (a, "a1", 0.7), (b, "b2", -0.4))
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert tokens == expected[0, 20:].tolist()


def test_two_engines_in_one_process_do_not_meet(llama_bundles) -> None:
    jobs = mixed_jobs(llama_bundles)
    first, second = tiny_engine("llama", llama_bundles), tiny_engine("llama", llama_bundles)
    expected = [answer.tokens for answer in run(tiny_engine("llama", llama_bundles), jobs)[0]]
    outputs: dict[int, dict[str, list[int]]] = {0: {}, 1: {}}
    for index, job in enumerate(jobs):
        first.submit(job.submit(str(index)))
        second.submit(jobs[-1 - index].submit(str(len(jobs) - 1 - index)))
    while first.has_work or second.has_work:
        for which, engine in enumerate((first, second)):
            for output in engine.step().outputs:
                outputs[which].setdefault(output.id, []).append(output.token)
    for which in (0, 1):
        assert [outputs[which][str(i)] for i in range(len(jobs))] == expected


def test_reloaded_task_never_sees_the_old_version_s_cache() -> None:
    model = tiny_model("llama")
    old, new = (cluster(model, ["t"], seed=seed) for seed in (1, 2))
    prompt = tuple(range(40))
    engine = tiny_engine("llama", [old])
    run(engine, [Job(prompt, ((old, "t"),))])
    engine.unload(old.digest)
    engine.load(new)
    (answer,), _ = run(engine, [Job(prompt, ((new, "t"),))])
    (fresh,), _ = run(tiny_engine("llama", [new]), [Job(prompt, ((new, "t"),))])
    assert answer.cached_tokens == 0
    assert answer.tokens == fresh.tokens


def test_tenants_do_not_share_prefixes(llama_bundles) -> None:
    engine = tiny_engine("llama")
    cached = []
    for request_id, salt in (("1", "x"), ("2", "y"), ("3", "x")):
        engine.submit(Job(tuple(range(40)), max_tokens=1).submit(request_id, salt=salt))
        cached += [output.cached_tokens for output in engine.step().outputs]
    assert cached == [0, 0, 32]


# What is refused, and what it leaves behind.


def submit(tokens=(5, 6), refs=(), request_id="x", **sampling) -> Submit:
    return Submit(request_id, list(tokens), refs, Sampling(**({"max_tokens": 4} | sampling)))


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (submit(()), InvalidRequest, "no tokens"),
        (submit((5, 96)), InvalidRequest, "prompt holds 96"),
        (submit((5, -1)), InvalidRequest, "prompt holds -1"),
        (submit(logit_bias={96: 1.0}), InvalidRequest, "logit_bias holds 96"),
        (submit(stop_token_ids=(200,)), InvalidRequest, "stop_token_ids holds 200"),
        (submit([5] * 256), PromptTooLong, "256 tokens"),
        (submit(refs=(TaskRef("sha256:0", "t"),)), AdapterNotFound, "sha256:0"),
    ],
)
def test_request_is_refused_and_leaves_nothing(message, error, words) -> None:
    engine = tiny_engine("llama")
    with pytest.raises(error, match=words):
        engine.submit(message)
    assert not engine.has_work
    engine.submit(submit())


def test_too_long_a_prompt_gives_its_adapter_back(llama_bundles) -> None:
    a, *_ = llama_bundles
    engine = tiny_engine("llama", [a])
    with pytest.raises(PromptTooLong):
        engine.submit(submit([5] * 256, (TaskRef(a.digest, "a1"),)))
    engine.unload(a.digest)


def test_id_in_flight_is_refused_and_free_again_afterwards() -> None:
    engine = tiny_engine("llama")
    engine.submit(submit())
    with pytest.raises(InvalidRequest, match="'x' is in flight"):
        engine.submit(submit())
    engine.cancel("x")
    engine.submit(submit())


def test_unknown_task_of_a_resident_adapter_is_refused(llama_bundles) -> None:
    a, *_ = llama_bundles
    engine = tiny_engine("llama", [a])
    with pytest.raises(AdapterNotFound, match="no task 'z'"):
        engine.submit(submit(refs=(TaskRef(a.digest, "z"),)))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelled_request_holds_nothing(llama_bundles, steps: int) -> None:
    a, *_ = llama_bundles
    engine = tiny_engine("llama", [a])
    engine.submit(submit(refs=(TaskRef(a.digest, "a1"),)))
    for _ in range(steps):
        engine.step()
    engine.cancel("x")
    engine.cancel("x")
    assert not engine.has_work
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks
    engine.unload(a.digest)
    engine.scheduler.check_integrity()


def test_step_without_work_says_nothing() -> None:
    assert tiny_engine("llama").step().outputs == []


@pytest.mark.parametrize("family", ["llama", "gemma2"], scope="module")
@pytest.mark.parametrize("where", ["model", "sampler"])
def test_fault_ends_the_requests_of_its_step_and_no_others(
    family, bundles, jobs, solo, where, monkeypatch
) -> None:
    engine = tiny_engine(family, bundles, max_num_seqs=4)
    for index, job in enumerate(jobs):
        engine.submit(job.submit(str(index)))
    engine.step()
    victims = {seq.id for seq in engine.scheduler.running}

    def broken(*_args, **_kwargs):
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        if where == "model":
            # Deep in the model; on the generic path siblings already wait for their outputs.
            model = engine.model.model
            stack = stack_of(model)
            k_proj = None if stack else model.model.layers[1].self_attn.k_proj
            patch.setattr(stack or k_proj, "run" if stack else "forward", broken)
        else:
            patch.setattr(engine._sampler, "sample", broken)
        failed = engine.step().outputs
    assert {output.id for output in failed} == victims
    assert {output.finish for output in failed} == {"error"}
    assert all("injected" not in (output.error or "") for output in failed)
    engine.scheduler.check_integrity()
    engine.pool.check_integrity()

    rest: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            rest.setdefault(output.id, []).append(output.token)
    assert rest.keys() == {str(index) for index in range(len(jobs))} - victims
    for request_id, tokens in rest.items():
        expected = solo[int(request_id)]
        assert tokens[: len(expected)] == expected
    again, _ = run(engine, jobs)
    assert_same(again, solo)
    for bundle in bundles:
        engine.unload(bundle.digest)


# Memory and limits.


def test_scores_that_are_nan_end_their_own_request_and_no_other(monkeypatch) -> None:
    engine = tiny_engine("llama", [])
    run_step = engine.runner.run

    def one_of_them(schedule):
        logits = run_step(schedule).clone()
        for row, seq in enumerate(schedule.sampled):
            if seq.id == "broken" and seq.output:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "run", one_of_them)
    for name in ("broken", "sound"):
        engine.submit(submit(request_id=name, max_tokens=3, ignore_eos=True))
    outputs = [output for _ in range(4) for output in engine.step().outputs]

    ends = {output.id: (output.finish, output.error) for output in outputs if output.finish}
    assert ends["sound"] == ("length", None)
    finish, error = ends["broken"]
    assert finish == "error"
    assert "NaN" in error
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_memory_plan_prints_what_everybody_gets() -> None:
    lines = str(tiny_engine("llama").memory).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "base weights (loaded)",
        "KV cache",
        "adapters",
        "free memory",
    ]
    assert lines[1].endswith("1024 blocks of 4096 bytes")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"kv_memory": 2**50}, "lower --kv-memory"),
        ({"adapter_memory": 2**50}, "lower --kv-memory or --adapter-memory"),
        ({"kv_memory": 4095}, "hold no block of 4096 bytes"),
        ({"adapter_memory": 1000}, "hold no page"),
    ],
)
def test_memory_that_cannot_be_had_is_refused(limits: dict[str, int], words: str) -> None:
    with pytest.raises(MemoryPlanRefused, match=words):
        tiny_engine("llama", **limits)


def test_refused_plan_is_shown() -> None:
    with pytest.raises(MemoryPlanRefused, match=r"KV cache +\d+\.0 MiB"):
        tiny_engine("llama", kv_memory=2**50)


def test_defaults_leave_most_of_the_memory_free() -> None:
    first = tiny_engine("llama")
    first.close()
    memory = Engine(first.model, EngineConfig(max_tasks=8)).memory
    assert memory.adapters <= 0.15 * memory.free
    assert memory.num_blocks * 16 >= 64 * 256 // 4


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_model_len": 257}, "reaches 256"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"token_budget": 3, "max_num_seqs": 4}, "token budget 3"),
    ],
)
def test_contradicting_limits_are_refused(limits: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_engine("llama", **limits)
