"""What this set promises, one test a promise: `pytest -q` (CPU, nothing downloaded).

Part one, to be read: examples worked out by hand, every router again as slow loops, the equations
of today's models, numbers that published code gives. Part two: what holds for every router, who
leaks the future, what losses and solvers do, and what a layer must bear in other people's hands.
Part three: the promises of train.py and the two model files.

Axes as in routers.py: G groups, T tokens, D width, E experts, C slots, K choices. Numbers are
compared in float64. What is parametrized over ROUTERS, or by @each, tests a router that you add as
it is; for its values, write its worked example (WORKED) and its slow twin (SLOW).
"""

import base64
import collections
import contextlib
import copy
import errno
import fcntl
import fractions
import functools
import gc
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
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch
from xml.etree import ElementTree

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread mostly waits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import moe_tokens
import moe_vision
import train
from routers import MoE, ROUTERS, Experts, HardRouting, Router, Routing, TokenChoice
from routers import balance_loss, importance_loss, load_loss, z_loss
from routers import build_router, first_come, sinkhorn_plan, sparse_plan, stacked

# ================================================================ PART ONE, routers.py: helpers
TOKENS_CHOOSE = [name for name, kind in ROUTERS.items() if kind.chooses == "tokens"]
HARD = [name for name, kind in ROUTERS.items() if kind.chooses is not None]
GATED = [name for name, kind in ROUTERS.items() if kind.gated]
TRAINING = dict(noise_std=[0.5], bias_rate=[0.1], iterations=[2])
PRIORITY, BOTH = ["token", "choice", "gate"], ["softmax", "plan"]


def settings(names=tuple(ROUTERS), **axes):
    """(name, options) for every product of options; a router is spared what it does not know."""
    found = {}
    for name, values in itertools.product(names, itertools.product(*axes.values())):
        known = ROUTERS[name].defaults
        options = {option: value for option, value in zip(axes, values) if option in known}
        if name in TOKENS_CHOOSE or options.get("capacity_factor", 1):  # dropless is for them alone
            found[f"{name} {options}"] = name, options
    return [pytest.param(*value, id=key) for key, value in found.items()]


def each(names=tuple(ROUTERS), **axes):
    """The test below runs for each of these settings, as its arguments name and options."""
    return pytest.mark.parametrize("name, options", settings(names, **axes))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


float64 = functools.partial(torch.tensor, dtype=torch.float64)


def layer(name, x, num_experts, seed=0, **options):
    """The MoE layer with that router for tokens x [G, T, D], in float64."""
    torch.manual_seed(seed)
    router = build_router(name, x.shape[-1], num_experts, tokens=x.shape[1], **options)
    return MoE(router, Experts(num_experts, x.shape[-1], hidden=7)).double()


def plain(name, num_experts, **options):
    """The router alone with logits = x: D = E, and the identity as its weight."""
    router = build_router(name, num_experts, num_experts, tokens=num_experts, **options).double()
    if hasattr(router, "gate"):
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
        weighed = (draw(*values[-1].shape, seed=1) * values[-1]).sum()
        both.append((*values, *torch.autograd.grad(weighed, leaves, materialize_grads=True)))
    same(*both, within)


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
KEYS = dict(top_k=2, num_keys=3)
WORKED = [  # router, options, numbers, and expert after expert who sits there, token:weight
    # All three want expert 0, which has two slots: the first two get them, token 2 is dropped.
    ("token_choice", TWO, GATES, "0:.5 1:.6 | |"),
    # The surest first: token 2 (.7), then token 1 (.6); token 0 is dropped.
    ("token_choice", TWO | dict(priority="gate"), GATES, "1:.6 2:.7 | |"),
    # Two choices, by position: 0 -> 0, 1; 1 -> 0, 2; 2 -> 0 (full), 1. Gates over .8, .9 and .9.
    ("token_choice", dict(top_k=2, renormalize=True), GATES, "0:5/8 1:6/9 | 0:3/8 2:2/9 | 1:3/9"),
    # Expert 0 is everyone's largest; the plan's rows prefer 0 (.6), 2 (.5), 1 (.5). Softmax weighs.
    ("sinkhorn_token_choice", TWO, CROWD, "0:.9 | 2:1/3 | 1:.2"),
    # A row's two largest, .5 and .3, reach the simplex by (1 - .8) / 2 more each: .6 and .4. So
    # every expert has .6 + .4 = 1 and no price has to move. The plan weighs.
    ("sparse_token_choice", PLAN, TURNS, "0:.6 2:.4 | 0:.4 1:.6 | 1:.4 2:.6"),
    # The bias adds .4 to expert 2. Token 0: .8 .5 .6, so it goes to 0 and 2, where by the sigmoids
    # it would go to 0 and 1. Its weights know no bias: .8 and .2, whose sum is 1. Token 1 goes to 1
    # (.75) and 2 (.25), token 2 to 0 and 1: .9 and .6 over 1.5.
    ("sigmoid", dict(top_k=2), ALONE, "0:.8 2:.6 | 1:.75 2:.4 | 0:.2 1:.25"),
    # One choice: 0 (.8), then 1 (.75), then 0 (.9). The sigmoid itself weighs, it is not made 1.
    ("sigmoid", TWO, ALONE, "0:.8 2:.9 | 1:.75 |"),
    # Columns .5 .6 .7, .3 .1 .2 and .2 .3 .1: the two largest of each.
    ("expert_choice", TWO, GATES, "1:.6 2:.7 | 0:.3 2:.2 | 0:.2 1:.3"),
    # The plan's columns: .6 .3 .1 takes 0, 1; .3 .2 .5 takes 2, 0; .1 .5 .4 takes 1, 2.
    ("sinkhorn_expert_choice", TWO, CROWD, "0:.9 1:.72 | 0:.075 2:1/3 | 1:.2 2:4/15"),
    # The sparse plan above, by columns: .5 .2 .3 -> .6 (token 0), .4 (token 2), and so on in turn.
    ("sparse_expert_choice", PLAN, TURNS, "0:.6 2:.4 | 0:.4 1:.6 | 1:.4 2:.6"),
    # Thresholds start at 1/3: token 0 passes at 0, 1 at 0 and 1, 2 at 0 (which is full) and 1.
    ("expert_threshold", {}, NEAR, "0:.5 1:.4 | 1:.4 2:.35 |"),
    # Keys 0, 2, 4, a table 1 0 2. Key 0 goes to 1 and the next, 2; key 2 to 2, 0; key 4 is read as
    # 4 mod 3 = 1 and goes to 0, 1.
    ("hash", KEYS, GATES, "1:.5 2:.5 | 0:.5 2:.5 | 0:.5 1:.5"),
    # The same seats, and gates over the sum of a token's two: .3 .2, then .3 .6, then .7 .2.
    ("hash", KEYS | dict(hash_weights="learned"), GATES, "1:6/9 2:7/9 | 0:.6 2:2/9 | 0:.4 1:3/9"),
]


@pytest.mark.parametrize("name, options, numbers, by_hand", WORKED)
def test_a_router_fills_the_tensors_as_worked_out_by_hand(name, options, numbers, by_hand):
    router, want = plain(name, 3, **options), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    router.load_state_dict(STATE.get(name, {}), strict=False)
    dispatch, combine = router(float64([numbers]).log(), torch.tensor([[0, 2, 4]])).tensors()
    for e, seats in enumerate(by_hand.split("|")):
        for seat in seats.split():
            token, weight = seat.split(":")
            want[:, 0, int(token), e] = float64([1, float(fractions.Fraction(weight))])
    # Which of an expert's slots is whose, no router promises. A sparse price moves by 1e-10.
    assert dispatch.shape == combine.shape == (1, 3, 3, 2)
    same((dispatch.sum(3), combine.sum(3)), (want[0], want[1]), 1e-9)


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
    assert build_router("soft", 8, 3, tokens=10, top_k=2).options.slots == 7  # 10 * 2 / 3


# ---------------------------------------------------------------- every router again, as slow loops
# One group: tokens x [T, D], logits, scores and gates [T, E], through which gradients run. What
# comes back is {(token, expert): weight}, one entry a seat.
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


def slow_project(z, k):
    """Each column of z on the simplex, where at most k of its entries stay above zero."""
    projected = torch.zeros_like(z)
    for e, column in enumerate(z.T):
        places = best(column, k)
        while places:  # the widest support in which everyone stays above zero
            over = (column[places].sum() - 1) / len(places)
            if column[places[-1]] > over:
                break
            places.pop()
        projected[places, e] = column[places] - over
    return projected


def slow_sparse(gates, k, mass, iterations):
    """A plan whose columns have that mass: torch's Adam moves a price for each row by its error."""
    T, E = gates.shape
    price = torch.zeros(T, 1, dtype=torch.float64)
    adam = torch.optim.Adam([price], lr=1e-2)
    for _ in range(iterations):
        plan = mass * slow_project((price + gates.detach()) / mass, k)
        price.grad = plan.sum(1, keepdim=True) - mass * E / T
        adam.step()
        if price.grad.norm() <= 1e-3:
            break
    return mass * slow_project((price + gates) / mass, k)


def slow_line(line, capacity):
    """The seats of (token, expert, weight) in this order; a full expert turns away."""
    seats, taken = {}, {}
    for token, expert, weight in line:
        taken[expert] = taken.get(expert, 0) + 1
        if capacity is None or taken[expert] <= capacity:
            seats[token, expert] = weight
    return seats


def slow_scores(router, name, x):
    """What decides, and what weighs."""
    logits, o = x @ router.gate.weight.T, router.options
    T, E = logits.shape
    decide = gates = logits.sigmoid() if name == "sigmoid" else logits.softmax(1)
    if name == "sparse_expert_choice":
        decide = slow_sparse(gates, router.capacity(T), T / E, o.iterations)
    if name == "sparse_token_choice":  # tokens and experts exchanged: a token has mass 1
        decide = slow_sparse(gates.T, o.top_k, 1.0, o.iterations).T
    if name.startswith("sinkhorn"):
        decide = slow_sinkhorn(logits, o.iterations)
    return decide, decide if getattr(o, "combine_weights", "") == "plan" else gates


def slow_expert_choice(router, name, x, key):
    decide, weigh = slow_scores(router, name, x)
    pairs = itertools.product(range(router.num_experts), range(router.capacity(len(x))))
    picks = [best(column) for column in decide.T]
    return {(picks[e][n], e): weigh[picks[e][n], e] for e, n in pairs}


def slow_token_choice(router, name, x, key):
    o, K = router.options, router.options.top_k
    decide, weigh = slow_scores(router, name, x)
    biased = decide + router.bias if o.bias_rate else decide  # 2412.19437 (16)
    tokens = best(decide.amax(1)) if o.priority == "gate" else range(len(x))  # the surest first
    pairs = itertools.product(tokens, range(K))  # one after the other, each with all its choices
    if o.priority != "token":  # all first choices, then all second
        pairs = sorted(pairs, key=lambda pair: pair[1])
    line = []
    for t, k in pairs:
        picks = best(biased[t], K)
        total = weigh[t, picks].sum() if o.renormalize and K > 1 else 1
        line.append((t, picks[k], weigh[t, picks[k]] / total))
    return slow_line(line, router.capacity(len(x)))


def slow_hash(router, name, x, key):
    K, line = router.options.top_k, []
    for t, k in enumerate(key.tolist()):
        first = int(router.table[k % len(router.table)])
        experts = [(first + further) % router.num_experts for further in range(K)]
        weights = [1 / K] * K
        if router.options.hash_weights == "learned":
            weights = (router.gate.weight[experts] @ x[t]).softmax(0)
        line += zip([t] * K, experts, weights)
    return slow_line(line, router.capacity(len(x)))


def slow_threshold(router, name, x, key):
    gates, line = (x @ router.gate.weight.T).softmax(1), []
    for t, e in (gates >= router.threshold).nonzero().tolist():  # one token after the other
        line.append((t, e, gates[t, e]))
    return slow_line(line, router.capacity(len(x), margin=2))


SLOW = dict(hash=slow_hash, expert_threshold=slow_threshold, sigmoid=slow_token_choice)
for kind in "", "sinkhorn_", "sparse_":
    SLOW[f"{kind}token_choice"] = slow_token_choice
    SLOW[f"{kind}expert_choice"] = slow_expert_choice


def slow_expert(experts, e, z):
    return F.gelu(z @ experts.w1[e] + experts.b1[e, 0]) @ experts.w2[e] + experts.b2[e, 0]


