"""Mixture-of-experts routers behind one formulation: a dispatch tensor and a combine tensor.

A mixture of experts (MoE) holds E small networks, the experts, where a transformer has one. A
router decides which expert works on which token, and fills two tensors, both [G, T, E, C]:

    slots[g,e,c] = sum_t      dispatch[g,t,e,c] * x[g,t]                  what enters each slot
    y[g,t]       = sum_{e,c}  combine[g,t,e,c]  * expert_e(slots[g,e,c])  what comes back

Axes, the same letters in every file:
    G  groups that are routed independently (an image, a sequence)     T  tokens in a group
    D  width of a token                                                E  experts
    C  slots, or capacity, of one expert in one group                  K  choices of one token

An example, token choice: one group of three tokens, one choice a token, and three experts with two
slots each (capacity_factor=2). The gates, softmax(logits), are

              expert 0  expert 1  expert 2
    token 0      .5        .3        .2        All three like expert 0 best. It has two slots:
    token 1      .6        .1        .3        tokens 0 and 1 are first in line and take them,
    token 2      .7        .2        .1        token 2 finds none left and is dropped.

    dispatch[0,0,0,0] = 1       combine[0,0,0,0] = .5       y[0,0] = .5 * expert_0(x[0,0])
    dispatch[0,1,0,1] = 1       combine[0,1,0,1] = .6       y[0,1] = .6 * expert_0(x[0,1])
    all others are 0            all others are 0            y[0,2] = 0

Words, the same in every file:
    gate        the layer that makes logits [G, T, E] from tokens
    gates       softmax(logits), unless a router says otherwise
    plan        logits or gates rebalanced, so that all experts get about the same
    scores      what decides a routing, and what weighs its outputs: gates or a plan
    load        the share of all assignments that ask for each expert
    assignment  one token sent to one expert; it is dropped if that expert has no slot left
    line        the order in which assignments ask for slots
    dropless    C is as large as the fullest expert needs, so that no assignment is dropped

arXiv 2401.15969, Routers in Vision Mixture of Experts, has six of the routers below: TokenChoice
and its Sinkhorn form, ExpertChoice and its Sinkhorn and sparse forms, and Soft. "As published" is
the code in google-research/vmoe at commit 942a78b; "Differs:" says where this code departs from
the paper or code named beside it.

Read in order. To add a router, subclass one and add it to ROUTERS. Not here: expert parallelism,
padding.
"""

import colorsys
import copy
import functools
import hashlib
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- the formulation
class Routing:
    """What a router decided. tensors() is the decision, dispatch(x) and combine(y) apply it. Also:

    load    [E], each expert's share of all assignments, before drops (of Soft: of all weight)
    losses  {name: scalar}, not yet weighted
    router  the router that made it
    notes   whatever else is worth keeping (logits, gates, ...), as attributes
    """

    def __init__(self, dispatch, combine, load, losses=None, **notes):
        self._dispatch, self._combine = dispatch, combine
        self.load = load
        self.losses = losses or {}
        vars(self).update(notes)

    def tensors(self):
        """The definition: dispatch and combine, both [G, T, E, C]."""
        return self._dispatch, self._combine

    def dispatch(self, x):
        """Tokens x [G, T, D] -> slots [G, E, C, D]: the first equation."""
        return torch.einsum("gtec,gtd->gecd", self._dispatch.to(x.dtype), x)

    def combine(self, y):
        """The experts' outputs y [G, E, C, D] -> tokens [G, T, D]: the second equation."""
        return torch.einsum("gtec,gecd->gtd", self._combine.to(y.dtype), y)

    def run(self, x, experts):
        """Both equations, with the experts at work between them: x [G, T, D] -> y [G, T, D]."""
        return self.combine(experts(self.dispatch(x)))

    def mass(self):
        """The weight that each token gives each expert, [G, T, E]."""
        return self._combine.sum(-1)

    def counts(self):
        """In how many slots each token sits, [G, T]; 0 means dropped. Soft: in all of them."""
        return (self._dispatch != 0).sum((2, 3))


