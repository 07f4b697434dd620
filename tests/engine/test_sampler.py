from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from oneplusn.errors import InvalidRequest
from oneplusn.kernels import draw_native
from oneplusn.server.engine.draws import GROUP, Filters, largest_of, smallest_kept, uniforms
from oneplusn.server.engine.sampler import NO_TOKEN, Sampler
from oneplusn.server.engine.sequence import Sequence
from oneplusn.server.messages import Sampling
from tolerances import assert_close

EOS = 3


def sequence(prompt=(2, 3), output=(), **sampling) -> Sequence:
    sampling = {"max_tokens": 100, "seed": 0} | sampling
    return Sequence("r", list(prompt), Sampling(**sampling), output=list(output))


def sample(logits: Tensor, *seqs: Sequence):
    return Sampler([EOS]).sample(logits, list(seqs))


def pick(row: list[float], **request) -> int:
    """Sample one row of logits."""
    return sample(torch.tensor([row]), sequence(**request)).tokens[0]


def oracle(logits: Tensor, seq: Sequence) -> Tensor:
    """Compute the distribution of one row [V] by transformers' processors, in fp32."""
    sampling = seq.sampling
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    bias = {(token,): value for token, value in sampling.logit_bias.items()}
    for token in set(seq.output):
        # Neither penalty has a class of its own; both are a bias that follows from the output.
        penalty = sampling.presence_penalty + sampling.frequency_penalty * seq.output.count(token)
        bias[(token,)] = bias.get((token,), 0.0) - penalty
    if bias:
        processors.append(SequenceBiasLogitsProcessor(bias))
    if len(seq.output) < sampling.min_tokens:
        processors.append(SuppressTokensLogitsProcessor([EOS, *sampling.stop_token_ids]))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores = processors(torch.tensor([seq.prompt + seq.output]), logits[None].clone())
    return scores[0].softmax(-1)


def mixed_requests(count: int, vocab_size: int) -> list[Sequence]:
    """Draw requests that use every parameter, most of them several at once."""
    rng = np.random.default_rng(count)

    def sometimes(value, default):
        return value if rng.random() < 0.5 else default

    requests = []
    for index in range(count):
        bias = {int(token): float(rng.normal()) for token in rng.integers(0, vocab_size, 4)}
        sampling = Sampling(
            max_tokens=100,
            temperature=float(rng.uniform(0.2, 1.5)),
            top_k=sometimes(int(rng.choice([1, 5, 64, 128, 200, 10**6])), 0),
            top_p=sometimes(float(rng.uniform(0.05, 0.999)), 1.0),
            min_p=sometimes(float(rng.uniform(0.001, 0.5)), 0.0),
            repetition_penalty=sometimes(float(rng.uniform(0.5, 2)), 1.0),
            presence_penalty=sometimes(float(rng.uniform(-2, 2)), 0.0),
            frequency_penalty=sometimes(float(rng.uniform(-2, 2)), 0.0),
            seed=index,
            stop_token_ids=sometimes((7, 8), ()),
            min_tokens=sometimes(9, 0),
            logit_bias=sometimes(bias, {}),
        )
        prompt = rng.integers(0, vocab_size, rng.integers(1, 30)).tolist()
        output = rng.integers(0, vocab_size, rng.integers(0, 20)).tolist()
        requests.append(Sequence(str(index), prompt, sampling, output=output))
    return requests


# 300 and 9,001 columns: below and above what is searched by groups; peaked rows are settled by
# their largest candidates, flat ones by the whole row.
@pytest.mark.parametrize("vocab_size", [40, 300, 9001])
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["flat", "peaked"])
def test_every_row_of_a_mixed_batch_samples_from_the_distribution_of_transformers(
    vocab_size, spread
):
    seqs = mixed_requests(96, vocab_size)
    logits = torch.randn(96, vocab_size, generator=torch.Generator().manual_seed(1)) * spread
    tokens = sample(logits, *seqs).tokens
    numbers = uniforms((seq.seed for seq in seqs), (seq.num_tokens for seq in seqs))
    for row, seq in enumerate(seqs):
        expected = oracle(logits[row], seq).double()
        reach = expected.cumsum(-1)
        token, number = tokens[row], numbers[row]
        assert expected[token] > 0, seq.sampling
        # The number falls into the token's part of the distribution, up to fp32 rounding.
        assert reach[token] - expected[token] - 1e-6 <= number <= reach[token] + 1e-6, seq.sampling