SIZES = [  # T, E, and what is bought
    (7, 3, dict(top_k=[2], capacity_factor=[1.0], hash_weights=["learned"])),
    (6, 4, dict(top_k=[2], capacity_factor=[0.5], renormalize=[True], bias_rate=[0.1])),
    (3, 5, dict(capacity_factor=[1.0])),
    (3, 1, dict(capacity_factor=[1.0])),
    (5, 4, dict(top_k=[2], capacity_factor=[None], renormalize=[False])),
]
CASES = []  # every router of SLOW at every size, in each order and weighing that it knows
for T, E, size in SIZES:
    axes = size | dict(priority=PRIORITY, combine_weights=BOTH, num_keys=[8], iterations=[8])
    for case in settings(SLOW, **axes):
        CASES.append(pytest.param(*case.values, T, E, id=f"T={T} E={E} {case.id}"))


@pytest.mark.parametrize("name, options, T, E", CASES)
def test_seats_weights_and_layer_equal_plain_loops_in_values_and_gradients(name, options, T, E):
    x = draw(2, T, 4, seed=T).requires_grad_()
    key = (5 * torch.arange(T) + torch.arange(2)[:, None]) % 11
    moe = layer(name, x, E, **options)
    moe.router.update([moe.router(x, key)])  # a bias or a threshold as after some training
    moe.shared = nn.Linear(4, 4).double()
    y, routing = moe(x, key)
    weights, want = torch.zeros(2, T, E, dtype=torch.float64), moe.shared(x)  # all tokens pass it
    seats = torch.zeros(2, T, E, dtype=torch.bool)
    for g in range(2):
        for (t, e), weight in SLOW[name](moe.router, name, x[g], key[g]).items():
            seats[g, t, e], weights[g, t, e] = True, weight
            want[g, t] = want[g, t] + weight * slow_expert(moe.experts, e, x[g, t])
    assert torch.equal(routing.seats, seats)
    within = 1e-10 if "iterations" in ROUTERS[name].defaults else 1e-12
    alike([x, *moe.parameters()], [routing.expert_weights, y], [weights, want], within)


def test_soft_equals_the_two_sums_of_routers_py_as_plain_loops():
    x = draw(1, 5, 4).requires_grad_()
    moe = layer("soft", x, 3, slots=2, scale=3.0)
    y, routing = moe(x)
    grown, want = torch.zeros(1, 5, 3, 2, dtype=torch.float64), 0
    for t, e, c in itertools.product(range(5), range(3), range(2)):
        token, axis = x[0, t], moe.router.phi[:, e, c]
        lengths = ((token @ token + 1e-6) * (axis @ axis + 1e-6)).sqrt()
        grown[0, t, e, c] = (moe.router.scale * (token @ axis) / lengths).exp()
    dispatch, combine = grown / grown.sum(1), grown / grown.sum((2, 3), keepdim=True)
    for e, c in itertools.product(range(3), range(2)):
        slot = sum(dispatch[0, t, e, c] * x[0, t] for t in range(5))
        want = want + combine[:, :, e, c, None] * slow_expert(moe.experts, e, slot)
    alike([x, *moe.parameters()], [*routing.tensors(), y], [dispatch, combine, want])


# ---------------------------------------------------------------- today's models
MODELS = {"Mixtral": 2, "Qwen3": 8, "gpt-oss": 4, "DeepSeek-V3": 8}  # K; groups are left out


@pytest.mark.parametrize("model, K", MODELS.items())
def test_the_equations_of_todays_models_as_published_are_options_of_ours(model, K):
    name = "sigmoid" if model == "DeepSeek-V3" else "token_choice"
    x, want, bias = draw(2, 6, 5).requires_grad_(), [], draw(16, seed=1) / 5
    moe = layer(name, x, 16, top_k=K, renormalize=True, capacity_factor=None)
    moe.router.load_state_dict({"bias": bias}, strict=False)
    for token in x.flatten(0, 1):
        logits = moe.router.gate.weight @ token
        s = decide = logits.exp() / logits.exp().sum()  # a softmax over all experts
        if model == "gpt-oss":  # a softmax over those chosen
            s, decide = logits.exp(), logits
        if model == "DeepSeek-V3":  # 2412.19437 (12) to (16)
            s = 1 / (1 + (-logits).exp())
            decide = s + bias
        chosen = best(decide, K)
        total = sum(s[e] for e in chosen)
        want.append(sum(s[e] / total * slow_expert(moe.experts, e, token) for e in chosen))
    alike([x, *moe.parameters()], [moe(x)[0]], [torch.stack(want).view_as(x)])