class HardRouting(Routing):
    """A routing with at most one token in a slot: an index for each slot, a gather and a scatter.

    index   [G, E, C], the token in each slot; T where the slot is empty
    weight  [G, E, C], the combine weight of each slot; 0 where it is empty
    filled  None, or of a dropless routing how many slots each expert fills in all groups, a list:
            most slots are empty then, and experts that have ragged() run on these alone
    """

    def __init__(self, index, weight, tokens, load, losses=None, filled=None, **notes):
        super().__init__(None, None, load, losses, **notes)
        self.index, self.weight, self.tokens, self.filled = index, weight, tokens, filled
        # For each slot, in Experts' order [E, G, C]: its row in x.flatten(0, 1), and its weight.
        # Empty slots have one row more, G * T: zeros to read, and a place to write.
        group = torch.arange(len(index), device=index.device)[:, None, None]
        rows = torch.where(index < tokens, group * tokens + index, len(index) * tokens)
        self._rows, self._weights = rows.transpose(0, 1).flatten(), weight.transpose(0, 1).flatten()

    def tensors(self):
        dispatch = F.one_hot(self.index, self.tokens + 1)[..., :-1]  # [G, E, C, T]
        dispatch = dispatch.permute(0, 3, 1, 2).to(self.weight.dtype)  # [G, T, E, C]
        return dispatch, dispatch * self.weight[:, None]

    def dispatch(self, x):
        G, E, C = self.index.shape
        padded = F.pad(x.flatten(0, 1), (0, 0, 0, 1))  # [G * T + 1, D]
        slots = padded.index_select(0, self._rows)
        return slots.view(E, G, C, x.shape[-1]).transpose(0, 1)

    def combine(self, y):
        return self._add_up(y.transpose(0, 1).flatten(0, 2), self._weights, self._rows)

    def run(self, x, experts):
        if self.filled is None or not hasattr(experts, "ragged"):
            return super().run(x, experts)
        # The number of filled slots is known, so that nothing here waits for the device.
        taken = self._rows < len(self.index) * self.tokens
        slot = taken.nonzero_static(size=sum(self.filled)).flatten()  # [N], expert by expert
        rows = self._rows[slot]
        y = experts.ragged(x.flatten(0, 1).index_select(0, rows), self.filled)  # [N, D]
        return self._add_up(y, self._weights[slot], rows)

    def _add_up(self, y, weights, rows):
        """Add each slot's output, of y [N, D], times its weight to its row; -> [G, T, D]."""
        G, T = len(self.index), self.tokens
        weighted = y * weights[:, None].to(y.dtype)
        sums = y.new_zeros(G * T + 1, y.shape[-1]).index_add_(0, rows, weighted)
        return sums[:-1].unflatten(0, (G, T))

    def mass(self):
        return self._by_token(self.weight)

    def counts(self):
        return self._by_token(torch.ones_like(self.index)).sum(-1)

    def _by_token(self, values):
        G, E, _ = self.index.shape
        sums = values.new_zeros(G, E, self.tokens + 1).scatter_add(2, self.index, values)
        return sums[..., :-1].mT  # [G, T, E]


def top(scores, k, dim):
    """Indices of the k largest along dim, largest first. Unlike in torch.topk, ties keep order."""
    if k == 1:
        return scores.argmax(dim, keepdim=True)
    return scores.sort(dim=dim, descending=True, stable=True).indices.narrow(dim, 0, k)


def queue(wants, capacity):
    """wants [G, N, E] -> [G, E, C]: which of N places in line gets each slot, N where none does.

    Of the places that want an expert, the first gets its slot 0, the second slot 1, and so on: of
    wants 0 1 0 1 and three slots, place 1 gets slot 0, place 3 slot 1, and slot 2 holds N = 4.
    """
    count = wants.cumsum(1, dtype=torch.int32).mT.contiguous()  # [G, E, N], how many up to n want e
    nth = torch.arange(1, capacity + 1, dtype=torch.int32, device=wants.device)
    # A count never falls along the line: slot c goes to the first n whose count is c + 1.
    return torch.searchsorted(count, nth.repeat(*count.shape[:2], 1))


# ---------------------------------------------------------------- how scores are made
def sinkhorn_plan(logits, iterations=20):
    """Entropic optimal transport of tokens to experts (S-BASE, 2202.01169).

        argmin_P  <P, -logits> + sum P log P,  each row sums to 1, each column to T/E

    logits [G, T, E] -> plan [G, T, E]. Rows, scaled last, sum to 1 up to rounding (float32 logits
    of size s: about s * 1e-7). Columns are near T/E for logits a few units apart, as a router's
    are; a hundred apart, some are off by half or more. Autograd runs through every iteration.
    Differs: in the log domain, so that no logit overflows.
    """
    G, T, E = logits.shape
    u = logits.new_zeros(G, T, 1)
    for _ in range(iterations):
        v = math.log(T / E) - (logits + u).logsumexp(1, keepdim=True)  # [G, 1, E], experts
        u = -(logits + v).logsumexp(2, keepdim=True)  # [G, T, 1], tokens
    return (logits + u + v).exp()


def project(z, k):
    """Each column of z [G, T, E], over T, projected on the simplex with at most k non-zeros.

    Only its k largest entries stay (of equals, the first). One threshold is taken off them, such
    that those still above 0 sum to 1; the others become 0.
    """
    largest = z.topk(min(k, z.shape[1]), dim=1).values  # [G, k, E], falling
    count = torch.arange(1, largest.shape[1] + 1, device=z.device, dtype=z.dtype)[:, None]
    threshold = (largest.cumsum(1) - 1) / count  # if so many stay above 0
    # No support at all: z is not finite, or so large that z - 1 is z.
    support = (largest > threshold).sum(1, keepdim=True).clamp(min=1)
    last = largest[:, -1:]  # what is above it stays, and of what equals it the first, up to k
    above, level = z > last, z == last
    kept = above | (level & (level.cumsum(1) + above.sum(1, keepdim=True) <= k))
    return (z - threshold.gather(1, support - 1)).clamp(min=0) * kept


