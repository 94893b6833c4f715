"""What this set promises, one test a promise: `pytest -q` (CPU, nothing downloaded).

Part one, to be read: examples worked out by hand, every router again as slow loops, numbers that
published code gives. Part two: what holds for every router, who leaks the future, what the losses
and solvers do, and what a layer must bear in other people's hands. Part three: the promises of
train.py and the two model files.

Axes as in routers.py: G groups, T tokens, D width, E experts, C slots, K choices. Numbers are
compared in float64. What is parametrised over ROUTERS, or by @each, tests a router that you add as
it is; for its values, write its worked example (WORKED) and its slow twin (SLOW).
"""

import base64
import collections
import contextlib
import copy
import fractions
import functools
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from http.client import BadStatusLine, IncompleteRead
from types import SimpleNamespace
from unittest.mock import Mock, patch
from xml.etree import ElementTree

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread mostly waits
import numpy as np
import pytest
from torch import nn
import torch
import torch.nn.functional as F

import moe_tokens
import moe_vision
import routers
import train
from routers import MoE, ROUTERS, Experts, Router, Routing, TokenChoice, build_router, seeded
from routers import stacked
from routers import balance_loss, importance_loss, load_loss, z_loss
from routers import sinkhorn_plan, sparse_plan, top

ROOT = pathlib.Path(train.__file__).parent


# ================================================================ PART ONE, routers.py: helpers
def knowing(option):
    """The names of the routers that have this option."""
    return [name for name, kind in ROUTERS.items() if option in kind.defaults]


TOKENS_CHOOSE = [name for name, kind in ROUTERS.items() if kind.chooses == "tokens"]
HARD = [name for name, kind in ROUTERS.items() if kind.chooses is not None]
WEIGHED, NOISY = knowing("router_weights"), knowing("noise_std")
TRAINING = dict(noise_std=[0.5], bias_rate=[0.1], iterations=[2])
PRIORITY, BOTH = ["token", "choice", "gate"], ["softmax", "plan"]
LEARNED = [name for name in ROUTERS if list(build_router(name, 4, 2, tokens=4).parameters())]


def settings(names=tuple(ROUTERS), **axes):
    """(name, options) for every product of options; a router is spared what it does not know."""
    found = {}
    for name, values in itertools.product(names, itertools.product(*axes.values())):
        options, words = {}, [name]
        for option, value in zip(axes, values):
            if option in ROUTERS[name].defaults:
                options[option] = value
                words.append(f"{option}={value}")
        dropless = options.get("capacity_factor", 1) is None
        if name in TOKENS_CHOOSE or not dropless:  # dropless is for them alone
            found[" ".join(words)] = name, options
    return [pytest.param(*value, id=key) for key, value in found.items()]


def each(names=tuple(ROUTERS), **axes):
    """The test below runs for each of these settings, as its arguments name and options."""
    return pytest.mark.parametrize("name, options", settings(names, **axes))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


float64 = functools.partial(torch.tensor, dtype=torch.float64)


def layer(name, x, num_experts, seed=0, **options):
    """The MoE layer with that router for tokens x [G, T, D], in float64."""
    torch.manual_seed(seed)
    router = build_router(name, x.shape[-1], num_experts, tokens=x.shape[1], **options)
    return MoE(router, Experts(num_experts, x.shape[-1], hidden=7)).double()


def plain(name, num_experts, **options):
    """The router alone with logits = x: D = E, and the identity as its weight."""
    router = build_router(name, num_experts, num_experts, tokens=num_experts, **options).double()
    if name in WEIGHED:
        nn.init.eye_(router.gate.weight)
    return router


def same(got, want, within=1e-12):
    if isinstance(want, (float, list)):
        want = float64(want)
    torch.testing.assert_close(got, want, rtol=0, atol=within)


def alike(leaves, got, want, within=1e-12):
    """The same values; and of the last of them, weighed at random, the same gradients."""
    both = []
    for values in got, want:
        last = values[-1]
        weighed = (draw(*last.shape, seed=1) * last).sum()
        gradients = torch.autograd.grad(weighed, leaves, materialize_grads=True)
        both.append((*values, *gradients))
    same(*both, within)


def routes_alike(name, y, routing, want, reference):
    """What decides is equal and in float32; the outputs of narrower experts are close."""
    said, expected = (*routing.tensors(), routing.load), (*reference.tensors(), reference.load)
    if name in WEIGHED:
        said, expected = (*said, routing.logits), (*expected, reference.logits)
    same(said, expected, 0)
    assert {tensor.dtype for tensor in said} == {torch.float32}
    same(y.float(), want, 0.02)


def shift_buffers(router):
    """Give a bias or a threshold values that it would have after some training."""
    for buffer in router.buffers():
        if buffer.is_floating_point():
            buffer -= draw(router.num_experts, seed=2).abs().to(buffer.dtype) / 20


# ---------------------------------------------------------------- worked examples, by hand
# Three tokens, three experts, two slots each.
# Rows are tokens. Logits are the logarithms of these numbers, so a softmax divides each row by its
# sum, and a sigmoid makes n / (1 + n) of a number n.
GATES = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.7, 0.2, 0.1]]
TURNS = [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]]
# A doubly stochastic matrix (.6 .3 .1 / .3 .2 .5 / .1 .5 .4) whose first column is times 6: the
# first expert is in demand. Sinkhorn divides that out again; the softmax (.9 .075 .025 /
# .72 .08 .2 / .4 1/3 4/15) does not.
CROWD = [[3.6, 0.3, 0.1], [1.8, 0.2, 0.5], [0.6, 0.5, 0.4]]
# Sigmoids .8 .5 .2 / .2 .75 .25 / .9 .6 .1.
ALONE = [[4, 1, 1 / 4], [1 / 4, 3, 1 / 3], [9, 1.5, 1 / 9]]
NEAR = [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.45, 0.35, 0.2]]
STATE = {"hash": {"table": torch.tensor([1, 0, 2])}, "sigmoid": {"bias": float64([0, 0, 0.4])}}
TWO, PLAN = dict(capacity_factor=2), dict(top_k=2, combine_weights="plan")
WORKED = [  # router, options, numbers, and expert after expert its slots, token:weight
    # All three want expert 0, which has two slots: the first two get them, token 2 is dropped.
    ("token_choice", TWO, GATES, "0:.5 1:.6 | |"),
    # The surest first: token 2 (.7), then token 1 (.6); token 0 is dropped.
    ("token_choice", TWO | dict(priority="gate"), GATES, "2:.7 1:.6 | |"),
    # Two choices, by position: 0 -> 0, 1; 1 -> 0, 2; 2 -> 0 (full), 1. Gates over .8, .9 and .9.
    ("token_choice", dict(top_k=2, renormalize=True), GATES, "0:5/8 1:6/9 | 0:3/8 2:2/9 | 1:3/9"),
    # Expert 0 is everyone's largest; the plan's rows prefer 0 (.6), 2 (.5), 1 (.5). Softmax weighs.
    ("sinkhorn_token_choice", TWO, CROWD, "0:.9 | 2:1/3 | 1:.2"),
    # A row's two largest, .5 and .3, reach the simplex by (1 - .8) / 2 more each: .6 and .4. So
    # every expert has .6 + .4 = 1 and no price has to move. Seats by position; the plan weighs.
    ("sparse_token_choice", PLAN, TURNS, "0:.6 2:.4 | 0:.4 1:.6 | 1:.4 2:.6"),
    # The bias adds .4 to expert 2. Token 0: .8 .5 .6, so it goes to 0 and 2, where by the sigmoids
    # it would go to 0 and 1. Its weights know no bias: .8 and .2, whose sum is 1. Token 1 goes to 1
    # (.75) and 2 (.25), token 2 to 0 and 1: .9 and .6 over 1.5.
    ("sigmoid", dict(top_k=2), ALONE, "0:.8 2:.6 | 1:.75 2:.4 | 0:.2 1:.25"),
    # One choice: 0 (.8), then 1 (.75), then 0 (.9). The sigmoid itself weighs, it is not made 1.
    ("sigmoid", TWO, ALONE, "0:.8 2:.9 | 1:.75 |"),
    # Columns .5 .6 .7, .3 .1 .2 and .2 .3 .1: the two largest of each, falling.
    ("expert_choice", TWO, GATES, "2:.7 1:.6 | 0:.3 2:.2 | 1:.3 0:.2"),
    # The plan's columns: .6 .3 .1 takes 0, 1; .3 .2 .5 takes 2, 0; .1 .5 .4 takes 1, 2.
    ("sinkhorn_expert_choice", TWO, CROWD, "0:.9 1:.72 | 2:1/3 0:.075 | 1:.2 2:4/15"),
    # The sparse plan above, by columns: .5 .2 .3 -> .6 (token 0), .4 (token 2), and so on in turn.
    ("sparse_expert_choice", PLAN, TURNS, "0:.6 2:.4 | 1:.6 0:.4 | 2:.6 1:.4"),
    # Thresholds start at 1/3: token 0 passes at 0, 1 at 0 and 1, 2 at 0 (which is full) and 1.
    ("expert_threshold", {}, NEAR, "0:.5 1:.4 | 1:.4 2:.35 |"),
    # Keys 0, 2, 4, a table 1 0 2. Key 0 goes to 1 and the next, 2; key 2 to 2, 0; 4 mod 3 to 1, 2.
    ("hash", dict(top_k=2, num_keys=3), GATES, "1:.5 | 0:.5 2:.5 | 0:.5 1:.5"),
]


@pytest.mark.parametrize("name, options, numbers, seats", WORKED)
def test_a_router_fills_the_tensors_as_worked_out_by_hand(name, options, numbers, seats):
    router, want = plain(name, 3, **options), torch.zeros(2, 1, 3, 3, 2, dtype=torch.float64)
    router.load_state_dict(STATE.get(name, {}), strict=False)
    dispatch, combine = router(float64([numbers]).log(), torch.tensor([[0, 2, 4]])).tensors()
    for e, slots in enumerate(seats.split("|")):
        for c, slot in enumerate(slots.split()):
            token, weight = slot.split(":")
            want[:, 0, int(token), e, c] = float64([1, float(fractions.Fraction(weight))])
    same((dispatch, combine), (want[0], want[1]), 1e-9)  # a sparse price moves by 1e-10


def test_soft_fills_the_tensors_as_worked_out_by_hand():
    scale = math.log(2) * (1 + 1e-6)  # undoes the 1e-6 under both roots
    router = build_router("soft", 3, 3, slots=2, scale=scale).double()
    points = torch.tensor([[0, 1], [2, 0], [1, 2]])
    axes = F.one_hot(points).permute(2, 0, 1).double()  # [D, E, C]: each axis has two slots
    router.load_state_dict({"phi": axes, "scale": router.scale})
    dispatch, combine = router(torch.eye(3, dtype=torch.float64)[None]).tensors()
    # exp(logits): 2 where token and slot agree, else 1. A slot 2 / (2+1+1), a token 2 / (2+2+4*1).
    want = (1 + axes) / 4, (1 + axes) / 8
    same((dispatch[0], combine[0]), want, 1e-7)  # the scale was a float32


# ---------------------------------------------------------------- every router again, as slow loops
# One group: tokens x [T, D], logits, scores and gates [T, E], through which gradients run. What
# comes back is slots[e][c], each a {token: (dispatch, combine)}.
def best(values, k=None):
    """The places of the k largest, falling; of equals the first."""
    pairs = sorted((-value, place) for place, value in enumerate(values.tolist()))
    return [place for _, place in pairs[:k]]


def slow_sinkhorn(logits, iterations):
    """The paper's form: scale columns, then rows, of exp(logits), as long as that is finite."""
    kernel, (T, E) = logits.exp(), logits.shape
    u = torch.ones(T, dtype=torch.float64)
    for _ in range(iterations):
        v = T / E / (u @ kernel)
        u = 1 / (kernel @ v)
    return u[:, None] * kernel * v


def slow_project(column, k):
    largest = best(column, k)
    for size in range(len(largest), 0, -1):  # the widest support in which everyone stays above zero
        over = (column[largest[:size]].sum() - 1) / size
        if column[largest[size - 1]] > over:
            break
    projected = torch.zeros_like(column)
    for i in largest[:size]:
        projected[i] = column[i] - over
    return projected


def slow_sparse(gates, k, mass, iterations):
    """A plan whose columns have that mass: torch's Adam moves a price for each row by its error."""
    T, E = gates.shape
    price = torch.zeros(T, dtype=torch.float64)
    adam = torch.optim.Adam([price], lr=1e-2)

    def plan(gates):
        columns = [mass * slow_project((price + column) / mass, k) for column in gates.T]
        return torch.stack(columns, 1)

    for _ in range(iterations):
        price.grad = plan(gates.detach()).sum(1) - mass * E / T
        adam.step()
        if price.grad.norm() <= 1e-3:
            break
    return plan(gates)


def slow_queue(line, num_experts, capacity):
    """(expert, token, weight) in this order; a full expert turns away."""
    slots = [[] for _ in range(num_experts)]
    for expert, token, weight in line:
        if capacity is None or len(slots[expert]) < capacity:
            slots[expert].append({token: (1.0, weight)})
    return slots


def budget(router, tokens, times=1):
    o = router.options
    if o.capacity_factor is None:
        return None
    wanted = math.ceil(times * tokens * o.top_k * o.capacity_factor / router.num_experts)
    return min(tokens, wanted)


def slow_scores(router, name, x):
    """What decides, and what weighs."""
    logits, o = x @ router.gate.weight.T, router.options
    T, E = logits.shape
    if name == "sigmoid":  # as in DeepSeek-V3, 2412.19437 (15)
        return logits.sigmoid(), logits.sigmoid()
    decide = gates = logits.softmax(1)
    if name == "sparse_expert_choice":
        decide = slow_sparse(gates, budget(router, T), T / E, o.iterations)
    if name == "sparse_token_choice":  # tokens and experts exchanged: a token has mass 1
        decide = slow_sparse(gates.T, o.top_k, 1.0, o.iterations).T
    if name.startswith("sinkhorn"):
        decide = slow_sinkhorn(logits, o.iterations)
    plan_weighs = getattr(o, "combine_weights", "softmax") == "plan"
    return decide, decide if plan_weighs else gates


def slow_expert_choice(router, name, x, key):
    decide, weigh = slow_scores(router, name, x)
    line = []
    for e, column in enumerate(decide.T):
        for t in best(column, budget(router, len(x))):
            line.append((e, t, weigh[t, e]))
    return slow_queue(line, router.num_experts, None)


def slow_token_choice(router, name, x, key):
    o, K = router.options, router.options.top_k
    decide, weigh = slow_scores(router, name, x)
    divide = K > 1  # by the sum of a token's weights: sigmoid's rule; others are told
    if name != "sigmoid":
        divide = o.renormalize
    biased = decide + router.bias if o.bias_rate else decide  # 2412.19437 (16)
    tokens, pairs = range(len(x)), []
    if o.priority == "gate":  # the surest first
        tokens = best(decide.amax(1))
    if o.priority == "token":  # one after the other, each with all its choices
        for t in tokens:
            for k in range(K):
                pairs.append((t, k))
    else:  # all first choices, then all second
        for k in range(K):
            for t in tokens:
                pairs.append((t, k))
    line = []
    for t, k in pairs:
        picks = best(biased[t], K)
        total = weigh[t, picks].sum() if divide else 1
        line.append((picks[k], t, weigh[t, picks[k]] / total))
    return slow_queue(line, router.num_experts, budget(router, len(x)))