# ---------------------------------------------------------------- numbers that published code gives
# By google-research/vmoe, commit 942a78bc81d2e63199f0933733582ddae0715416, on random tokens: logits
# row by row, the token in each slot (T where empty), the combine weight of each slot. All but the
# tokens are times 10^4 and rounded: weights are held to 1e-4.
PUBLISHED = [  # router, options, E; its numbers stand at the same place below
    ("token_choice", dict(top_k=2, priority="choice"), 3),
    ("sinkhorn_token_choice", dict(priority="gate", combine_weights="plan"), 4),
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

11767 47080 -27053 6555 1284 17077 6318 11375 23750 23625 14110 7660 -18965 11897 -10305 -6586 -8061
-20773 17910 8567 12880 24720 971 4993 9898 -4420 -4332 12064 -9185 13158 -11007 -2765 17164 32699
-9699 -17377 3719 -34600 14043 20230 -5276 -8338 5885 -5671 2768 -315 -459 -1078 -5524 -13278 -14958
-3686 6039 46554 -46303 8637 -1831 -3006 -9401 -14582 1709 -16804 9322 2811 |
5 14 2 11 3 7 13 8 4 10 15 7 9 12 6 7 |
1990 3791 3893 3185 7623 7144 9615 8113 6719 5309 4850 637 5765 3938 4563 1453
"""


@pytest.mark.parametrize("place", range(len(PUBLISHED)))
def test_a_router_gives_the_published_seats_and_weights(place):
    name, options, E = PUBLISHED[place]
    parts = PUBLISHED_NUMBERS.split("\n\n")[place].split("|")
    logits, tokens, weights = [float64([*map(int, part.split())]) for part in parts]
    routing = plain(name, E, **options)(logits.view(1, -1, E) / 1e4)
    want = torch.zeros(E, routing.seats.shape[1] + 1, dtype=torch.float64)
    want.scatter_(1, tokens.long().view(E, -1), weights.view(E, -1) / 1e4)
    same(routing.expert_weights[0].T, want[:, :-1], 1e-4)
    assert torch.equal(routing.seats[0].T, want[:, :-1] > 0)


# ================================================================ PART TWO, routers.py: properties
@each(HARD, top_k=[1, 2], capacity_factor=[0.25, 1.0, 4.0, None], priority=PRIORITY)
def test_a_hard_routing_seats_one_token_a_slot_drops_to_zero_and_equals_its_tensors(name, options):
    x, bought = draw(3, 13, 6).requires_grad_(), options["capacity_factor"]
    moe = layer(name, x, 4, **options)
    y, routing = moe(x)
    (dispatch, combine), counts = routing.tensors(), routing.slots_per_token
    assert set(dispatch.unique().tolist()) <= {0.0, 1.0}
    assert dispatch.sum(1).max() == 1 and dispatch.sum(3).max() == 1
    assert torch.equal(combine != 0, dispatch == 1)
    most = options["top_k"] if name in TOKENS_CHOOSE else 4
    assert counts.max() <= most
    if bought in (4.0, None) and ROUTERS[name].chooses != "threshold":  # room for every token
        assert bool((counts == most).all())
    assert not y[counts == 0].any() and y[counts > 0].abs().sum(-1).min() > 0
    tensors = Routing(*moe.router(x).tensors())
    assert torch.equal(counts, tensors.slots_per_token)
    one = [routing.dispatch(x), routing.expert_weights, y]
    other = [tensors.dispatch(x), tensors.expert_weights, moe(x, routing=tensors)[0]]
    alike([x, *moe.parameters()], one, other)


def test_capacity_is_rounded_up_from_1_to_t_but_not_by_float_error():
    cases = [(10, 4, 2, 1.0, 5), (11, 4, 2, 1.0, 6), (10, 4, 1, 99.0, 10), (10, 4, 1, 1e-9, 1)]
    for T, E, K, factor, C in [*cases, (100, 10, 1, 1.1, 11)]:  # 100 * 1.1 is 110 and a bit
        router = build_router("token_choice", 4, E, top_k=K, capacity_factor=factor)
        assert router.capacity(T) == C


@each([name for name in GATED if name in SLOW], noise_std=[0.5], top_k=[2], combine_weights=BOTH)
def test_noise_of_noise_std_over_e_enters_choices_and_load_loss_in_training_alone(name, options):
    x, router = draw(2, 16, 4), plain(name, 4, **options)
    torch.manual_seed(3)
    noisy = x + torch.randn_like(x) * 0.5 / 4
    torch.manual_seed(3)
    routing, clean = router(x), router.eval()(noisy)
    weights = clean.expert_weights
    if name == "sinkhorn_token_choice" and options["combine_weights"] == "softmax":
        weights = clean.seats * x.softmax(-1)  # published so: the clean softmax weighs
    gates = x.softmax(2)
    if name == "sigmoid":  # each expert on its own, over the sum of all
        gates = F.normalize(x.sigmoid(), p=1, dim=2)
    same((routing.logits, routing.gates), (x, gates))  # both without noise
    same((routing.seats, routing.expert_weights), (clean.seats, weights))
    assert not torch.equal(clean.seats, router(x).seats)
    if name in TOKENS_CHOOSE:
        assert "load" not in router(x).losses  # no noise
        router.train()
        same(routing.losses["load"], load_loss(x, noisy, 2, 0.5 / 4))


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_are_those_that_the_router_names_from_its_own_probabilities(name):
    x, noise = draw(3, 12, 4), dict(noise_std=1.0) if name in GATED else {}
    assert layer(name, x, 4, **noise).router(x).losses.keys() == set(ROUTERS[name].aux_losses)
    routing = layer(name, x, 4, top_k=2).router(x)
    if name in GATED:
        same(routing.losses["z"], z_loss(routing.logits))
    if "balance" in routing.losses:
        same(routing.losses["importance"], importance_loss(routing.logits, routing.gates))
        same(routing.losses["balance"], balance_loss(routing.gates, routing.wants, 2))


@each(top_k=[2], iterations=[1], capacity_factor=[1.0, None])
def test_a_fresh_layer_compiles_into_one_graph(name, options):
    torch._dynamo.reset()
    x = draw(2, 8, 6).requires_grad_()
    moe = layer(name, x, 4, **options)
    y, routing = torch.compile(moe, fullgraph=True, backend="eager")(x)
    alike([x, *moe.parameters()], [y], [moe(x)[0]])
    if options["capacity_factor"] is None:
        assert routing.capacity == 8  # the largest load is unknown: room for every token


def test_equal_scores_go_to_the_lower_index():
    x = torch.zeros(1, 70, 40, dtype=torch.float64)  # long enough for an unstable sort to show
    for name in "token_choice", "sigmoid":
        for priority in PRIORITY:
            routing = plain(name, 40, top_k=3, capacity_factor=5, priority=priority)(x)
            assert bool(routing.seats[0, :27, :3].all())  # C = 70 * 3 * 5 / 40, rounded up
            assert routing.seats.sum() == 27 * 3
    seats = plain("expert_choice", 40, capacity_factor=20)(x).seats
    assert bool(seats[0, :35].all()) and not seats[0, 35:].any()
    plan = sparse_plan(torch.zeros(1, 6, 3, dtype=torch.float64), 2)
    assert (plan > 0).sum(1).tolist() == [[2, 2, 2]]


# ---------------------------------------------------------------- who leaks the future
@each(top_k=[1, 2], capacity_factor=[1.0, 4.0, None], priority=PRIORITY, combine_weights=BOTH)
def test_groups_are_apart_and_what_is_called_causal_and_that_alone_leaks_nothing(name, options):
    bought, priority = options["capacity_factor"], options.get("priority", "token")
    causal = build_router(name, 6, 4, tokens=16, **options).causal
    if name in SLOW:
        # Where first choices, or surer tokens, come first, they may come from behind.
        in_order = priority == "token" or (priority == "choice" and options["top_k"] == 1)
        in_order = name in ("token_choice", "sigmoid") and (in_order or bought is None)
        assert causal is (in_order or name in ("hash", "expert_threshold"))
    # How far do EARLIER outputs and weights of 60 groups move with the last token and key?
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
        weights = (now.expert_weights - then.expert_weights)[:30, :-1].abs().max()
        if causal:
            assert max(outputs, weights) <= 1e-12
        elif bought in (1.0, None):  # where everyone has room, little is left to leak
            assert max(outputs, weights) > 1e-6
        if causal and bought in (4.0, None):  # there is room for every token, however few there are
            same(moe(x[:, :7], key[:, :7])[0], after[:, :7])


# ---------------------------------------------------------------- losses, solvers
def test_losses_equal_values_worked_out_by_hand():
    gates = float64([[[0.8, 0.2], [0.6, 0.4]], [[0.9, 0.1], [0.1, 0.9]]])
    # Group 0: f = (1, 0), P = (.7, .3), so 2 * .7 = 1.4. Group 1: f = P = (.5, .5), so 1. Mean 1.2.
    same(balance_loss(gates, gates > 0.5, 1), 1.2)
    for logits, given in (gates.log(), None), (draw(2, 2, 2), gates):  # gates that are given count
        # Group 0: sums (1.4, .6), mean 1, variance .16. Group 1: even. Mean .08.
        same(importance_loss(logits, given), 0.08)
    # Rows sum to 1, and in group 1 we add 2 to the logits: logsumexp 0 and 2, squared 0 and 4.
    same(z_loss(gates.log() + torch.tensor([0, 2])[:, None, None]), 2.0)
    for E, K in (4, 1), (6, 3), (5, 5):  # 1 when uniform, E/K at collapse
        wants = (torch.arange(E) < K).expand(2, 30, E)
        same(balance_loss(torch.full(wants.shape, 1 / E).double(), wants, K), 1.0, 1e-6)
        same(balance_loss(wants.double() / K, wants, K), E / K)


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


@each(["sigmoid", "token_choice"], top_k=[2], capacity_factor=[1.0, None], renormalize=[True])
def test_gates_that_underflow_and_huge_logits_give_no_nan_in_values_or_gradients(name, options):
    huge = [[-200.0] * 4, [0, 0, -200, -200], [1e3, -1e3, 1e3, 0], [0, 0, -300, -95]]
    x = torch.tensor([huge] * 2, requires_grad=True)
    moe = layer(name, x, 4, bias_rate=0.1, **options).float()
    nn.init.eye_(moe.router.gate.weight)
    moe.router.bias += torch.tensor([0.0, 0, 9, 9])  # what is chosen has a gate of 0
    y, routing = moe(x)
    assert not routing.wants[..., :2].any()
    loss = 1e4 * y.sum() + sum(routing.losses.values())
    for value in loss, *torch.autograd.grad(loss, [x, *moe.parameters()]):
        assert value.isfinite().all()


@pytest.mark.parametrize("scale", [1, 100, 1e4])
def test_a_sinkhorn_plan_of_large_float32_logits_holds_what_its_docstring_says(scale):
    logits = (scale * draw(20, 64, 8).float()).requires_grad_()
    plan = sinkhorn_plan(logits)
    assert torch.autograd.grad(plan.square().sum(), logits)[0].isfinite().all()
    plan = plan.detach().double()
    assert (plan.sum(2) - 1).abs().max() <= 1e-7 * max(10, logits.abs().max().item())
    off = (plan.sum(1) * 8 / 64 - 1).abs().max()
    low, high = (0, 1e-3) if scale == 1 else (0.5, 7)  # the docstring warns of it
    assert low < off < high


def test_the_sparse_solver_reaches_the_best_balanced_assignment():
    gates = draw(8, 6, 3).softmax(-1)
    seats = torch.tensor(sorted(set(itertools.permutations([0, 0, 1, 1, 2, 2]))))  # all 90 of them
    best_value = gates[:, torch.arange(6), seats].sum(-1).amax(-1)
    plan = sparse_plan(gates, 2, iterations=800)
    chosen = (plan > 0).double()  # at the optimum, T tokens fill T seats of weight 1
    same(plan, chosen, 2e-3)
    same((gates * chosen).sum((1, 2)), best_value)
    # Every group has stopped, and by itself.
    same(sparse_plan(gates[:3], 2, iterations=200), plan[:3], 1e-9)


# ---------------------------------------------------------------- what is refused
NUMBER, WHOLE = "must be a number >= 0, got", "must be a whole number >= 1, got"
WRONG = [  # a router, options against a rule, and what the error says
    ("tokens", {}, f"unknown router 'tokens'; known: {', '.join(ROUTERS)}"),
    ("expert_choice", PLAN, "ExpertChoice has no option combine_weights; it has top_k, "),
    ("hash", dict(hash_weights="learned"), "hash_weights=learned needs top_k >= 2, got top_k=1"),
    ("token_choice", dict(priority="last"), "priority must be one of token, choice, gate, got pri"),
    ("token_choice", dict(noise_std=-1), f"noise_std {NUMBER} noise_std=-1"),
    ("token_choice", dict(bias_rate=math.inf), f"bias_rate {NUMBER} bias_rate=inf"),
    ("expert_choice", dict(capacity_factor=None), "is for routers in which tokens choose, got Exp"),
    ("soft", dict(tokens=None), "soft needs slots, or tokens to count them from"),
    ("soft", dict(slots=0), f"slots {WHOLE} slots=0"),
    ("hash", dict(top_k=1.5), f"top_k {WHOLE} top_k=1.5"),
    ("hash", dict(top_k=True), f"top_k {WHOLE} top_k=True"),
    ("expert_threshold", dict(top_k=4), "top_k must be at most num_experts=3, got top_k=4"),
    ("sigmoid", dict(capacity_factor=0.0), "capacity_factor must be a positive number, got"),
    ("sigmoid", dict(renormalize="no"), "renormalize must be True or False, got renormalize='no'"),
]


@pytest.mark.parametrize("name, options, message", WRONG)
def test_a_wrong_option_is_a_valueerror_that_names_the_rule(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_router(name, **dict(dim=4, num_experts=3, tokens=5) | options)


@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_of_a_wrong_shape_are_refused_and_options_of_numpy_are_not(name):
    x = draw(2, 5, 4)
    moe = layer(name, x, np.int64(3), top_k=np.int64(2), capacity_factor=np.float32(2))
    same(moe(x)[0], layer(name, x, 3, top_k=2, capacity_factor=2.0)(x)[0], 0)
    rule = re.escape("a router needs tokens [G, T, 4], at least one in a group, got")
    for wrong in draw(5, 4), draw(2, 5, 3), draw(2, 0, 4):
        with pytest.raises(ValueError, match=rule):
            moe(wrong)
    if name == "hash":
        with pytest.raises(ValueError, match=re.escape("key must be [G, T] = [2, 5], got [5]")):
            moe(x, torch.arange(5))


# ---------------------------------------------------------------- what a router remembers
@each(router_weights=["learned", "random"], bias_rate=[0.1])
def test_only_update_changes_a_buffer_and_every_kind_of_copy_gives_the_same_output(name, options):
    x, key = draw(2, 12, 6), torch.randint(50, (2, 12), generator=seeded(0))
    moe, fresh = layer(name, x, 4, **options), layer(name, x, 4, seed=1, **options)
    before = copy.deepcopy(moe.state_dict())
    routing = moe(x, key)[1]
    same(moe.state_dict(), before, 0)
    moe.router.update([routing], seeded(1))
    fresh.load_state_dict(moe.state_dict())
    for twin in fresh, copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)):
        for mode in True, False:
            assert torch.equal(twin.train(mode)(x, key)[0], moe.train(mode)(x, key)[0])
        same(twin.state_dict(), moe.state_dict(), 0)


@each(GATED, router_weights=["frozen", "random"], gate=["linear", "mlp"])
def test_frozen_gates_stand_still_and_update_draws_random_ones(name, options):
    x = draw(2, 12, 6)
    moe = layer(name, x, 4, **options)
    found = []
    for key in 1, 2, 1, 0:
        y, routing = moe(x)
        found.append(routing.logits)
        assert torch.equal(moe.router.eval()(x).logits, moe.router.train()(x).logits)
        if name in SLOW:
            first, *second = moe.router.gate.parameters()
            same(found[-1], F.gelu(x @ first.T) @ second[0].T if second else x @ first.T)
        y.square().sum().backward()
        moe.router.update([routing], seeded(key))
    assert all(weight.grad is None for weight in moe.router.parameters())
    assert torch.equal(found[1], found[3])  # the same key, the same weights
    frozen = options["router_weights"] == "frozen"
    assert torch.equal(found[0], found[1]) == torch.equal(found[1], found[2]) == frozen


def test_a_bias_moves_as_worked_out_by_hand():
    # By sign: twelve wants, two for each of six experts if even; here 5 2 2 2 1 0, of two routings
    # whose shares differ. The steps -1 0 0 0 1 1 have a mean of 1/6, which is taken off.
    router = plain("token_choice", 6, bias_rate=0.6)
    wants = [0, 0, 0, 1, 2, 3, 3], [0, 0, 1, 2, 4]
    router.update([router(F.one_hot(torch.tensor([experts]), 6).double()) for experts in wants])
    same(router.bias, [-0.7, -0.1, -0.1, -0.1, 0.5, 0.5])
    # By quantile. The bars, each token's second gate, are .3 .3 .2. Columns less bars: .2 .3 .5,
    # 0 -.2 0 and -.1 0 -.1. An even share is one token; the second best of each: .3, 0, -.1. Half
    # of that is taken off, then the mean of -.15, 0, .05.
    router = plain("token_choice", 3, bias_rate=0.5, bias_update="quantile")
    router.update([router(float64([[row]]).log()) for row in GATES])  # a step is all its routings
    same(router.bias, [-0.35 / 3, 0.1 / 3, 0.25 / 3])


@pytest.mark.parametrize("name", ["token_choice", "sigmoid"])
@pytest.mark.parametrize("rule, rate", [("sign", 0.01), ("quantile", 1.0)])  # sign .02 would swing
def test_a_skewed_frozen_gate_is_repaired_by_either_rule_alone(name, rule, rate):
    options = dict(router_weights="frozen", bias_rate=rate, bias_update=rule, capacity_factor=None)
    x = draw(8, 64, 16)
    router = layer(name, x, 8, top_k=2, **options).router
    x += 2.5 * router.gate.weight[0]  # what all tokens share, and expert 0 likes
    assert router(x).load.max() * 8 > 3  # the largest load over the mean; 4 is all there is
    for _ in range(30):
        router.update([router(x)])
    assert router(x).load.max() * 8 < 1.2


def test_expert_thresholds_start_at_the_mean_quantile_and_then_run():
    router, x = plain("expert_threshold", 4), draw(3, 3, 5, 4)
    # The quantile 1 - 1/4 of 5 numbers is the fourth. Its mean is over groups, then routings.
    quantile = x.softmax(3).sort(2).values[:, :, 3].mean(1)
    same(router.threshold, [1 / 4] * 4)
    assert router(0 * x[0]).wants.all()  # whose gates, 1/4, just reach it
    router.update([router(x[0]), router(x[1])])
    first = (quantile[0] + quantile[1]) / 2
    same(router.threshold, first)
    router.update([router(x[2])])
    same(router.threshold, 0.9 * first + 0.1 * quantile[2], 1e-8)  # that 0.1 is a float32
    before = router.threshold.clone()
    router.update([router(x[2] * math.nan)])
    assert torch.equal(router.threshold, before)  # else all later tokens would be dropped


def test_a_hash_is_balanced_over_each_run_of_keys_and_repeats_beyond_its_table():
    router = build_router("hash", 6, 4, num_keys=10, capacity_factor=None)
    x, key = draw(1, 22, 6), torch.arange(-1, 21)[None]
    minus_one, *experts = router(x, key).wants[0].int().argmax(1).tolist()
    assert sorted(experts[:4]) == sorted(experts[4:8]) == [0, 1, 2, 3]
    assert experts[8] != experts[9] == minus_one and experts[10:20] == experts[:10]
    for given in None, key[:, 1:].to(torch.uint16):  # a position is its own key
        assert torch.equal(router(x[:, 1:], given).seats, router(x[:, 1:], key[:, 1:]).seats)
    assert not torch.equal(router.table, build_router("hash", 6, 4).table[:10])  # one of its own


# ---------------------------------------------------------------- the layer in other people's hands
class TopP(Router):
    """A token goes to its likeliest experts until their gates sum to p."""

    chooses, causal = "tokens", True
    defaults = dict(p=0.6)

    def forward(self, x, key=None):
        C = self.capacity(x.shape[1])
        logits = self.logits(x)
        gates = self.add_noise(logits).softmax(2)
        falling, order = gates.sort(2, descending=True)
        short = falling.cumsum(2) - falling < self.options.p  # before this one
        wants = torch.zeros_like(short).scatter(2, order, short)
        return HardRouting(self, first_come(wants, C), gates, C, wants=wants, logits=logits)


@pytest.mark.parametrize("factor", [1.5, None])
def test_a_router_of_ones_own_is_one_class_and_one_entry(factor, monkeypatch):
    monkeypatch.setitem(ROUTERS, "top_p", TopP)
    routing = plain("top_p", 3, capacity_factor=factor)(float64([GATES + [[0.1, 0.1, 0.8]]]).log())
    weights = [[0.5, 0.3, 0], [0.6, 0, 0], [0.7, 0, 0], [0, 0, 0.8]]
    if factor:  # two slots an expert: the third in line for expert 0 is dropped
        weights[2][0] = 0.0
    same(routing.expert_weights[0], weights)
    same(routing.load.double(), [3 / 5, 1 / 5, 1 / 5], 1e-6)  # counted before
    assert routing.losses.keys() == {"z"}


def test_the_defaults_of_a_subclass_add_to_those_of_its_parent():
    class Mine(TokenChoice):
        defaults = dict(warmth=1.0, other=None)

    assert Mine.defaults == TokenChoice.defaults | dict(warmth=1.0, other=None)
    assert Mine(4, 3, other="x", priority="gate").options.other == "x"
    with pytest.raises(ValueError, match=f"warmth {NUMBER}"):  # a default's type is its rule
        Mine(4, 3, warmth=-1)
    Mine.defaults["warmth"] = -1.0
    assert Mine(4, 3, warmth=-1.0).options.warmth == -1  # a default always passes
    gated = type("Gated", (ROUTERS["hash"],), dict(gated=True))
    assert gated(4, 3, gate="mlp")(draw(2, 5, 4)).wants.sum() == 10


class SwiGLU(Experts):
    """silu(z w1) * (z w3), then w2 (2002.05202): a fork of the experts is this class."""

    names = ("w1", "w3", "w2")

    def __init__(self, num_experts, dim, hidden):
        nn.Module.__init__(self)
        self.num_experts, self.dim = num_experts, dim
        self.w1 = stacked(num_experts, dim, hidden, fan_in=dim)
        self.w3 = stacked(num_experts, dim, hidden, fan_in=dim)
        self.w2 = stacked(num_experts, hidden, dim, fan_in=hidden)

    def expert(self, z, w1, w3, w2):
        return (F.silu(z @ w1) * (z @ w3)) @ w2


@pytest.mark.parametrize("factor", [2.0, None])
@pytest.mark.parametrize("kind", [Experts, SwiGLU])
def test_experts_fill_all_slots_or_filled_ones_by_weights_as_others_leave_them(kind, factor):
    x, hook = draw(2, 9, 6), Mock(return_value=None)
    moe = layer("token_choice", x, 4, capacity_factor=factor)
    moe.experts = kind(4, 6, 6).double()  # dim = hidden: no shape tells one weight from another
    moe.shared = nn.Linear(6, 6).double()
    assert all((weight[0] != weight[1]).all() for weight in moe.experts.parameters())
    (y, routing), clipped, changed = moe(x), copy.deepcopy(moe), copy.deepcopy(moe)
    same(moe(x, routing=Routing(*routing.tensors()))[0], y)
    wide = moe(torch.cat([x, 2 * x], 2), routing=routing)[
        0
    ]  # a slot, as a sequence, of two vectors
    same(wide, torch.cat([y, moe(2 * x, routing=routing)[0]], 2))
    clipped.experts.w2.data.relu_()
    parametrize.register_parametrization(changed.experts, "w2", nn.ReLU())
    same(changed(x)[0], clipped(x)[0])
    clipped.experts.w2.data.zero_()
    moe.experts.register_forward_hook(hook)
    prune.identity(moe.experts, "w1")  # from here a product with a mask, no longer a parameter
    same(moe(x)[0], y)
    prune.random_unstructured(moe.experts, "w2", amount=1.0)
    same(moe(x)[0], clipped(x)[0])
    assert hook.call_count == 2
    prune.random_unstructured(moe.router.gate, "weight", amount=1.0)
    assert not moe(x)[1].logits.any()
    if kind is SwiGLU:  # a fork's own equation reaches the slots
        z, e = draw(2, 4, 5, 6), changed.experts
        same(e(z), (F.silu(z @ e.w1) * (z @ e.w3)) @ e.w2)


@each(combine_weights=BOTH, capacity_factor=[1.0, None])
def test_a_token_that_is_not_finite_harms_its_own_group_or_row_alone(name, options):
    x = draw(3, 12, 6)
    moe = layer(name, x, 4, **options)
    before, _ = moe(x)
    x[1, 5] = math.nan
    after, routing = moe(x)
    same(after[[0, 2]], before[[0, 2]])
    assert name != "expert_choice" or after[1, 5].isnan().all()  # it is chosen, so it shows
    if name in HARD and options.get("combine_weights") != "plan":  # a plan is of the whole group
        dispatch, combine = routing.tensors()
        assert not combine[dispatch == 0].any()  # nor is it where the token has no seat
        combine[1, 5] = 0
        assert combine.isfinite().all()


@each(top_k=[2], capacity_factor=[1.0, None], gate=["mlp"], bias_rate=[0.1])
def test_under_autocast_and_in_half_precision_a_layer_routes_as_in_float32(name, options):
    x = draw(2, 16, 8).bfloat16()
    full = layer(name, x, 4, **options).float()
    full.router.update([full.router(x.float())])
    half = copy.deepcopy(full).bfloat16()
    full.load_state_dict(half.state_dict())
    want, reference = full(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [full(x), half(x)]
    for y, routing in [*pairs, half(x)]:
        got, expected = (*routing.tensors(), routing.load), (*reference.tensors(), reference.load)
        same(got, expected, 0)  # of float32, too
        assert y.dtype == x.dtype
        same(y.float(), want, 0.02)
        y.sum().backward()
    half.router.update([routing])


@each(top_k=[1, 2], priority=["token", "gate"], combine_weights=BOTH, **TRAINING)
def test_no_value_is_read_back_on_the_way_through_a_layer(name, options, monkeypatch):
    monkeypatch.setattr(torch, "autocast", MagicMock())  # knows no meta device
    x = draw(2, 8, 6).to("meta").requires_grad_()  # shapes without numbers: .item() raises
    moe = layer(name, x, 4, **options).to("meta")
    y, routing = moe(x, torch.zeros(2, 8, dtype=torch.long, device="meta"))
    (y.sum() + sum(routing.losses.values())).backward()
    moe.router.update([routing])
    assert y.shape == x.grad.shape == (2, 8, 6)


# ================================================================ PART THREE, train.py: helpers
SMALL = """--dim 16 --depth 2 --heads 2 --hidden 32 --experts 4 --patch 8 --batch-size 8 --steps 3
    --log-every 1"""
WORDS = """--task tokens --dim 16 --depth 2 --heads 2 --hidden 32 --experts 4 --context 16
    --batch-size 4 --steps 3 --log-every 1"""
ROOT = pathlib.Path(train.__file__).parent


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
    """What the one line of an error says; status 2, and no traceback."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        train.main(words_of(flags))
    gc.collect()  # a record that the error holds keeps its folder locked
    lines = err.getvalue().replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and not re.search(r"%\||it/s|\?it", line)]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("train.py: error: ")
    return lines[0]