def sparse_plan(gates, k, iterations=20, lr=1e-2, column_sum=None):
    """Optimal transport with at most k non-zeros in a column (2209.15466, its semi-dual).

        argmax_P  <P, gates> - |P|^2 / 2,  columns sum to column_sum, rows to column_sum * E/T

    gates [G, T, E] -> plan [G, T, E]. column_sum is T/E if None, so that rows sum to 1. Columns are
    exact; rows approximate, since with so few non-zeros there may be no such P. Each row has a
    bonus, alpha; given all of them, a column's best share is a projection. Adam lowers alpha where
    a row's sum is too large; a group's last step is its first with errors of norm <= 1e-3. Differs:
    the last projection passes a gradient; the published code passes none.
    """
    G, T, E = gates.shape
    column_sum = T / E if column_sum is None else column_sum
    row_sum = column_sum * E / T
    fixed = gates.detach()
    alpha = m = v = fixed.new_zeros(G, T, 1)
    running = torch.ones_like(alpha[:, :1], dtype=torch.bool)
    for step in range(1, iterations + 1):
        share = project((alpha + fixed) / column_sum, k)  # its columns sum to 1
        slope = column_sum * share.sum(2, keepdim=True) - row_sum  # [G, T, 1], each row's error
        m = 0.9 * m + 0.1 * slope  # from here: Adam
        v = 0.999 * v + 0.001 * slope**2
        move = lr * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        alpha = torch.where(running, alpha - move, alpha)
        running = running & (slope.norm(dim=1, keepdim=True) > 1e-3)
    return column_sum * project((alpha + gates) / column_sum, k)


# ---------------------------------------------------------------- losses
def importance_loss(logits, gates=None):
    """Squared coefficient of variation of the experts' summed gates (V-MoE 2106.05974, app. A).

    In each group, then the mean of groups; of logits [G, T, E] without noise. gates: the router's
    own probabilities, or softmax(logits).
    """
    gates = logits.softmax(-1) if gates is None else gates
    importance = gates.sum(1)  # [G, E]
    return (importance.var(1, correction=0) / importance.mean(1) ** 2).mean()


def load_loss(logits, noisy_logits, top_k, noise_std):
    """Squared coefficient of variation of each expert's chance to be chosen under fresh noise.

    logits without noise, noisy_logits with normal noise of deviation noise_std, both [G, T, E]
    (V-MoE, app. A). Chosen by logits alone: a bias or a plan is not seen. Differs from 1701.06538,
    as the published code does: the threshold is the K-th noisy logit of all experts.
    """
    threshold = noisy_logits.topk(top_k).values[..., -1:]  # [G, T, 1]
    chance = torch.special.ndtr((logits - threshold) / noise_std).mean(1)  # [G, E]
    return (chance.var(1, correction=0) / chance.mean(1) ** 2).mean()


def balance_loss(logits, expert_index, gates=None, scope="group"):
    """(E/K) sum_e f_e P_e: 1 when all is even, E/K at collapse (Switch, 2101.03961, eq. 4 to 6).

    f_e is the share of tokens with e among their choices expert_index [G, T, K], before drops; P_e
    the mean of the gates, softmax(logits) or those given, [G, T, E]. scope: "group" takes f and P
    of each group; "batch" (2501.11873) P of all groups here, f of all groups in all processes.
    """
    E, K = logits.shape[-1], expert_index.shape[-1]
    gates = logits.softmax(-1) if gates is None else gates
    f = F.one_hot(expert_index, E).sum(2).to(gates.dtype).mean(1)  # [G, E]
    P = gates.mean(1)  # [G, E]
    if scope == "batch":
        f, P = f.mean(0, keepdim=True), P.mean(0, keepdim=True)
        if torch.is_grad_enabled():  # one process evaluates alone: it would wait for ever
            f = mean_over_processes(f)
    return E / K * (f * P).sum(1).mean()