@pytest.mark.parametrize("width", [8, 128, 1024])
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["flat", "peaked"])
def test_the_filters_keep_what_transformers_keeps(width, spread):
    table = [
        (top_k, top_p, min_p)
        for top_k in (0, 1, 7, 8, 128, 500, 5000)
        for top_p in (1.0, 0.001, 0.5, 0.9, 0.999)
        for min_p in (0.0, 0.02, 0.5)
    ]
    noise = torch.randn(len(table), 1024, generator=torch.Generator().manual_seed(2))
    scores = noise * spread
    scores -= scores.amax(-1, keepdim=True)
    top_k, top_p, min_p = zip(*table, strict=True)
    filters = Filters(
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
    )
    weights = scores.exp()
    threshold = smallest_kept(weights, weights.topk(width).values, filters)
    for row, (k, p, m) in enumerate(table):
        seq = sequence(temperature=1.0, top_k=k, top_p=p, min_p=m)
        expected = oracle(scores[row], seq) > 0
        assert torch.equal(weights[row] >= threshold[row], expected), (k, p, m)


@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 24, 31, 60]),
    num_groups=st.integers(1, 60),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    levels=st.sampled_from([2, 50, 10**6]),
    top_k=st.sampled_from([0, 1, 30, 100, 3000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 1.0]),
)
def test_what_is_found_by_counting_is_what_sorting_finds(
    seed, width, num_groups, spread, levels, top_k, top_p, min_p
):
    """Also where most weights are equal, or nothing."""
    noise = np.random.default_rng(seed).normal(size=(2, num_groups * GROUP)) * spread
    scores = torch.from_numpy(np.round(noise * levels) / levels).float()
    weights = torch.softmax(scores, -1)
    filters = Filters(
        torch.tensor([top_k] * 2),
        torch.tensor([top_p] * 2, dtype=torch.float64),
        torch.tensor([min_p] * 2, dtype=torch.float64),
    )
    largest = weights.sort(descending=True).values
    expected = smallest_kept(weights, largest, filters)
    assert torch.equal(smallest_kept(weights, largest[:, :width], filters), expected)
    assert torch.equal(largest_of(weights, 24)[0], largest[:, :24])


@pytest.mark.parametrize("width", [1, 8, 20, 24, 64])
def test_what_ties_with_the_last_of_top_k_counts_for_top_p(width):
    weights = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, *[1] * 30, *[0] * 27]])
    filters = Filters(torch.tensor([10]), torch.tensor([0.5], dtype=torch.float64), torch.zeros(1))
    # The 30 that tie with the tenth make 65 of it; 8 + 7 + 6 + 5 + 4 + 3 reach a half.
    assert smallest_kept(weights, weights[:, :width], filters).tolist() == [3.0]


def test_equal_logits_are_kept_or_dropped_together():
    row = [0.0, 2.0, 1.0, 1.0, 1.0, 0.0]
    for request_ in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}):
        seqs = [sequence(temperature=1, seed=seed, **request_) for seed in range(200)]
        assert set(sample(torch.tensor([row] * 200), *seqs).tokens) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1, "top_k": 1}, id="top-k of one"),
        pytest.param({"temperature": 1, "top_p": 1e-9}, id="top-p of nearly nothing"),
        pytest.param({"temperature": 1, "min_p": 1}, id="min-p of one"),
        pytest.param({"temperature": 1e-38}, id="temperature of nearly nothing"),
        pytest.param({"temperature": 1e-38, "top_p": 0.5}, id="cold and filtered"),
    ],
)
def test_the_narrowest_settings_pick_the_largest_logit(request_):
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(3))
    seqs = [sequence(**{"seed": seed} | request_) for seed in range(20)]
    assert sample(logits, *seqs).tokens == logits.argmax(-1).tolist()


def test_greedy_ties_go_to_the_lowest_id_in_any_batch():
    logits = torch.tensor([[0.0, 4.0, 1.0, 4.0]] * 2)
    assert sample(logits, sequence(), sequence()).tokens == [1, 1]
    assert sample(logits, sequence(), sequence(temperature=1)).tokens[0] == 1