def overrides_of(*flags):
    """{setting: value} of a command line of one run."""
    return {name: values[0] for name, values in train.parse(words_of(flags))[1].items()}


def built(*flags, small=SMALL):
    """The small run of these flags, not yet trained."""
    settings = train.resolve(overrides_of(small, *flags))
    data = train.TASKS[settings.task].load_data(settings, train.pick_device(settings))
    model = train.build(settings, data)
    optimizer = train.make_optimizer(settings, model)
    return SimpleNamespace(settings=settings, data=data, model=model, optimizer=optimizer)


def step_of(b, step):
    batch = b.data.batch(step)
    return train.train_step(b.settings, b.data, b.model, b.optimizer, step, batch)


def json_of(text):
    """What a path, or a line, holds; Infinity and NaN are no JSON."""
    text = text.read_text("utf-8") if isinstance(text, pathlib.Path) else text
    return json.loads(text, parse_constant=pytest.fail)


def lines_of(folder):
    return list(map(json_of, pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()))


def checkpoint_of(folder):
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


def same_runs(one, other):
    """Two folders hold the same lines and the same weights, bit for bit."""
    assert lines_of(one) == lines_of(other)
    same(checkpoint_of(one)["model"], checkpoint_of(other)["model"], 0)


def write_cifar(folder, files=("data_batch_1.bin", "test_batch.bin"), classes=10, fine=0):
    """A folder in the CIFAR layout: random pixels, and image i of 40 is of class i % classes."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3072), np.uint8)
    labels = np.zeros((40, 1 + fine), np.uint8)
    labels[:, -1] = np.arange(40) % classes
    for file in files:
        np.hstack([labels, pixels]).tofile(folder / file)
    return pixels


def write_npz(path, **changed):
    x, y = np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 4
    np.savez(path, **dict(x_train=x, y_train=y, x_test=x, y_test=y) | changed)
    return path


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
    return f"--vocab-size 320 --data {folder}"


class Mine(moe_vision.Images):
    """An own data set: two classes, dark and bright. What happens[step]() does, happens there."""

    image_size, names, mean, std = 16, ["dark", "bright"], 0.4, 0.2
    description = "two classes of noise"
    happens = {}

    def batch(self, step, part=slice(None)):
        self.happens.get(step, int)()
        g = moe_vision.seeded(self.seed, step)
        label = torch.randint(2, (self.batch_size,), generator=g)
        image = torch.randn(len(label), 3, 16, 16, generator=g) + 2 * label[:, None, None, None]
        return {"image": image[part], "label": label[part]}

    def batches(self, split):
        yield self.batch(split)


@pytest.fixture
def mine(monkeypatch):
    """The happenings of --data mine."""
    monkeypatch.setitem(moe_vision.DATASETS, "mine", Mine)
    monkeypatch.setattr(Mine, "happens", {})
    return Mine.happens


# ================================================================ one run, flags and their help
def test_one_seed_gives_the_same_run_bit_for_bit_and_resume_evaluates_it_again(here, album):
    flags = "--router token_choice --capacity-factor 1 --balance vmoe --noise-std 1 --out"
    run(SMALL, album, flags, "a")
    printed = run(SMALL, album, flags, "b")
    same_runs("a", "b")
    lines = lines_of("a")
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 3, 3]
    assert {"loss", "importance", "load", "blocks"} <= set(lines[0])
    assert [line.get("split") for line in lines[3:]] == ["validation", "test", "test_dropless"]
    assert lines[4] == json_of(here / "a/summary.json")["test"] | {"step": 3, "split": "test"}
    files = {path: path.read_bytes() for path in (here / "b").iterdir()}
    assert run("--resume b") == printed and "| token_choice |" in printed
    assert files == {path: path.read_bytes() for path in (here / "b").iterdir()}
    first, second = built("--seed 0"), built("--seed 1")
    assert not torch.equal(first.data.batch(0)["image"], second.data.batch(0)["image"])
    assert not torch.equal(first.model.embed.weight, second.model.embed.weight)


WRONG_FLAGS = [
    ("--experts 8 --top-k 9", "top_k must be at most num_experts=8, got top_k=9"),
    ("--router soft --priority gate", "--router soft on --task vision has no --priority"),
    ("--prefix 4", "on --task vision has no --prefix"),
    ("--heads 3", "--heads must divide --dim, got --heads 3 and --dim 16"),
    ("--steps 0", "--steps must be at least 1, got 0"),
    ("--head patch --data x", "--head patch is for drawn images"),
    ("--resume nowhere", "nowhere"),
    ("--head class patch", "--head takes one value, got 2"),
    ("--bench --router soft hash", "--router takes one value beside --bench"),
    ("--resume x --dim 16", "--dim cannot change in a run that is resumed"),
    ("--out full", "--out full is not empty"),
    ("--router expert_choice --balance switch", "expert_choice on --task vision has no --balance"),
]


@pytest.mark.parametrize("flags, rule", WRONG_FLAGS)
def test_a_wrong_flag_gets_one_line_that_names_the_rule_and_the_value(flags, rule, here):
    pathlib.Path("full/x").mkdir(parents=True)
    assert rule in refused(*[SMALL][: "--resume" not in flags], flags)
    assert [path.name for path in here.iterdir()] == ["full"]  # nothing was begun


def test_help_shows_the_defaults_that_hold_also_where_they_differ_by_task_and_router():
    texts = {}  # {flag: what is said of it}
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        train.main(["--help"])
    for part in re.split(r"\n  (?=-)", out.getvalue()):
        texts[part.split()[0].strip(",")] = " ".join(part.split())
    usual = dict(capacity_factor=1.0, balance="none", renormalize=False, bias_rate=0.0)
    for task, router in itertools.product(train.TASKS, ROUTERS):
        s = train.resolve({"task": task, "router": router, "allow_leak": True})
        for name in "lr", "steps", "batch_size", "dim", "experts", "hidden":
            assert f"{task}, tiny: {getattr(s, name)}" in texts["--" + name.replace("_", "-")]
        for name, value in usual.items():
            holds = getattr(s, name, value)
            named = rf"\b{router}: {str(holds).lower()}\b"
            text = texts["--" + name.replace("_", "-")].lower()
            assert bool(re.search(named, text)) == (holds != value), (router, name)
        several = train.resolve(dict(task=task, router=router, top_k=2, allow_leak=True))
        expected = task == "tokens" or router == "sigmoid"
        assert getattr(several, "renormalize", expected) == expected
    assert "on text True where top_k >= 2" in texts["--renormalize"]
    for balance, rule, rate in ("bias", "sign", 1e-3), ("quantile", "quantile", 1.0):
        s = train.resolve({"router": "token_choice", "balance": balance})
        assert (s.bias_update, s.bias_rate, s.loss_weights) == (rule, rate, {})
    s = train.resolve({"router": "sigmoid", "balance": "switch"})
    assert (s.bias_rate, s.loss_weights) == (0, {"balance": 0.01})
    for weights in "frozen", "random":
        assert (
            train.resolve({"router": "token_choice", "router_weights": weights}).balance == "none"
        )


# ================================================================ images
class Bomb:  # what a pickle inside an .npz or a checkpoint could do
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_broken_images_are_refused_and_a_pickle_is_never_opened(here):
    flags = SMALL + " --batch-size 99 --data"  # more than the images below
    x, y = np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 4
    wrong = {"allow_pickle": dict(y_train=np.array([Bomb()], object)), "too few for": {}}
    wrong |= {"float64 labels": dict(y_train=y / 1.0), "float64 (20,": dict(x_train=x / 1.0)}
    wrong |= {"labels 0 to 4, of 4 classes": dict(y_test=y + y // 3)}
    for rule, changed in wrong.items():
        assert rule in refused(flags, write_npz("x.npz", **changed))
    write_cifar(here / "c", classes=11)
    assert "labels 0 to 10, of 10 classes" in refused(flags, "c")
    os.truncate("c/test_batch.bin", 9999)
    assert "size 9999" in refused(flags, "c")
    (here / "x.txt").write_text("words")
    assert "it must hold data_batch_*.bin and test_batch.bin" in refused(flags, "x.txt")
    assert not (here / "exploded").exists() and not (here / "runs").exists()


CIFAR10 = ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")


@pytest.mark.parametrize("fine, files", [(0, CIFAR10), (1, ("train.bin", "test.bin"))])
def test_cifar_files_are_read_whole_parted_and_trained_on(fine, files, here):
    pixels = write_cifar(here / "data", files, fine=fine, classes=7)
    (images, labels), (test, _), classes = moe_vision.read_images(here / "data")
    assert classes == (100 if fine else 10) and len(images) == 40 * (len(files) - 1)
    assert (images[:40].reshape(40, -1) == pixels).all() and len(test) == 40
    assert (labels[:40] == np.arange(40) % 7).all()
    parts, held = built("--data data").data.stored, len(images) // 10
    assert [len(parts[name][1]) for name in ("train", "validation")] == [len(images) - held, held]
    both = torch.cat([parts["train"][0], parts["validation"][0]])
    assert sorted(both.sum((1, 2, 3)).tolist()) == sorted(images.sum((1, 2, 3)).tolist())
    run(SMALL, "--router dense --data data --out run")


def test_an_epoch_of_stored_images_meets_each_once_cropped_or_flipped_on_its_own(here):
    write_cifar(here)
    data = built("--batch-size 9 --data .").data
    images = data.stored["train"][0]
    data.stored["train"] = images, torch.arange(36)  # name each image by its number
    labels = torch.cat([data.batch(step)["label"] for step in range(4)])
    assert labels.sort().values.tolist() == list(range(36))
    whole, part = data.batch(2), data.batch(2, part=slice(3, 7))
    same(part, {name: value[3:7] for name, value in whole.items()}, 0)
    flipped, places = [], set()
    for got, number in zip(whole["image"], whole["label"]):
        padded, found = F.pad(images[number], (4,) * 4), []
        for y, x, flip in itertools.product(range(9), range(9), (False, True)):
            crop = padded[:, y : y + 32, x : x + 32]
            crop = crop.flip(2) if flip else crop
            if torch.equal((crop / 255 - data.mean) / data.std, got):
                found.append((y, x, flip))
        ((*place, flip),) = found  # one crop it is
        places.add(tuple(place))
        flipped.append(flip)
    assert 0 < sum(flipped) < 9 and len(places) > 6


def test_the_official_archive_is_fetched_once_and_held_against_its_md5(here, monkeypatch):
    write_cifar(here / "source")
    with tarfile.open("archive", "w:gz") as tar:
        tar.add("source", "cifar-10-batches-bin")
    url, md5 = (here / "archive").as_uri(), hashlib.md5(pathlib.Path("archive").read_bytes())
    wrong = {"its md5 is not 000": (url, "0" * 32), "cannot read": (url + "x", md5.hexdigest())}
    for rule, entry in wrong.items():
        monkeypatch.setitem(moe_vision.OFFICIAL, "cifar10", entry)
        assert rule in refused("--data cifar10") and not list(here.glob("data/*"))
    monkeypatch.setitem(moe_vision.OFFICIAL, "cifar10", (url, md5.hexdigest()))
    assert "40 test images" in built("--data cifar10").data.description
    (here / "archive").unlink()
    (folder,) = (here / "data").iterdir()  # no scraps beside it
    assert {file.name for file in folder.iterdir()} == {"data_batch_1.bin", "test_batch.bin"}
    assert "40 test images" in built("--data cifar10").data.description


def test_drawn_images_hold_what_their_labels_and_patch_maps_say():
    data = built("--batch-size 64 --patch 4").data
    batch = data.batch(3)
    for label, tiles in zip(batch["label"], batch["tile"]):  # each class has its own set of tiles
        owned = moe_vision.TILES_OF[moe_vision.TRAINED[label]]
        assert len(owned.unique()) == 64 and torch.isin(tiles[tiles >= 0], owned).all()
    assert torch.equal(batch["tile"] >= 0, batch["kind"] > 0)
    whole = batch["kind"] == 2  # a tile shows its pattern: its light pixels are the brighter ones
    pixels = F.pixel_unshuffle(batch["image"].mean(1, keepdim=True), 4).flatten(2).mT  # [B, T, 16]
    light, seen = moe_vision.TILES.flatten(1)[batch["tile"][whole]] > 0, pixels[whole]
    gap = (seen * light).sum(1) / light.sum(1) - (seen * ~light).sum(1) / (~light).sum(1)
    assert (gap > 0.5).float().mean() > 0.99
    assert seen.mean() > pixels[batch["kind"] == 0].mean() + 1  # the map lies where the shape is
    same(data.batch(3, part=slice(10, 20)), {name: batch[name][10:20] for name in batch}, 0)
    b = built("--head patch --router dense --dtype float64 --patch 4 --batch-size 64")
    same(b.data.batch(3)["image"], batch["image"].double(), 1e-4)
    truth = torch.where(batch["kind"] == 0, 0, 2 * batch["shape"][:, None] + batch["kind"])
    sure = 10.0 * F.one_hot(truth, 13)  # a model that tells each patch, but all shapes as one
    sure[..., 1:] = sure[..., 1:].roll(2, -1)
    loss, counts, _ = b.data.loss(Mock(return_value=(sure, {})), batch)
    assert b.data.metrics(counts | {"loss": loss})["miou"] == pytest.approx(100 / 13)
    assert b.model(b.data.batch(3)["image"])[0].shape == (64, 64, 13)


def test_the_ridge_probe_picks_its_penalty_by_leaving_one_out():
    x, z, rule = draw(24, 20), draw(200, 20, seed=1), draw(20, 3, seed=2)
    y = (x @ rule + draw(24, 3, seed=99)).argmax(1)  # few and noisy: without leverages, 0.365
    truth = (z @ rule).argmax(1)
    mean, std = x.mean(0), x.std(0) + 1e-5
    a, b = torch.full((24, 21), 100.0).double(), torch.full((200, 21), 100.0).double()
    a[:, :20], b[:, :20] = (x - mean) / std, (z - mean) / std
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


# ================================================================ what a model costs
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "expert_threshold"])
def test_every_router_pays_what_the_dense_model_of_its_active_experts_pays(router, shelf):
    for small, flags in (SMALL, []), (WORDS, ["--allow-leak", shelf]):
        for more in "--top-k 1", "--top-k 2 --shared 1":
            b = built("--router", router, *flags, more, small=small)
            dense = built("--router dense", *flags, more, small=small)
            s, T = b.settings, b.data.tokens
            # of a token and block: a gate, but soft's logits, dispatch, combine for T * K slots
            columns = {"soft": 3 * T * s.top_k, "hash": 0}.get(router, s.experts)
            routing = 2 * T * s.dim * columns * len(s.moe_blocks) / 1e9
            cost = train.measure_flops(dense.data, dense.model) + routing
            within = 1e-9 if router not in ("sparse_token_choice", "cosine") else 0.03
            assert train.measure_flops(b.data, b.model) == pytest.approx(cost, rel=within)
            expert = 2 * s.dim * s.hidden + s.dim + s.hidden
            idle = (s.experts - s.top_k) * expert * len(s.moe_blocks)
            assert train.idle_parameters(b.model, T) == pytest.approx(idle)
            if b.model.blocks[-1].ffn.router.chooses == "tokens":  # more slots, but no more experts
                b = built("--router", router, *flags, more, "--capacity-factor 2", small=small)
                assert train.idle_parameters(b.model, T) == pytest.approx(idle)


def test_a_bench_times_a_layer_of_every_router_against_a_dense_one(monkeypatch):
    monkeypatch.setattr(train, "BENCH_SECONDS", 1e-6)
    text = run("--bench --dim 8 --hidden 16 --experts 4 --top-k 2 --priority gate")
    assert re.search(r"\| ms +\| time / dense \|", text)
    for name in ROUTERS:
        assert len(re.findall(rf"\| {name} +(?:\| [\d.]+ +){{2}}\|", text)) == 1


# ================================================================ training
def step_by_hand(b, step, moments):
    """One step of that model in plain words, on its whole batch at once; the gradient's norm."""
    s, names = b.settings, dict(b.model.named_parameters())
    loss, _, routings = b.data.loss(b.model.train(), b.data.batch(step))
    for routing in routings.values():
        loss = loss + 0.1 * routing.losses["balance"] + 0.2 * routing.losses["z"]
    gradients = torch.autograd.grad(loss, names.values())
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt().item()
    rate = s.lr * (step + 1) / 3  # it rises in 3 of 30 steps
    if step >= 3:
        rate = s.lr * (1 + math.cos(math.pi * (step - 3) / 27)) / 2
    for (name, parameter), gradient in zip(names.items(), gradients):
        m, v = moments.get(name, (0, 0))
        gradient = gradient * min(1, 1 / (norm + 1e-6))
        moments[name] = m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        own, decay = rate, 0.05
        if ".router." in name:
            own, decay = 0.5 * rate, 0
        elif re.search(r"norm|bias|position|\bb[12]$", name):
            decay = 0
        move = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        parameter.data.mul_(1 - own * decay).sub_(own * move)
    for routing in routings.values():
        routing.router.update([routing])
    return norm