def z_loss(logits):
    """Mean over tokens of logsumexp(logits)^2, to keep logits small (ST-MoE, 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


# ---------------------------------------------------------------- what all routers share
CHOICES = {
    "priority": ("token", "choice", "gate"),
    "combine_weights": ("softmax", "plan"),
    "gate": ("linear", "mlp"),
    "router_weights": ("learned", "frozen", "random"),
    "balance_scope": ("group", "batch"),
}
WHOLE = ("dim", "num_experts", "top_k", "iterations", "num_keys", "slots", "tokens")
RANGES = {"noise_std": 1e6, "scale": 1e6, "bias_rate": 1.0}  # numbers from 0 to this


class Router(nn.Module):
    """What all routers share: options and their rules, the gate, the capacity.

    A subclass says who `chooses` ("tokens", "experts", "threshold" or None), lists its options with
    their `defaults`, the losses that it `offers` and the `recipe`, train.py's settings for it. It
    writes decide(logits, noisy) -> Routing, which may end in admit(); or route(x, key) -> Routing,
    if it does not start from the gate's logits.

    causal is True only if, with these options, later tokens change neither a token's choices nor,
    at a fixed C, its drops. But C grows with T: what a short text drops, a longer one may seat.

    top_k            K, choices of a token; where experts choose, it only sets the budget, of
                     T * K * capacity_factor slots
    capacity_factor  slots for each assignment; None is dropless, where tokens choose
    noise_std        in training, normal noise of deviation noise_std / E on the logits
    router_weights   learned; frozen as they start; or random, drawn anew at each step
    gate             linear, or mlp with one hidden layer
    """

    chooses = "experts"
    causal = False
    offers = ("z",)
    recipe = {}
    margin = 1  # a factor in C; 2 where nobody knows how many tokens will ask
    defaults = dict(top_k=1, capacity_factor=1.0, noise_std=0.0)
    defaults |= dict(router_weights="learned", gate="linear")

    def __init__(self, dim, num_experts, tokens=None, **options):
        """tokens: how many a group has. Soft alone needs it, where slots is None."""
        super().__init__()
        self.dim, self.num_experts, self.tokens = dim, num_experts, tokens
        unknown = [name for name in options if name not in self.defaults]
        if unknown:
            has = f"it has {', '.join(self.defaults)}"
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}; {has}")
        self.options = SimpleNamespace(**(self.defaults | options))
        self.check_options()
        if "router_weights" in self.defaults:  # hash and soft have no gate
            self.make_gate()
        if getattr(self.options, "bias_rate", 0):
            self.register_buffer("bias", torch.zeros(num_experts, dtype=at_least_float32()))

    def forward(self, x, key=None):
        """Tokens x [G, T, D] and, for hash, key [G, T] -> Routing. ValueError for other shapes."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"a router needs tokens [G, T, {self.dim}], got {list(x.shape)}")
        if x.shape[1] < 1:
            raise ValueError("a group needs at least 1 token, got 0")
        routing = self.route(x, key)
        routing.router = self
        return routing

    def route(self, x, key):
        """The Routing of x [G, T, D], by the gate's logits. Hash alone reads key [G, T].

        decide() gets the logits [G, T, E] without and with noise; the z loss is added here.
        """
        logits = self.logits(x)
        routing = self.decide(logits, self.add_noise(logits))
        routing.logits, routing.gates = logits, self.probabilities(logits)
        routing.losses["z"] = z_loss(logits)
        return routing

    def logits(self, x):
        """Logits [G, T, E] of tokens x [G, T, D], in float32 at least; without noise."""
        random = self.options.router_weights == "random" and self.training
        gate = self.random_gate if random else self.gate
        with torch.autocast(x.device.type, enabled=False):
            z = x.to(torch.promote_types(x.dtype, torch.float32))
            weights = {name: weight.to(z.dtype) for name, weight in gate.named_parameters()}
            return torch.func.functional_call(gate, weights, z)  # gate(z), its weights cast

    def add_noise(self, logits):
        """In training, logits with noise of deviation noise_std / E; else the logits themselves."""
        noise_std = getattr(self.options, "noise_std", 0)
        if not (self.training and noise_std):
            return logits
        return logits + draw_noise(logits) * (noise_std / self.num_experts)

    def probabilities(self, logits):
        """The gates [G, T, E] of these logits. Losses and statistics go by them too."""
        return logits.softmax(-1)

    def scores(self, logits, noisy):
        """What decides the routing and what weighs the outputs, both [G, T, E]; here the gates."""
        gates = self.probabilities(noisy)
        return gates, gates

    def by_plan(self, gates, z, make_plan):
        """Scores where a plan, make_plan(z), decides; combine_weights says what weighs."""
        if self.options.combine_weights == "plan":
            plan = make_plan(z)
            return plan, plan
        return make_plan(z.detach()), gates  # a plan that weighs nothing needs no gradient

    def capacity(self, tokens):
        """C = ceil(margin*T*K*cf / E), at most T, for a group of T tokens; None if dropless.

        Differs: the published code, by default, rounds C up to a multiple of 4.
        """
        o = self.options
        if o.capacity_factor is None:
            return None
        wanted = self.margin * tokens * o.top_k * o.capacity_factor / self.num_experts
        return math.ceil(min(tokens, wanted))

    def admit(self, wants, gates):
        """The routing in which tokens queue by position for all experts that they want.

        wants [G, T, E], True or False; gates [G, T, E] are the weights of those that get a slot.
        """
        T = wants.shape[1]
        C, filled = self.room(wants, T)
        index = queue(wants, C)  # [G, E, C]
        weight = F.pad(gates.mT, (0, 1)).gather(2, index)
        load = wants.sum((0, 1)) / wants.sum().clamp(min=1)
        return HardRouting(index, weight, T, load, filled=filled)

    def room(self, wants, tokens):
        """C, and for a dropless routing how many slots each expert fills."""
        C = self.capacity(tokens)
        if C is not None:
            return C, None
        if torch.compiler.is_compiling():
            return tokens, None  # a compiled graph knows no loads: room for every token
        asked = wants.sum(1).cpu()  # [G, E], how many want each expert; waits for the device
        longest = int(asked.max()) if len(asked) else 1
        return longest, asked.sum(0).tolist()

    @torch.no_grad()
    def update(self, routings, generator=None):
        """Called once after each training step with its routings: moves what has no gradient."""
        if getattr(self.options, "router_weights", None) == "random":
            self.redraw(self.random_gate, generator)

    def make_gate(self):
        self.gate = nn.Linear(self.dim, self.num_experts, bias=False)
        if self.options.gate == "mlp":
            hidden = nn.Linear(self.dim, self.dim, bias=False)
            self.gate = nn.Sequential(hidden, nn.GELU(), self.gate)
        self.redraw(self.gate)
        self.gate.requires_grad_(self.options.router_weights == "learned")
        if self.options.router_weights == "random":
            self.random_gate = copy.deepcopy(self.gate)  # for training; evaluation keeps self.gate

    def redraw(self, gate, generator=None):
        """Fresh weights of deviation dim^-1/2: a linear gate keeps the variance of tokens."""
        with torch.no_grad():
            for weight in gate.parameters():
                fresh = torch.empty(weight.shape, dtype=weight.dtype)  # on the CPU: alike anywhere
                weight.copy_(fresh.normal_(0, self.dim**-0.5, generator=generator))

    def check_options(self):
        """ValueError for an invalid option; it names the rule and the value."""
        values = dict(dim=self.dim, num_experts=self.num_experts, tokens=self.tokens)
        values |= vars(self.options)

        def need(ok, name, rule):
            if not ok:
                raise ValueError(f"{rule}, got {name}={values[name]!r}")

        for name, value in values.items():
            if name in CHOICES:
                ok = value in CHOICES[name]
                need(ok, name, f"{name} must be one of {', '.join(CHOICES[name])}")
            if name in WHOLE and not (value is None and name in ("slots", "tokens")):
                ok = type(value) is int and value >= 1
                need(ok, name, f"{name} must be a whole number >= 1")
            if name in RANGES:
                ok = type(value) in (int, float) and 0 <= value <= RANGES[name]
                need(ok, name, f"{name} must be a number >= 0, at most {RANGES[name]:g}")
        E, K, factor = self.num_experts, values["top_k"], values["capacity_factor"]
        need(K <= E, "top_k", f"top_k must be at most num_experts={E}")
        if factor is None:
            rule = "capacity_factor=None (dropless) is for routers in which tokens choose"
            need(self.chooses == "tokens", "capacity_factor", rule)
        else:
            ok = type(factor) in (int, float) and 0 < factor < math.inf
            need(ok, "capacity_factor", "capacity_factor must be a positive number")
        if values.get("renormalize"):
            need(K > 1, "top_k", "renormalize needs top_k >= 2 (the only gate would always be 1)")
        tiny = 0 < values.get("noise_std", 0) < 1e-6
        need(not tiny, "noise_std", "noise_std must be 0 or at least 1e-6")

    def _apply(self, fn, recurse=True):
        """As in nn.Module, but bias and threshold stay in float32: their steps are tiny."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in self.named_buffers(recurse=False):
            if after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(after.device, torch.float32)
        return self


# ---------------------------------------------------------------- tokens choose experts
class TokenChoice(Router):
    """Each token goes to the K experts of its largest gates, if they have a slot left.

    V-MoE 2106.05974, section 2; Switch 2101.03961. Further options:

    priority       "token": by position. "choice": all first choices, then all second (GShard).
                   "gate": as "choice", the tokens by their largest score (V-MoE, section 4)
    renormalize    divide a token's K gates by their sum (K >= 2)
    bias_rate      0, or the step u of 2408.15664: experts are chosen by score + bias and weighed
                   without it; update() moves it by u * sign(mean load - load), then centres it
    balance_scope  the balance loss counts shares by "group" or over the "batch" (2501.11873)
    """

    chooses = "tokens"
    offers = ("importance", "load", "balance", "z")  # load needs noise
    defaults = Router.defaults | dict(priority="token", renormalize=False)
    defaults |= dict(bias_rate=0.0, balance_scope="group")
    recipe = dict(capacity_factor=None, balance="switch")

    @property
    def causal(self):
        o = self.options
        dropless = o.capacity_factor is None
        return dropless or o.priority == "token" or (o.priority == "choice" and o.top_k == 1)

    def decide(self, logits, noisy):
        o = self.options
        decides, weighs = self.scores(logits, noisy)
        biased = decides + self.bias if o.bias_rate else decides
        expert_index = top(biased, o.top_k, -1)  # [G, T, K]
        weight = weighs.gather(-1, expert_index)
        if getattr(o, "renormalize", o.top_k > 1):  # Sigmoid has no such option: where K > 1
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)  # never 0 / 0
        routing = self.seat(expert_index, weight, decides)
        gates, losses = self.probabilities(logits), routing.losses
        losses["importance"] = importance_loss(logits, gates)
        losses["balance"] = balance_loss(logits, expert_index, gates, o.balance_scope)
        if noisy is not logits:  # add_noise() did add some
            deviation = o.noise_std / self.num_experts  # of the noise itself
            losses["load"] = load_loss(logits, noisy, o.top_k, deviation)
        return routing

    def seat(self, expert_index, weight, decides=None):
        """Give slots to the assignments expert_index, weight [G, T, K], in order of `priority`."""
        G, T, K = expert_index.shape
        device = expert_index.device
        order = torch.arange(T, device=device).expand(G, T)
        if self.options.priority == "gate":
            order = top(decides.amax(-1), T, -1)  # the surest first
        token = order[..., None].expand(G, T, K)
        parts = [token, expert_index.gather(1, token), weight.gather(1, token)]  # each [G, T, K]
        if self.options.priority != "token":
            parts = [part.mT for part in parts]  # first choices stand before second
        token, expert, weight = (part.flatten(1) for part in parts)  # [G, N], N = T * K: the line
        wants = expert[..., None] == torch.arange(self.num_experts, device=device)  # [G, N, E]
        C, filled = self.room(wants, T)
        place = queue(wants, C)  # [G, E, C], in the line; N where a slot is empty
        index = F.pad(token, (0, 1), value=T).gather(1, place.flatten(1)).view_as(place)
        weight = F.pad(weight, (0, 1)).gather(1, place.flatten(1)).view_as(place)
        load = wants.sum((0, 1)).to(weight.dtype) / max(1, G * T * K)
        return HardRouting(index, weight, T, load, filled=filled, expert_index=expert_index)

    @torch.no_grad()
    def update(self, routings, generator=None):
        super().update(routings, generator)
        if getattr(self.options, "bias_rate", 0):
            load = torch.stack([routing.load.to(self.bias) for routing in routings]).mean(0)
            load = mean_over_processes(load)
            self.bias += self.options.bias_rate * (1 / self.num_experts - load).sign()
            self.bias -= self.bias.mean()  # only differences choose


class SinkhornTokenChoice(TokenChoice):
    """Tokens choose by a Sinkhorn plan of the noisy logits (S-BASE, 2202.01169). Never causal.

    combine_weights: "softmax" or "plan" weighs the outputs. iterations: of Sinkhorn's algorithm.
    """

    defaults = TokenChoice.defaults | dict(iterations=20, combine_weights="softmax")
    recipe = dict(capacity_factor=None)
    causal = False  # a plan balances over all tokens

    def scores(self, logits, noisy):
        plan = functools.partial(sinkhorn_plan, iterations=self.options.iterations)
        return self.by_plan(logits.softmax(-1), noisy, plan)  # gates without noise, as published


class SparseTokenChoice(TokenChoice):
    """Tokens choose by a plan with at most K experts a token (2209.15466). Never causal, no noise.

    Options: as SinkhornTokenChoice. A token whose plan holds fewer goes to the first others too. At
    K = 1 a token's plan is 1 at its only expert: combine_weights="plan" gives no gradient.
    """

    offers = ("importance", "balance", "z")
    defaults = SinkhornTokenChoice.defaults.copy()
    del defaults["noise_std"]
    recipe = dict(capacity_factor=None)
    causal = False

    def scores(self, logits, noisy):
        def plan(z):  # transposed: columns are tokens, each of mass 1; rows, the experts, get T/E
            return sparse_plan(z.mT, self.options.top_k, self.options.iterations, column_sum=1.0).mT

        gates = logits.softmax(-1)
        return self.by_plan(gates, gates, plan)


class Sigmoid(TokenChoice):
    """DeepSeek-V3's router (2412.19437, eq. 12 to 16): s = sigmoid(logits), each expert on its own.

    A token goes to the K largest s + bias, weighed by s over the sum of its K chosen s; update()
    moves the bias by bias_rate. Differs: at K = 1 that weight would always be 1 and the router
    would not learn from the task, so s itself weighs. probabilities(): s over the sum of all s.
    """

    offers = ("importance", "balance", "z")
    defaults = TokenChoice.defaults | dict(bias_rate=1e-3)
    del defaults["renormalize"], defaults["noise_std"]
    recipe = dict(capacity_factor=None, balance="bias")

    def probabilities(self, logits):
        return F.logsigmoid(logits).softmax(-1)  # s / sum s, also where every s underflows

    def scores(self, logits, noisy):
        s = logits.sigmoid()
        return s, s


class Hash(TokenChoice):
    """A fixed table sends a key (token id, patch position, topic) to K experts (2106.04426).

    The table is random and balanced: each run of E keys uses every expert once. A key from num_keys
    on goes to expert key mod E; further choices are the next experts. Without keys, a token's
    position is its key. The K experts weigh 1/K each. Nothing is learned, and no token's choice
    depends on another token.
    """

    offers = ()
    defaults = dict(top_k=1, capacity_factor=1.0, num_keys=4096)
    recipe = dict(capacity_factor=None, num_keys=None)  # moe_tokens.py: one for each token id
    causal = True

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        self.options.priority = "token"  # for seat()
        runs = math.ceil(self.options.num_keys / num_experts)
        table = torch.rand(runs, num_experts).argsort(1).flatten()
        self.register_buffer("table", table[: self.options.num_keys])

    def route(self, x, key):
        G, T, _ = x.shape
        E, K = self.num_experts, self.options.top_k
        if key is None:
            key = torch.arange(T, device=x.device).expand(G, T)
        if key.shape != (G, T):
            raise ValueError(f"key must be [G, T] = {[G, T]}, got {list(key.shape)}")
        key = key.long()  # of any integer type
        inside = (key >= 0) & (key < len(self.table))
        known = self.table[key.clamp(0, len(self.table) - 1)]
        first = torch.where(inside, known, key % E)  # [G, T]
        expert_index = (first[..., None] + torch.arange(K, device=x.device)) % E  # [G, T, K]
        weight = x.new_full((G, T, K), 1 / K, dtype=torch.promote_types(x.dtype, torch.float32))
        return self.seat(expert_index, weight)


# ---------------------------------------------------------------- experts choose tokens
class ExpertChoice(Router):
    """Each expert takes the C tokens with the largest gates for it (2202.09368, section 3.2).

    Slots are sorted by score, the largest first. Never causal: a token competes with all others.
    """

    def decide(self, logits, noisy):
        T, E = logits.shape[1:]
        decides, weighs = self.scores(logits, noisy)
        index = top(decides, self.capacity(T), 1).mT  # [G, E, C]
        weight = weighs.mT.gather(2, index)
        return HardRouting(index, weight, T, load=logits.new_full((E,), 1 / E))


class SinkhornExpertChoice(ExpertChoice):
    """Experts choose by a Sinkhorn plan of the noisy logits (2401.15969).

    Options: as SinkhornTokenChoice.
    """

    defaults = ExpertChoice.defaults | dict(iterations=20, combine_weights="softmax")

    def scores(self, logits, noisy):
        plan = functools.partial(sinkhorn_plan, iterations=self.options.iterations)
        return self.by_plan(noisy.softmax(-1), noisy, plan)  # gates with noise, as published


class SparseExpertChoice(ExpertChoice):
    """Experts choose by a plan with at most C tokens an expert (2209.15466). No noise.

    An expert whose plan holds fewer fills its slots with the first other tokens, as published.
    """

    defaults = SinkhornExpertChoice.defaults.copy()
    del defaults["noise_std"]

    def scores(self, logits, noisy):
        C, gates = self.capacity(logits.shape[1]), logits.softmax(-1)
        plan = functools.partial(sparse_plan, k=C, iterations=self.options.iterations)
        return self.by_plan(gates, gates, plan)


class ExpertThreshold(Router):
    """A token goes to every expert whose gate reaches that expert's threshold (2603.11535).

    Expert choice made causal: update() keeps the threshold at a running mean of the (1 - K/E)
    quantile of the gates in a group. If groups are alike, a token meets K experts on average. The
    first update replaces the start, 1/E. Tokens queue by position for C = ceil(2*T*K*cf / E) slots,
    at most T. Differs: the paper speaks of the distribution of all tokens; a mean of groups can be
    added up over many processes.
    """

    chooses = "threshold"
    causal = True
    margin = 2
    decay = 0.9

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        start = torch.full((num_experts,), 1 / num_experts, dtype=at_least_float32())
        self.register_buffer("threshold", start)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def decide(self, logits, noisy):
        gates = self.probabilities(noisy)
        routing = self.admit(gates >= self.threshold, gates)
        routing.quantile = self.threshold  # of an empty batch: it stays
        if len(gates):
            share = 1 - self.options.top_k / self.num_experts
            routing.quantile = gates.detach().quantile(share, dim=1).mean(0)  # [E]
        return routing

    @torch.no_grad()
    def update(self, routings, generator=None):
        super().update(routings, generator)
        quantile = torch.stack([r.quantile.to(self.threshold) for r in routings]).mean(0)
        quantile = mean_over_processes(quantile)
        quantile = torch.where(quantile.isfinite(), quantile, self.threshold)  # not finite: stay
        self.threshold.lerp_(quantile, torch.where(self.updates > 0, 1 - self.decay, 1.0))
        self.updates += 1


# ---------------------------------------------------------------- nobody chooses
class Soft(Router):
    """Each slot is a mix of all tokens, each output a mix of all slots (2308.00951, section 2).

    phi [D, E, C] is a direction for each slot. scale is learned and sharpens all mixes. As
    published it starts at 1, where mixes are almost uniform; for a short training 10 is better.
    C is the option slots, or round(T*K*cf / E) with T = tokens. Never causal. Its logits are
    [G, T, E, C], its gates [G, T, E*C].
    """

    chooses = None
    offers = ()
    defaults = dict(top_k=1, capacity_factor=1.0, slots=None, scale=1.0)

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        o = self.options
        if o.slots is None:
            if self.tokens is None:
                rule = "soft needs slots, or the tokens of a group to count them from"
                raise ValueError(f"{rule}, got slots=None")
            wanted = self.tokens * o.top_k * o.capacity_factor / num_experts
            o.slots = max(1, round(min(wanted, 2.0**31)))
        self.phi = nn.Parameter(torch.empty(dim, num_experts, o.slots))
        nn.init.normal_(self.phi, std=dim**-0.5)
        self.scale = nn.Parameter(torch.tensor(float(o.scale)))

    def capacity(self, tokens):
        return self.options.slots

    def route(self, x, key):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            direction = self.scale.to(x.dtype) * unit(self.phi.to(x.dtype), 0)
            logits = torch.einsum("gtd,dec->gtec", unit(x, -1), direction)
            dispatch = logits.softmax(1)  # over tokens: a slot's weights sum to 1
            gates = logits.flatten(2).softmax(-1)  # [G, T, E*C]: a token's weights sum to 1
        combine = gates.view_as(logits)
        load = combine.detach().sum(-1).mean((0, 1))
        return Routing(dispatch, combine, load, logits=logits, gates=gates)


def unit(z, dim):
    """z with length 1 along dim."""
    return z * (z.square().sum(dim, keepdim=True) + 1e-6).rsqrt()


# ---------------------------------------------------------------- experts and the layer
class Experts(nn.Module):
    """E two-layer perceptrons with GELU, their weights stacked, run by one batched product a layer.

    init: "independent", each as nn.Linear starts; "identical", all like the first, as in V-MoE,
    where routing alone sets them apart. To change what an expert computes, override expert(): it
    gets the module's parameters in the order in which they were set. A foreign model.apply(init)
    does not reach these weights.
    """

    biases = ("b1", "b2")  # weight decay spares them; by their shape they look like weights

    def __init__(self, num_experts, dim, hidden, init="independent"):
        super().__init__()
        self.dim = dim
        self.w1 = stacked(num_experts, dim, hidden, dim, init)
        self.b1 = stacked(num_experts, 1, hidden, dim, init)
        self.w2 = stacked(num_experts, hidden, dim, hidden, init)
        self.b2 = stacked(num_experts, 1, dim, hidden, init)

    def expert(self, z, w1, b1, w2, b2):
        """What each expert computes of its N vectors, z [E, N, D]; E is 1 for one expert alone."""
        return torch.baddbmm(b2, F.gelu(torch.baddbmm(b1, z, w1)), w2)

    def forward(self, slots):
        """slots [G, E, C, D] -> the same; a slot that is n*D wide holds n vectors (a sequence)."""
        G, E, C, width = slots.shape
        z = slots.transpose(0, 1).reshape(E, -1, self.dim)
        return self.expert(z, *self.parameters()).view(E, G, C, width).transpose(0, 1)

    def ragged(self, z, counts):
        """The same for z [N, D] sorted by expert, counts[e] rows of each: no empty slots."""
        outputs = []
        each = [parameter.split(1) for parameter in self.parameters()]
        for rows, *parameters in zip(z.split(counts), *each):
            vectors = rows.reshape(1, -1, self.dim)
            outputs.append(self.expert(vectors, *parameters).view_as(rows))
        return torch.cat(outputs)


def stacked(num_experts, rows, columns, fan_in, init="independent"):
    """A parameter [E, rows, columns], uniform in +-fan_in^-1/2 as in nn.Linear."""
    if init not in ("independent", "identical"):
        raise ValueError(f"init must be one of independent, identical, got {init!r}")
    drawn = torch.empty(num_experts if init == "independent" else 1, rows, columns)
    drawn.uniform_(-(fan_in**-0.5), fan_in**-0.5)
    return nn.Parameter(drawn.expand(num_experts, rows, columns).clone())


class MoE(nn.Module):
    """The layer: route, dispatch, let the experts work, combine.

    experts  any module on slots [G, E, C, D] that treats each slot by itself, such as Experts
    shared   None, or a module on [..., D] that every token passes beside the routed experts: N
             shared experts are an FFN N times as wide (DeepSeekMoE, 2401.06066)
    """

    def __init__(self, router, experts, shared=None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        if isinstance(experts, Experts):
            count = len(next(experts.parameters()))
            wanted, got = (router.num_experts, router.dim), (count, experts.dim)
            if wanted != got:
                rule = "router and experts must agree in num_experts and dim"
                raise ValueError(f"{rule}, got {wanted} and {got}")

    def forward(self, x, key=None, routing=None):
        """x [G, T, D], key [G, T] or None -> y like x, and its Routing, the given one if any.

        With one given, x may be [G, T, n*D]: moe_tokens.py routes a sequence of n tokens as one.
        """
        self.check_type(x)
        if routing is None:
            routing = self.router(x, key)
        y = routing.run(x, self.experts)
        if self.shared is not None:
            tokens = x.unflatten(-1, (-1, self.router.dim))  # [G, T, n, D], mostly n = 1
            y = y + self.shared(tokens).flatten(-2)
        return y, routing

    def check_type(self, x):
        for weight in self.experts.parameters():
            if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                rule = "tokens and experts must be of one type outside autocast"
                raise ValueError(f"{rule}, got tokens of {x.dtype} and experts of {weight.dtype}")

    def no_decay(self):
        """The names of the parameters that weight decay should spare: the router, all biases."""
        biases = [f"experts.{name}" for name in getattr(self.experts, "biases", ())]
        names = []
        for name, parameter in self.named_parameters():
            if name.startswith("router.") or name in biases or parameter.ndim == 1:
                names.append(name)
        return names


def build_router(name, dim, num_experts, **options):
    """The router of that name, for tokens [G, T, dim]. ValueError for an invalid name or option."""
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; known: {', '.join(ROUTERS)}")
    return ROUTERS[name](dim, num_experts, **options)


ROUTERS = {
    "token_choice": TokenChoice,
    "sinkhorn_token_choice": SinkhornTokenChoice,
    "sparse_token_choice": SparseTokenChoice,
    "sigmoid": Sigmoid,
    "hash": Hash,
    "expert_choice": ExpertChoice,
    "sinkhorn_expert_choice": SinkhornExpertChoice,
    "sparse_expert_choice": SparseExpertChoice,
    "expert_threshold": ExpertThreshold,
    "soft": Soft,
}


# ---------------------------------------------------------------- helpers
def draw_noise(logits):
    """Standard normal noise. Of many processes, each draws the whole batch's and takes its part."""
    if not dist.is_initialized():
        return torch.randn_like(logits)
    whole = logits.new_empty(dist.get_world_size() * len(logits), *logits.shape[1:])
    return torch.randn_like(whole).chunk(dist.get_world_size())[dist.get_rank()]


def mean_over_processes(value):
    """The mean of a value over all processes that train; the value, where one trains."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def at_least_float32():
    """The default dtype, or float32 if that is coarser: bias and threshold move in tiny steps."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def seeded(*key):
    """A generator fixed by its key, as seeded(seed, step, "noise"): one key, the same draws."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@functools.lru_cache(2)
def order_of_epoch(seed, epoch, count):
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))


def rows_of_step(seed, step, size, count):
    """Which of `count` examples are the batch of a step: epoch by epoch, each in a fresh order."""
    epoch, start = divmod(step * size, count)
    this, after = (order_of_epoch(seed, epoch + i, count) for i in (0, 1))
    return torch.cat([this[start : start + size], after[: max(0, start + size - count)]])


def send(tensor, device):
    """The tensor on that device; to a GPU, without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def color(place, count, lightness=None):
    """(red, green, blue) of expert `place` of `count`; grey where place is count: no expert."""
    if place == count:
        return 200, 200, 200
    if lightness is None:
        lightness = 0.45 + 0.25 * (place % 2)  # neighbours differ in it too
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(place / count, lightness, 0.8))