def slow_soft(router, name, x, key):
    D, E, C = router.phi.shape
    phi = router.phi.flatten(1)
    x = x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt()
    phi = phi / (phi.square().sum(0) + 1e-6).sqrt()
    grown = (router.scale * x @ phi).exp()  # [T, E * C]
    dispatch, combine = grown / grown.sum(0), grown / grown.sum(1, keepdim=True)
    slots = [[] for _ in range(E)]
    for s in range(E * C):
        slots[s // C].append({t: (dispatch[t, s], combine[t, s]) for t in range(len(x))})
    return slots


def slow_hash(router, name, x, key):
    K, E, line = router.options.top_k, router.num_experts, []
    for t, k in enumerate(key.tolist()):
        first = int(router.table[k]) if k < len(router.table) else k % E
        for choice in range(K):
            line.append(((first + choice) % E, t, 1 / K))
    return slow_queue(line, E, budget(router, len(x)))


def slow_threshold(router, name, x, key):
    E, line = router.num_experts, []
    gates = (x @ router.gate.weight.T).softmax(1)
    for t, e in itertools.product(range(len(x)), range(E)):
        if gates[t, e] >= router.threshold[e]:
            line.append((e, t, gates[t, e]))
    return slow_queue(line, E, budget(router, len(x), times=2))


SLOW = dict(hash=slow_hash, expert_threshold=slow_threshold, soft=slow_soft)
SLOW["sigmoid"] = slow_token_choice
for kind in "", "sinkhorn_", "sparse_":
    SLOW[f"{kind}token_choice"] = slow_token_choice
    SLOW[f"{kind}expert_choice"] = slow_expert_choice


def slow_expert(experts, e, z):
    return F.gelu(z @ experts.w1[e] + experts.b1[e, 0]) @ experts.w2[e] + experts.b2[e, 0]


SIZES = [  # T, E, and what is bought
    (7, 3, dict(top_k=2, capacity_factor=1.0)),
    (6, 4, dict(top_k=2, capacity_factor=0.5, renormalize=True, bias_rate=0.1)),
    (5, 3, dict(capacity_factor=2.0)),
    (3, 5, dict(capacity_factor=1.0)),
    (4, 3, dict(top_k=3, capacity_factor=0.5)),
    (3, 1, dict(capacity_factor=1.0)),
    (5, 4, dict(top_k=2, capacity_factor=None)),
]


def cases():
    """Every router of SLOW at every size, in each order and weighing that it knows."""
    found = []
    for T, E, size in SIZES:
        axes = {option: [value] for option, value in size.items()}
        axes |= dict(priority=PRIORITY, combine_weights=BOTH)
        for case in settings(SLOW, **axes, num_keys=[8], iterations=[8]):
            found.append(pytest.param(*case.values, T, E, id=f"T={T} E={E} {case.id}"))
    return found


@pytest.mark.parametrize("name, options, T, E", cases())
def test_tensors_and_layer_equal_plain_loops_in_values_and_gradients(name, options, T, E):
    x = draw(2, T, 4, seed=T).requires_grad_()
    key = (5 * torch.arange(T) + torch.arange(2)[:, None]) % 11
    moe = layer(name, x, E, **options)
    shift_buffers(moe.router)
    moe.shared = nn.Linear(4, 4).double()
    y, routing = moe(x, key)
    got = torch.stack(routing.tensors())
    want, slow_y = torch.zeros_like(got), moe.shared(x)  # which every token passes
    for g in range(2):  # the two sums of routers.py's first lines, one slot after the other
        for e, slots in enumerate(SLOW[name](moe.router, name, x[g], key[g])):
            for c, slot in enumerate(slots):
                enters = sum(weight * x[g, t] for t, (weight, _) in slot.items())
                leaves = slow_expert(moe.experts, e, enters)
                for t, (dispatch, combine) in slot.items():
                    want[0, g, t, e, c], want[1, g, t, e, c] = dispatch, combine
                    slow_y[g, t] = slow_y[g, t] + combine * leaves
    if E == 1:  # every plan is 1 but for rounding, so the order of its slots means nothing
        got, want = got.sum(-1), want.sum(-1)
    within = 1e-10 if "iterations" in ROUTERS[name].defaults else 1e-12
    alike([x, *moe.parameters()], [got, y], [want, slow_y], within)


# ---------------------------------------------------------------- numbers that published code gives
# By google-research/vmoe, commit 942a78bc81d2e63199f0933733582ddae0715416, on random tokens: logits
# row by row, the token in each slot (T where empty), the combine weight of each slot. All but the
# tokens are times 10^4 and rounded: weights are held to 1e-4.
PUBLISHED = [  # router, options, E; its numbers stand at the same place below
    ("token_choice", dict(top_k=2, priority="choice"), 3),
    ("sinkhorn_token_choice", dict(priority="gate", combine_weights="plan"), 4),
    ("expert_choice", dict(capacity_factor=2), 3),
    ("sinkhorn_expert_choice", dict(capacity_factor=1.5, combine_weights="plan"), 6),
    ("sparse_expert_choice", {}, 4),
]
PUBLISHED_NUMBERS = """\
-28312 -24384 -38756 21952 25999 -8012 -1628 -14074 -22263 -2320 -29752 -7233 19031 12912 -3443
-11453 -2021 -7223 7238 12196 23126 691 5291 2808 -10714 5559 -3358 17090 -9737 -22985 |
2 3 4 9 0 1 10 0 1 5 7 8 2 4 6 3 5 7 8 10 10 |
7067 5966 6068 9203 3530 3923 0 5228 5880 5041 4147 6225 2036 3291 6496 3650 2996 3235 2552 0 0

-23408 24252 -6480 -23535 -21379 23761 -3857 -26140 37206 -21563 11654 -1332 -21758 5534 -22058 1253
10054 -9283 -4385 10015 13030 -2706 -14617 -7337 9816 -9347 5125 2271 -21540 20461 -18652 -23131
12765 541 13036 -13207 36275 -10346 -226 -3439 15011 1634 3138 -4554 4276 -3390 -834 -2276 -21219
-4661 3338 16562 -7452 -16823 -5168 -594 -19691 -16078 -16462 -12242 12059 12814 -2869 -4777 |
9 2 5 10 7 0 1 15 8 6 11 16 12 4 3 13 |
8766 7678 5680 3830 9073 8607 8269 3489 6815 4535 3990 0 7224 5751 5545 4878

-21 14883 -8791 5494 -10009 -9856 -8274 -17701 -44 -15632 -513 -2047 -11514 21622 -46325 -6418
-21878 -5759 14570 8800 47513 -5063 -4604 17616 7713 1483 49262 7821 14683 23416 |
1 5 2 0 9 3 7 4 0 3 9 1 2 5 8 6 7 2 9 5 3 |
7005 4384 2727 1708 1292 1061 854 9639 7582 4812 2565 1486 1062 934 9765 9452 8251 6210 6143 4682
4127

4235 -5562 -4791 -7985 -11625 -5974 9375 -4499 -1620 -597 -2569 25047 -34334 -1986 12839 8607 -26213
-36388 -16493 10625 11101 3259 -10830 -10283 -16631 13514 -7697 27716 -3106 -17209 4373 15264 2355
9973 13413 -48 16769 -279 -6148 2859 8853 -6147 -24215 17583 1922 11283 -14612 -2693 175 2303 -13176
11886 5626 18327 16705 19254 13918 682 22914 20674 13407 -8573 8652 4857 3460 18196 5524 -3656 -6853
8225 6946 22716 9324 -1280 3057 -656 7545 -2341 -535 4357 -13860 14739 1669 -5394 20537 -2694 -18684
4320 13454 1543 27566 12333 204 4596 45976 24386 -22679 7888 5373 -4618 -38466 -3622 10643 7452
-10024 25676 11638 49881 9677 -5829 7256 -12568 -900 -15618 -3777 619 14483 -668 -13302 -15742 12562
1281 -1343 10977 29513 16655 22954 -5385 -3956 2775 33430 8873 -14192 7127 -7516 -39 4018 -23907
-568 -7715 5547 8776 -437 9172 |
14 6 0 18 12 21 7 22 16 3 5 9 19 2 3 18 16 23 4 13 2 23 8 7 15 21 20 9 22 14 17 1 11 8 10 23 |
5485 5014 3817 3811 3049 2681 5552 4316 4265 3621 3533 2340 6233 5753 4113 3618 3592 2488 7197 4819
2895 2640 2554 2460 7186 6094 5469 2410 2259 2154 8454 6163 5186 3974 3233 2245

11767 47080 -27053 6555 1284 17077 6318 11375 23750 23625 14110 7660 -18965 11897 -10305 -6586 -8061
-20773 17910 8567 12880 24720 971 4993 9898 -4420 -4332 12064 -9185 13158 -11007 -2765 17164 32699
-9699 -17377 3719 -34600 14043 20230 -5276 -8338 5885 -5671 2768 -315 -459 -1078 -5524 -13278 -14958
-3686 6039 46554 -46303 8637 -1831 -3006 -9401 -14582 1709 -16804 9322 2811 |
5 14 2 11 3 7 13 8 4 10 15 7 9 12 6 7 |
1990 3791 3893 3185 7623 7144 9615 8113 6719 5309 4850 637 5765 3938 4563 1453
"""


def numbers(text):
    return float64([int(word) for word in text.split()]) / 1e4


@pytest.mark.parametrize("place", range(len(PUBLISHED)))
def test_a_router_gives_the_published_slots_and_weights(place):
    name, options, E = PUBLISHED[place]
    logits, index, weights = PUBLISHED_NUMBERS.split("\n\n")[place].split("|")
    routing = plain(name, E, **options)(numbers(logits).view(1, -1, E))
    assert routing.index.flatten().tolist() == [int(word) for word in index.split()]
    same(routing.weight.flatten(), numbers(weights), 1e-4)


# ================================================================ PART TWO, routers.py: properties
@each(HARD, top_k=[1, 2], capacity_factor=[0.25, 1.0, 4.0, None], priority=PRIORITY)
def test_a_hard_routing_seats_one_token_a_slot_drops_to_zero_and_equals_its_tensors(name, options):
    x, K, bought = draw(3, 13, 6).requires_grad_(), options["top_k"], options["capacity_factor"]
    moe = layer(name, x, 4, **options)
    y, routing = moe(x)
    (dispatch, combine), counts = routing.tensors(), routing.counts()
    assert set(dispatch.unique().tolist()) <= {0.0, 1.0}
    assert dispatch.sum(1).max() == 1 and dispatch.sum(3).max() == 1
    assert torch.equal(combine != 0, dispatch == 1)
    most = K if name in TOKENS_CHOOSE else 4
    assert counts.max() <= most
    if bought in (4.0, None) and ROUTERS[name].chooses != "threshold":  # room for every token
        assert bool((counts == most).all())
    assert not y[counts == 0].any() and y[counts > 0].abs().sum(-1).min() > 0
    tensors = Routing(*moe.router(x).tensors(), routing.load)
    want, used = moe(x, routing=tensors)
    assert used is tensors and torch.equal(counts, tensors.counts())
    one = [routing.dispatch(x), routing.mass(), y]
    other = [tensors.dispatch(x), tensors.mass(), want]
    alike([x, *moe.parameters()], one, other)


BUDGETS = [  # T, E, K, factor, and by hand C where tokens, experts, a threshold or nobody chooses
    (10, 3, 2, 1.0, 7, 7, 10, 7),
    (10, 3, 1, 1.0, 4, 4, 7, 3),
    (4, 8, 1, 1.0, 1, 1, 1, 1),
    (5, 2, 2, 2.0, 5, 5, 5, 10),
    (12, 4, 1, 1.05, 4, 4, 7, 3),
    (12, 4, 1, 0.5, 2, 2, 3, 2),
    (5, 3, 2, 1e308, 5, 5, 5, None),  # all that a group has; Soft would want so many
]


@pytest.mark.parametrize("T, E, K, factor, tokens, experts, threshold, soft", BUDGETS)
@pytest.mark.parametrize("name", ROUTERS)
def test_slots_are_bought_from_one_budget(name, T, E, K, factor, tokens, experts, threshold, soft):
    x = draw(1, T, 8)
    C = dict(tokens=tokens, experts=experts, threshold=threshold).get(ROUTERS[name].chooses, soft)
    if C is None:
        return
    router = layer(name, x, E, top_k=K, capacity_factor=factor).router
    for mode in True, False:
        dispatch, _ = router.train(mode)(x).tensors()
        assert dispatch.shape == (1, T, E, C)
    same(router(x).load.double().sum(), 1.0, 1e-6)


@each([name for name in NOISY if name in SLOW], noise_std=[0.5], top_k=[2], combine_weights=BOTH)
def test_noise_of_noise_std_over_e_enters_choices_and_load_loss_in_training_alone(name, options):
    x, router = draw(2, 16, 4), plain(name, 4, **options)
    torch.manual_seed(3)
    noisy = x + torch.randn_like(x) * 0.5 / 4
    torch.manual_seed(3)
    routing = router(x)
    dispatch, combine = router.eval()(noisy).tensors()
    if name == "sinkhorn_token_choice" and options["combine_weights"] == "softmax":
        combine = dispatch * x.softmax(-1)[..., None]  # published so: the clean softmax weighs
    same(routing.logits, x)
    same(routing.tensors(), (dispatch, combine))
    if name in TOKENS_CHOOSE:
        assert "load" not in router(x).losses  # no noise
        same(routing.losses["load"], load_loss(x, noisy, 2, 0.5 / 4))


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_are_those_that_the_router_offers_from_its_own_probabilities(name):
    x, options = draw(3, 12, 4), dict(noise_std=1.0) if name in NOISY else {}
    router = layer(name, x, 4, **options).router
    routing = router(x)
    assert routing.losses.keys() == set(ROUTERS[name].offers)
    for loss in routing.losses.values():
        assert loss.shape == () and loss.isfinite()
    if name in WEIGHED:
        same(routing.gates, router.probabilities(routing.logits))
        same(routing.gates.sum(-1), torch.ones(3, 12, dtype=torch.float64))
        same(routing.losses["z"], z_loss(routing.logits))
    if "importance" in routing.losses:
        same(routing.losses["importance"], importance_loss(routing.logits, routing.gates))
    if name in knowing("balance_scope"):
        for scope in "group", "batch":
            routing = layer(name, x, 4, top_k=2, balance_scope=scope).router(x)
            want = balance_loss(routing.logits, routing.expert_index, routing.gates, scope)
            same(routing.losses["balance"], want)


@each(top_k=[2], combine_weights=["plan"], capacity_factor=[1.0, None])
def test_autocast_leaves_logits_and_choices_in_float32(name, options):
    x = draw(2, 16, 8).bfloat16()
    moe = layer(name, x.double(), 4, **options).float()
    reference = moe(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
        same(moe(x.float())[0], y, 0)  # the experts work in bfloat16, whatever comes in
    routes_alike(name, y, routing, *reference)


@each(top_k=[2], capacity_factor=[1.0, None], iterations=[1])
def test_a_fresh_layer_compiles_into_one_graph(name, options):
    torch._dynamo.reset()
    x = draw(2, 8, 6).requires_grad_()
    moe = layer(name, x, 4, **options)
    y, routing = torch.compile(moe, fullgraph=True, backend="eager")(x)
    alike([x, *moe.parameters()], [y], [moe(x)[0]])
    if options["capacity_factor"] is None:
        dispatch, _ = routing.tensors()
        assert dispatch.shape == (2, 8, 4, 8)  # the longest queue is unknown: every token


def test_importing_routers_changes_and_prints_nothing(capsys):
    states = []
    for _ in range(2):
        drawn, settings = torch.get_rng_state().tolist(), torch.get_default_dtype()
        modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        states.append((random.getstate(), drawn, settings, modes, torch.get_num_threads()))
        runpy.run_path(routers.__file__)
    assert states[0] == states[1] and capsys.readouterr() == ("", "")


def test_equal_scores_go_to_the_lower_index():
    x = torch.zeros(1, 70, 40, dtype=torch.float64)  # long enough for an unstable sort to show
    assert top(x, 40, 1)[0, :, 7].tolist() == list(range(40))
    for name in "token_choice", "sigmoid":
        assert plain(name, 40, top_k=40)(x).expert_index[0, 5].tolist() == list(range(40))
        routing = plain(name, 40, capacity_factor=20, priority="gate")(x)
        assert routing.index[0, 0].tolist() == list(range(35))
    assert plain("expert_choice", 40, capacity_factor=20)(x).index[0, 9].tolist() == list(range(35))


# ---------------------------------------------------------------- who leaks the future
def causal_by_hand(name, options):
    if name not in ("token_choice", "sigmoid"):
        return name in ("hash", "expert_threshold")
    if options["capacity_factor"] is None or options["priority"] == "token":
        return True
    # Where first choices, or surer tokens, come first, they may come from behind.
    return options["priority"] == "choice" and options["top_k"] == 1


@each(top_k=[1, 2], capacity_factor=[0.5, 1.0, 4.0, None], priority=PRIORITY, combine_weights=BOTH)
def test_groups_are_apart_and_what_is_called_causal_and_that_alone_leaks_nothing(name, options):
    bought = options["capacity_factor"]
    causal = build_router(name, 6, 4, tokens=16, **options).causal
    if name in SLOW:
        assert causal is causal_by_hand(name, options)
    # How far do EARLIER outputs and masses of 60 groups move with the last token and key?
    for seed in range(2):
        x = draw(40, 16, 6, seed=seed)
        key = torch.randint(100, (40, 16), generator=seeded(seed))
        moe = layer(name, x, 4, seed, **options)
        before, then = moe(x, key)
        x[:30, -1] = 2 * draw(30, 6, seed=seed + 100)
        key[:30, -1] += 1
        after, now = moe(x, key)
        same(after[30:], before[30:])
        outputs = (after - before)[:30, :-1].abs().max()
        masses = (now.mass() - then.mass())[:30, :-1].abs().max()
        if causal:
            assert max(outputs, masses) <= 1e-12
        elif bought in (1.0, None):  # where everyone has room, little is left to leak
            assert max(outputs, masses) > 1e-6
        if causal and bought in (4.0, None):  # there is room for every token, however few there are
            same(moe(x[:, :7], key[:, :7])[0], after[:, :7])


# ---------------------------------------------------------------- learning signals
@each(LEARNED, combine_weights=BOTH, gate=["linear", "mlp"])
def test_the_task_loss_alone_moves_every_learned_router_at_top_1(name, options):
    if name == "sparse_token_choice" and options["combine_weights"] == "plan":
        # A lone choice holds all of its token's mass: a constant weight.
        options = options | dict(top_k=2)
    x = draw(4, 16, 6)
    moe = layer(name, x, 4, **options)
    for gradient in torch.autograd.grad(moe(x)[0].square().sum(), list(moe.router.parameters())):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-6


def test_losses_equal_values_worked_out_by_hand():
    gates = float64([[[0.8, 0.2], [0.6, 0.4]], [[0.9, 0.1], [0.1, 0.9]]])
    choice = gates.argmax(-1, keepdim=True)
    # Group 0: f = (1, 0), P = (.7, .3), so 2 * .7 = 1.4. Group 1: f = P = (.5, .5), so 1. Mean 1.2.
    same(balance_loss(gates.log(), choice), 1.2)
    # Group 0: sums (1.4, .6), mean 1, variance .16. Group 1: even. Mean .08.
    same(importance_loss(gates.log()), 0.08)
    # Gates that are given count, whatever the logits.
    same(balance_loss(draw(2, 2, 2), choice, gates), 1.2)
    same(importance_loss(draw(2, 2, 2), gates), 0.08)
    # Rows sum to 1, and in group 1 we add 2 to the logits: logsumexp 0 and 2, squared 0 and 4.
    same(z_loss(gates.log() + torch.tensor([0, 2])[:, None, None]), 2.0)
    for E, K in (4, 1), (4, 2), (6, 3), (5, 5):  # 1 when uniform, E/K at collapse
        logits = torch.zeros(2, 30, E, dtype=torch.float64)
        even = (torch.arange(30)[:, None] + torch.arange(K)) % E
        same(balance_loss(logits, even.expand(2, 30, K)), 1.0)
        logits[..., :K] = 500
        same(balance_loss(logits, torch.arange(K).expand(2, 30, K)), E / K)
    single = draw(2, 5, 1).requires_grad_()
    gradient = torch.autograd.grad(importance_loss(single), single)[0]
    assert gradient.eq(0).all()  # of one expert: even, not NaN


def test_the_balance_of_a_batch_lets_each_sequence_have_its_own_expert():
    gates = float64([[[0.8, 0.2]] * 2, [[0.5, 0.5]] * 2])
    index = torch.tensor([[[0], [0]], [[1], [1]]])
    # f = (1, 0) and (0, 1), P = (.8, .2) and (.5, .5). By groups 2 * .8 and 2 * .5, mean 1.3.
    same(balance_loss(gates.log(), index, scope="group"), 1.3)
    # As a batch f = (.5, .5), P = (.65, .35): 2 * (.325 + .175) = 1, all is even.
    same(balance_loss(gates.log(), index, scope="batch"), 1.0)
    index[0, 1] = 1  # f = (.5, .5) and (0, 1). By groups 1 and 1.
    same(balance_loss(gates.log(), index, scope="group"), 1.0)
    # As a batch f = (.25, .75): 2 * (.1625 + .2625) = .85, expert 1 is in demand and not in favour.
    same(balance_loss(gates.log(), index, scope="batch"), 0.85)


def test_load_loss_equals_a_loop_over_tokens_and_experts_in_values_and_gradients():
    clean, want = draw(2, 7, 4).requires_grad_(), 0
    noisy = clean + 0.3 * draw(2, 7, 4, seed=1)
    for g in range(2):
        chance = [0] * 4
        for t, e in itertools.product(range(7), range(4)):
            threshold = noisy[g, t, best(noisy[g, t], 2)[-1]]
            deviations = (clean[g, t, e] - threshold) / 0.3
            chance[e] = chance[e] + (1 + (deviations / math.sqrt(2)).erf()) / 2 / 7
        mean = sum(chance) / 4
        want += sum((value - mean) ** 2 for value in chance) / 4 / mean**2 / 2
    alike([clean], [load_loss(clean, noisy, 2, 0.3)], [want])


def load_under_noise(logits):
    return load_loss(logits, logits + 0.1 * draw(*logits.shape[1:], seed=9), 2, 0.1)


def balance_of_two_choices(logits):
    return balance_loss(logits, top(logits, 2, -1))


LOSSES = dict(importance=importance_loss, z=z_loss, load=load_under_noise)
LOSSES["balance"] = balance_of_two_choices


@pytest.mark.parametrize("name", ["importance", "balance", "load"])
def test_a_balance_loss_pushes_the_overloaded_expert_down(name):
    skew = float64([2, 0, 0, -2])
    logits = (draw(1, 40, 4) + skew).requires_grad_()
    push = torch.autograd.grad(LOSSES[name](logits), logits)[0].sum((0, 1))
    assert push.argmax() == 0 and push[0] > 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_finite_at_huge_logits(name):
    signs, one_hot = draw(2, 9, 4).sign(), torch.eye(4).double().repeat(2, 2, 1)
    for logits in signs, one_hot, float64([[[-1.0] * 4] * 5]):
        logits = (1e3 * logits).requires_grad_()
        loss = LOSSES[name](logits)
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def underflown(name, tokens, bias, **options):
    """A routing of tokens whose gates all underflow; values and gradients have to be finite."""
    x = torch.tensor([tokens] * 2, requires_grad=True)
    moe = layer(name, x, 4, bias_rate=0.1, **options).float()
    nn.init.eye_(moe.router.gate.weight)
    moe.router.bias += torch.tensor(bias)
    y, routing = moe(x)
    loss = 1e4 * y.sum() + sum(routing.losses.values())
    for value in y, loss, *torch.autograd.grad(loss, [x, *moe.parameters()]):
        assert value.isfinite().all()
    return routing


@each(["sigmoid"], top_k=[1, 2], capacity_factor=[1.0, None])
def test_gates_that_all_underflow_give_no_nan_in_values_or_gradients(name, options):
    for level in -50.0, -90.0, -200.0:
        routing = underflown(name, [[level] * 4] * 5, [0.0] * 4, **options)
        same(routing.gates, torch.full((2, 5, 4), 0.25), 1e-6)
    # The two of which nothing is left are chosen.
    tokens, bias = [[0.0, 0, -200, -200], [0, 0, -300, -95]], [0.0, 0, 9, 9]
    routing = underflown("token_choice", tokens, bias, top_k=2, renormalize=True)
    assert bool((routing.expert_index >= 2).all())


# ---------------------------------------------------------------- solvers
@pytest.mark.parametrize("scale", [1, 100, 1e4])
def test_a_sinkhorn_plan_of_large_float32_logits_holds_what_its_docstring_says(scale):
    logits = (scale * draw(20, 64, 8).float()).requires_grad_()
    plan = sinkhorn_plan(logits)
    assert torch.autograd.grad(plan.square().sum(), logits)[0].isfinite().all()
    size = logits.abs().max().item()
    plan = plan.detach().double()
    assert (plan.sum(2) - 1).abs().max() <= 1e-7 * max(10, size)  # 10: the sum rounds too
    off = (plan.sum(1) * 8 / 64 - 1).abs().max()
    low, high = (0, 1e-3) if scale == 1 else (0.5, 7)  # the docstring warns of it
    assert low < off < high


def test_the_sparse_solver_reaches_the_best_balanced_assignment():
    gates = draw(8, 6, 3).softmax(-1)
    seats = torch.tensor(sorted(set(itertools.permutations([0, 0, 1, 1, 2, 2]))))  # all 90 of them
    best_value = gates[:, torch.arange(6), seats].sum(-1).amax(-1)
    plan = sparse_plan(gates, 2, iterations=4000)
    chosen = (plan > 0).double()  # at the optimum, T tokens fill T seats of weight 1
    same(plan, chosen, 2e-3)
    same(chosen.sum(1), torch.full((8, 3), 2.0).double())
    same((gates * chosen).sum((1, 2)), best_value)
    # Every group has stopped, and by itself.
    same(sparse_plan(gates[:3], 2, iterations=200), plan[:3], 1e-9)


# ---------------------------------------------------------------- options
COMMON, NOT_TOKENS = knowing("capacity_factor"), sorted(set(ROUTERS) - set(TOKENS_CHOOSE))
BROKEN = [  # the rule, the routers that know it, the option, and values against the rule
    ("priority must be one of token, choice, gate", ["token_choice"], "priority", ["last"]),
    ("must be one of softmax, plan", knowing("combine_weights"), "combine_weights", ["both"]),
    ("must be one of group, batch", knowing("balance_scope"), "balance_scope", ["world"]),
    ("must be one of learned, frozen, random", WEIGHED, "router_weights", ["self"]),
    ("gate must be one of linear, mlp", WEIGHED, "gate", ["cubic"]),
    ("scale must be a number >= 0, at most 1e+06", ["soft"], "scale", [-1]),
    ("slots must be a whole number >= 1", ["soft"], "slots", [0]),
    ("soft needs slots, or the tokens of a group to count them from", ["soft"], "slots", [None]),
    ("tokens must be a whole number >= 1", ["soft"], "tokens", [0]),
    ("num_keys must be a whole number >= 1", ["hash"], "num_keys", [0, None]),
    ("iterations must be a whole number >= 1", knowing("iterations"), "iterations", [0, None]),
    ("num_experts must be a whole number >= 1", ROUTERS, "num_experts", [0]),
    ("dim must be a whole number >= 1", ROUTERS, "dim", [0]),
    ("top_k must be a whole number >= 1", COMMON, "top_k", [0, 1.5, None]),
    ("top_k must be at most num_experts=3", COMMON, "top_k", [4]),
    ("is for routers in which tokens choose", NOT_TOKENS, "capacity_factor", [None]),
    ("must be a positive number", COMMON, "capacity_factor", [0, -1.0, math.inf, math.nan]),
    ("noise_std must be a number >= 0, at most 1e+06", NOISY, "noise_std", [-1, math.nan, 1e7]),
    ("noise_std must be 0 or at least 1e-6", NOISY, "noise_std", [1e-45]),
    ("must be a number >= 0, at most 1", knowing("bias_rate"), "bias_rate", [-1, 1.5, math.nan]),
]
WRONG = [
    ("tokens", {}, f"unknown router 'tokens'; known: {', '.join(ROUTERS)}"),
    ("sigmoid", dict(renormalize=True), "Sigmoid has no option renormalize; it has top_k, "),
    ("expert_choice", PLAN, "ExpertChoice has no option combine_weights; it has top_k, "),
]
LONE = "renormalize needs top_k >= 2 (the only gate would always be 1), got top_k=1"


def wrong_options():
    """(router, options, message) of every rule that is broken."""
    found = WRONG + [(name, dict(renormalize=True), LONE) for name in knowing("renormalize")]
    for rule, names, option, values in BROKEN:
        for name, value in itertools.product(names, values):
            found.append((name, {option: value}, f"{rule}, got {option}={value!r}"))
    return found


@pytest.mark.parametrize("name, options, message", wrong_options())
def test_a_wrong_option_is_a_valueerror_that_names_the_rule(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_router(name, **dict(dim=4, num_experts=3) | options)


WRONG_TOKENS = [
    (torch.zeros(5, 4), "needs tokens [G, T, 4], got [5, 4]"),
    (torch.zeros(1, 2, 5, 4), "needs tokens [G, T, 4], got [1, 2, 5, 4]"),
    (torch.zeros(2, 5, 3), "needs tokens [G, T, 4], got [2, 5, 3]"),
    (torch.zeros(2, 0, 4), "a group needs at least 1 token, got 0"),
    (torch.zeros(2, 5, 4).double(), "tokens of torch.float64 and experts of torch.float32"),
    (torch.zeros(2, 5, 4).bfloat16(), "tokens of torch.bfloat16 and experts of torch.float32"),
]


@pytest.mark.parametrize("tokens, words", WRONG_TOKENS)
@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_of_a_wrong_shape_or_type_are_a_valueerror_that_says_so(name, tokens, words):
    moe = layer(name, draw(2, 5, 4), 3).float()
    with pytest.raises(ValueError, match=re.escape(words)):
        moe(tokens)


def test_experts_and_keys_that_do_not_fit_are_a_valueerror_that_says_so():
    router, rule = build_router("hash", 4, 4), "must agree in num_experts and dim, got"
    for experts, dim in (4, 8), (3, 4):
        with pytest.raises(ValueError, match=re.escape(f"{rule} (4, 4) and ({experts}, {dim})")):
            MoE(router, Experts(experts, dim, 6))
    with pytest.raises(ValueError, match=re.escape("key must be [G, T] = [2, 5], got [5]")):
        router(torch.zeros(2, 5, 4), torch.arange(5))


# ---------------------------------------------------------------- what a router remembers
@each(router_weights=["learned", "random"], bias_rate=[0.1])
def test_only_update_changes_a_buffer_and_every_kind_of_copy_gives_the_same_output(name, options):
    x, key = draw(2, 12, 6), torch.randint(50, (2, 12), generator=seeded(0))
    moe, fresh = layer(name, x, 4, **options), layer(name, x, 4, seed=1, **options)
    before = copy.deepcopy(moe.state_dict())
    y, routing = moe(x, key)
    y.sum().backward()
    same(moe.state_dict(), before, 0)
    moe.router.update([routing], seeded(1))
    fresh.load_state_dict(moe.state_dict())
    file = io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    for twin in fresh, copy.deepcopy(moe), torch.load(file, weights_only=False):  # pickle at work
        for mode in True, False:
            assert torch.equal(twin.train(mode)(x, key)[0], moe.train(mode)(x, key)[0])
        for mine, other in zip(twin.state_dict().values(), moe.state_dict().values()):
            assert torch.equal(mine, other) and mine.data_ptr() != other.data_ptr()


@each(WEIGHED, router_weights=["frozen", "random"], gate=["linear", "mlp"])
def test_frozen_gates_stand_still_and_update_draws_random_ones_for_training_alone(name, options):
    x = draw(2, 12, 6)
    moe = layer(name, x, 4, **options)
    trained, fixed = [], []
    for key in 1, 2, 1, 0:
        trained.append(moe.router.train()(x).logits)
        fixed.append(moe.router.eval()(x).logits)
        y, routing = moe.train()(x)
        y.square().sum().backward()
        torch.optim.SGD(moe.parameters(), 0.1).step()
        moe.router.update([routing], seeded(key))
    assert all(weight.grad is None for weight in moe.router.parameters())
    assert all(weight.grad.any() for weight in moe.experts.parameters())
    assert all(torch.equal(logits, fixed[0]) for logits in fixed)
    assert torch.equal(trained[1], trained[3])  # the same key, the same weights
    frozen = options["router_weights"] == "frozen"
    assert torch.equal(trained[0], trained[1]) is frozen
    assert torch.equal(trained[1], trained[2]) is frozen


@pytest.mark.parametrize("name", [name for name in WEIGHED if name in SLOW])
def test_logits_pass_a_hidden_layer_for_gate_mlp(name):
    x = draw(2, 12, 6)
    router = layer(name, x, 4, gate="mlp").router
    first, second = router.parameters()
    same(router(x).logits, F.gelu(x @ first.T) @ second.T)


@each(knowing("bias_rate"), bias_rate=[0.1], capacity_factor=[None])
def test_a_bias_follows_the_sign_of_the_mean_load_error_and_only_chooses(name, options):
    x, router = draw(2, 13, 3), plain(name, 3, **options)
    one, other = router(x), router(x * 2 + torch.tensor([1, 0, 0]))
    router.update([one, other])
    step = (1 / 3 - (one.load + other.load) / 2).sign()
    same(router.state_dict()["bias"], 0.1 * (step - step.mean()))  # only differences choose
    router.bias.copy_(torch.tensor([0, 0, 9]))
    routing = router(x)
    assert bool((one.expert_index != 2).any()) and bool((routing.expert_index == 2).all())
    if name in SLOW:
        weight = x.sigmoid() if name == "sigmoid" else x.softmax(-1)
        same(routing.mass()[..., 2], weight[..., 2])


def test_expert_thresholds_start_at_the_mean_quantile_and_then_run():
    router, quantile, routings = plain("expert_threshold", 4), [], []
    for seed in range(3):
        x = draw(3, 5, 4, seed=seed)
        # The quantile 1 - 1/4 of 5 numbers is the fourth. Its mean is over groups, then routings.
        quantile.append(x.softmax(-1).sort(1).values[:, 3].mean(0))
        routings.append(router(x))
    same(router.state_dict()["threshold"], [1 / 4] * 4)
    router.update(routings[:2])
    first = (quantile[0] + quantile[1]) / 2
    same(router.threshold, first)
    router.update(routings[2:])
    then = router.threshold.clone()
    same(then, 0.9 * first + 0.1 * quantile[2], 1e-8)  # that 0.1 is a float32
    x[0, 3] = math.nan
    router.update([router(x)])
    assert torch.equal(router.threshold, then)  # a step with a token that is not finite
    x[0, 3] = 1
    router.update([router(x)])
    assert router.threshold.isfinite().all() and not torch.equal(router.threshold, then)


def test_a_hash_is_balanced_over_each_run_of_keys_and_reads_unknown_keys_and_positions():
    router = build_router("hash", 6, 4, num_keys=10, capacity_factor=None)

    def first(key):
        return router(draw(*key.shape, 6), key).expert_index[..., 0]

    runs = first(torch.arange(8).view(2, 4))  # keys 0..3, keys 4..7
    assert runs.sort(1).values.tolist() == [[0, 1, 2, 3]] * 2
    assert len(set(first(torch.tensor([[8, 9]])).flatten().tolist())) == 2
    assert first(torch.tensor([[10, 11, -1]])).tolist() == [[2, 3, 3]]  # unknown keys: mod E
    x = draw(2, 12, 6)
    assert torch.equal(router(x).index, router(x, torch.arange(12).expand(2, 12)).index)
    for kind in torch.uint8, torch.int16, torch.uint16:
        key = torch.arange(12).expand(2, 12)
        assert torch.equal(router(x, key.to(kind)).index, router(x, key).index)
    tables = {tuple(build_router("hash", 6, 4).table[:40].tolist()) for _ in range(3)}
    assert len(tables) == 3  # a table of its own each


@pytest.mark.parametrize("name", ["sigmoid", "expert_threshold"])
def test_what_moves_in_tiny_steps_is_never_held_in_half_precision(name):
    torch.set_default_dtype(torch.bfloat16)
    router = build_router(name, 4, 2)
    for buffer in router.bfloat16().buffers():
        assert buffer.dtype in (torch.float32, torch.long)


def test_a_seed_is_a_matter_of_its_key_alone():
    keys = [(0, 1, "noise"), (0, 1, "noise"), (0, 2, "noise"), (0, 1, "batch")]
    one, again, step, purpose = (torch.rand(4, generator=seeded(*key)).tolist() for key in keys)
    assert one == again and one != step and one != purpose and step != purpose


def test_experts_start_apart_or_all_like_the_first():
    for weights in Experts(4, 3, 5).parameters():
        assert not torch.equal(weights[0], weights[1])
    for weights in Experts(4, 3, 5, init="identical").parameters():
        assert torch.equal(weights, weights[:1].expand_as(weights))
    with pytest.raises(ValueError, match="init must be one of independent, identical, got 'zero'"):
        Experts(2, 3, 4, init="zero")


# ---------------------------------------------------------------- the layer in other people's hands
def test_a_fork_of_a_router_weighs_by_its_own_gates():
    class Sharp(TokenChoice):
        def probabilities(self, logits):
            return (5 * logits).softmax(-1)

    router, x = Sharp(4, 4, capacity_factor=None).double(), draw(3, 12, 4)
    gates = (5 * (x @ router.gate.weight.T)).softmax(-1)
    same(router(x).gates, gates)
    same(router(x).mass().sum(-1), gates.amax(-1))


class TopP(Router):
    """A token goes to its likeliest experts until their gates sum to p."""

    chooses, causal = "tokens", True
    defaults = Router.defaults | dict(p=0.6)

    def decide(self, logits, noisy):
        gates = self.probabilities(noisy)
        largest, order = gates.sort(-1, descending=True)
        short = largest.cumsum(-1) - largest < self.options.p  # before this one
        return self.admit(torch.zeros_like(short).scatter(-1, order, short), gates)


@pytest.mark.parametrize("factor", [1.5, None])
def test_a_router_of_ones_own_may_say_who_wants_whom(factor):
    gates = float64([GATES + [[0.1, 0.1, 0.8]]])
    router = TopP(3, 3, capacity_factor=factor).double()
    nn.init.eye_(router.gate.weight)
    routing = router(gates.log())
    mass = [[0.5, 0.3, 0], [0.6, 0, 0], [0.7, 0, 0], [0, 0, 0.8]]
    if factor:  # two slots an expert: the third in line for expert 0 is dropped
        mass[2][0] = 0.0
    same(routing.mass()[0], mass)
    same(routing.load.double(), [3 / 5, 1 / 5, 1 / 5], 1e-6)
    y, _ = MoE(router, Experts(3, 3, 5).double())(gates.log(), routing=routing)
    assert y.shape == gates.shape and y[0, 2].any() == (factor is None)


class SwiGLU(Experts):
    """silu(z w1) * (z w3), then w2 (2002.05202): a fork of the experts is this class."""

    biases = ()

    def __init__(self, num_experts, dim, hidden):
        nn.Module.__init__(self)
        self.dim = dim
        self.w1 = stacked(num_experts, dim, hidden, dim)
        self.w3 = stacked(num_experts, dim, hidden, dim)
        self.w2 = stacked(num_experts, hidden, dim, hidden)

    def expert(self, z, w1, w3, w2):
        return (F.silu(z @ w1) * (z @ w3)) @ w2


def test_a_fork_of_the_experts_runs_in_all_slots_and_in_filled_ones_alone():
    x, z = draw(3, 9, 6), draw(2, 8, 5, 6)
    moe = layer("token_choice", x, 8, top_k=2, capacity_factor=None)
    experts = moe.experts = SwiGLU(8, 6, 7).double()
    same(experts(z), (F.silu(z @ experts.w1) * (z @ experts.w3)) @ experts.w2)
    y, routing = moe(x)
    assert sum(routing.filled) == 3 * 9 * 2 and len(routing.filled) == 8
    same(moe(x, routing=Routing(*routing.tensors(), routing.load))[0], y)


@each(LEARNED, top_k=[2], capacity_factor=[1.0, None], combine_weights=["plan"])
def test_gradients_have_gradients_and_equal_those_of_torch_func(name, options):
    x = draw(2, 7, 4).requires_grad_()
    moe = layer(name, x, 3, **options)
    leaves = [x, *moe.parameters()]

    def loss(x, routing=None):
        return moe(x, routing=routing)[0].square().sum()

    def penalty(routing):  # the squared length of the gradient, and its gradient in turn
        first = torch.autograd.grad(loss(x, routing), leaves, create_graph=True)
        length = sum(gradient.square().sum() for gradient in first)
        return first, torch.autograd.grad(length, leaves)

    tensors = moe.router(x)
    first, second = penalty(None)
    same((first, second), penalty(Routing(*tensors.tensors(), tensors.load)), 1e-9)
    same(torch.func.grad(loss)(x), first[0])


@each(combine_weights=BOTH, capacity_factor=[1.0, None])
def test_a_token_that_is_not_finite_harms_its_own_group_alone(name, options):
    for bad in math.nan, math.inf:
        x = draw(3, 12, 6)
        moe = layer(name, x, 4, **options)
        before, _ = moe(x)
        x[1, 5] = bad
        after, _ = moe(x)
        fixed = options["capacity_factor"] is not None
        same(after[[0, 2]], before[[0, 2]], 0 if fixed else 1e-12)


def test_empty_slots_hold_zeros_so_that_no_token_passes_an_expert_that_it_did_not_get():
    class Delicate(nn.Module):
        def forward(self, slots):
            too_much = slots > 8  # expert 1 overflows
            too_much[:, 0] = False
            return slots.masked_fill(too_much, math.inf)

    x = float64([[[9.0, 0], [9, 0]]])  # both choose expert 0; the slots of expert 1 stay empty
    y, routing = MoE(plain("token_choice", 2, capacity_factor=2.0), Delicate())(x)
    same(y, x * x.softmax(-1).amax(-1, keepdim=True))
    assert not routing.dispatch(x)[0, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each(top_k=[2], capacity_factor=[1.0, None], gate=["mlp"], bias_rate=[0.1])
def test_a_half_precision_layer_routes_as_the_float32_one_of_its_weights(name, options, dtype):
    x = draw(2, 16, 8).to(dtype)
    full = layer(name, x, 4, **options).float()
    shift_buffers(full.router)
    half = copy.deepcopy(full)
    half = half.to(dtype)
    for word, buffer in half.router.named_buffers():  # a bias or a threshold keeps its last digit
        assert torch.equal(buffer, full.router.get_buffer(word)) and buffer.dtype != dtype
    full.load_state_dict(half.state_dict())
    y, routing = half(x)
    routes_alike(name, y, routing, *full(x.float()))
    assert y.dtype == dtype
    y.sum().backward()
    for parameter in half.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:var")  # a variance of nothing, in a loss
@each(top_k=[2], capacity_factor=[1.0, None], combine_weights=BOTH)
def test_no_groups_give_empty_outputs_and_gradients_of_zero(name, options):
    x = draw(0, 5, 4).requires_grad_()
    moe = layer(name, x, 3, **options)
    y, routing = moe(x)
    assert y.shape == (0, 5, 4) and routing.counts().shape == (0, 5)
    y.sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@each(top_k=[1, 2], priority=["token", "gate"], combine_weights=BOTH, **TRAINING)
def test_no_value_is_read_back_on_the_way_through_a_layer(name, options, monkeypatch):
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(torch, "autocast", Mock(return_value=nothing))  # knows no meta device
    x = draw(2, 8, 6).to("meta").requires_grad_()  # shapes without numbers: .item() raises
    moe = layer(name, x, 4, **options).to("meta")
    y, routing = moe(x, torch.zeros(2, 8, dtype=torch.long, device="meta"))
    (y.sum() + sum(routing.losses.values())).backward()
    moe.router.update([routing])
    assert y.shape == x.grad.shape == (2, 8, 6)


@each(HARD, capacity_factor=[1.0, None], top_k=[2])
def test_sequences_routed_whole_pass_their_experts_token_by_token(name, options):
    B, T, D = 10, 5, 6
    x = draw(B, T, D).requires_grad_()
    moe = layer(name, x.mean(1)[None], 4, **options)
    moe.shared = nn.Linear(D, D).double()
    routing, again = (moe.router(x.mean(1)[None]) for _ in range(2))  # one group of B sequences
    y, used = moe(x.view(1, B, T * D), routing=routing)
    assert used is routing
    want = moe.shared(x)
    for e in range(4):
        want = want + again.mass()[0, :, e, None, None] * slow_expert(moe.experts, e, x)
    alike([x, *moe.parameters()], [y.view(B, T, D)], [want])


# ================================================================ PART THREE, train.py: helpers
SMALL = """--dim 16 --depth 2 --heads 2 --hidden 32 --experts 4 --patch 8 --batch-size 8 --steps 3
    --log-every 1"""
WORDS = """--task tokens --dim 16 --depth 2 --heads 2 --hidden 32 --experts 4 --context 16
    --batch-size 4 --steps 3 --log-every 1 --vocab-size 320"""
OF_DATA = SMALL + " --batch-size 99 --data"  # more than the images below


@pytest.fixture(autouse=True)
def single_precision_again():
    """A run with --dtype float64, or a test, changes torch's default type for all that follow."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(flags):
    """A command line as its words; each text that starts with a flag is parted."""
    words = []
    for flag in map(str, flags):
        words += flag.split() if flag.startswith("--") else [flag]
    return words


def run(*flags, status=0):
    """What a command line prints; it has to end with this status."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main(words_of(flags)) == status
    return out.getvalue()


def refused(*flags):
    """What the one line of an error says, soon; status 2, and no traceback."""
    with contextlib.redirect_stderr(io.StringIO()) as err, at_most(20):
        with pytest.raises(SystemExit) as stop:
            train.main(words_of(flags))
    progress = r"^\s*$|%\||it/s|\?it"
    said = [line for line in err.getvalue().splitlines() if not re.search(progress, line)]
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("train.py: error: "), said
    return said[0]


@contextlib.contextmanager
def at_most(seconds):
    """Inside, a hang is an error; it is no Exception, so that nothing takes it for its own."""
    hangs = pytest.fail.Exception(f"still at it after {seconds} s")
    signal.signal(signal.SIGALRM, Mock(side_effect=hangs))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def said_of(*words):
    """{setting: value}, what a command line of one run says."""
    _, said = train.parse(words_of(words))
    return {name: values[0] for name, values in said.items()}


def built(*flags, small=SMALL):
    """The small run of these flags, not yet trained."""
    settings = train.settle(said_of(small, *flags))
    device = train.pick_device(settings)
    data = train.TASKS[settings.task].load(settings, device)
    b = SimpleNamespace(settings=settings, data=data, model=train.build(settings, data, device))
    b.gflops = train.measure_flops(settings, data, b.model)
    b.optimizer = train.make_optimizer(settings, b.model, device)
    return b


def step_of(b, step):
    return train.train_step(b.settings, b.data, b.model, b.optimizer, step)


def json_of(path):
    return json.loads(pathlib.Path(path).read_text("utf-8"))


def lines_of(folder):
    text = pathlib.Path(folder, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoint_of(folder):
    return torch.load(pathlib.Path(folder, "checkpoint.pt"), weights_only=True)


def same_runs(one, other):
    """Two folders hold the same lines and the same weights, bit for bit."""
    lines, again = (pathlib.Path(folder, "metrics.jsonl").read_bytes() for folder in (one, other))
    assert lines == again
    same(checkpoint_of(one)["model"], checkpoint_of(other)["model"], 0)


def write_cifar(folder, files=("data_batch_1.bin", "test_batch.bin"), count=40, classes=10, fine=0):
    """A folder in the CIFAR layout: random pixels, and image i is of class i % classes."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), np.uint8)
    labels = np.zeros((count, 1 + fine), np.uint8)
    labels[:, -1] = np.arange(count) % classes
    for file in files:
        np.hstack([labels, pixels]).tofile(folder / file)
    return pixels


def write_npz(path, **changed):
    x, y = np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 4
    np.savez(path, **dict(x_train=x, y_train=y, x_test=x, y_test=y) | changed)
    return path


def stored(path, flags="--batch-size 4"):
    """The images below a path."""
    return moe_vision.Stored(train.filled(said_of(flags, "--data", path)), "cpu")


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """64 images of an odd size, 24 x 24 pixels in four classes, told by their brightness."""
    g = np.random.default_rng(0)
    y = np.arange(64) % 4
    x = (60 * y[:, None, None, None] + g.integers(0, 20, (64, 24, 24, 3))).astype(np.uint8)
    path = tmp_path_factory.mktemp("album") / "x.npz"
    return f"--data {write_npz(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Three topics of forty documents, whose words tell the topic; and one document of a fourth."""
    folder, g = tmp_path_factory.mktemp("shelf"), random.Random(0)
    en, de = "the cat sat on a mat and it was 3 pm", "die Katze saß auf der Matte und es war 3 Uhr"
    for topic, words in ("en", en), ("de", de), ("it", "il gatto (era) qui"):
        (folder / topic).mkdir()
        for i in range(40):
            text = " ".join(g.choices(words.split(), k=120 + i))
            (folder / topic / f"{i}.txt").write_text(text + ".\n")
    (folder / "fr").mkdir()
    (folder / "fr/lone.txt").write_text("le chat est là. " * 20)
    return f"--data {folder}"


@pytest.fixture
def hasty(monkeypatch):
    """Of the drawn images that are evaluated, an eighth."""
    split = moe_vision.Drawn.split
    monkeypatch.setattr(moe_vision.Drawn, "split", lambda self, name: [next(split(self, name))])


class Bomb:  # what a pickle inside an .npz or a checkpoint could do
    def __reduce__(self):
        return os.mkdir, ("exploded",)


# ================================================================ one run, and wrong flags
def test_one_seed_gives_the_same_run_bit_for_bit_and_eval_repeats_it(here, capsys, hasty):
    flags = "--router token_choice --capacity-factor 1 --balance vmoe --noise-std 1 --out"
    run(SMALL, flags, "a")
    printed = run(SMALL, flags, "b").splitlines()
    waits = "evaluating on validation.*evaluating on test.*examining experts"
    assert re.search(waits, capsys.readouterr().err, re.S)
    same_runs("a", "b")
    lines = lines_of("a")
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 3, 3]
    assert {"loss", "importance", "load", "blocks"} <= set(lines[0])
    assert [line.get("split") for line in lines[3:]] == ["validation", "test", "test_dropless"]
    assert lines[4] == json_of("a/summary.json")["test"] | {"step": 3, "split": "test"}
    again = run("--eval b").splitlines()
    assert again == printed[-len(again) - 1 : -1] and len(again) > 4  # the last names the folder
    first, second = built("--seed 0"), built("--seed 1")
    assert not torch.equal(first.data.batch(0)["image"], second.data.batch(0)["image"])
    assert not torch.equal(first.model.embed.weight, second.model.embed.weight)


WRONG_FLAGS = [
    ("--router expert", "unknown router 'expert'; known: dense, token_choice"),
    ("--patch 5", "--patch must divide the image size, got --patch 5"),
    ("--experts 8 --top-k 9", "top_k must be at most num_experts=8, got top_k=9"),
    ("--router dense --experts 8 --top-k 9", "--top-k must be at most --experts 8, got 9"),
    ("--balance switch", "--router expert_choice offers no balance loss; it offers z"),
    ("--depth 4 --moe-blocks 4", "must name blocks from 0 to 3, got [4]"),
    ("--capacity-factor much", "must be a positive number, got much"),
    ("--router soft --priority gate", "--priority is no option of --router soft; it has"),
    ("--heads 3 --dim 64", "--heads must divide --dim, got --heads 3 and --dim 64"),
    ("--router hash --z-loss 1", "offers no z loss"),
    ("--grad-accum 3 --batch-size 128", "must divide --batch-size 128, got 3 times 1"),
    ("--balance bias", "--balance bias is for routers in which"),
    ("--router token_choice --priority gate", "--priority orders the line for slots; dropless"),
    ("--router soft --slots 2 --capacity-factor 2", "--capacity-factor counts slots, which"),
    ("--router sigmoid --balance-scope batch", "--balance-scope is for the loss of --balance"),
    ("--router token_choice --balance bias --bias-rate 0", "needs a --bias-rate above 0, got 0.0"),
    ("--moe-blocks a", "--moe-blocks: must be a list such as 1,3, got a"),
    ("--steps 1.5", "--steps: must be a whole number >= 1, got 1.5"),
    ("--learning-rate 1", "unrecognized arguments: --learning-rate 1"),
    ("--group batch --router soft", "--group batch does not fit Soft MoE"),
    ("--head patch --data x", "--head patch is for drawn images"),
    ("--bench --router dense", "--bench times routers: token_choice"),
    ("--bench --router soft --noise-std 1", "--noise-std is no option of --router soft"),
    ("--no-bench", "unrecognized arguments: --no-bench"),
    ("--bench --tokens 100", "--group-size must divide --tokens 100, got 256"),
    ("--lr inf", "must be a positive number, at most 1.79"),
    ("--warmup 1", "must be a share from 0 up to 1"),
    ("--few-shot", "--few-shot is for stored images"),
    ("--balance-weight 1", "weighs the losses of --balance vmoe or switch, got --balance none"),
    ("--router hash --router-lr 2", "--router-lr is for routers that learn, not hash"),
    ("--router token_choice --router-weights frozen --router-lr 2", "for routers that learn"),
    ("--router token_choice --shared -1", "must be a whole number >= 0, got -1"),
    ("--router token_choice --balance-scope world", "--balance-scope: invalid choice: 'world'"),
    ("--temperature 1", "--temperature is for --sample or --bench"),
    ("--eval x --sample y", "one at a time: --eval, --sample"),
    # a grid refuses what a run refuses, and what no run of it uses
    ("--router dense soft --prefix 4", "--prefix is no setting of --task vision"),
    ("--router token_choice soft --noise-std 0 -1", "must be a number >= 0, got -1"),
    ("--experts 2 4 --router token_choice --top-k 3", "top_k must be at most num_experts=2"),
    ("--router all --heads 3", "no router takes these settings; dense: --heads must divide --dim"),
    ("--seed 0 1 --out file", "File exists: 'file'"),
    ("--out file", "--out file is a file"),
    ("--eval x --router all", "--eval takes one value for each flag, and one router"),
    ("--resume x --seed 0 1", "--resume takes one value for each flag, and one router"),
]
ONE_VALUE = ["--device cpu auto", "--log-every 1 2", "--save-every 1 2", "--out y z"]
ONE_VALUE += ["--task vision tokens", "--head class patch"]


def wrong_flags():
    """(flags, rule) of every command line that is wrong."""
    found = WRONG_FLAGS.copy()
    for action in "--eval", "--resume", "--sample":
        found.append((f"{action} nowhere", "nowhere is no run: config.json is missing"))
    for flag in "--eval", "--resume", "--table", "--sample", "--out", "--data":
        found.append((f"{flag}=", f"argument {flag}: is empty; say a path"))
    for flags in ONE_VALUE:
        found.append((flags, f"{flags.split()[0]} takes one value, got 2"))
    if not torch.cuda.is_available():
        found.append(("--device cuda", "--device cuda: this machine has none; there is cpu"))
    return found


@pytest.mark.parametrize("flags, rule", wrong_flags())
def test_a_wrong_flag_gets_one_line_that_names_the_rule_and_the_value(flags, rule, here):
    (here / "file").touch()
    short = () if re.search("--(bench|eval|resume|sample|table) ", flags) else ("--steps", 1)
    assert rule in refused(*flags.split(), *short)
    assert [path.name for path in here.iterdir()] == ["file"]


# ================================================================ images
def test_broken_image_files_are_refused(here):
    rule = "lacks train.bin; it needs data_batch_*.bin and test_batch.bin, or train.bin and"
    assert rule in refused(OF_DATA, ".")
    write_cifar(here)
    assert "--batch-size 99 is larger than the data: 36 training images" in refused(OF_DATA, ".")
    os.truncate("test_batch.bin", 9999)
    assert "not a whole number of records of 3073 bytes" in refused(OF_DATA, ".")
    os.truncate("data_batch_1.bin", 0)
    assert "data_batch_1.bin holds 0 bytes" in refused(OF_DATA, ".")
    write_cifar(here, classes=11)
    assert "has a label 10; labels of this layout are below 10" in refused(OF_DATA, ".")
    os.truncate(write_npz("x.npz"), 9999)
    assert "x.npz is no .npz archive; for text say --task tokens" in refused(OF_DATA, "x.npz")
    np.savez("x.npz", x_train=0, y_train=0)
    assert "x.npz lacks x_test, y_test; it needs" in refused(OF_DATA, "x.npz")
    with zipfile.ZipFile("x.npz", "w") as archive:
        for key in "x_train", "y_train", "x_test", "y_test":
            archive.writestr(key + ".npy", b"no array")
    assert "x_train must be square uint8 images" in refused(OF_DATA, "x.npz")
    os.mkfifo("pipe.npz")
    assert "no such data: pipe.npz" in refused(OF_DATA, "pipe.npz")


IMAGES, LABELS = np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 5
LARGE = np.where(np.arange(20) == 7, 3_000_000, 1)
WRONG_ARRAYS = [
    (dict(y_train=np.array([Bomb()], object)), "allow_pickle"),
    (dict(y_train=np.zeros(20)), "y_train must be 20 whole numbers, got float64"),
    (dict(x_train=IMAGES * 1.0), "must be square uint8 images [N, S, S, 3], got float64"),
    (dict(x_train=IMAGES[:, :0, :0], x_test=IMAGES[:, :0, :0]), "got uint8 [20, 0, 0, 3]"),
    (dict(y_test=LABELS), "labels out of range: 0 to 4, but training knows 0 to 3"),
    (dict(y_train=LABELS - 1), "labels out of range: -1"),
    (dict(y_train=LARGE, y_test=LARGE), "labels out of range: 1 to 3000000"),
]


@pytest.mark.parametrize("changed, rule", WRONG_ARRAYS)
def test_wrong_arrays_are_refused_and_a_pickle_is_never_opened(changed, rule, here):
    assert rule in refused(OF_DATA, write_npz("x.npz", **changed))
    assert not (here / "exploded").exists()


CIFAR10 = ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")
CIFAR100 = ("train.bin", "test.bin")


@pytest.mark.parametrize("fine, files", [(0, CIFAR10), (1, CIFAR100)])
def test_cifar_files_are_read_whole_and_trained_on(fine, files, here):
    pixels = write_cifar(here / "data", files, fine=fine, classes=7)
    images, labels, classes = moe_vision.read_cifar([here / "data" / file for file in files[:-1]])
    assert classes == (100 if fine else 10) and len(images) == 40 * (len(files) - 1)
    assert (images[:40].reshape(40, -1) == pixels).all()
    assert (labels[:40] == np.arange(40) % 7).all()
    run(SMALL, "--data data --out run")


def test_stored_images_part_into_training_validation_test_and_the_few_shot_classes(here):
    few_shot = "--few-shot --batch-size 4"
    write_cifar(here, count=200)
    data = stored(here, few_shot)
    assert all((labels < 8).all() for _, labels in data.parts.values())
    assert list(data.few_shot_classes) == [8, 9]
    (_, support), (_, query) = data.probe(0)
    assert support.bincount().tolist() == [10, 10] and len(query) == 80 - 20
    write_npz("x.npz", x_test=np.full((5, 16, 16, 3), 9, np.uint8), y_test=np.arange(5) % 4)
    parts = stored("x.npz").parts
    assert (parts["test"][0] == 9).all()
    assert not parts["train"][0].any() and not parts["validation"][0].any()
    with pytest.raises(ValueError, match="a fifth of the classes, at least 2; .* has 4 classes"):
        stored("x.npz", few_shot)
    write_cifar(here / "few")
    with pytest.raises(ValueError, match="more than 10 images of each held-out class"):
        stored("few", few_shot)
    (here / "test_batch.bin").write_bytes(b"\1" + b"\7" * 3072)
    parts = stored(here).parts
    sizes = {name: len(labels) for name, (_, labels) in parts.items()}
    assert sizes == {"train": 180, "validation": 20, "test": 1}
    both = torch.cat([parts["train"][0], parts["validation"][0]])
    assert len(both.flatten(1).unique(dim=0)) == 200


def test_an_epoch_of_stored_images_meets_each_once_cropped_or_flipped_on_its_own(here):
    write_cifar(here)
    data = stored(here, "--batch-size 9")
    images = data.parts["train"][0]
    data.parts["train"] = images, torch.arange(36)  # name each image by its number
    labels = torch.cat([data.batch(step)["label"] for step in range(4)])
    assert labels.sort().values.tolist() == list(range(36))
    whole, part = data.batch(2), data.batch(2, part=slice(3, 7))
    same(part, {name: value[3:7] for name, value in whole.items()}, 0)
    flipped = set()
    for image, label in zip(whole["image"], whole["label"]):
        windows = F.pad(images[label], (4,) * 4).unfold(1, 32, 1).unfold(2, 32, 1)  # [3, 9, 9, ...]
        crops = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)
        crops = data.ready(torch.cat([crops, crops.flip(-1)]), torch.zeros(162))["image"]
        (fits,) = (crops == image).flatten(1).all(1).nonzero()
        flipped.add(fits.item() >= 81)
    assert flipped == {False, True}
    assert not torch.equal(whole["image"], data.ready(images, labels)["image"][whole["label"]])


def packed(*members):
    """An archive of the folder source and of these members, and its md5."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        tar.add("source", "cifar-10-batches-bin")
        for member in members:
            tar.addfile(member)
    return raw.getvalue(), hashlib.md5(raw.getvalue()).hexdigest()


def publish(monkeypatch, body, md5):
    """From now on CIFAR-10 is this archive."""
    path = pathlib.Path("archive").resolve()
    path.write_bytes(body)
    monkeypatch.setitem(moe_vision.OFFICIAL, "cifar10", (path.as_uri(), md5))


def test_the_official_archive_is_fetched_once_and_unpacked_in_its_folder(here, monkeypatch):
    write_cifar(here / "source", count=20)
    link = tarfile.TarInfo("cifar-10-batches-bin/link.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for outside in tarfile.TarInfo("../../escaped.bin"), link:
        publish(monkeypatch, *packed(outside))
        assert "cannot fetch file:" in refused("--data cifar10")
        assert not list((here / "data").iterdir())
    body, md5 = packed()
    publish(monkeypatch, body, "0" * 32)
    assert f"has md5 {md5}, not {'0' * 32}: cut short or changed" in refused("--data cifar10")
    assert not list((here / "data").iterdir())
    publish(monkeypatch, body, md5)
    folder = moe_vision.download("cifar10")
    assert {file.name for file in folder.iterdir()} == {"data_batch_1.bin", "test_batch.bin"}
    assert {file.name for file in here.iterdir()} == {"archive", "data", "source"}
    assert [file.name for file in (here / "data").iterdir()] == ["cifar10"]
    publish(monkeypatch, b"not fetched again", md5)
    assert moe_vision.download("cifar10") == folder


def test_a_download_that_stalls_or_breaks_is_one_line(here, monkeypatch):
    errors = [IncompleteRead(b""), BadStatusLine("x"), TimeoutError("timed out")]
    broken = Mock(side_effect=errors)
    monkeypatch.setattr(urllib.request, "urlopen", broken)
    for error in errors:
        assert f"cannot fetch {moe_vision.TORONTO}" in refused("--data cifar10")
    assert 5 <= broken.call_args.kwargs["timeout"] <= 120
    assert not list((here / "data").iterdir())


def test_drawn_images_hold_what_their_labels_and_patch_maps_say():
    data = moe_vision.Drawn(train.filled(said_of("--batch-size 64 --patch 4")), "cpu")
    batch = data.batch(3)
    shapes = {name: list(value.shape) for name, value in batch.items()}
    known = {"kind": [64, 64], "shape": [64], "tile": [64, 64]}
    assert shapes == {"image": [64, 3, 32, 32], "label": [64], **known}
    for label, tiles in zip(batch["label"], batch["tile"]):  # each class has its own set of tiles
        owned = moe_vision.TILES_OF[moe_vision.TRAINED[label]]
        assert len(owned.unique()) == 64 and torch.isin(tiles[tiles >= 0], owned).all()
    assert torch.equal(batch["tile"] >= 0, batch["kind"] > 0)
    whole = batch["kind"] == 2  # a tile shows its pattern: its light pixels are the brighter ones
    pixels = F.pixel_unshuffle(batch["image"].mean(1, keepdim=True), 4).flatten(2).mT  # [B, T, 16]
    pattern = moe_vision.TILES.flatten(1)[batch["tile"][whole]]
    light, dark = pattern > 0, pattern < 0
    seen = pixels[whole]
    gap = (seen * light).sum(1) / light.sum(1) - (seen * dark).sum(1) / dark.sum(1)
    assert (gap > 0.5).float().mean() > 0.99
    assert seen.mean() > pixels[batch["kind"] == 0].mean() + 1  # the map lies where the shape is
    same(data.batch(3, part=slice(10, 20)), {name: batch[name][10:20] for name in batch}, 0)
    assert not torch.equal(batch["image"], data.batch(4)["image"])
    double = built("--dtype float64 --batch-size 64 --patch 4").data.batch(3)["image"]
    torch.set_default_dtype(torch.float32)
    same(double, batch["image"].double(), 1e-4)
    number = torch.tensor([[0.5] * 4 + [0.0] * 3 + [1.0] * 3])  # black ground, white shape
    disc, tiles = torch.tensor([moe_vision.SHAPES.index("disc")]), torch.zeros(1, 64).long()
    drawn = data.render(torch.tensor([0]), disc, tiles, number, torch.zeros(1, 1, 32, 32))
    filled = (drawn["image"][0, 0] > -2).float()  # black is (0 - 0.5) * 4
    share = filled.view(8, 4, 8, 4).mean((1, 3)).flatten()  # of each patch
    assert torch.equal(drawn["kind"][0], (share > 0).long() + (share == 1).long())
    assert drawn["kind"].unique().tolist() == [0, 1, 2]


def test_the_ridge_probe_picks_its_penalty_by_leaving_one_out():
    x, z, rule = draw(24, 20), draw(200, 20, seed=1), draw(20, 3, seed=2)
    y = (x @ rule + draw(24, 3, seed=99)).argmax(1)  # few and noisy: without leverages, 0.365
    truth = (z @ rule).argmax(1)
    mean, std = x.mean(0), x.std(0) + 1e-5
    a, b = (F.pad((features - mean) / std, (0, 1), value=100.0) for features in (x, z))
    targets = F.one_hot(y).double() * 2 - 1

    def solve(rows, penalty):
        matrix = a[rows].T @ a[rows] + penalty * torch.eye(21)
        return torch.linalg.solve(matrix, a[rows].T @ targets[rows])

    def error(penalty):
        left_out = [a[i] @ solve(torch.arange(24) != i, penalty) for i in range(24)]
        return (torch.stack(left_out) - targets).square().sum()

    penalty = min(2.0 ** np.arange(-10, 20), key=error)
    guess = (b @ solve(torch.arange(24), penalty)).argmax(1)
    expected = (guess == truth).double().mean().item()
    assert moe_vision.ridge_accuracy((x, y), (z, truth)) == pytest.approx(expected)
    assert 0.5 < expected < 1


class Mine(moe_vision.Images):
    """An own data set: two classes, bright and dark."""

    image_size, names, about = 16, ["dark", "bright"], "two classes of noise"
    mean, std = 0.4, 0.2

    def make(self, count, *key):
        g = seeded(self.seed, *key)
        label = torch.randint(2, (count,), generator=g)
        image = torch.randn(count, 3, 16, 16, generator=g) + 2 * label[:, None, None, None]
        return {"image": image, "label": label}

    def batch(self, step, part=slice(None)):
        return {name: value[part] for name, value in self.make(self.batch_size, step).items()}

    def split(self, name):
        yield self.make(64, name)


def test_an_own_set_of_images_is_one_class_and_one_entry(here, monkeypatch):
    monkeypatch.setitem(moe_vision.DATASETS, "mine", Mine)
    run(SMALL, "--data mine --router token_choice --steps 30 --warmup 0 --lr 0.01 --out run")
    assert json_of("run/summary.json")["test"]["top1"] == 100
    assert "two classes of noise" in (here / "run/report.html").read_text()
    run("--eval run")
    labels = {"class": (torch.zeros(1, 5).long(), None, "ab")}  # one too many
    monkeypatch.setattr(Mine, "labels", Mock(return_value=labels))
    monkeypatch.setattr(train, "train_step", None)  # refused before the training
    said = refused(SMALL, "--data mine")
    assert re.search("labels of 5 tokens .*do not fit a routing of 4", said)


# ================================================================ the vision model
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("router", ["dense", "expert_choice", "soft"])
def test_gflops_count_one_images_products_and_active_parameters_what_a_token_meets(router, shared):
    flags = f"--router {router} --top-k 3 --shared"
    b, alone = built(flags, shared), built(flags, 0)
    D, H, T, E, K, out = 16, 32, 16, 4, 3, 18
    block = T * D * 3 * D + 2 * T * T * D + T * D * D  # qkv, two attention products, projection
    mixing = {"dense": 0, "expert_choice": T * D * E, "soft": 3 * T * D * K * T}[router]
    work = (K + shared) * T * 2 * D * H  # what a token's experts do
    products = T * 3 * 64 * D + 2 * block + T * 2 * D * H + work + mixing + D * out
    assert b.gflops == pytest.approx(2 * products / 1e9, rel=1e-9)
    total, active = train.parameters(b.model, b.data)
    expert = 2 * D * H + D + H
    assert total - active == (0 if router == "dense" else (E - K) * expert)
    more = active - train.parameters(alone.model, b.data)[1]
    # the shared experts have one output bias together, and in a dense FFN none of their own
    assert more == shared * (2 * D * H + H) + D * (shared > 0 and router != "dense")
    if router == "soft":  # 4 slots of an expert for 16 tokens are a quarter of its work
        few = built("--router soft --top-k 3 --slots 4")
        total, active = train.parameters(few.model, few.data)
        assert total - active == (E - 1) * expert
    if router == "dense":  # slots that no token can use do not make experts active
        wide = built("--router token_choice --top-k 3 --capacity-factor 1.3")
        total, active = train.parameters(wide.model, wide.data)
        assert total - active == (E - K) * expert


LEARNS_FROM = [  # tokens for each active parameter; the last is the study of language
    ("--task vision", 25),
    ("--task tokens", 25),
    ("--task tokens --experts 4 --steps 1700", 40),
]


@pytest.mark.parametrize("flags, least", LEARNS_FROM)
def test_default_sizes_learn_from_many_tokens_a_parameter_and_dense_can_match_all(flags, least):
    settings, data, (every, active) = sized(flags, "--router token_choice")
    assert settings.steps * settings.batch_size * data.tokens / active >= least
    _, _, (matched, _) = sized(flags, "--router dense --dense-match total")
    assert matched == pytest.approx(every, rel=0.03)


def sized(*flags):
    """Settings, data without its text, and how many parameters there are: in all, and active."""
    settings = train.settle(said_of(*flags))
    if settings.task == "vision":
        data = moe_vision.Drawn(settings, "cpu")
    else:
        data = moe_tokens.Text.__new__(moe_tokens.Text)  # as the library is: it fills both sizes
        data.vocab_size, data.tokens, data.topics = settings.vocab_size, settings.context, []
    return settings, data, train.parameters(train.build(settings, data, torch.device("cpu")), data)


def test_a_bias_moves_where_it_balances_or_is_asked_for_and_help_names_the_defaults(capsys):
    rates = {"": 1e-3, "--balance none": 0, "--balance switch --bias-rate 0.1": 0.1}
    for flags, rate in rates.items():
        assert train.settle(said_of(f"--router sigmoid {flags}")).bias_rate == rate
    assert train.settle(said_of("--router token_choice --balance bias")).bias_rate == 1e-3
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "sigmoid (0.0 or 0.001, by router)" in shown
    assert "all routers (1.0 or none, by router)" in shown and "all routers (1)" in shown


@functools.cache
def tiny(*flags):
    """A run of the default size."""
    return built(*flags, small="--size tiny")


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "expert_threshold"])
@pytest.mark.parametrize("task", ["vision", "tokens"])
def test_every_router_pays_what_the_dense_model_of_its_active_experts_pays(task, router, shelf):
    data = [f"--task {task}"]
    if task == "tokens":
        data = ["--task tokens --batch-size 4 --allow-leak", shelf]
    for more in "--top-k 1", "--top-k 2 --shared 1":
        dense, b = tiny("--router dense", *data, more), tiny("--router", router, *data, more)
        s, T, within = b.settings, b.data.tokens, 1e-9 if router in SLOW else 0.03
        # of a token and a block: a gate, but soft's logits, dispatch and combine for T * K slots
        columns = {"soft": 3 * T * s.top_k, "hash": 0}.get(router, s.experts)
        routing = 2 * T * s.dim * columns * len(s.moe_blocks) / 1e9
        assert b.gflops == pytest.approx(dense.gflops + routing, rel=within)
        if task == "tokens" and router == "token_choice":
            whole = tiny("--router token_choice --unit sequence", *data, more)
            assert whole.gflops == pytest.approx(dense.gflops, rel=0.03)


def test_patches_are_told_apart_by_kind_and_shape():
    b = built("--head patch --router dense")
    batch = b.data.batch(0)
    kind = batch["kind"]
    truth = torch.where(kind == 0, 0, 2 * batch["shape"][:, None] + kind)

    def loss_and_miou(classes):
        """Of a model that says with certainty that the patches are of these classes."""
        sure = 10.0 * F.one_hot(classes, 13).float()
        loss, counts, _ = b.data.loss(Mock(return_value=(sure, {})), batch)
        return loss, b.data.metrics(counts | {"loss": loss})["miou"]

    loss, miou = loss_and_miou(truth)
    assert loss < 1e-2 and miou == pytest.approx(100 * len(truth.unique()) / 13)
    _, miou = loss_and_miou(0 * truth)  # all of it is ground
    assert miou == pytest.approx(100 * (truth == 0).double().mean().item() / 13)
    assert b.model(batch["image"])[0].shape == (*truth.shape, 13)


@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
def test_a_batch_is_one_group_if_so_asked(router, album):
    b = built("--router", router, "--group batch --patch 6", album)
    (routing,) = b.model(b.data.batch(0)["image"])[1].values()
    assert list(routing.mass().shape) == [1, 8 * 16, 4]
    _, joints = train.specialisation(b.settings, b.data, b.model)
    for joint, _ in joints[1].values():  # every token of the test split, once
        assert float(joint.sum()) == pytest.approx(20 * 16, rel=1e-4)


def test_statistics_of_a_routing_worked_out_by_hand():
    ones, load = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 0])
    uneven = Routing(ones, ones, load, gates=torch.tensor([[[0.25, 0.75]]]))
    told = train.statistics({0: uneven})[0]
    assert told["dead"] == 1 and told["entropy"] == pytest.approx(0.811278, abs=1e-5)
    index = torch.tensor([[[0, 1], [0, 4]]])  # of four tokens, 2 and 3 are dropped
    routing = routers.HardRouting(index, torch.ones(1, 2, 2), 4, torch.tensor([0.75, 0.25]))
    expected = {"load": 1.5, "dead": 0, "dropped": 0.5, "slots_per_token": 0.75}
    assert train.statistics({1: routing}) == {1: expected}


def test_a_readers_router_brings_its_flags_and_its_bugs_keep_a_traceback(here, monkeypatch, album):
    class Mine(TokenChoice):
        defaults = TokenChoice.defaults | dict(mode="plain", depth_of=0.5)

        def logits(self, x):
            one, two = x.shape  # there are three
            return super().logits(x)

    monkeypatch.setitem(ROUTERS, "mine", Mine)
    monkeypatch.setitem(train.ROUTER_KINDS, "mine", Mine)
    for name in "mode", "depth_of":
        monkeypatch.setitem(train.OPTIONS, name, Mine.defaults[name])
    with pytest.raises(ValueError, match="too many values to unpack"):
        train.main(words_of([SMALL, album, "--router mine --mode odd --depth-of 0.1 --out run"]))
    assert train.parse(["--mode", "odd"])[1] == {"mode": ["odd"]}
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
        train.main(words_of([SMALL, album, "--router mine --seed 0 1 --out grid"]))
    assert "Traceback" in err.getvalue() and "failed: too many values" in err.getvalue()
    monkeypatch.setitem(train.OPTIONS, "temperature", 1.0)
    assert "router option temperature has the name of another flag" in refused(SMALL)


def test_a_compiled_run_tells_its_first_step_apart(here, monkeypatch, album):
    compiled = Mock(side_effect=functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compiled)
    flags = [SMALL, album, "--compile --out run --router"]
    assert "; compiled, " not in run(*flags, "expert_choice")
    summary = json_of("run/summary.json")
    left = summary["seconds"] - summary["first_step_seconds"]
    assert 0 < left < summary["first_step_seconds"]
    assert compiled.call_count == 1 and compiled.call_args.kwargs == {"fullgraph": True}
    assert summary["images_per_second"] == pytest.approx(8 * 2 / left)  # two steps of 8 images
    dropless = train.settle(said_of(*flags, "token_choice", "--capacity-factor none"))
    assert "computes a slot for every token" in train.about(dropless, torch.device("cpu"))


def test_a_bench_times_a_layer_against_its_bounds_in_the_type_asked_for(here, monkeypatch):
    flags = "--bench --dim 8 --hidden 16 --tokens 512 --repeats 1 --out"
    timed = Mock(side_effect=train.timed)
    monkeypatch.setattr(train, "timed", timed)
    for dtype in "float32", "float64":
        timed.reset_mock()
        assert "| token_choice |" in run(flags, "b.json", "--router token_choice --dtype", dtype)
        assert {call.args[2].dtype for call in timed.call_args_list} == {getattr(torch, dtype)}
        (row,) = json_of("b.json")
        assert set(row["ms"]) == {"layer", "dense", "bare experts", "tensor form"}
    monkeypatch.setattr(train, "bench_router", None)  # nothing is timed before the file is open
    assert "/nope" in refused(flags, "/nope/x.json")


def test_no_decay_on_norms_biases_positions_and_routers_which_have_a_rate_of_their_own():
    b = built("--router token_choice --router-lr 0.25 --shared 1")
    decayed, spared, gates = (group["params"] for group in b.optimizer.param_groups)
    names = {id(parameter): name for name, parameter in b.model.named_parameters()}
    assert len(decayed) + len(spared) + len(gates) == len(names)
    assert [names[id(parameter)] for parameter in gates] == ["blocks.1.feed.router.gate.weight"]
    words = ("norm", "bias", "position", ".b1", ".b2")
    for parameters, free in (decayed, False), (spared, True):
        for parameter in parameters:
            assert any(word in names[id(parameter)] for word in words) == free
    assert [group["weight_decay"] > 0 for group in b.optimizer.param_groups] == [True, False, False]
    mine = {"router.gate.weight", "experts.b1", "experts.b2", "shared.0.bias", "shared.2.bias"}
    assert set(b.model.blocks[1].feed.no_decay()) == mine
    step_of(b, 1)
    rates = [group["lr"] for group in b.optimizer.param_groups]
    assert rates == [rates[0], rates[0], 0.25 * rates[0]] and rates[0] > 0
    assert train.settle(said_of("--router soft --router-lr 2")).router_lr == 2  # for phi and scale


def test_a_batch_in_parts_takes_the_step_of_the_whole_and_the_balance_weight_its_gradient(album):
    moved, told = [], []
    for parts, weight in (1, 0.5), (4, 0.5), (1, 0):
        flags = f"--balance switch --balance-weight {weight} --grad-accum {parts} --dtype float64"
        b = built("--router token_choice --noise-std 0", flags, album)
        stepped = step_of(b, 0)
        line = train.numbers(b.data.metrics(stepped.sums) | stepped.losses)
        moved.append(nn.utils.parameters_to_vector(b.model.parameters()).detach())
        told.append([line[name] for name in ("loss", "balance", "top1", "grad_norm")])
    assert told[0] == pytest.approx(told[1], rel=1e-9)
    same(moved[0], moved[1], 1e-9)
    assert told[0][:3] == pytest.approx(told[2][:3]) and abs(told[0][3] - told[2][3]) > 1e-4


def test_an_evaluation_tells_the_load_of_the_whole_split(monkeypatch):
    b = built("--router token_choice --noise-std 0")
    drawn = b.data.draw(64, moe_vision.TRAINED, "x")
    batches, load, entropy = [], 0, 0
    for rows in slice(0, 40), slice(40, 64):  # the last one is smaller
        batches.append({name: value[rows] for name, value in drawn.items()})
        routings = b.model(batches[-1]["image"])[1]
        share = len(batches[-1]["image"]) / 64
        load = load + share * routings[1].load
        entropy += share * train.statistics(routings)[1]["entropy"]
    monkeypatch.setattr(b.data, "split", Mock(return_value=batches))
    told = train.evaluate(b.settings, b.data, b.model, "test")["blocks"]
    assert told[1]["load"] == pytest.approx(float(load.max() * 4)) and len(told) == 1
    assert told[1]["entropy"] == pytest.approx(entropy, rel=1e-6)


def test_hash_routes_by_the_place_in_the_image_also_where_a_batch_is_one_group():
    b = built("--router hash")
    together = built("--router hash --group batch").model
    together.load_state_dict(b.model.state_dict())
    image = b.data.batch(0)["image"]
    same(b.model(image)[0], together(image)[0], 1e-5)


# ================================================================ text and the GPT
def gpt(shelf, *flags):
    """The small run of these flags in float64, and 3 sequences of tokens for it."""
    b = built(shelf, "--dtype float64", *flags, small=WORDS)
    b.tokens = torch.randint(b.data.vocab_size, (3, 16), generator=seeded("sequences"))
    return b


BY_PREFIX = "--router token_choice --unit sequence --prefix 4"
AXES = [
    "--router token_choice",
    "--router token_choice --balance bias --capacity-factor 1",
    "--router token_choice --router-weights frozen --scope global",
    "--router sigmoid --top-k 2",
    "--router hash",
    "--router hash --hash-key topic",
    "--router expert_threshold",
    "--router expert_threshold --scope global",
    "--router dense",
    BY_PREFIX,
    BY_PREFIX + " --top-k 2 --scope global",
    BY_PREFIX + " --shared 1",
    "--router hash --unit sequence",
]
LEAKY = [
    "--router expert_choice",
    "--router soft",
    "--router token_choice --capacity-factor 1 --priority gate",
    "--router token_choice --unit sequence --pool mean",
    BY_PREFIX + " --score-from 1",
]


@pytest.mark.parametrize("flags", AXES + LEAKY)
def test_a_gpt_lets_no_later_token_nor_another_sequence_in_unless_it_says_so(flags, shelf):
    b = gpt(shelf, flags, *["--allow-leak"] * (flags in LEAKY))
    topic, moved = torch.tensor([0, 1, 2]), 0.0
    first, context = b.settings.score_from, b.settings.context
    b.model.train()
    with torch.no_grad():
        out = b.model(b.tokens, topic)[0]
        for t in range(first, context):
            changed = b.tokens.clone()
            changed[1, t] = (changed[1, t] + 1 + t) % 300
            difference = (b.model(changed, topic)[0] - out).abs().amax(-1)  # [3, T]
            assert difference[1, t] > 1e-6 and difference[[0, 2]].max() < 1e-10
            moved = max(moved, difference[1, first - 1 : t].max().item())
    assert (moved > 1e-6) == (flags in LEAKY) == (b.settings.remark == "leaky"), moved


@pytest.mark.parametrize("flags", [flags for flags in AXES if "topic" not in flags])
def test_what_is_offered_for_sampling_says_of_a_beginning_what_it_says_of_the_whole(flags, shelf):
    b = gpt(shelf, flags)
    start = b.settings.prefix if b.settings.unit == "sequence" else 1
    with torch.no_grad(), train.dropless(b.model):
        out = b.model(b.tokens)[0]
        for t in range(start, b.settings.context):
            same(b.model(b.tokens[:, :t])[0], out[:, :t], 1e-10)


def test_a_sequence_as_a_whole_goes_to_the_experts_that_its_prefix_chooses(shelf):
    model = gpt(shelf, BY_PREFIX, "--top-k 2").model
    moe, x = model.blocks[0].feed, draw(5, 16, 16)
    routing = model.route(moe, x, torch.zeros(5, 16, dtype=torch.long))
    same(routing.tensors(), moe.router(x[:, :4].mean(1)[None]).tensors())


def test_global_routing_is_one_object_of_one_router_in_all_blocks(shelf):
    b = gpt(shelf, "--router token_choice --scope global")
    routings = b.model(b.tokens)[1]
    first, second = b.model.moes()
    assert len(routings) == 2 and routings[0] is routings[1] and first.router is second.router
    assert b.model(b.tokens)[1][0] is not routings[0]
    assert sum("router" in name for name, _ in b.model.named_parameters()) == 1


def test_a_step_draws_random_gates_anew(shelf):
    b = gpt(shelf, "--router token_choice --router-weights random")
    gate = b.model.blocks[0].feed.router.random_gate
    before = gate.weight.clone()
    step_of(b, 0)
    assert not torch.equal(gate.weight, before)


def test_a_gpt_starts_at_the_log_of_its_vocabulary_and_learns_a_batch_by_heart(shelf):
    b = built("--router token_choice --lr 0.01 --steps 200 --dim 32", shelf, small=WORDS)
    batch = b.data.batch(0)
    loss, log = b.data.loss(b.model, batch)[0].item(), math.log(b.data.vocab_size)
    assert abs(loss / log - 1) < 0.02
    b.data.batch = Mock(return_value=batch)
    for step in range(b.settings.steps):
        step_of(b, step)
    assert b.data.loss(b.model, batch)[0] < 0.1


def test_the_tokenizer_brings_back_any_bytes_and_takes_the_longest_pieces():
    text = "def naïve(x):\r\n\t return x  ** 2 # 日本語 \U0001f600\n\n\n    self.self_self"
    text = (text + " = \"'''\" + 'ß' * 12345\n").encode()
    tokenizer = moe_tokens.Tokenizer.learn([text * 3, b"the theatre then"], 280)
    pieces, g = tokenizer.pieces, random.Random(0)
    assert pieces[:256] == [bytes([i]) for i in range(256)] and len(set(pieces[256:])) == 24
    samples = [b"", text, b"\x00\xff\xfe", "\u2028\u0085 e\u0301 \ufeff".encode()]
    samples += [b" \t \r \n\r", bytes(range(256)), b"a" * 99 + "日".encode() * 40]
    samples += [g.randbytes(g.randrange(1, 60)) for _ in range(300)]
    for sample in samples:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    tokenizer = moe_tokens.Tokenizer([b" the", b"at", b"atre", b"x", b"r"])
    words = [tokenizer.pieces[i] for i in tokenizer.encode(b" theatre x")]
    assert words == [b" the", b"atre", b" ", b"x"]
    assert tokenizer.encode(b"x").tolist() == [259]  # a lexeme of its own,
    assert tokenizer.encode(b"xr").tolist() == [120, 114]  # and bytes of another


@pytest.mark.parametrize("text", ['{"ab": 1}', '"ab"', '[""]', '["ab", "ab"]', "[1]", "ab"])
def test_a_tokenizer_is_read_from_a_list_of_lexemes_alone(here, text):
    (here / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        moe_tokens.Tokenizer.read(here / "tokenizer.json")


def test_lexemes_are_short_and_read_in_linear_time_whatever_the_text():
    long = [letter * 200_000 for letter in (b"a", b"7", b" ", b"=", b"\n")]
    long += ["日本".encode() * 100_000, "ßä".encode() * 100_000, bytes(range(256)) * 800]
    for text in long:
        with at_most(3):
            lexemes = list(moe_tokens.lexemes(text))
            tokenizer = moe_tokens.Tokenizer.learn([text])
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert b"".join(lexemes) == text and max(map(len, lexemes)) <= 32
    text = "日本語、ß"  # no blanks between: a lexeme each
    assert list(moe_tokens.lexemes(text.encode())) == [letter.encode() for letter in text]


def test_the_standard_library_has_topics_in_both_parts_and_enough_bytes_a_token():
    words = "--task tokens --router token_choice --vocab-size 4096 --context 128"
    library = moe_tokens.Text(train.settle(said_of(words)), "cpu")
    documents = moe_tokens.read_documents(None)
    long = collections.Counter(topic for topic, _, raw in documents if len(raw) > 999)
    common = {topic for topic in long if long[topic] > 3}
    assert len(long) > 100 and library.facts["bytes_per_token"] >= 2.5
    for part in "train", "validation":
        assert common <= {library.topics[topic] for topic in library.parts[part][3]}
    assert f"Python {sys.version.split()[0]}" in library.about and library.vocab_size == 4096
    assert library.classes is moe_tokens.CODE
    ((_, name, raw),) = moe_tokens.read_documents(routers.__file__)
    assert name == "routers.py" and raw == pathlib.Path(routers.__file__).read_bytes()
    names, kinds = list(moe_tokens.CODE), {}
    for piece, kind in zip(library.tokenizer.pieces[256:], library.class_of[256:]):
        kinds[piece] = names[kind]
    expected = {b" if": "keyword", b" self": "name", b" 1": "number", b" =": "operator"}
    expected |= dict.fromkeys([b'"""', b"#"], "string or comment mark")
    expected |= {b"(": "bracket", b"\n    ": "newline and indent", b"  ": "blank"}
    assert expected.items() <= kinds.items()
    assert set(library.class_of[:256].tolist()) == {names.index("raw byte")}


def test_windows_lie_within_documents_which_are_divided_by_topic(shelf):
    b = gpt(shelf, "--router dense --score-from 5")
    data, documents = b.data, moe_tokens.read_documents(b.settings.data)
    counts = collections.Counter(topic for topic, _, _ in documents)
    assert counts == {"de": 40, "en": 40, "fr": 1, "it": 40}
    kept, held = moe_tokens.divide(documents)
    assert sorted(kept + held) == sorted(documents)
    counts = collections.Counter(topic for topic, _, _ in held)
    assert counts == {"de": 4, "en": 4, "it": 4}
    halves = moe_tokens.divide([("", "x", b"12345678" + "äü".encode())])
    assert halves == ([("", "x", "12345678ä".encode())], [("", "x", "ü".encode())])
    for part, chosen in ("train", kept), ("validation", held):
        rows = np.arange(len(data.parts[part][1]))
        batch = data.ready(part, rows)
        for tokens, label, topic in zip(batch["input"], batch["label"], batch["topic"]):
            text, name = data.tokenizer.decode(tokens), data.topics[topic]
            assert any(text in raw for of, _, raw in documents if of == name)
            assert (label[:4] == -100).all() and torch.equal(label[4:-1], tokens[5:])
        lengths = [len(data.tokenizer.encode(raw)) for _, _, raw in chosen]
        assert len(rows) == sum((length - 1) // 16 for length in lengths)
        assert (batch["bytes"][:, :4] == 0).all()
        for document in batch["document"].unique():  # its blocks have one topic
            assert len(batch["topic"][batch["document"] == document].unique()) == 1
    rows = routers.rows_of_step(0, 1, 4, data.sizes["train"])[1:3]
    same(data.batch(1, part=slice(1, 3)), data.ready("train", rows.numpy()), 0)


def write_bins(folder, modulus, count=1000):
    folder.mkdir(exist_ok=True)
    for name, length in ("train.bin", count), ("val.bin", count // 10):
        (np.arange(length) % modulus).astype(np.uint16).tofile(folder / name)


def test_nanogpt_files_are_mapped_trained_on_and_say_their_vocabulary(here):
    words = WORDS.removesuffix("--vocab-size 320") + "--router token_choice --data bins"
    write_bins(here / "bins", 50)
    said = run(words, "--vocab-size 50 --out run")
    assert "perplexity" in said and "bits/byte" not in said  # no tokenizer counts bytes
    data = built("--vocab-size 50", small=words).data
    batch = data.batch(0)
    assert torch.equal((batch["input"] + 1) % 50, batch["label"]) and data.vocab_size == 50
    assert isinstance(data.parts["train"][0], np.memmap)
    assert "without a tokenizer writes no text" in refused("--sample run --prompt x")
    for modulus, vocabulary in (50, 64), (64, 64), (65, 128):  # rounded up
        write_bins(here / "bins", modulus)
        b = built(small=words)
        assert b.data.vocab_size == len(b.model.embed.weight) == vocabulary


WRONG_TEXT = [(flags, "--allow-leak runs it all the same") for flags in LEAKY]
WRONG_TEXT += [
    ("--router expert_choice --unit sequence", "--unit sequence needs a dropless router"),
    ("--router token_choice --capacity-factor 1 --unit sequence", "needs a dropless router"),
    ("--router token_choice --unit sequence --prefix 17", "--prefix must be at most --context 16"),
    ("--router dense --data nowhere", "nowhere does not exist"),
    ("--router token_choice --prefix 3", "--pool and --prefix are for --unit sequence"),
    ("--router hash --unit sequence --prefix 4", "--pool and --prefix are for --unit sequence"),
    ("--router dense --score-from 17", "--score-from must be at most --context 16, got 17"),
    ("--router dense --scope global", "are for routers; --router dense has none"),
    ("--router token_choice --hash-key topic", "--hash-key is for --router hash"),
    ("--router hash --hash-key topic", "needs text in at least two topics"),
    ("--router dense --data short.txt", "is shorter than one window"),
    ("--router dense --data empty", "empty holds no text"),
    ("--router dense --data latin.txt", "is not UTF-8 at byte 2; --replace-undecodable"),
    ("--router dense --data bins", "holds token 400, beyond --vocab-size 320"),
    ("--router dense --data odd", "must hold tokens of two bytes each, got 33 bytes"),
    ("--router dense --data pipe", "pipe holds no text"),
    ("--router dense --data pipes", "must hold tokens of two bytes each, got 0 bytes"),
    ("--router dense --batch-size 4000", "--batch-size 4000 is larger than the data"),
    ("--router dense --vocab-size 255", "--vocab-size must be at least 256 for text"),
    ("--unit sequence --pool mean --prefix 8 --allow-leak", "--prefix is for --pool prefix"),
    ("--router dense --data bins --replace-undecodable", "--replace-undecodable is for text"),
]


@pytest.mark.parametrize("flags, rule", WRONG_TEXT)
def test_a_wrong_text_or_axis_gets_one_line(flags, rule, here):
    for folder in "empty", "pipes", "bins", "odd":
        (here / folder).mkdir()
    for path in "bins/train.bin", "bins/val.bin", "odd/val.bin":
        np.full(40, 400, np.uint16).tofile(path)
    (here / "odd/train.bin").write_bytes(b"\0" * 33)
    (here / "one.txt").write_text("one two three four " * 100)
    (here / "short.txt").write_text("one two")
    (here / "latin.txt").write_bytes(b"na\xefve " * 400)
    os.mkfifo("pipe")
    os.mkfifo("pipes/train.bin")
    data = [] if "--data" in flags else ["--data one.txt"]
    assert rule in refused(WORDS, *data, flags)
    assert not (here / "runs").exists()


def test_a_leak_is_marked_on_every_line_and_vanishes_when_the_model_generates(shelf, here):
    said = run(WORDS, shelf, "--router expert_choice --allow-leak --out run")
    assert "router expert_choice (leaky)" in said and "| expert_choice (leaky) |" in said
    assert all(line["remark"] == "leaky" for line in lines_of("run"))
    settings, data, model = train.load_run("run", "cpu")
    summary = json_of("run/summary.json")
    chosen = data.scored[:: max(1, len(data.scored) // 32)][:32]
    batch, total = data.ready("validation", chosen), 0.0
    with torch.no_grad():
        scored = data.loss(model, batch)[0].item()
        for t in range(settings.context):
            logits, _ = model(batch["input"][:, : t + 1])
            total += F.cross_entropy(logits[:, -1], batch["label"][:, t]).item()
    assert summary["as_generated"]["loss"] == pytest.approx(total / settings.context, rel=1e-4)
    assert summary["as_scored"]["loss"] == pytest.approx(scored, rel=1e-4)


def test_a_finished_run_writes_on_from_a_prompt_or_says_why_not(shelf, album, here):
    whole = "--router token_choice --unit sequence"
    run(WORDS, shelf, "--router expert_threshold --out a")
    run(WORDS, shelf, whole, "--prefix 8 --out b")
    run(WORDS, shelf, "--router hash --hash-key topic --out c")
    run(WORDS, shelf, whole, "--pool mean --allow-leak --out d")
    run(SMALL, album, "--out e")
    assert json_of("a/tokenizer.json")
    texts = []
    for extra in "--temperature 0", "--temperature 0", "--seed 1", "--seed 2":
        texts.append(run("--sample a --max-new-tokens 30", extra, "--prompt", "the cat"))
        assert texts[-1].startswith("the cat") and "sampled dropless" in texts[-1]
    assert texts[0] == texts[1] and texts[2] != texts[3]
    run("--sample b --prompt", "the cat sat on a mat and it")
    assert "--prompt is empty" in refused("--sample a --prompt", "")
    assert "by the first 8 tokens; --prompt has only 3" in refused("--sample b --prompt the")
    assert "a prompt has none" in refused("--sample c --prompt the")
    assert "the mean of a whole sequence" in refused("--sample d --prompt the")
    assert "a run of --task vision without a tokenizer" in refused("--sample e --prompt the")


def test_sampling_keeps_to_the_likeliest_tokens():
    class Fixed(nn.Module):
        context, position = 4, torch.zeros(1)

        def forward(self, tokens):
            return torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(*tokens.shape, 4), {}

    def drawn(**options):
        tokens = moe_tokens.generate(Fixed(), [0], 400, **options)[1:]
        return np.bincount(tokens, minlength=4) / 400

    for sure in drawn(temperature=0), drawn(top_p=0.4), drawn(top_p=1e-300):
        assert sure.tolist() == [1, 0, 0, 0]
    assert np.allclose(drawn(top_p=0.8), [5 / 8, 3 / 8, 0, 0], atol=0.08)
    assert np.allclose(drawn(), [0.5, 0.3, 0.15, 0.05], atol=0.08)


def test_colours_keep_the_text_and_a_token_of_no_expert_is_grey(shelf):
    b = gpt(shelf, "--router token_choice")
    asked = SimpleNamespace(prompt="the cat", max_new_tokens=40, temperature=0, top_p=1, seed=0)
    texts = []
    for colored in False, True:
        text = moe_tokens.sample(b.model, b.data.tokenizer, b.settings, asked, colored)
        texts.append(re.sub("\x1b\\[[0-9;]*m|\ufffd", "", text))
    assert texts[0] == texts[1] and texts[0].startswith("the cat")
    mass, bare = torch.tensor([[0.5, 0], [0, 0], [0.1, 0.2]]), moe_tokens.Tokenizer([])
    page = moe_tokens.painted(torch.tensor(list(b"abc")), mass, bare, moe_tokens.on_page)
    first, last, none = (str(routers.color(e, 2, lightness=0.8)) for e in range(3))
    shown = re.findall(r"rgb(\(.*?\))\">(\w)", page)
    tokens = torch.tensor(list("a日".encode()))  # three of the four bytes are one character
    assert "日" in moe_tokens.painted(tokens, torch.eye(4), bare, moe_tokens.on_page)
    # The context begins inside a character.
    asked.prompt, asked.max_new_tokens = "a" + "ø" * b.settings.context, 1
    text = moe_tokens.sample(b.model, b.data.tokenizer, b.settings, asked, True)
    assert re.sub("\x1b\\[[0-9;]*m", "", text).startswith(asked.prompt)
    assert shown == [(first, "a"), (none, "b"), (last, "c")] and none == "(200, 200, 200)"


# ================================================================ what experts specialise in
def test_nmi_equals_values_worked_out_by_hand_and_its_null_permutes_whole_units():
    assert train.nmi(torch.eye(4)) == pytest.approx(1)
    assert train.nmi(torch.ones(3, 5)) == pytest.approx(0)
    assert train.nmi(torch.tensor([[1.0, 0], [1, 0]])) == pytest.approx(0)
    p = torch.tensor([[0.5, 0.0], [0.25, 0.25]])  # H = 1 bit and 0.8113 bits, I = 0.3113 bits
    assert train.nmi(p * 7) == pytest.approx(0.311278 / math.sqrt(0.811278), abs=1e-5)
    unit = torch.arange(400) // 100  # 4 documents of 100 tokens, two topics
    label, mass = (unit >= 2).long(), F.one_hot(unit, 4).float()  # experts follow the document
    told = train.nmi_and_null(mass, label, unit)
    assert told == pytest.approx([1 / math.sqrt(2)] * 3)  # 4 documents prove no topic: all fit
    value, mean, bound = train.nmi_and_null(mass, label, torch.arange(400))
    assert value > 0.7 and bound < 0.05 and 0 < mean <= bound


def test_the_null_of_sequences_routed_as_a_whole_deals_whole_sequences():
    """Sequences of one class each go to random experts: tokens would call that knowledge."""
    label = (torch.arange(40) % 2)[:, None].expand(40, 50)
    mass = F.one_hot(torch.randint(4, (40,), generator=seeded("at random")), 4).float()

    def labels(batch, start):
        each = start * 50 + torch.arange(1000).view(20, 50)
        return {"token class": (label[batch["rows"]], each, "ab")}

    def loss(model, batch):
        return 0, {}, {0: Mock(mass=Mock(return_value=mass[batch["rows"]][None]))}

    data = Mock(device=torch.device("cpu"), labels=labels, loss=loss)
    data.split.return_value = [{"rows": torch.arange(20)}, {"rows": torch.arange(20, 40)}]
    settings = SimpleNamespace(dtype="float32", task="tokens")
    found, joints = train.specialisation(settings, data, nn.Identity())
    value, mean, bound = found[0]["token class"]
    assert 0 < value <= bound and mean > 0.01
    assert joints[0]["token class"][0].sum() == 2000
    tokens = train.nmi_and_null(mass.repeat_interleave(50, 0), label.flatten(), torch.arange(2000))
    assert tokens[0] == pytest.approx(value, rel=1e-4) and tokens[2] < value


@pytest.mark.parametrize("key, name", [("topic", "topic"), ("token", "token class")])
def test_experts_of_a_topic_know_it_those_of_a_token_its_class(key, name, shelf, here):
    said = run(WORDS, shelf, f"--router hash --hash-key {key} --out run")
    value, mean, bound = json_of("run/summary.json")["specialisation"]["0"][name]
    assert value > bound > mean and (name != "topic" or value == pytest.approx(1))
    assert "block 0, expert 0:" in said and ("| hash (topic oracle) |" in said) == (name == "topic")


# ================================================================ the report page
SVG = "{http://www.w3.org/2000/svg}"


class Page:
    """A report page, whole in itself: its text and its pictures, by their headings."""

    def __init__(self, path):
        self.text = pathlib.Path(path).read_text("utf-8")
        pictures = re.findall(r"<svg.*?</svg>", self.text, re.S)
        self.pictures = [ElementTree.fromstring(picture) for picture in pictures]
        addresses = re.findall(r"https?://[^\"' <]*", self.text)
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a name, nothing is loaded
        assert not re.search(r"\s(src|href)=(?![\"']?data:)", self.text)

    def lines(self, heading):
        """The lines of the picture with that heading."""
        for picture in self.pictures:
            if picture.find(f".//{SVG}text").text == heading:
                return list(picture.iter(SVG + "polyline"))

    def map(self, heading):
        """{(label, column): share} of the map with that heading."""
        found = re.search(rf"<table class=map><caption>{heading};.*?</table>", self.text, re.S)
        return shares_of(found[0])


def shares_of(heat_map):
    cells = re.findall(r'title="([^"]*), (\w+): ([\d.]+)"', heat_map)
    return {(label, column): float(share) for label, column, share in cells}


def points_of(line):
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def test_a_report_of_images_holds_the_summary_curves_maps_and_patches(here, hasty):
    run(SMALL, "--router token_choice --capacity-factor 0.5 --steps 4 --out run")
    page, summary = Page("run/report.html"), json_of("run/summary.json")
    for text in f"{summary['test']['top1']:.1f}", f"{summary['parameters']:,}", "drawn images":
        assert text in page.text
    for heading in ("loss", "gradient norm", *train.SIGNS.values()):
        assert points_of(page.lines(heading)[0]), heading
    losses = [line["loss"] for line in lines_of("run")[:4]]
    heights = [height for _, height in points_of(page.lines("loss")[0])]
    assert np.argsort(heights).tolist() == np.argsort(losses)[::-1].tolist()  # up is more
    kinds, columns = zip(*page.map("block 1: patch kind"))
    assert set(kinds) == {"background", "edge", "interior"} and set(columns) == {*"0123", "none"}
    assert page.map("block 1: shape")["disc", "none"] > 0.3  # half of the slots are missing
    assert ("class 1", "0") in page.map("block 1: class")
    value = summary["specialisation"]["1"]["patch kind"][0]
    assert re.search(rf"\| 1 +\| patch kind +\| {value:.3f} \|", page.text)
    assert all(f"expert {e}" in page.text for e in range(4)) and "no expert" in page.text
    picture = base64.b64decode(re.search(r"data:image/png;base64,([^\"]*)", page.text)[1])
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and height > 8 * 112 and width > 2 * 112


def test_a_report_page_of_text_colours_it_by_experts_that_its_legend_numbers(shelf, here):
    run(WORDS, shelf, "--router token_choice --out run")
    page = Page("run/report.html")
    assert "<h3>block 1</h3>" in page.text and page.text.count("<span") > 20
    for e in range(4):
        named = rf'<span style="background:rgb\([\d, ]+\)"> expert {e} </span>'
        assert len(re.findall(named, page.text)) == 2  # one for each block
    assert {column for _, column in page.map("block 0: topic")} == {*"0123", "none"}
    documents = moe_tokens.read_documents(said_of(shelf)["data"])
    windows = re.findall(r"<pre>(.*?)</pre>", page.text, re.S)
    for painted in windows:
        shown = html.unescape(re.sub(r"<[^>]*>", "", painted))
        assert any(shown in raw.decode() for _, _, raw in documents)  # a stretch of one document
    assert len(windows) == 3 * 2


def test_heat_maps_curves_and_pictures_show_what_they_are_given():
    joint = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    shares = shares_of(train.heat_map("t", joint, "abc"))
    assert list(shares.values()) == [0.75, 0.25, 0, 0, 0, 0, 0.25, 0, 0.75]
    assert list(shares)[:3] == [("a", "0"), ("a", "1"), ("a", "none")]
    lines = {"a": [(1, 1.0), (2, 1.0)], "b": [(1, 1.0), (2, math.nan)]}
    one, other = ElementTree.fromstring(train.curves("flat", lines, (0, 2))).iter(SVG + "polyline")
    assert len(points_of(one)) == 2 and len(points_of(other)) == 1
    assert one.get("stroke-dasharray") != other.get("stroke-dasharray")  # told apart
    for low, high in (0, 1), (1, 1.0001), (3, 4000), (-2e-9, 1e-9), (1, 499):
        marks = train.ticks(low, high)
        assert 2 <= len(marks) <= 7 and low - 1e-9 <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    *_, picture = train.health([{"step": 1, "blocks": {"0": {"mine": 0.5}}}])
    assert ">mine</text>" in picture  # a sign of one's own
    smooth = train.smoothed([(step, float(step % 2)) for step in range(100)])
    assert len(smooth) == 100 and max(abs(y - 0.5) for _, y in smooth[2:-2]) < 0.11
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    raw = re.search(rb"IDAT(.*)....\x00\x00\x00\x00IEND", moe_vision.png(pixels), re.S)[1]
    rows = np.frombuffer(zlib.decompress(raw), np.uint8).reshape(5, 22)
    assert np.array_equal(rows[:, 1:].reshape(5, 7, 3), pixels)


# ================================================================ grids and tables
def folders_of(grid):
    """The run folders of a grid, by name."""
    return sorted(path for path in pathlib.Path(grid).iterdir() if path.is_dir())


def table_of(grid):
    """The words of a grid's table, and its rows, each {head: cell}."""
    text, rows = pathlib.Path(grid, "results.md").read_text(), []
    for line in text.splitlines():
        if line.startswith("| ") and "| --" not in line:
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    return text, [dict(zip(rows[0], row)) for row in rows[1:]]


def test_a_grid_drops_what_a_router_ignores_and_keeps_finished_runs(here, album):
    flags = "--router dense token_choice soft --priority choice gate --seed 0 1"
    grid = SMALL, album, flags, "--capacity-factor 1 --out ."
    said = run(*grid)
    expected = ["dense-seed_0", "dense-seed_1", "soft-seed_0", "soft-seed_1"]
    for priority, seed in itertools.product(("choice", "gate"), "01"):
        expected.append(f"token_choice-priority_{priority}-seed_{seed}")
    assert [path.name.rsplit("-", 1)[0] for path in folders_of(".")] == expected
    shown, rows = table_of(".")
    assert f"In every row: --task vision --size tiny {album} --steps 3 --batch-size" in shown
    assert len(rows) == 4 and shown.strip() in said
    assert {"seeds", "priority", "to the best"} <= set(rows[0])
    scores = [json_of(path)["test"]["top1"] for path in here.glob("soft-*/summary.json")]
    (soft,) = [row for row in rows if row["router"] == "soft"]
    spread = f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    assert soft["priority"] == "-" and soft["seeds"] == "2" and soft["top-1 %"] == spread
    assert sorted(row["priority"] for row in rows) == ["-", "-", "choice", "gate"]
    page = Page("report.html")
    (curve,) = page.pictures
    assert len(list(curve.iter(SVG + "polyline"))) == 4
    assert "token_choice choice" in page.text and "token_choice gate" in page.text
    touched = {path: path.stat().st_mtime_ns for path in here.glob("*/checkpoint.pt")}
    (next(here.glob("soft-seed_1-*")) / "summary.json").unlink()
    run(*grid)
    assert touched == {path: path.stat().st_mtime_ns for path in here.glob("*/checkpoint.pt")}
    assert len(list(here.glob("soft-*/summary.json"))) == 2
    assert table_of(".")[1][0].keys() == rows[0].keys()


DAMAGES = [  # what stands in a file of one run, None: the file is gone; what the table says of it
    ("summary.json", [b'{"test"', b"{}", b"[]", b"[" * 100_000], "Left out, not readable"),
    ("summary.json", [None], "Not finished"),
    ("config.json", [b"", b"{}", b'{"said": {"dim": "x"}}', b"\xff"], "Left out, not readable"),
    ("config.json", [b"[" * 100_000], "Left out, not readable"),
    ("metrics.jsonl", [None], "Left out, not readable"),
]


def test_a_table_keeps_the_whole_runs_and_names_those_that_it_left_out(here, album):
    run(SMALL, album, "--router dense soft --out .")
    folder = next(here.glob("soft-*"))
    for name, contents, note in DAMAGES:
        path = folder / name
        good = path.read_bytes()
        for content in contents:
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            run("--table .")
            shown, rows = table_of(".")
            last = shown.splitlines()[-1]
            assert f"{note}: soft-seed_0" in last and len(last) < 400
            assert [row["router"] for row in rows] == ["dense"]
        path.write_bytes(good)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'no JSON\n[1]\n{}\n{"step": 9}\n{"step": 9, "loss": null}\n')
        file.write(b"[" * 100_000 + b"\n\xff\n")
    run("--table .")
    shown, rows = table_of(".")
    assert "Left out" not in shown and len(rows) == 2
    whole = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text("{}")
    assert "has no summary" in refused("--eval", str(folder))
    (folder / "summary.json").write_text(whole)
    shutil.copytree(folder, "twin")
    run("--table .")
    assert f"of the same settings and seed as {folder.name}: twin" in table_of(".")[0]
    for path in here.glob("*/summary.json"):
        path.unlink()
    said = refused("--table .")
    assert "no finished run" in said and "Not finished: dense" in said


def test_a_table_says_only_what_its_rows_bear_out(shelf, album, here, monkeypatch, hasty):
    data = [write_npz(f"{name}.npz") for name in "ab"]
    run(SMALL, "--size tiny small --router dense --out images --data", *data)
    shown, _ = table_of("images")
    assert shown.count("| one seed ") == 3 and shown.count("| best ") == 1
    assert "In every row: --task vision --steps 3 --batch-size 8\n" in shown  # not --lr
    run(SMALL, album, "--router dense --top-k 1 2 --dense-match active total --out dense")
    _, rows = table_of("dense")  # three widths
    widths = [(row["dense_match"], row["top_k"]) for row in rows]
    assert sorted(widths) == [("active", "1"), ("active", "2"), ("total", "-")]
    for head in "class", "patch":
        run(SMALL, f"--router dense --head {head} --out heads/{head}")
    several = "heads holds runs of several tasks: vision class, vision patch"
    assert several in refused("--table heads")
    assert several in refused(SMALL, "--router dense soft --head patch --out heads")
    assert len(folders_of("heads")) == 2
    for name, flags in ("a", ""), ("b", "--slots 2"):
        run(SMALL, album, f"--router soft {flags} --out slots/{name}")
    run("--table slots")
    assert {row["slots"] for row in table_of("slots")[1]} == {"none", "2"}
    (curve,) = Page("slots/report.html").pictures
    assert len(list(curve.iter(SVG + "polyline"))) == 2
    scores = {"expert_choice (leaky)": -1.0, "token_choice": -2.0}
    monkeypatch.setattr(train, "score", lambda summary, task: scores[summary["router"]])
    flags = "--router token_choice expert_choice --allow-leak --seed 0 1 --out words"
    run(WORDS, shelf, flags)
    _, (leaky, causal) = table_of("words")
    assert leaky["router"] == "expert_choice (leaky)" and leaky["to the best"] == "-1.000"
    assert causal["to the best"] == "best" and leaky["recipe"] != causal["recipe"]
    assert "balance switch" in causal["recipe"] and "capacity_factor none" in causal["recipe"]


def test_all_routers_leave_out_those_that_cannot_and_add_both_dense_models(shelf, here):
    said = run(WORDS, shelf, "--router all --steps 1 --shared 1 --out y")
    assert said.count("left out: expert_choice: --router expert_choice is not causal") == 1
    names = {path.name.split("-")[0] for path in folders_of("y")}
    assert names == {"dense", "token_choice", "hash", "sigmoid", "expert_threshold"}
    _, rows = table_of("y")
    assert not {"capacity_factor", "balance", "priority"} & set(rows[0])  # by recipes alone
    table = {}
    for row in rows:
        width = row["dense_match"] if row["router"] == "dense" else "-"
        sizes = float(row["GFLOPs"]), int(row["parameters"].replace(",", ""))
        table[row["router"], width] = sizes
    gflops, parameters = table["dense", "active"][0], table["dense", "total"][1]
    for router in "token_choice", "sigmoid", "hash":  # the gate apart, all have K + 1 experts' work
        assert table[router, "-"] == pytest.approx((gflops, parameters), rel=0.05)


# ================================================================ runs that survive
CHAINS = [
    ("vision", "--router expert_threshold --shared 1"),
    ("tokens", "--router sigmoid --balance bias"),
]
FORK = multiprocessing.get_context("forkserver")  # children of a process that has torch loaded
FORK.set_forkserver_preload([__name__])


def lines_in(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("task, router", CHAINS)
def test_a_run_killed_three_times_ends_as_one(task, router, shelf, album, tmp_path):
    small = {"vision": [SMALL, album], "tokens": [WORDS, shelf]}[task]
    flags = [*small, "--steps 40 --save-every 7 --log-every 1", router]
    a, b = tmp_path / "a", tmp_path / "b"
    run(*flags, "--out", a)
    ends = []
    for most in 10, 18, 25:
        words = ["--resume", b] if ends else [*flags, "--out", b]
        child = FORK.Process(target=train.main, args=(words_of(words),))
        child.start()
        while child.is_alive() and not (lines_in(b) >= most and (b / "checkpoint.pt").exists()):
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGSTOP)
        try:
            assert "is in use: another process trains there" in refused("--resume", b)
        finally:
            child.kill()  # whatever came of that: nobody would wake it
        child.join()
        assert child.exitcode == -signal.SIGKILL and not (b / "summary.json").exists()
        checkpoint = checkpoint_of(b)
        ends.append((checkpoint["step"], lines_in(b), checkpoint["model"]["embed.weight"]))
        with open(b / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 39, "lo' * 9999)  # as if it had died in the middle of a line
    assert any(count > step for step, count, _ in ends), "no line was ever cut back"
    assert ends[0][0] < ends[1][0] < ends[2][0] and not torch.equal(ends[0][2], ends[2][2])
    run("--resume", b)
    same_runs(a, b)


def signalled(number, at, harm=False):
    """Inside, step `at` is sent a signal, unless number is None; harm: the weights go bad there."""
    train_step = train.train_step

    def disturbed(settings, data, model, optimizer, step):
        if step == at and number:
            os.kill(os.getpid(), number)
        stepped = train_step(settings, data, model, optimizer, step)
        if step == at and harm:
            model.head.weight.data[0, 0] = math.inf
        return stepped

    return patch.object(train, "train_step", disturbed)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first(number, status, here, album):
    flags = SMALL, album, "--steps 6 --router expert_threshold --out"
    run(*flags, "a")
    with signalled(number, 2):
        said = run(*flags, "b", status=status)
    assert "interrupted after 3 of 6 steps; --resume b goes on from there" in said
    assert "is no finished run: summary.json is missing" in refused("--eval b")
    had = [("--router", "dense", "expert_threshold"), ("--dim", 32, 16), ("--clip", 2.0, 1.0)]
    for flag, value, before in had:
        assert f"it has {flag} {before}, not {value}" in refused("--resume b", flag, value)
    run("--resume b --log-every 1 --save-every 1")
    same_runs("a", "b")
    with signalled(number, 6):
        run("--resume b --steps 9", status=status)
    assert not (here / "b/summary.json").exists()
    assert "it is of step 7, beyond --steps 6" in refused("--resume b --steps 6")
    assert json_of("b/config.json")["settings"]["steps"] == 9
    assert "--out b is not empty" in refused(*flags, "b")
    assert "--out means nothing beside --resume" in refused("--resume b --out c")
    run("--resume b")  # nothing that was refused holds the folder
    run(SMALL, album, "--router dense --out d")
    run("--resume d --experts 4")  # as it was said, though a dense model has none


def test_a_signal_in_the_last_step_ends_the_run_and_the_grid(here, album):
    flags = SMALL, album, "--seed 0 1 --out ."
    with signalled(signal.SIGTERM, 2):
        run(*flags, status=143)
    (folder,) = folders_of(".")
    assert not (folder / "summary.json").exists() and not (here / "results.md").exists()
    assert checkpoint_of(folder)["step"] == 3
    run(*flags)
    assert (folder / "summary.json").exists()


def test_a_run_that_diverges_stops_at_its_last_good_checkpoint(here, capsys, album):
    with signalled(None, 4, harm=True):
        run(SMALL, album, "--steps 9 --save-every 2 --out run", status=1)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    told = "diverged at step 6: loss (nan|inf), gradient norm nan; per block .*load.*; "
    assert re.search(told + "the checkpoint of step 4 in", said)
    saved = checkpoint_of("run")
    assert saved["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())
    run("--resume run")


def test_weights_that_are_not_finite_never_replace_good_ones(here, capsys, album):
    for router in "sparse_expert_choice", "expert_choice", "dense":
        flags = f"--router {router} --lr 1e30 --schedule constant --steps 6"
        run(SMALL, album, flags, "--out", router, status=1)
        assert "train.py: diverged at " in capsys.readouterr().err
    run(SMALL, album, "--steps 1 --lr 1e30 --out one", status=1)
    assert "no checkpoint was saved before" in capsys.readouterr().err
    assert not (here / "one/checkpoint.pt").exists()
    with signalled(signal.SIGTERM, 3, harm=True):
        run(SMALL, album, "--steps 9 --save-every 2 --out two", status=1)
    assert "the checkpoint of step 2 in" in capsys.readouterr().err
    saved = checkpoint_of("two")
    assert saved["step"] == 2 and torch.isfinite(saved["model"]["head.weight"]).all()


def test_a_run_resumed_on_other_data_says_so(here, capsys):
    pathlib.Path("text").mkdir()
    for name in "ab":
        pathlib.Path("text", name).write_text("a word and another, " * 200)
    with signalled(signal.SIGTERM, 1):
        run(WORDS, "--router dense --data text --out run", status=143)
    pathlib.Path("text/b").write_text("now it says less, " * 100)
    run("--resume run")
    assert "it goes on, not bit for bit" in capsys.readouterr().err


def test_a_grid_never_trains_over_what_another_process_did_meanwhile(here, monkeypatch):
    def late(folder):  # the other process was done just before this one got its lock
        (folder / "checkpoint.pt").write_bytes(b"theirs")
        return lock(folder)

    lock = train.locked
    monkeypatch.setattr(train, "locked", late)
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
        train.main(words_of([SMALL, "--router dense --seed 0 1 --out grid"]))
    assert "another process has trained there meanwhile" in err.getvalue()
    assert {path.read_bytes() for path in here.glob("grid/*/checkpoint.pt")} == {b"theirs"}


WRONG_SAID = dict(dim="x", hidden=-1, heads=3, steps=1.5, router="none", lr=None, task="vision ")
WRONG_SAID |= dict(experts=[4, 5], compile=3, seed={}, balance="x", few_shot="x", nonsense=1)
WRONG_SAID |= dict(eval="x", depth="2", data="", moe_blocks=[9], dtype="int8", top_k=9)
NO_CONFIG = ['{"said": {"help": true}}', "", "{}", "[]", "3", '{"said": [1]}', "\0"]
NO_CONFIG += ["[" * 100_000, '{"said": ' * 100_000]
WRONG_SAVED = [{"step": "x"}, {"step": 99}, {"metrics_end": 10**9}, {"made_by": 3, "step": None}]
WRONG_SAVED += [{"model": {}}, {"optimizer": {}}, {"settings": {}}, {"model": 3}]
WRONG_STATE = [("exp_avg", torch.zeros(3, 3)), ("step", torch.zeros(2)), ("step", "x")]


def damages_of(folder):
    """(file, what stands there in place of the good, what the refusal says)"""
    config, checkpoint = json_of(folder / "config.json"), train.read_checkpoint(folder)
    good = (folder / "checkpoint.pt").read_bytes()
    middle = good.index(b"data/0") + 500
    changed, evil = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], io.BytesIO()
    torch.save({"model": Bomb()}, evil)
    damages = [("metrics.jsonl", b"", "metrics.jsonl is shorter than at the checkpoint")]
    for bad in changed, good[: len(good) // 2], evil.getvalue(), pickle.dumps(Bomb()), b"":
        damages.append(("checkpoint.pt", bad, "cannot be read as a checkpoint"))
    damages += [("config.json", text.encode(), "run") for text in NO_CONFIG]
    damages += [("checkpoint.pt", checkpoint | change, "run") for change in WRONG_SAVED]
    for name, value in (*WRONG_SAID.items(), ("steps", 10**30), ("router", "all")):
        damages.append(("config.json", config | {"said": config["said"] | {name: value}}, ""))
    for lost in checkpoint:
        rest = {name: value for name, value in checkpoint.items() if name != lost}
        damages.append(("checkpoint.pt", rest, "run"))
    for key, tensor in WRONG_STATE:
        bad = copy.deepcopy(checkpoint)
        bad["optimizer"]["state"][0][key] = tensor
        damages.append(("checkpoint.pt", bad, "run"))
    return damages


def test_a_damaged_run_folder_gets_one_line_no_training_and_is_left_alone(here, monkeypatch, album):
    folder = here / "run"
    with signalled(signal.SIGTERM, 1):
        run(SMALL, album, "--steps 4 --save-every 2 --router token_choice --out run", status=143)
    monkeypatch.setattr(train, "train_step", None)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for name, content, rule in damages_of(folder):
        path = folder / name
        if isinstance(content, dict):
            train.save(path, content)
        else:
            path.write_bytes(content)
        bad = path.read_bytes()
        assert rule in refused("--resume run")
        assert path.read_bytes() == bad and not (here / "exploded").exists()
        path.write_bytes(whole[path])
    for path in folder / "config.json", folder / "checkpoint.pt":
        path.unlink()
        os.mkfifo(path)
        refused("--resume run")
        path.unlink()
        path.write_bytes(whole[path])
    assert whole == {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "checkpoint.pt").write_bytes(b"")
    assert "cannot be read as a checkpoint" in refused("--eval run")


def test_a_full_disk_gets_one_line_and_what_was_saved_stays_whole(here):
    write_cifar(here / "data")
    run(SMALL, "--data data --out run")
    before = (here / "run/checkpoint.pt").read_bytes()
    with patch.object(os, "fsync", Mock(side_effect=OSError(28, "No space left on device"))):
        assert "No space left on device" in refused("--resume run --steps 9")
    assert (here / "run/checkpoint.pt").read_bytes() == before
    assert not list(here.glob("run/*.part"))


def test_nobody_to_print_to_loses_no_result(here):
    """A reader that leaves, and in what it leaves unread, topics whose names are no text."""
    for topic in b"text/\xff\xfe", b"text/b":
        os.makedirs(topic)
        for i in range(12):
            with open(topic + b"/%d.txt" % i, "w", encoding="utf-8") as file:
                file.write("häßlich und schön " * 30)
    flags = " ".join(words_of([WORDS, "--router hash --hash-key topic --data text --out run"]))
    command = f"{sys.executable} {ROOT / 'train.py'} {flags} 2>&1 | head -1"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, timeout=120, env=environ)
    assert json_of("run/summary.json")["steps"] == 3
    assert (here / "run/report.html").read_text("utf-8").startswith("<!doctype html>")


def test_a_closed_stream_and_a_small_alphabet_cost_words_alone():
    train.Outlet(None).write("to nobody")
    small = io.TextIOWrapper(io.BytesIO(), "ascii")
    train.Outlet(small).write("5 ± 1 \udcff")
    assert small.buffer.getvalue() == rb"5 \xb1 1 \udcff"


ABSURD = """--dim 1000000000000;--depth 10000000;--seed 1000000000000000000000000;
    --dim 10000000;--hidden 10000000;--experts 10000000;--batch-size 10000000;--steps 100000000;
    --depth 1024 --dim 8192;--shared 4096 --hidden 1000000;--router soft --slots 10000000;
    --router soft --capacity-factor 1e308 --top-k 8 --slots 9999999;
    --task tokens --router dense --context 10000000;
    --task tokens --router dense --dim 10000000""".split(";")


@pytest.mark.parametrize("flags", [flags.strip() for flags in ABSURD])
def test_absurd_sizes_get_one_line_quickly_and_take_no_memory(flags, shelf, here):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(flags, *[shelf] * ("tokens" in flags), "--out run")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 300_000  # kilobytes
    assert not (here / "run").exists()


# ================================================================ many processes
def one_of_two(rank, ports, commands, synchronised):
    """A process as torchrun starts it, for one command line after another."""
    torch.set_num_threads(1)
    if not synchronised:
        train.DistributedDataParallel = lambda model: model  # gradients stay apart
    for port, words in zip(ports, commands):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        status = train.main(words)
        if status:
            sys.exit(status)


def in_two_processes(commands, synchronised=True):
    """The exit statuses of two processes that run these command lines together."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    commands, children = list(map(words_of, commands)), []
    for rank in range(2):
        children.append(FORK.Process(target=one_of_two, args=(rank, ports, commands, synchronised)))
        children[-1].start()
    for child in children:
        child.join(90)
        child.kill()
    return [child.exitcode for child in children]


@pytest.mark.parametrize("task", ["vision", "tokens"])
def test_two_processes_take_the_steps_of_one_if_gradients_are_synchronised(task, album, here):
    common = [SMALL, album, "--patch 6"]
    if task == "tokens":
        words, g = "the cat sat on a mat and it was 3 pm".split(), random.Random(0)
        (here / "one.txt").write_text(" ".join(g.choices(words, k=1000)))
        common = [WORDS, "--data one.txt --allow-leak"]
    common += ["--dtype float64 --schedule constant --warmup 0 --lr 0.02 --steps 3 --batch-size 16"]
    flags = {name: f"--router {name}" for name in ("dense", *ROUTERS)}
    flags["switch"] = "--router token_choice --balance switch --balance-scope batch"
    flags["switch"] += " --balance-weight 1 --noise-std 1 --grad-accum 2"
    flags["bias"] = "--router token_choice --balance bias --bias-rate 0.1 --noise-std 1"
    flags["sigmoid"] += " --bias-rate 0.1 --top-k 2 --shared 1"
    flags["threshold"] = "--router expert_threshold --noise-std 1 --router-lr 0.5"
    flags["random"] = "--router token_choice --router-weights random"
    commands = [[*common, more, "--out", f"two {name}"] for name, more in flags.items()]
    assert in_two_processes(commands) == [0, 0]
    apart = [*common, "--router token_choice --out apart"]
    assert in_two_processes([apart], synchronised=False) == [0, 0]
    for name, more in flags.items():
        run(*common, more, "--out", f"one {name}")
        one, two = losses_of(f"one {name}"), losses_of(f"two {name}")
        assert len(one) == 3 and one == pytest.approx(two, rel=1e-9), name
        one, two = (checkpoint_of(f"{count} {name}")["model"] for count in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
    assert losses_of("one token_choice") != pytest.approx(losses_of("apart"), abs=1e-6)


def losses_of(folder):
    return [line["loss"] for line in lines_of(folder) if "split" not in line]


def test_many_processes_end_a_grid_at_an_error_and_route_no_sequence_whole(here, monkeypatch):
    monkeypatch.setattr(train, "processes", Mock(return_value=(0, 1)))
    monkeypatch.setattr(train.dist, "is_initialized", Mock(return_value=True))
    monkeypatch.setattr(train, "run", Mock(side_effect=ValueError("in use")))
    with pytest.raises(ValueError, match="it runs in one process"):
        train.settle(said_of(WORDS, "--router token_choice --unit sequence"))
    _, lists = train.parse(words_of([SMALL, "--seed 0 1 --out grid"]))
    with pytest.raises(ValueError, match="in use"):
        train.grid(lists)
    assert train.run.call_count == 1  # the others must not wait for the next run


def test_a_wrong_setting_of_torchrun_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun sets RANK to a whole number, got RANK=None" in refused(SMALL)
    for name in "RANK", "LOCAL_RANK", "MASTER_PORT":
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "WORLD_SIZE to a whole number, got WORLD_SIZE=many" in refused(SMALL)


# ================================================================ whatever the bytes
def damaged(good, g):
    """These bytes cut short, or with some of them changed."""
    if g.random() < 0.4:
        return good[: g.randrange(len(good))]
    bad = bytearray(good)
    for _ in range(g.choice([1, 1, 2, 8, 40])):
        bad[g.randrange(len(bad))] = g.randrange(256)
    return bytes(bad)


def test_readers_end_in_a_value_or_a_valueerror_whatever_the_bytes(shelf, album, here):
    write_cifar(here / "cifar")
    write_npz("x.npz")
    write_bins(here / "bin", 300, 200)
    (here / "one.txt").write_text("Dies sei — naïve — ein Text. " * 30)
    run(SMALL, album, "--out run")
    run(WORDS, shelf, "--router dense --out words")

    def text(path):
        flags = "--task tokens --router dense --context 8 --batch-size 2 --vocab-size 300 --data"
        return moe_tokens.Text(train.settle(said_of(flags, path)), "cpu")

    readers = {
        "cifar/data_batch_1.bin": lambda path: stored("cifar"),
        "x.npz": stored,
        "one.txt": text,
        "bin/train.bin": lambda path: text("bin"),
        "words/tokenizer.json": moe_tokens.Tokenizer.read,
        "run/config.json": lambda path: train.load_run("run", "cpu"),
        "run/checkpoint.pt": lambda path: train.read_checkpoint(path.parent),
    }
    for name, read in readers.items():
        path, g, refusals = here / name, random.Random(1), 0
        good = path.read_bytes()
        for _ in range(150):
            path.write_bytes(damaged(good, g))
            try:
                read(path)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
                refusals += 1
        path.write_bytes(good)
        read(path)
        assert refusals > 10, (path, refusals)


# ================================================================ README.md
def python(*words):
    """What a Python program prints that runs in this folder, and has to succeed."""
    environ = os.environ | {"PYTHONPATH": os.getcwd()}
    given = dict(capture_output=True, text=True, timeout=170, env=environ)
    ran = subprocess.run([sys.executable, *words], **given)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-2000:]
    return ran.stdout


def test_every_python_block_of_readme_runs_and_flags_and_tests_pick_its_router_up(here):
    for path in *ROOT.glob("*.py"), ROOT / "README.md":
        shutil.copy(path, here)
    shown, readme = [], (here / "README.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M):
        if "ROUTERS[" in block and block.startswith("class"):
            added = block
        else:
            shown.append(block)
    assert shown and len(added.splitlines()) <= 15
    with open("routers.py", "a") as file:
        file.write("\n\n" + added)
    (here / "blocks.py").write_text("\n\n".join(shown))
    python("blocks.py")
    name = re.search(r"ROUTERS\[\"(\w+)\"\]", added)[1]
    some = f"{name} and (leak or hard or copy or compiles or run)"  # of all that pick it up
    said = python("-m", "pytest", "-q", "test_routers.py", "-k", some)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 20
    option = re.search(r"dict\((\w+)=", added)[1].replace("_", "-")
    flags = f"--{option} 0.5 --steps 2 --router {name} --out run"
    assert f"| {name} " in python("train.py", *words_of([SMALL, flags]))