def test_steps_equal_those_written_out_by_hand(album, monkeypatch):
    monkeypatch.setitem(train.BALANCE, "st_moe", {"balance": 0.1, "z": 0.2})
    flags = """--router token_choice --balance st_moe --bias-rate 0.1 --shared 1
        --top-k 2 --router-lr 0.5 --lr 0.1 --steps 30 --dtype float64 --moe-blocks 0,1"""
    b, twin, moments, norms = built(flags, album), built(flags, album), {}, []
    for step in range(8):
        stepped = step_of(b, step)
        norms.append(step_by_hand(twin, step, moments))
        assert float(stepped.losses["grad_norm"]) == pytest.approx(norms[-1], rel=1e-6)
        same(b.model.state_dict(), twin.model.state_dict(), 1e-6)
    assert max(norms) > 1.2 and min(norms) < 0.9  # clipped or not
    assert b.model.blocks[1].ffn.router.bias.abs().max() > 0.05


@pytest.mark.parametrize("flags", ["--noise-std 4", "--router-weights random"])
def test_noise_and_random_gates_are_drawn_anew_at_each_step_and_the_same_again(flags, album):
    b = built("--router token_choice --lr 0", flags, album)
    b.data.batch, losses = Mock(return_value=b.data.batch(0)), []
    for step in 0, 1, 2, 1, 2:  # a random gate is drawn at the end of the step before
        losses.append(float(step_of(b, step).sums["loss"]))
    assert losses[2] == losses[4] != losses[1]