@pytest.mark.parametrize(
    ("row", "request_", "token"),
    [
        pytest.param([3, 2.5, 0, 0], {"prompt": [0], "repetition_penalty": 1.3}, 1, id="of prompt"),
        pytest.param([3, 2.5, 0, 0], {"output": [0], "repetition_penalty": 1.3}, 1, id="of output"),
        pytest.param([3, 2.5, 0, 0], {"output": [0], "repetition_penalty": 1.1}, 0, id="too weak"),
        pytest.param(
            [-1, -1.2, -9, -9], {"prompt": [0], "repetition_penalty": 1.3}, 1, id="below 0"
        ),
        pytest.param(
            [3, 2.5, 0, 0], {"prompt": [0], "presence_penalty": 2}, 0, id="not the prompt"
        ),
        pytest.param([3, 2.5, 0, 0], {"output": [0], "presence_penalty": 0.6}, 1, id="presence"),
        pytest.param([3, 2.5, 0, 0], {"output": [0] * 9, "presence_penalty": 0.4}, 0, id="once"),
        pytest.param([3, 2.5, 0, 0], {"output": [0, 0], "frequency_penalty": 0.3}, 1, id="counted"),
        pytest.param(
            [3, 2.5, 0, 0], {"output": [0], "frequency_penalty": 0.3}, 0, id="counted once"
        ),
        pytest.param([3, 2.5, 0, 0], {"output": [1], "frequency_penalty": -0.6}, 1, id="rewarded"),
        pytest.param([3, 2.5, 0, 0], {"logit_bias": {2: 3.5}}, 2, id="bias"),
        pytest.param([3, 2.5, 0, 0], {"logit_bias": {0: -100}}, 1, id="ban"),
        pytest.param(
            [3, 2.5, 0, 0],
            {"output": [0], "repetition_penalty": 2, "logit_bias": {0: 2}},
            0,
            id="bias after penalty",
        ),
        pytest.param([1, 0, 0, 9], {"min_tokens": 1}, 0, id="eos masked"),
        pytest.param([1, 0, 0, 9], {"min_tokens": 1, "output": [0]}, 3, id="eos allowed again"),
        pytest.param([1, 0, 0, 9], {"min_tokens": 1, "ignore_eos": True}, 3, id="eos is no end"),
        pytest.param([1, 8, 0, 9], {"min_tokens": 1, "stop_token_ids": (1,)}, 0, id="stop masked"),
    ],
)
def test_adjustments_change_the_greedy_token(row, request_, token):
    assert pick([float(value) for value in row], **request_) == token


def test_the_output_counts_as_it_grows():
    sampler, seq = Sampler(), sequence(prompt=[0], repetition_penalty=10)
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    for expected in (1, 2, 3):
        assert sampler.sample(logits, [seq]).tokens == [expected]
        seq.output.append(expected)
    assert sampler.sample(logits, [seq]).tokens == [0]


@pytest.fixture(scope="module")
def crowd() -> tuple[Tensor, list[Sequence], list[int]]:
    """Make logits, requests of every kind, and the token that each gets alone."""
    seqs = mixed_requests(24, 700)
    logits = torch.randn(24, 700, generator=torch.Generator().manual_seed(4)) * 2
    return logits, seqs, [sample(logits[[row]], seq).tokens[0] for row, seq in enumerate(seqs)]