def test_statistics_of_a_routing_worked_out_by_hand():
    ones, gates = torch.ones(1, 1, 2, 1), torch.tensor([[[0.25, 0.75]]])
    stats = train.block_stats(train.block_sums({0: Routing(ones, ones, gates=gates)}))[0]
    assert stats["load_max"] == 1 and stats["entropy"] == pytest.approx(0.811278, abs=1e-5)
    wants = torch.tensor([[[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]]).bool()
    seats = torch.tensor([[[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]]]).bool()
    sums = train.block_sums({1: HardRouting(None, seats, torch.ones(1, 4, 3), 2, wants=wants)})
    expected = {"load_max": 2, "dead": 1, "dropped": 0.5, "entropy": 0}
    assert train.block_stats(sums)[1] == pytest.approx(expected)


def test_a_bug_in_a_readers_router_keeps_its_traceback(monkeypatch, album, here):
    def logits(self, x):
        one, two = x.shape  # there are three

    monkeypatch.setattr(TokenChoice, "logits", logits)
    with pytest.raises(ValueError, match="too many values to unpack"):
        train.main(words_of([SMALL, album, "--router token_choice --out run"]))
    monkeypatch.setattr(train, "make_router", Mock(side_effect=KeyError("tau")))
    assert "'tau' (KeyError, " in refused(SMALL, album, "--router token_choice --out other")


def test_no_number_that_is_not_finite_is_ever_written(shelf, here):
    run(WORDS, shelf, "--router token_choice --lr 30 --steps 6 --out run")
    lines = lines_of("run")
    assert max(line["loss"] for line in lines) > 88  # in float32, its exponential is no number
    assert all("perplexity" in line for line in lines)
    json_of(here / "run/summary.json")


# ================================================================ text and the GPT
def gpt(shelf, *flags):
    """The small run of these flags in float64, and 3 sequences of tokens for it."""
    b = built(shelf, "--dtype float64", *flags, small=WORDS)
    b.tokens = torch.randint(b.data.vocab_size, (3, 16), generator=moe_vision.seeded("sequences"))
    return b


BY_PREFIX = "--router token_choice --unit sequence --prefix 4"
CAUSAL = [
    "--router token_choice",
    "--router token_choice --balance bias --capacity-factor 1",
    "--router token_choice --router-weights frozen --scope global",
    "--router sigmoid --top-k 2",
    "--router hash",
    "--router expert_threshold --scope global",
    BY_PREFIX,
    BY_PREFIX + " --top-k 2 --scope global",
    "--router hash --unit sequence",
]
LEAKY = [
    "--router expert_choice",
    "--router soft",
    "--router token_choice --capacity-factor 1 --priority gate",
    "--router token_choice --unit sequence --pool mean",
    BY_PREFIX + " --score-from 1",
]


@pytest.mark.parametrize("flags", CAUSAL + LEAKY)
def test_a_gpt_lets_no_later_token_nor_another_sequence_in_unless_it_says_so(flags, shelf):
    b = gpt(shelf, flags, *["--allow-leak"] * (flags in LEAKY))
    moved, first, context = 0.0, b.settings.score_from, b.settings.context
    b.model.train()
    with torch.no_grad():
        out = b.model(b.tokens)[0]
        for t in range(first, context):
            changed = b.tokens.clone()
            changed[1, t] = (changed[1, t] + 1 + t) % 300
            difference = (b.model(changed)[0] - out).abs().amax(-1)  # [3, T]
            assert difference[1, t] > 1e-6 and difference[[0, 2]].max() < 1e-10
            moved = max(moved, difference[1, first - 1 : t].max().item())
        assert (moved > 1e-6) == (flags in LEAKY) == (b.settings.label == "leaky"), moved
        if flags not in LEAKY:  # as it writes, it says of a beginning what it says of the whole
            options = str([moe.router.options for moe in b.model.moes()])
            with train.dropless(b.model.eval()):
                for t in range(first, context):
                    same(b.model(b.tokens[:, :t])[0], b.model(b.tokens)[0][:, :t], 1e-10)
            assert options == str([moe.router.options for moe in b.model.moes()])  # as before


def test_a_sequence_goes_whole_to_what_its_prefix_chooses_and_a_global_routing_serves_all(shelf):
    b = gpt(shelf, BY_PREFIX, "--top-k 2")
    _, owner, _ = b.data.labels(b.data.batch(0), 3)["token class"]
    assert torch.equal(owner, torch.arange(3, 3 + len(owner))[:, None].expand(owner.shape))
    model = b.model
    moe, x = model.blocks[0].ffn, draw(5, 16, 16)
    routing = model.route(moe, x, torch.zeros(5, 16, dtype=torch.long))
    same(routing.tensors(), moe.router(x[:, :4].mean(1)[None]).tensors())
    b = gpt(shelf, "--router token_choice --scope global --router-weights random")
    routings = b.model(b.tokens)[1]
    assert len(routings) == 2 and routings[0] is routings[1]
    alone, both = b.data.loss(b.model, b.data.batch(0))[2][0], step_of(b, 0).losses
    assert both["balance"].item() == pytest.approx(alone.losses["balance"].item())  # counts once


SCRIPT = """def naïve(x):\r\n\t return x  ** 2 # 日本語 \U0001f600\n\n
    self.self_self = "'''" + 'ß' * 12345\n"""


def test_the_tokenizer_brings_back_any_bytes_and_gives_the_ids_that_all_numbers_rest_on():
    tokenizer = moe_tokens.Tokenizer.learn([SCRIPT.encode() * 3, b"the theatre then the end"], 280)
    pieces, g = tokenizer.pieces, random.Random(0)
    assert pieces[:256] == [bytes([i]) for i in range(256)] and len(set(pieces)) == 280
    assert pieces[256:260] == [b"self_self", b"\n\n\n    ", " naïve".encode(), b" 12345"]
    ids = tokenizer.encode("def naïves(self):\n    return 'ß日' ** 123 then".encode()).tolist()
    expected = [264, 258, 115, 40, 262, 41, 58, 10, 267, 267, 260, 270, 279, 230, 151, 165, 39, 271]
    assert ids == expected + [42, 32, 49, 50, 51, 32, 116, 104, 101, 110]
    samples = [b"", SCRIPT.encode(), bytes(range(256)) + b"\xff\xfe", b"a" * 99_999]
    for text in samples + [g.randbytes(g.randrange(1, 60)) for _ in range(300)]:
        assert tokenizer.to_text(tokenizer.encode(text)) == text
    tokenizer = moe_tokens.Tokenizer([b" the", b"at", b"atre"])
    words = [tokenizer.pieces[i] for i in tokenizer.encode(b" theatre x")]
    assert words == [b" the", b"atre", b" ", b"x"]  # the longest beginnings


def test_the_standard_library_has_topics_and_tokens_have_classes():
    topics = {document.topic for document in moe_tokens.read_documents(None)}
    assert {"asyncio", "json", "random"} <= topics and not topics & {"test", "encodings"}
    code, prose = list(moe_tokens.CODE), list(moe_tokens.PROSE)
    expected = {" if": "keyword", " self": "name", " =": "operator", "(": "bracket", " 1": "number"}
    expected |= {"#": "string or comment mark", "  ": "blank", "\n    ": "newline and indent"}
    for piece, name in expected.items():
        assert code[moe_tokens.token_class(256, piece.encode(), moe_tokens.CODE)] == name
    assert prose[moe_tokens.token_class(256, b" The", moe_tokens.PROSE)] == "function word"
    assert code[moe_tokens.token_class(40, b"(", moe_tokens.CODE)] == "raw byte"


def test_windows_lie_within_documents_which_are_divided_by_topic(shelf):
    data = gpt(shelf, "--router dense --score-from 5").data
    documents = moe_tokens.read_documents(overrides_of(shelf)["data"])
    kept, held = moe_tokens.divide(documents)
    assert sorted(kept + held) == sorted(documents)
    assert collections.Counter(document.topic for document in held) == {"de": 4, "en": 4, "it": 4}
    (start,), (end,) = moe_tokens.divide([moe_tokens.Document("", "x", b"1234567890")])
    assert (start.raw, end.raw) == (b"123456789", b"0")
    alone = [moe_tokens.Document(str(i), str(i), b"x") for i in range(20)]
    assert len(moe_tokens.divide(alone)[1]) == 2  # topics of one document are taken together
    for part, chosen in ("train", kept), ("validation", held):
        batch = data.ready(part, np.arange(data.sizes[part]))
        topic = data.topic_of[batch["document"]]
        for tokens, label, place in zip(batch["input"], batch["label"], topic):
            text = data.tokenizer.to_text(tokens)
            assert any(text in raw for of, _, raw in documents if of == data.topics[place])
            assert (label[:4] == -100).all() and torch.equal(label[4:-1], tokens[5:])
        lengths = [len(data.tokenizer.encode(document.raw)) for document in chosen]
        assert len(topic) == sum((length - 1) // 16 for length in lengths)
        spelled = [len(data.tokenizer.pieces[i]) for i in batch["label"][0, 4:]]
        assert batch["bytes"][0].tolist() == [0, 0, 0, 0, *spelled]
    order = torch.cat([data.batch(step)["input"] for step in range(data.sizes["train"] // 4)])
    assert len(order.unique(dim=0)) > 0.9 * len(order)  # an epoch meets each window once
    order = torch.cat([moe_vision.rows_of_step(1, step, 3, 4) for step in range(4)]).view(3, 4)
    assert (order.sort(1).values == torch.arange(4)).all()  # also where a batch spans two epochs
    same(data.batch(1, part=slice(1, 3))["input"], data.batch(1)["input"][1:3], 0)


def test_nanogpt_files_are_mapped_trained_on_and_say_their_vocabulary(here):
    (here / "bins").mkdir()
    for modulus, vocabulary in (65, 128), (50, 64):  # rounded up
        for name, length in ("train.bin", 1000), ("val.bin", 100):
            (np.arange(length) % modulus).astype(np.uint16).tofile(here / "bins" / name)
        b = built("--router token_choice --data bins", small=WORDS)
        assert b.data.vocab_size == len(b.model.embed.weight) == vocabulary
        batch = b.data.batch(0)
        assert torch.equal((batch["input"] + 1) % modulus, batch["label"])
    assert b.data.stored["train"][0].strides == (16 * 2, 2)  # windows lie in the file, uncopied
    text = run(WORDS, "--router token_choice --data bins --out run")
    assert "perplexity" in text and "bits/byte" not in text  # no tokenizer counts bytes


WRONG_TEXT = [(flags, "--allow-leak runs it, every number labeled leaky") for flags in LEAKY]
WRONG_TEXT += [
    ("--router expert_choice --unit sequence", "--unit sequence needs a dropless router"),
    ("--router hash --unit sequence --capacity-factor 1", "needs a dropless router"),
    ("--router dense --data nowhere", "nowhere holds no text, or does not exist"),
    ("--router dense --context 999", "too few for --batch-size 4"),
    ("--router dense --data latin.txt", "latin.txt is not UTF-8 at byte 2"),
    ("--router dense --data odd", "must hold more than 16 tokens of two bytes each, got 33 bytes"),
    ("--router dense --vocab-size 255", "--vocab-size must be at least 256"),
]


@pytest.mark.parametrize("flags, rule", WRONG_TEXT)
def test_a_wrong_text_or_axis_gets_one_line(flags, rule, here):
    (here / "one.txt").write_text("one two three four " * 100)
    (here / "latin.txt").write_bytes(b"na\xefve " * 400)
    (here / "odd").mkdir()
    (here / "odd/train.bin").write_bytes(b"\0" * 33)
    data = [] if "--data" in flags else ["--data one.txt"]
    assert rule in refused(WORDS, *data, flags)
    assert not (here / "runs").exists()


def test_a_leak_is_labeled_on_every_line_and_vanishes_when_the_model_generates(shelf, here):
    text = run(WORDS, shelf, "--router expert_choice --allow-leak --out run")
    assert "router expert_choice (leaky)" in text and "| expert_choice (leaky) |" in text
    assert all(line["label"] == "leaky" for line in lines_of("run"))
    b = built(shelf, "--router expert_choice --allow-leak", small=WORDS)
    b.model.load_state_dict(checkpoint_of("run")["model"])
    (whole,), total = b.data.batches("validation"), 0.0
    held = len(whole["input"])
    batch = {name: value[:: held // 32][:32] for name, value in whole.items()}
    with torch.no_grad():
        scored = b.data.loss(b.model, batch)[0].item()
        for t in range(16):
            logits = b.model(batch["input"][:, : t + 1])[0][:, -1]
            total += F.cross_entropy(logits, batch["label"][:, t]).item() / 16
    summary = json_of(here / "run/summary.json")
    for way, loss in ("as_generated", total), ("as_scored", scored):
        assert summary[way]["loss"] == pytest.approx(loss, rel=1e-4)
    gap = summary["as_generated"]["bits_per_byte"] - summary["as_scored"]["bits_per_byte"]
    expected = summary["validation"]["bits_per_byte"] + gap
    assert summary["cells"]["as generated"] == pytest.approx(expected)


def test_a_finished_run_writes_on_from_a_prompt_or_says_why_not(shelf, here):
    run(WORDS, shelf, "--router expert_threshold --out a")
    run(WORDS, shelf, "--router token_choice --unit sequence --prefix 8 --out b")
    texts = []
    for extra in "--temperature 0", "--temperature 0", "--seed 1", "--seed 2":
        texts.append(run("--sample a --max-new-tokens 30", extra, "--prompt", "the cat"))
        assert texts[-1].startswith("the cat") and "sampled dropless" in texts[-1]
    assert texts[0] == texts[1] and texts[2] != texts[3]
    assert "needs at least 8 tokens in this run, got 4" in refused("--sample b --prompt", "the cat")
    (here / "b/checkpoint.pt").unlink()
    assert "b has no checkpoint yet" in refused("--sample b")


def test_sampling_draws_by_the_sharpened_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    model = Mock(side_effect=lambda tokens: (logits.expand(*tokens.shape, 4), {}), context=4)
    model.position, sharp = torch.zeros(1), np.array([0.25, 0.09, 0.0225, 0.0025])
    wanted = {1: [0.5, 0.3, 0.15, 0.05], 0: [1, 0, 0, 0], 0.5: sharp / sharp.sum()}
    for temperature, shares in wanted.items():
        tokens = moe_tokens.generate(model, [0], 400, temperature)[1:]
        assert np.allclose(np.bincount(tokens, minlength=4) / 400, shares, atol=0.08)


# ================================================================ what experts specialize in
def test_nmi_equals_values_worked_out_by_hand_and_its_null_permutes_whole_units():
    assert train.nmi(torch.ones(3, 5)) == pytest.approx(0)
    assert train.nmi(torch.tensor([[1.0, 0], [1, 0]])) == pytest.approx(0)
    p = torch.tensor([[0.5, 0.0], [0.25, 0.25]])  # H = 1 bit and 0.8113 bits, I = 0.3113 bits
    assert train.nmi(p * 7) == pytest.approx(0.311278 / math.sqrt(0.811278), abs=1e-5)
    unit = torch.arange(400) // 100  # 4 documents of 100 tokens, two topics
    label, weight = (unit >= 2).long(), F.one_hot(unit, 4).float()  # experts follow the document
    value, null = train.nmi_and_null(weight, label, unit)
    assert [value, *null] == pytest.approx([1 / math.sqrt(2)] * (1 + len(null)))  # any topic fits
    long = torch.cat([weight, weight[:1].expand(300, 4)])  # of the first document: no more weight
    known = train.nmi_and_null(long, F.pad(label, (0, 300)), F.pad(unit, (0, 300)))[0]
    assert known == pytest.approx(train.nmi(torch.tensor([[4.0, 1, 0, 0], [0, 0, 1, 1]])))
    value, null = train.nmi_and_null(weight, label, torch.arange(400))
    assert value > 0.7 and 0 < np.mean(null) <= np.quantile(null, 0.95) < 0.05 and len(null) >= 50


def test_patches_that_show_no_tile_are_not_counted(monkeypatch):
    monkeypatch.setattr(train, "EXAMINED", 2**12)  # sooner
    b = built("--router hash --patch 4")
    _, contingency = train.specialization(b.settings, b.data, b.model)
    kinds, tiles = (contingency[1][label][0] for label in ("patch kind", "tile"))
    assert kinds.sum() == 2048 * 64 and 0 < tiles.sum() == kinds[1:].sum()  # background has none


# ================================================================ the report page
def page_of(path):
    """A report page, which loads nothing, and the heights of its curves, {heading: [[y, ...]]}."""
    text, found = pathlib.Path(path).read_text("utf-8"), {}
    assert set(re.findall(r"https?://[^\"' <]*", text)) <= {"http://www.w3.org/2000/svg"}  # a name
    assert not re.search(r"\s(src|href)=(?![\"']?data:)", text)
    for heading, picture in re.findall(r"<figure><b>(.*?)</b>.*?(<svg.*?</svg>)", text, re.S):
        ElementTree.fromstring(picture)
        found[html.unescape(heading).split(":")[0]] = []
        for points in re.findall('points="(.*?)"', picture):
            heights = [float(point.split(",")[1]) for point in points.split()]
            found[html.unescape(heading).split(":")[0]].append(heights)
    return html.unescape(text), found


def test_a_report_of_images_holds_the_printed_table_curves_and_maps_and_is_clear(here):
    text = run(SMALL, "--router token_choice --capacity-factor 0.5 --steps 4 --out run")
    page, drawn = page_of("run/report.html")
    assert text.partition("\n")[2].rpartition("\n->")[0] in page and "drawn images" in page
    assert [name.split()[0] for name in drawn] == ["training", "load_max", "dropped", "entropy"]
    losses = [line["loss"] for line in lines_of("run")[:4]]
    (heights,) = drawn["training loss"]
    assert np.argsort(heights).tolist() == np.argsort(losses)[::-1].tolist()
    (kinds,) = re.findall("patch kind by expert</caption>(.*?)</table>", page, re.S)
    _, *rows = re.split("<th>(?:background|edge|interior)", kinds)
    for row in rows:
        shares = [int(share) for share in re.findall(r'">(\d+)', row)]
        assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=3) and shares[4] > 20
    assert len(rows) == 3 and all(f"expert {e}" in page for e in range(4))


def test_the_patches_of_an_expert_are_those_it_weighs_most_with_their_pixels_rounded():
    b = built("--router expert_choice")
    image = next(b.data.batches("test"))["image"]
    found = re.findall(r"data:image/bmp;base64,([^\"]*)", b.data.pictures(b.model, {}))
    assert len(found) == 4 * 16  # experts, and the best of each
    best = b.model(image)[1][1].expert_weights.flatten(0, 1).argmax(0)  # of B * T patches
    pixels = F.unfold((image * 0.25 + 0.5).clamp(0, 1) * 255, 8, stride=8)  # [B, 3 * 8 * 8, T]
    patches = pixels.mT.reshape(-1, 3, 8, 8).permute(0, 2, 3, 1)
    for e, raw in enumerate(map(base64.b64decode, found[::16])):
        place, width, height = struct.unpack_from("<I4xii", raw, 10)
        assert (width, height) == (8, -8)  # minus: the first row is on top
        shown = np.frombuffer(raw, np.uint8, offset=place).reshape(8, 8, 4)[..., 2::-1]
        assert np.abs(shown - patches[best[e]].numpy()).max() <= 0.5001


def test_a_report_of_text_colors_it_by_experts_and_names_their_commonest_tokens(shelf, here):
    text = run(WORDS, shelf, "--router hash --out run")
    page = pathlib.Path("run/report.html").read_text("utf-8")
    documents = moe_tokens.read_documents(overrides_of(shelf)["data"])
    windows = re.findall(r"<pre>(.*?)</pre>", page, re.S)
    for window in windows:
        shown = html.unescape(re.sub(r"<[^>]*>", "", window))
        assert any(shown in raw.decode() for _, _, raw in documents)  # a stretch of one document
    assert len(windows) == 3 * 2
    found, *_ = json_of(here / "run/summary.json")["specialization"]
    assert (found["block"], found["experts know of"]) == (0, "token class")
    assert found["NMI"] > found["by chance, 95 %"] > found["by chance"]  # tables know the class
    assert found["above chance"] == found["NMI"] - found["by chance"]
    table = checkpoint_of("run")["model"]["blocks.1.ffn.router.table"]
    pieces = built(shelf, "--router hash", small=WORDS).data.tokenizer.pieces
    expert = table[pieces.index(b" gatto")]
    assert re.search(rf"block 1, expert {expert}: .*\bgatto\b", text)
    weights, pieces = torch.tensor([[0.5, 0], [0, 0], [0.1, 0.2]]), [b"a", b"b", b"c"]
    painted = moe_tokens.painted(torch.arange(3), weights, pieces)
    shown = re.findall(r"background:(.*?)\">(\w)", painted)
    assert [letter for _, letter in shown] == ["a", "b", "c"] and len(dict(shown)) == 3
    assert shown[1][0] == "#c8c8c8"  # gray: no expert


# ================================================================ grids and tables
def table_of(grid):
    """The words of a grid's table, and its rows, each {head: cell}."""
    text, rows = pathlib.Path(grid, "results.md").read_text(), []
    for line in text.splitlines():
        if line.startswith("| ") and "| --" not in line:
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    return text, [dict(zip(rows[0], row)) for row in rows[1:]]


def test_a_grid_runs_equal_cells_once_and_keeps_what_is_finished(here, album):
    flags = "--router dense token_choice --priority choice gate --capacity-factor none 1 --seed 0 1"
    text = run(SMALL, album, flags, "--steps 1 --out g")
    folders = {path.parent: path.stat().st_mtime_ns for path in here.glob("g/*/summary.json")}
    shown, rows = table_of("g")
    found = sorted((row["router"], row["priority"], row["capacity_factor"]) for row in rows)
    hard = ("choice", "1.0"), ("choice", "none"), ("gate", "1.0")  # dropless, no line: one run
    assert found == [("dense", "-", "-"), *[("token_choice", *cell) for cell in hard]]
    assert len(folders) == 8 and shown.strip() in text
    lost = next(here.glob("g/dense*seed_1-*"))
    (lost / "summary.json").unlink()
    run(SMALL, album, flags, "--steps 1 --out g")
    again = {path.parent: path.stat().st_mtime_ns for path in here.glob("g/*/summary.json")}
    changed = [folder for folder in again if again[folder] != folders[folder]]
    assert again.keys() == folders.keys() and changed == [lost]
    run(SMALL, album, "--router dense --lr 1e30 0.01 --steps 1 --out h", status=1)
    shown, rows = table_of("h")
    assert "Left out, not finished or not readable: dense-seed_0-" in shown and len(rows) == 1


def test_a_table_tells_means_ties_and_single_seeds_and_no_leaky_row_is_the_best(shelf, here):
    bits = {"token_choice": (2, 2.2), "expert_choice": (1, 1), "hash": (2.15, 2.25)}
    bits["sigmoid"] = 3, 3
    run(WORDS, shelf, "--allow-leak --seed 0 1 --steps 1 --out g --router", *bits)
    for i, (router, seed) in enumerate(itertools.product(bits, (0, 1))):
        (path,) = here.glob(f"g/{router}-seed_{seed}-*/summary.json")
        summary, value = json_of(path), bits[router][seed]
        assert summary["score"] == -summary["cells"]["bits/byte"]
        summary["cells"] |= {"GFLOPs": 1.0 + i // 2, "bits/byte": value}
        path.write_text(json.dumps(summary | {"score": -value}))
    run("--table g")
    shown, rows = table_of("g")
    verdicts = [f"{row['router']}: {row['to the best']}, {row['bits/byte']}" for row in rows]
    expected = ["expert_choice (leaky): +1.1, 1", "token_choice: best, 2.1 ± 0.141"]
    assert verdicts == expected + ["hash: tie, 2.2 ± 0.0707", "sigmoid: -0.9, 3"]
    page, drawn = page_of("g/report.html")
    heights = [[1] * 4, [0.5, 0.4] * 2, [0.425, 0.375] * 2, [0] * 4]  # of two seeds, twice
    assert shown.strip() in page and drawn["bits/byte"] == heights
    assert re.findall(r'points="([\d.]+)', page) == ["0.3333", "0.0000", "0.6667", "1.0000"]
    (path,) = here.glob("g/hash-seed_1*/summary.json")
    path.write_text('{"test"')
    run("--table g")
    shown, rows = table_of("g")
    assert {row["to the best"] for row in rows if row["router"] == "hash"} == {"one seed"}
    assert f"Left out, not finished or not readable: {path.parent.name}" in shown


def test_all_routers_leave_out_those_that_cannot_and_add_both_dense_models(shelf, here):
    text = run(WORDS, shelf, "--router all --steps 1 --shared 1 --out y")
    assert text.count("left out: expert_choice: --router expert_choice is not causal") == 1
    names = sorted(path.parent.name.split("-")[0] for path in here.glob("y/*/summary.json"))
    assert names == ["dense", "dense", "expert_threshold", "hash", "sigmoid", "token_choice"]


# ================================================================ runs that survive
FORK = multiprocessing.get_context("forkserver")  # children of a process that has torch loaded
FORK.set_forkserver_preload([__name__])


@contextlib.contextmanager
def minutes(death=None):
    """Inside, a step of --data mine takes a minute, and the batch of step `death` is the end."""
    batch, clock = Mine.batch, [0]

    def batch_by_the_clock(self, step, part=slice(None)):
        if step == death:
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(step, int):  # else it names a split
            clock.append(60 * step)
        return batch(self, step, part)

    mine, slow = dict(mine=Mine), patch.object(Mine, "batch", batch_by_the_clock)
    ticks = patch.object(time, "perf_counter", lambda: max(clock))
    with patch.dict(moe_vision.DATASETS, mine), slow, ticks:
        yield


def killed(words, death):
    with minutes(death):
        train.main(words)


def test_a_run_killed_twice_ends_as_one_that_was_not(here):
    flags = "--router expert_threshold --shared 1 --data mine --steps 12 --save-every 3"
    common = words_of([SMALL, flags])
    with minutes():
        assert train.main([*common, "--out", "a"]) == 0
    steps = []
    for words, death in ([*common, "--out", "b"], 6), (["--resume", "b"], 9):
        child = FORK.Process(target=killed, args=(words, death))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL and not (here / "b/summary.json").exists()
        steps.append((checkpoint_of("b")["step"], lines_of("b")[-1]["step"]))
        with open("b/metrics.jsonl", "ab") as file:
            file.write(b'{"step": 39, "lo' * 9999)  # as if it had died in the middle of a line
    assert [saved < logged for saved, logged in steps] == [True, True] and steps[0] < steps[1]
    with minutes():
        assert train.main(["--resume", "b"]) == 0
    same_runs("a", "b")


def test_a_resumed_run_counts_its_log_from_the_checkpoint(here):
    b, folder = built("--router dense"), here / "run"
    optimizer = train.make_optimizer(b.settings, b.model)
    for _ in range(2):
        record = train.Record(b.settings, folder)
        step = record.restore(b.data, b.model, optimizer)
        record.begin({}, b.data)
        record.save(step + 1, b.model, optimizer)
        assert checkpoint_of("run")["metrics_end"] == 0  # no line is older than the checkpoint
        record.log(step + 2, {"loss": 1.0})
        del record  # killed


def test_checkpoints_are_saved_by_the_minute_or_after_every_step(here):
    for flag, saves in ("--save-every 0", 6), ("--save-every 2", 3), ("--save-every 99", 1):
        with minutes(), patch.object(torch, "save", wraps=torch.save) as save:
            run(SMALL, "--router dense --data mine --steps 6 --out", f"run {saves}", flag)
        assert save.call_count == saves


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first(number, status, here, mine):
    flags = SMALL, "--data mine --steps 6 --router expert_threshold --out"
    run(*flags, "a")
    mine[3] = lambda: os.kill(os.getpid(), number)
    text = run(*flags, "b", status=status)
    mine.clear()
    step = checkpoint_of("b")["step"]
    assert step in (3, 4) and f"interrupted after {step} of 6 steps; --resume b goes on" in text
    assert "b is at step" in refused("--resume b --steps 2")
    assert "--out b is not empty" in refused(*flags, "b")
    run("--resume b --log-every 1 --save-every 0")
    same_runs("a", "b")


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(here, capsys, mine):
    images = Mine.batch

    def bad(self, step, part=slice(None)):
        batch = images(self, step, part)
        return batch | {"image": batch["image"] * (math.nan if step == 4 else 1)}

    with patch.object(Mine, "batch", bad):
        run(SMALL, "--data mine --router token_choice --steps 9 --save-every 0 --out run", status=1)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search("^train.py: run diverged at step 5: loss nan, gradient norm nan", line)
    saved = checkpoint_of("run")
    assert saved["step"] == 4 and len(lines_of("run")) == 4  # every line is JSON
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    run("--resume run")
    run(SMALL, "--data mine --steps 1 --lr 1e30 --out one", status=1)  # its step is finite
    assert "one diverged at step 1: the new weights" in capsys.readouterr().err
    assert not (here / "one/checkpoint.pt").exists()


def write_data(kind, folder, seed):
    """Data of that kind, all of the same sizes; returns the flags for it."""
    folder.mkdir(exist_ok=True)
    g = np.random.default_rng(seed)
    if kind == "npz":
        write_npz(folder / "data", x_train=g.integers(0, 256, (20, 16, 16, 3), np.uint8))
        os.replace(folder / "data.npz", folder / "data")
    elif kind == "text":
        (folder / "data").write_text(" ".join(map(str, g.integers(100, 999, 600))))
    else:
        (folder / "data").mkdir(exist_ok=True)
        for name in "train.bin", "val.bin":
            g.integers(0, 60, 400, np.uint16).tofile(folder / "data" / name)
    small = SMALL if kind == "npz" else f"{WORDS} --vocab-size 320"
    return f"{small} --batch-size 4 --router dense --data data"


@pytest.mark.parametrize("kind", ["npz", "text", "bin"])
def test_resume_finds_its_data_from_any_folder_and_refuses_other_data(kind, here):
    flags = write_data(kind, here / "home", seed=0)
    write_data(kind, here / "away", seed=1)
    os.chdir(here / "home")
    text = run(flags, "--out run")
    os.chdir(here / "away")
    assert run("--resume ../home/run").partition("\n->")[0] == text.partition("\n->")[0]
    write_data(kind, here / "home", seed=2)  # changed in place
    assert "was trained on other data" in refused("--resume ../home/run --steps 5")


@pytest.mark.parametrize("content", [b"", pickle.dumps(Bomb(), protocol=2)])
def test_a_damaged_checkpoint_gets_one_line_and_is_left_alone(content, here, mine):
    run(SMALL, "--data mine --router dense --out run")
    (here / "run/checkpoint.pt").write_bytes(content)
    refused("--resume run --steps 9")
    assert (here / "run/checkpoint.pt").read_bytes() == content and not list(here.glob("exploded"))


def test_a_run_folder_in_use_is_refused_but_a_disk_without_locks_is_not(here, mine, monkeypatch):
    run(SMALL, "--data mine --router dense --out run")
    before = {path: path.read_bytes() for path in (here / "run").iterdir()}
    with open("run/metrics.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "run is in use: another process trains there" in refused("--resume run --steps 9")
    assert before == {path: path.read_bytes() for path in (here / "run").iterdir()}
    monkeypatch.setattr(train, "flock", Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    run("--resume run --steps 5")


def test_a_full_disk_gets_one_line_and_what_was_saved_stays_whole(here, mine):
    run(SMALL, "--data mine --router dense --out run")
    before = (here / "run/checkpoint.pt").read_bytes()
    full = [None, OSError(28, "No space left on device")]  # config.json goes well
    with patch.object(os, "replace", Mock(side_effect=full)):
        assert "No space left on device" in refused("--resume run --steps 9")
    assert (here / "run/checkpoint.pt").read_bytes() == before
    assert not list(here.glob("run/*.part"))


# ================================================================ many processes
def one_of_two(rank, ports, commands):
    """A process as torchrun starts it, for one command line after another."""
    torch.set_num_threads(1)
    for port, words in zip(ports, commands):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        assert train.main(words) == 0


def in_two_processes(commands):
    """Run these command lines, each in two processes together."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    given = ports, list(map(words_of, commands))
    children = [FORK.Process(target=one_of_two, args=(rank, *given)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(150)
        child.kill()
        assert child.exitcode == 0


SHARED = [  # task, router, and what is special about a run that two processes share
    "vision token_choice --balance vmoe --noise-std 1 --top-k 2 --shared 1",
    # of six experts, a share of 1/6 is rounded: with this seed, a sign of such shares would differ
    "vision token_choice --balance bias --experts 6 --steps 60 --batch-size 6 --seed 1",
    "vision token_choice --balance quantile --experts 6 --steps 12",
    "vision expert_threshold --noise-std 1 --router-lr 0.5 --experts 3",
    "vision sparse_expert_choice",
    "vision soft",
    "vision sigmoid --router-weights random",
    "tokens sigmoid --bias-rate 0.1 --capacity-factor 0.5 --experts 3",
    "tokens hash",
]


def test_two_processes_take_the_steps_of_one_and_count_its_blocks(album, here):
    pathlib.Path("one.txt").write_text(" ".join(random.Random(0).choices(SCRIPT.split(), k=900)))
    tasks = {"vision": [SMALL, album], "tokens": [WORDS, "--vocab-size 320 --data one.txt"]}
    runs = []
    for line in SHARED:
        task, more = line.split(" ", 1)
        common = f"--dtype float64 --lr 0.02 --seed 2 --batch-size 12 --router {more} --out"
        runs.append([*tasks[task], common])
    in_two_processes([[*flags, f"two {i}"] for i, flags in enumerate(runs)])
    for i, flags in enumerate(runs):
        run(*flags, f"one {i}")
        want, got = (json.dumps(lines_of(f"{count} {i}")) for count in ("one", "two"))
        number = r"-?\d[\d.e-]*"  # of losses, and of the load and drops of blocks
        assert re.sub(number, "", got) == re.sub(number, "", want)
        got, want = (np.array(re.findall(number, text), float) for text in (got, want))
        assert np.allclose(got, want, rtol=1e-6, atol=1e-8), SHARED[i]
        same(checkpoint_of(f"two {i}")["model"], checkpoint_of(f"one {i}")["model"], 1e-9)


# ================================================================ README.md
def python(*words):
    """What a Python program prints that runs in this folder, and has to succeed."""
    given = dict(capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    ran = subprocess.run([sys.executable, *words], **given)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-2000:]
    return ran.stdout


def test_readmes_python_blocks_run_and_its_router_and_ones_own_become_flags(here, album):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    (added,) = [block for block in blocks if block.startswith("class")]
    assert len(blocks) > 1 and len(added.splitlines()) <= 15
    for block in blocks:
        if block != added:
            exec(block, {})
    for path in *ROOT.glob("*.py"), __file__:
        shutil.copy(path, here)
    with open("routers.py", "a") as file:
        file.write(f"\n\n{added}\n\nclass Warm(TokenChoice):\n")
        file.write('    defaults = dict(warmth=1.0, x=None)\n\n\nROUTERS["warm"] = Warm\n')
    option = re.search(r"defaults = dict\((\w+)=", added)[1].replace("_", "-")
    name = re.search(r"ROUTERS\[\"(\w+)\"\]", added)[1]
    code = "import train; print([train.main(words.split()) for words in %r])"
    flags = "--warmth 0.5 --x 3 --router warm --out w", f"--{option} 0.5 --router {name} --out r"
    lines = [f"{SMALL} {album} {more}" for more in flags]
    assert python("-c", code % lines).endswith("[0, 0]\n")
    s = json_of(here / "w/config.json")["settings"]
    assert (s["warmth"], s["x"], s["capacity_factor"]) == (0.5, 3, None)
    found = python("-m", "pytest", "-q", pathlib.Path(__file__).name, "-k", f"{name} and not graph")
    assert int(re.search(r"(\d+) passed", found)[1]) >= 20


@pytest.mark.parametrize("page", ["README.md", ".github/RESULTS.md"])
def test_the_links_of_a_page_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    assert len(links) > 2
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            path = (ROOT / page).parent / path if path else ROOT / page
            anchors = [""]
            if path.suffix == ".md":
                for heading in re.findall(r"^#+ (.*)$", path.read_text(), re.M):
                    anchors.append(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
            assert path.exists() and anchor in anchors, link


def test_readme_stays_a_lesson():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2300