@settings(max_examples=30)
@given(order=st.permutations(range(24)), size=st.integers(1, 24))
def test_a_request_gets_the_same_token_in_any_batch(crowd, order, size):
    logits, seqs, alone = crowd
    rows = order[:size]
    together = sample(logits[rows], *(seqs[row] for row in rows))
    assert together.tokens == [alone[row] for row in rows]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({}, id="unfiltered"),
        pytest.param({"top_k": 20}, id="top-k"),
        pytest.param({"top_p": 0.9}, id="top-p"),
        pytest.param({"min_p": 0.05, "temperature": 1.3}, id="min-p"),
    ],
)
def test_one_seed_samples_the_distribution_over_its_positions(request_):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(5))
    # A sequence's length is the position of its next token.
    request_ = {"temperature": 0.8, "seed": 11} | request_
    seqs = [sequence([0] * length, **request_) for length in range(1, 4001)]
    expected = oracle(logits[0], seqs[0]).double()
    tokens = torch.tensor(sample(logits.expand(4000, -1), *seqs).tokens)
    observed = torch.bincount(tokens, minlength=50)
    assert not observed[expected == 0].any()
    assert chi_square(observed[expected > 0], expected[expected > 0] * 4000) < 4


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """Return Pearson's statistic in standard deviations above its mean."""
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        pytest.param([7] * 100_000, range(100_000), id="positions of a seed"),
        pytest.param(range(100_000), [0] * 100_000, id="seeds at a position"),
        pytest.param([-3, 2**64 + 9] * 50_000, range(100_000), id="seeds beyond 64 bits"),
    ],
)
def test_the_random_numbers_are_uniform_and_neighbours_unrelated(seeds, positions):
    numbers = torch.from_numpy(uniforms(seeds, positions))
    assert 0 <= numbers.min() < numbers.max() < 1
    bins = (numbers * 20).long()
    flat = torch.full((400,), 100_000 / 400, dtype=torch.float64)
    pairs = torch.bincount(bins[:-1] * 20 + bins[1:], minlength=400)
    assert abs(chi_square(pairs, flat)) < 4


def splitmix64(state: int) -> int:
    """The published finaliser, on Python's integers: splitmix64(0) is 0xE220A8397B1DCDAF."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 0), (0, 1), (2**64 - 1, 131_072)])
def test_a_seed_means_the_same_numbers_in_every_release(seed, position):
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    expected = splitmix64(splitmix64(seed) + position * 0x9E3779B97F4A7C15 & 2**64 - 1) >> 12
    assert uniforms([seed], [position]).tolist() == [expected / 2**52]


def test_the_global_generator_is_neither_read_nor_moved():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(6))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(logits, sequence(temperature=1)).tokens
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(logits, sequence(temperature=1)).tokens == first


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = torch.randn(4, 9001, generator=torch.Generator().manual_seed(7)) * 3
    sampled = sample(
        logits,
        sequence(logprobs=3, temperature=0.7, top_k=5, logit_bias={9: 20.0}),
        sequence(),
        sequence(logprobs=0),
        sequence(logprobs=20),
    )
    logs = logits.log_softmax(-1)
    assert sampled.logprobs[1] is None
    assert sampled.top[1] is None
    assert sampled.top[2] == []
    for row, count in ((0, 3), (2, 0), (3, 20)):
        chosen = torch.tensor(sampled.logprobs[row])
        assert_close(chosen, logs[row, sampled.tokens[row]])
        values, ids = logs[row].topk(count)
        assert [token for token, _ in sampled.top[row]] == ids.tolist()
        assert_close(torch.tensor([value for _, value in sampled.top[row]]), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_stay_as_they_are(dtype):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(8)).to(dtype)
    before = logits.clone()
    request_ = {"temperature": 0.5, "logit_bias": {1: 5.0}, "min_tokens": 4, "logprobs": 2}
    sample(logits, sequence(), sequence(**request_), sequence(repetition_penalty=1.5))
    assert torch.equal(logits, before)


def test_logits_of_inference_mode_and_others_may_alternate():
    sampler, seq = Sampler(), sequence(temperature=1, top_k=3, logit_bias={1: 0.5})
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        inside = sampler.sample(logits.clone(), [seq])
    assert sampler.sample(logits, [seq]) == inside


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "request_", [{"temperature": 0}, {}, {"top_p": 0.5}, {"logprobs": 2}], ids=str
)
def test_a_row_without_a_distribution_has_no_token_and_changes_no_other(
    request_, value, compiled, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(draw_native, "takes", lambda logits: False)
    sound = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    broken = sound.clone()
    broken[1] = value
    seqs = [sequence(seed=row, **request_) for row in range(3)]
    first, _, last = sample(sound, *seqs).tokens

    assert sample(broken, *seqs).tokens == [first, NO_TOKEN, last]


def test_a_step_that_samples_nothing_yields_nothing():
    assert sample(torch.empty(0, 50)).tokens == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("min_tokens", -1),
        ("min_tokens", 101),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**{"max_tokens": 100} | {field: value})
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field} is ")
