"""Mixture-of-experts routers behind one formulation: a dispatch tensor and a combine tensor.

A mixture of experts (MoE) holds E small networks, the experts, where a transformer has one. A
router decides which expert works on which token. It fills two tensors, both [G, T, E, C]:

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
    token 1      .6        .1        .3        tokens 0 and 1 are first in line and get a seat,
    token 2      .7        .2        .1        token 2 is turned away, and dropped.

    dispatch[0,0,0,0] = 1       combine[0,0,0,0] = .5       y[0,0] = .5 * expert_0(x[0,0])
    dispatch[0,1,0,1] = 1       combine[0,1,0,1] = .6       y[0,1] = .6 * expert_0(x[0,1])
    all others are 0            all others are 0            y[0,2] = 0

Words, the same in every file:
    gate      the layer that makes logits [G, T, E] from tokens
    gates     softmax(logits), unless a router says otherwise
    scores    decide who goes where, weights multiply the outputs; mostly both are the gates
    wants     True where a token wants an expert; seats: True where it got a slot of that expert
    load      each expert's share of all wants, before any token is turned away
    dropped   a token that no expert serves
    dropless  C is as large as the fullest expert needs, so that no token is turned away

Six routers are those of 2401.15969 (arXiv), Routers in Vision Mixture of Experts. "As published" is
its code, google-research/vmoe at 942a78b; "Differs:" says where we depart from a paper or its code.

Read up to the first "Later"; the rest is variations. To add a router, subclass one, return a
HardRouting or a Routing, and add it to ROUTERS. Not here: experts on several machines, padding.
"""

import math
import numbers
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- the layer, and the two equations
class MoE(nn.Module):
    """Route, dispatch, let the experts work, combine: in place of a transformer's FFN.

    experts: any module on slots [G, E, C, D] that treats each slot by itself, such as Experts.
    shared: an FFN that every token passes beside the experts (DeepSeekMoE, 2401.06066).
    """

    def __init__(self, router, experts, shared=None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x, key=None, routing=None):
        """x [G, T, D] -> y like x, and its Routing (`routing`, if given). key [G, T] is for hash.

        With a routing made elsewhere, a token may be n vectors, [G, T, n*D], such as a sequence.
        """
        if routing is None:
            routing = self.router(x, key)
        if routing.filled is not None and isinstance(self.experts, Experts):
            y = run_filled(routing, x, self.experts)  # dropless: the same y, without empty slots
        else:
            slots = routing.dispatch(x)  # [G, E, C, D]
            y = routing.combine(self.experts(slots))  # [G, T, D]
        if self.shared is not None:
            y = y + self.shared(x.reshape(-1, self.router.dim)).view_as(y)
        return y, routing


class Routing:
    """What a router decided: the two tensors, and the two equations that apply them. Also

    expert_weights     [G, T, E], what each expert's output weighs for each token
    slots_per_token    [G, T], in how many slots each sits; 0: it is dropped
    tokens_per_expert  [E], how many tokens want each expert; in Soft MoE, its total weight
    notes              what losses and statistics read, as attributes: logits, gates, wants, ...
    """

    gates = None  # where a router has none
    filled = None  # of a dropless HardRouting: how many slots each expert fills

    def __init__(self, dispatch, combine, router=None, **notes):
        vars(self).update(notes, router=router)  # each note becomes an attribute
        self._dispatch, self._combine = dispatch, combine
        self.expert_weights = combine.sum(3)
        self.slots_per_token = (dispatch != 0).sum((2, 3))
        self.tokens_per_expert = combine.detach().sum((0, 1, 3))

    def tensors(self):
        """dispatch and combine, both [G, T, E, C]."""
        return self._dispatch, self._combine

    def dispatch(self, x):
        """Tokens x [G, T, D] -> slots [G, E, C, D]: the first equation."""
        return torch.einsum("gtec,gtd->gecd", self._dispatch.to(x.dtype), x)

    def combine(self, y):
        """The experts' outputs y [G, E, C, D] -> tokens [G, T, D]: the second equation."""
        return torch.einsum("gtec,gecd->gtd", self._combine.to(y.dtype), y)

    @property
    def load(self):
        """[E], each expert's share of tokens_per_expert."""
        return self.tokens_per_expert / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def losses(self):
        """{name: scalar}, not yet weighted: the losses that the router names in aux_losses."""
        found, router = {}, self.router
        for name in router.aux_losses if router else ():
            o = router.options
            if name == "importance":
                found[name] = importance_loss(self.logits, self.gates)
            if name == "balance":
                found[name] = balance_loss(self.gates, self.wants, o.top_k)
            if name == "load" and o.noise_std and router.training:
                deviation = o.noise_std / router.num_experts
                found[name] = load_loss(self.logits, self.noisy, o.top_k, deviation)
            if name == "z":
                found[name] = z_loss(self.logits)
        return found


# ---------------------------------------------------------------- what all routers share
BUDGET = dict(
    top_k=1,  # K, choices of a token; where experts choose, it only sets C
    capacity_factor=1.0,  # cf, slots for each choice; None is dropless, where tokens choose
)
GATE = dict(
    noise_std=0.0,  # in training, normal noise of deviation noise_std / E on the logits
    router_weights="learned",  # "frozen" as they start, or "random", drawn anew at each step
    gate="linear",  # or "mlp", with one hidden layer
)


class Router(nn.Module):
    """What all routers share. A subclass writes forward(x, key) -> Routing, and may say

    chooses         "tokens" (exactly K each), "experts", a "threshold" (any number), or None
    causal          True only if, at a fixed C, no later token changes a token's experts
    gated           whether it has a gate, and the options in GATE
    defaults        its options, beside its parent's; they become flags of train.py
    aux_losses      names of the losses it offers; Routing.losses computes them, from its notes
    train_defaults  train.py's settings for it, beside its options
    """

    chooses = "experts"
    causal = False
    gated = True
    defaults = {}
    aux_losses = ("z",)
    train_defaults = {}

    def __init_subclass__(cls):
        shared = BUDGET | (GATE if cls.gated else {})
        cls.defaults = shared | cls.__base__.defaults | vars(cls).get("defaults", {})  # its own win

    def __init__(self, dim, num_experts, tokens=None, **options):
        """tokens: how many a group has. Soft alone needs it, where slots is None."""
        super().__init__()
        self.dim, self.num_experts, self.tokens = dim, num_experts, tokens
        self.options = SimpleNamespace(**(self.defaults | options))
        check_options(self, options)
        if self.gated:
            self.gate = new_gate(dim, num_experts, self.options.gate)
            self.gate.requires_grad_(self.options.router_weights == "learned")

    def check_tokens(self, x):
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.dim:
            rule = f"a router needs tokens [G, T, {self.dim}], at least one in a group"
            raise ValueError(f"{rule}, got {list(x.shape)}")

    def logits(self, x):
        """gate(x), without noise: logits [G, T, E] of tokens x [G, T, D], in float32 at least."""
        self.check_tokens(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            weights = {name: weight.to(x.dtype) for name, weight in self.gate.named_parameters()}
            return torch.func.functional_call(self.gate, weights, x)  # gate(x), in x's type

    def add_noise(self, logits):
        """In training, logits with noise of deviation noise_std / E; else the logits themselves."""
        if self.training and self.options.noise_std:
            return logits + draw_noise(logits) * (self.options.noise_std / self.num_experts)
        return logits

    def scores_and_weights(self, logits, noisy):
        """What decides and what weighs, both [G, T, E]: here both are gates, with noise."""
        gates = noisy.softmax(2)
        return gates, gates

    def capacity(self, tokens, margin=1):
        """C = ceil(margin*T*K*cf / E), 1 to T; dropless: None. margin: 2 where K is only a mean."""
        o = self.options
        if o.capacity_factor is None:
            return None
        wanted = margin * tokens * o.top_k * o.capacity_factor / self.num_experts
        # Rounded: 11.000000000000002 is 11. Differs: the published code rounds C up to fours.
        return max(1, math.ceil(min(tokens, round(wanted, 9))))

    @torch.no_grad()
    def update(self, routings, generator=None):
        """Moves what has no gradient. Call it after each training step with the step's routings."""
        if self.gated and self.options.router_weights == "random":
            redraw(self.gate, generator)


# ---------------------------------------------------------------- tokens choose experts
class TokenChoice(Router):
    """Each token goes to the K experts with its largest gates, if they have a slot left.

        wants[g,t,e]      = gates[g,t,e] is one of the K largest of gates[g,t]
        dispatch[g,t,e,c] = 1 if t wants e, and is the c-th in line for it; c < C
        combine[g,t,e,c]  = dispatch[g,t,e,c] * gates[g,t,e]

    V-MoE 2106.05974, section 2; Switch 2101.03961.
    """

    chooses = "tokens"
    causal = True  # with some options it is not: see __init__
    defaults = dict(
        priority="token",  # who gets a seat first: by position; or "choice", "gate": rank_in_line()
        renormalize=False,  # K >= 2: divide a token's K weights by their sum
        bias_rate=0.0,  # > 0: experts are chosen by score + bias, which update() moves
        bias_update="sign",  # or "quantile": see move_bias()
    )
    aux_losses = ("importance", "balance", "load", "z")  # load needs noise
    train_defaults = dict(capacity_factor=None, balance="switch")

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        o = self.options
        by_position = o.priority == "token" or (o.priority == "choice" and o.top_k == 1)
        # If not by position, a later token may take the last slot, where there is a limit.
        self.causal = self.causal and (by_position or o.capacity_factor is None)
        if o.bias_rate:
            self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x, key=None):
        o, C = self.options, self.capacity(x.shape[1])
        logits = self.logits(x)  # [G, T, E], as all that follow
        gates = self.gates(logits)  # without noise: losses and statistics read them
        noisy = self.add_noise(logits)
        scores, weights = self.scores_and_weights(logits, noisy)  # here both are softmax(noisy)
        biased = scores + self.bias if o.bias_rate else scores
        wants = largest(biased, o.top_k, dim=2)
        if o.renormalize and o.top_k > 1:
            total = (weights * wants).sum(2, keepdim=True)
            weights = weights / total.clamp(min=1e-20)  # never 0 / 0
        rank = None if o.priority == "token" else rank_in_line(o.priority, scores, biased)
        seats = first_come(wants, C, rank)
        notes = dict(logits=logits, noisy=noisy, gates=gates, scores=scores.detach())
        return HardRouting(self, seats, weights, C, wants=wants, **notes)

    def gates(self, logits):
        """[G, T, E], a token's sum to 1: what losses and statistics read."""
        return logits.softmax(2)

    @torch.no_grad()
    def update(self, routings, generator=None):
        super().update(routings, generator)
        if self.options.bias_rate:
            move_bias(self, routings)


def largest(scores, k, dim):
    """True at the k largest along dim. Of equal ones the first count; topk promises no order."""
    scores = scores.detach().nan_to_num(math.inf, math.inf, -math.inf)  # NaN is chosen, and shows
    kth = scores.topk(k, dim).values.narrow(dim, k - 1, 1)
    above, equal = scores > kth, scores == kth
    needed = k - above.sum(dim, keepdim=True)  # so many of the equal ones
    return above | (equal & (equal.cumsum(dim, dtype=torch.int32) <= needed))


def first_come(wants, capacity, rank=None):
    """Of the tokens that want an expert, the first `capacity` in line get a seat.

    wants [G, T, E] -> seats [G, T, E]. The line is by rank [G, T, E], the lowest first, or by
    position if that is None. If capacity is None, all get a seat.
    """
    if capacity is None:
        return wants
    if rank is None:
        in_line = wants.mT.contiguous().cumsum(2, dtype=torch.int32).mT  # 1, 2, ...; .mT for speed
    else:
        # Who does not want it stands last: no rank is as large as wants.numel().
        in_line = 1 + ranks(torch.where(wants, rank, wants.numel()), dim=1)
    return wants & (in_line <= capacity)


class HardRouting(Routing):
    """A Routing with at most one token in a slot, so that two tensors [G, T, E] define it:

        seats    who has a seat               dispatch[g,t,e,c] = 1 if t is the c-th seated at e
        weights  what e's output weighs       combine[g,t,e,c]  = dispatch[g,t,e,c] * weights[g,t,e]

    The two equations become a gather and a scatter-add, for speed. wants: by default the seats. If
    capacity is None, C is what the fullest expert needs, and filled says what each one fills.
    """

    def __init__(self, router, seats, weights, capacity, wants=None, **notes):
        vars(self).update(notes, router=router)  # as in Routing, but without tensors [G, T, E, C]
        self.seats, self.weights, self.capacity, self._rows = seats, weights, capacity, None
        self.wants = seats if wants is None else wants
        self.expert_weights = torch.where(seats, weights, 0.0)
        self.slots_per_token = seats.sum(2)
        self.tokens_per_expert = self.wants.sum((0, 1))
        if capacity is None and torch.compiler.is_compiling():
            self.capacity = seats.shape[1]  # under torch.compile no load is known: C = T
        elif capacity is None:
            seated = seats.sum(1).cpu()  # [G, E]; waits for the device
            self.capacity = max([1, *seated.flatten().tolist()])
            self.filled = seated.sum(0).tolist()

    def tensors(self):
        place = self.seats.cumsum(1) - 1
        slot = torch.arange(self.capacity, device=place.device)
        dispatch = self.seats[..., None] & (place[..., None] == slot)  # [G, T, E, C]
        combine = torch.where(dispatch, self.weights[..., None], 0.0)
        return dispatch.to(combine.dtype), combine

    def rows(self):
        """[E, G * C]: which row of x fills each slot, if x is padded to [G * (T + 1), D].

        So each group ends in a row of zeros, for its empty slots.
        """
        if self._rows is not None:
            return self._rows
        G, T, E = self.seats.shape
        # Seats 0 1 0 1 count 0 1 1 2: the first place that counts n is the n-th seated token, here
        # 1 and 3. Where none counts n, searchsorted says T.
        seated = self.seats.mT.contiguous().cumsum(2, dtype=torch.int32)  # [G, E, T]
        nth = torch.arange(1, self.capacity + 1, dtype=torch.int32, device=seated.device)
        token = torch.searchsorted(seated, nth.repeat(G, E, 1))  # [G, E, C]
        group = torch.arange(G, device=seated.device)[:, None, None]
        self._rows = (group * (T + 1) + token).transpose(0, 1).flatten(1)
        return self._rows

    def dispatch(self, x):
        G, _, D = x.shape
        padded, rows = F.pad(x, (0, 0, 0, 1)).flatten(0, 1), self.rows()
        slots = padded.index_select(0, rows.flatten())
        return slots.view(len(rows), G, self.capacity, D).transpose(0, 1)

    def combine(self, y):
        (G, T, _), rows = self.seats.shape, self.rows()
        padded = F.pad(self.weights, (0, 0, 0, 1)).flatten(0, 1)  # 0 for empty slots
        weights = padded.T.gather(1, rows)  # [E, G * C]
        y = y.transpose(0, 1).flatten(0, 2)  # [E * G * C, D]
        weighted = y * weights.flatten()[:, None].to(y.dtype)
        sums = y.new_zeros(G * (T + 1), y.shape[1]).index_add_(0, rows.flatten(), weighted)
        return sums.unflatten(0, (G, T + 1))[:, :-1]


# ---------------------------------------------------------------- experts choose tokens
class ExpertChoice(Router):
    """Each expert takes the C tokens with the largest gates for it (2202.09368, section 3.2).

        seats[g,t,e]      = gates[g,t,e] is one of the C largest of gates[g,:,e]
        dispatch[g,t,e,c] = 1 if t is the c-th seated at e
        combine[g,t,e,c]  = dispatch[g,t,e,c] * gates[g,t,e]

    Never causal: a token competes with all others.
    """

    def forward(self, x, key=None):
        C = self.capacity(x.shape[1])
        logits = self.logits(x)  # [G, T, E], as all that follow
        noisy = self.add_noise(logits)
        scores, weights = self.scores_and_weights(logits, noisy)  # here both are softmax(noisy)
        seats = largest(scores, C, dim=1)
        return HardRouting(self, seats, weights, C, logits=logits, gates=logits.softmax(2))


# ---------------------------------------------------------------- nobody chooses
class Soft(Router):
    """Each slot is a mix of all tokens, each output a mix of all slots (2308.00951, section 2).

        logits[g,t,e,c] = scale * cos(x[g,t], phi[:,e,c])
        dispatch = softmax of logits over t,   combine = softmax of logits over all (e, c)

    phi [D, E, C] has a direction for each slot; scale is learned and sharpens all mixes. From 1, as
    published, mixes are almost uniform at first; for a short training 10 is better. C is fixed when
    it is built: the option slots, or round(tokens * K * cf / E). Never causal.
    """

    chooses = None
    gated = False
    defaults = dict(slots=None, scale=1.0)
    aux_losses = ()

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        o = self.options
        if o.slots is None and self.tokens is None:
            raise ValueError("soft needs slots, or tokens to count them from, got neither")
        if o.slots is None:
            o.slots = max(1, round(self.tokens * o.top_k * o.capacity_factor / num_experts))
        self.phi = nn.Parameter(torch.empty(dim, num_experts, o.slots))
        nn.init.normal_(self.phi, std=dim**-0.5)
        self.scale = nn.Parameter(torch.tensor(float(o.scale)))

    def forward(self, x, key=None):
        self.check_tokens(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            direction = self.scale.to(x.dtype) * unit_length(self.phi.to(x.dtype), 0)
            logits = torch.einsum("gtd,dec->gtec", unit_length(x, 2), direction)
            dispatch = logits.softmax(1)  # [G, T, E, C], a slot's weights sum to 1
            gates = logits.flatten(2).softmax(2)  # [G, T, E*C], a token's weights sum to 1
            combine = gates.view_as(logits)
        return Routing(dispatch, combine, router=self, logits=logits, gates=gates)


def unit_length(z, dim):
    """z with a length of about 1 along dim."""
    return z * (z.square().sum(dim, keepdim=True) + 1e-6).rsqrt()


# ---------------------------------------------------------------- experts
class Experts(nn.Module):
    """E two-layer perceptrons with GELU, their weights stacked: one batched product a layer.

    For other experts, make_weights() sets parameters [E, ...], and `names` lists them as expert()
    takes them. Those of shape [E, 1, n] are biases: train.py lets them not decay.
    """

    names = ("w1", "b1", "w2", "b2")

    def __init__(self, num_experts, dim, hidden):
        super().__init__()
        self.dim = dim
        self.make_weights(num_experts, dim, hidden)

    def make_weights(self, num_experts, dim, hidden):
        self.w1 = stacked(num_experts, dim, hidden, fan_in=dim)
        self.b1 = stacked(num_experts, 1, hidden, fan_in=dim)
        self.w2 = stacked(num_experts, hidden, dim, fan_in=hidden)
        self.b2 = stacked(num_experts, 1, dim, fan_in=hidden)

    def expert(self, z, w1, b1, w2, b2):
        """z [E, N, D] -> the same: expert e on its N vectors. Also for one expert, where E is 1."""
        return torch.baddbmm(b2, F.gelu(torch.baddbmm(b1, z, w1)), w2)

    def forward(self, slots, filled=None):
        """slots [G, E, C, D] -> outputs, the same shape; a slot that is n*D wide holds n vectors.

        Dropless, with filled: slots [N, D], filled[0] of expert 0, then filled[1] of expert 1, ...
        """
        weights = [getattr(self, name) for name in self.names]  # pruning or LoRA may replace them
        if filled is not None:
            return one_by_one(self, slots, filled, weights)
        z = slots.transpose(0, 1)  # [E, G, C, D]
        y = self.expert(z.reshape(len(z), -1, self.dim), *weights)
        return y.view(z.shape).transpose(0, 1)


def stacked(num_experts, rows, columns, fan_in):
    """A parameter [E, rows, columns], uniform in +-fan_in^-1/2 as in nn.Linear."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(num_experts, rows, columns).uniform_(-bound, bound))


# ================================================================ Later: plans decide
PLAN = dict(iterations=20, combine_weights="softmax")  # or "plan", which then weighs too


class SinkhornTokenChoice(TokenChoice):
    """Tokens choose by a Sinkhorn plan of the noisy logits (S-BASE, 2202.01169). Never causal."""

    causal = False  # a plan balances over all tokens
    defaults = PLAN
    train_defaults = dict(capacity_factor=None)

    def scores_and_weights(self, logits, noisy):
        gates = logits.softmax(2)  # as published: without noise
        return by_plan(self.options, sinkhorn_plan, noisy, gates)


class SinkhornExpertChoice(ExpertChoice):
    """Experts choose by a Sinkhorn plan of the noisy logits (2401.15969)."""

    defaults = PLAN

    def scores_and_weights(self, logits, noisy):
        return by_plan(self.options, sinkhorn_plan, noisy, gates=noisy.softmax(2))


class SparseTokenChoice(SinkhornTokenChoice):
    """Tokens choose by a plan with at most K experts a token (2209.15466).

    Where a token's plan has fewer than K non-zeros, the first other experts make up K. With K = 1
    and combine_weights="plan" all weights are 1, and the router gets no gradient.
    """

    def scores_and_weights(self, logits, noisy):
        columns = noisy.softmax(2).mT  # [G, E, T]: a column, with k non-zeros, is a token
        limits = dict(k=self.options.top_k, column_sum=1.0)
        scores, weights = by_plan(self.options, sparse_plan, columns, columns, **limits)
        return scores.mT, weights.mT


class SparseExpertChoice(SinkhornExpertChoice):
    """Experts choose by a plan of at most C tokens each; if fewer, the first others make up C."""

    def scores_and_weights(self, logits, noisy):
        gates = noisy.softmax(2)
        C = self.capacity(logits.shape[1])
        return by_plan(self.options, sparse_plan, gates, gates, k=C)


def by_plan(options, solve, z, gates, **limits):
    """Scores and weights [G, T, E]: solve(z), a plan, decides, and may weigh in place of gates."""
    if options.combine_weights == "plan":
        plan = solve(z, iterations=options.iterations, **limits)
        return plan, plan
    return solve(z.detach(), iterations=options.iterations, **limits), gates  # no gradient passes


def sinkhorn_plan(logits, iterations=20):
    """Entropic optimal transport of tokens to experts (S-BASE, 2202.01169).

        argmin_P  <P, -logits> + sum P log P,  each row sums to 1, each column to T/E

    logits [G, T, E] -> plan [G, T, E]. Rows, scaled last, sum to 1; columns come near T/E, unless
    logits span a hundred units. Differs: in the log domain, so that no logit overflows.
    """
    G, T, E = logits.shape
    u = logits.new_zeros(G, T, 1)
    for _ in range(iterations):
        v = math.log(T / E) - (logits + u).logsumexp(1, keepdim=True)  # [G, 1, E], experts
        u = -(logits + v).logsumexp(2, keepdim=True)  # [G, T, 1], tokens
    return (logits + u + v).exp()


def sparse_plan(gates, k, iterations=20, lr=1e-2, column_sum=None):
    """Optimal transport with at most k non-zeros in a column (2209.15466, its semi-dual).

        argmax_P  <P, gates> - |P|^2 / 2,  columns sum to column_sum, rows to column_sum * E/T

    gates [G, T, E] -> plan [G, T, E]; column_sum None is T/E, so that rows sum to 1. Columns are
    exact: column_sum times the projection of (gates + alpha) / column_sum. Rows are approximate:
    alpha [G, T, 1] raises a row's gates until its sum fits. Adam moves it, at most `iterations`
    times, until a group's errors have a norm <= 1e-3. Differs: the last projection has a gradient.
    """
    G, T, E = gates.shape
    column_sum = T / E if column_sum is None else column_sum
    row_sum = column_sum * E / T
    fixed = gates.detach()
    alpha = m = v = fixed.new_zeros(G, T, 1)
    running = torch.ones_like(alpha[:, :1], dtype=torch.bool)
    for step in range(1, iterations + 1):
        share = project((alpha + fixed) / column_sum, k)  # of a column; shares sum to 1
        slope = column_sum * share.sum(2, keepdim=True) - row_sum  # > 0: the row gets too much
        m = 0.9 * m + 0.1 * slope  # Adam by hand, as each group stops by itself
        v = 0.999 * v + 0.001 * slope**2
        move = lr * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        alpha = torch.where(running, alpha - move, alpha)
        running = running & (slope.norm(dim=1, keepdim=True) > 1e-3)
    return column_sum * project((alpha + gates) / column_sum, k)


def project(z, k):
    """Each column of z [G, T, E], over T, projected on the simplex with at most k non-zeros.

    Its k largest entries stay, less a threshold, clipped at 0, so that they sum to 1. With k = 2,
    .6 .5 .1 becomes .55 .45 0.
    """
    k = min(k, z.shape[1])
    values = z.topk(k, dim=1).values  # [G, k, E], falling
    count = torch.arange(1, k + 1, device=z.device, dtype=z.dtype)[:, None]
    threshold = (values.cumsum(1) - 1) / count  # if just the `count` largest stay
    # If z is not finite, or so large that z - 1 is z, the support would be 0.
    support = (values > threshold).sum(1, keepdim=True).clamp(min=1)
    return (z - threshold.gather(1, support - 1)).clamp(min=0) * largest(z, k, dim=1)


# ================================================================ Later: other ways to choose
class Sigmoid(TokenChoice):
    """DeepSeek-V3's router (2412.19437, eq. 12 to 16): s = sigmoid(logits), each expert on its own.

    A token goes to the K largest s + bias, weighed by s over the sum of its K chosen s. Differs:
    at K = 1 that would always be 1, and nothing would learn from the task, so s itself weighs.
    """

    defaults = dict(bias_rate=1e-3, renormalize=True)
    train_defaults = dict(capacity_factor=None, balance="bias")

    def gates(self, logits):
        return F.logsigmoid(logits).softmax(2)  # s / sum s; from log s, so never 0 / 0

    def scores_and_weights(self, logits, noisy):
        s = noisy.sigmoid()
        return s, s


class Hash(Router):
    """A fixed table sends a key (token id, patch position) to an expert (Hash Layers, 2106.04426).

    The table is random and balanced: each run of E keys uses every expert once. A token goes to its
    entry e and, if K > 1, to e + 1 ... e + K - 1, modulo E. Keys beyond the table start again;
    without keys a token's position is its key. Weights are 1/K; or, as in the first layers of
    DeepSeek-V4, a learned gate's softmax over the K chosen.
    """

    chooses = "tokens"
    causal = True
    gated = False  # it has none of the options in GATE
    defaults = dict(num_keys=None, hash_weights="equal")  # None: 4096; moe_tokens.py: all token ids
    aux_losses = ()
    train_defaults = dict(capacity_factor=None)

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        num_keys = self.options.num_keys or 4096
        runs = math.ceil(num_keys / num_experts)
        table = torch.rand(runs, num_experts).argsort(1).flatten()
        self.register_buffer("table", table[:num_keys])
        if self.options.hash_weights == "learned":
            if self.options.top_k == 1:
                raise ValueError("hash_weights=learned needs top_k >= 2, got top_k=1")
            self.gate = new_gate(dim, num_experts)

    def forward(self, x, key=None):
        self.check_tokens(x)
        (G, T, _), E, C = x.shape, self.num_experts, self.capacity(x.shape[1])
        if key is None:
            key = torch.arange(T, device=x.device).expand(G, T)
        if key.shape != (G, T):
            raise ValueError(f"key must be [G, T] = {[G, T]}, got {list(key.shape)}")
        first = self.table[key.long() % len(self.table)]  # [G, T]
        steps = (torch.arange(E, device=x.device) - first[..., None]) % E  # 0 for the first expert
        wants = steps < self.options.top_k  # [G, T, E]
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = wants.to(dtype) / self.options.top_k
        if self.options.hash_weights == "learned":
            weights = self.logits(x).masked_fill(~wants, -math.inf).softmax(2)
        return HardRouting(self, first_come(wants, C), weights, C, wants=wants)


class ExpertThreshold(Router):
    """A token goes to every expert whose gate reaches that expert's threshold (2603.11535).

    Expert choice made causal: an expert's threshold is a running mean, kept by update(), of the
    (1 - K/E) quantile of its gates in a group, so that a token passes K of them on average. The
    first update replaces the start, 1/E. Differs: the paper's quantile is of all tokens together.
    """

    chooses = "threshold"
    causal = True
    decay = 0.9

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        self.register_buffer("threshold", torch.full((num_experts,), 1 / num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(self, x, key=None):
        C = self.capacity(x.shape[1], margin=2)  # only the mean number that pass is known
        logits = self.logits(x)
        noisy = self.add_noise(logits)
        gates = noisy.softmax(2)
        wants = gates >= self.threshold
        notes = dict(logits=logits, gates=logits.softmax(2))
        return HardRouting(self, first_come(wants, C), gates, C, wants=wants, **notes)

    @torch.no_grad()
    def update(self, routings, generator=None):
        super().update(routings, generator)
        gates = torch.cat([routing.weights for routing in routings])  # the noisy gates
        below = 1 - self.options.top_k / self.num_experts
        quantile = gather_processes(gates.quantile(below, dim=1)).mean(0).to(self.threshold)  # [E]
        quantile = torch.where(quantile.isfinite(), quantile, self.threshold)  # not finite: stay
        share = torch.where(self.updates > 0, 1 - self.decay, 1.0)  # the first replaces the start
        self.threshold.lerp_(quantile, share)
        self.updates += 1


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


def build_router(name, dim, num_experts, **options):
    """The router of that name, for tokens [G, T, dim]. ValueError for an invalid name or option."""
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; known: {', '.join(ROUTERS)}")
    return ROUTERS[name](dim, num_experts, **options)


# ================================================================ Later: lines, biases, no drops
def rank_in_line(priority, scores, biased):
    """Numbers [G, T, E], the lowest first in line: all first choices before all second ones.

    Among these "choice" goes by position (GShard), "gate" by a token's largest score (V-MoE, 4).
    """
    T = scores.shape[1]
    place = torch.arange(T, device=scores.device)[:, None]
    if priority == "gate":
        place = ranks(-scores.amax(2, keepdim=True), dim=1)
    choice = ranks(-biased, dim=2)  # a token's first choice has rank 0
    return choice * T + place


def ranks(z, dim):
    """The place of each number along dim: 0 for the smallest, of equal ones the first."""
    return z.argsort(dim=dim, stable=True).argsort(dim=dim)


def move_bias(router, routings):
    """After a step: raise the bias [E] of experts that too few tokens want, lower that of others.

    "sign" (2408.15664): by bias_rate. "quantile" (Megatron-Core): at rate 1, so that of N tokens
    q = N*K / E, the even share, would clear the bar of each expert, if the bars stayed:

        bar[n] = (K+1)-th largest of scores[n] + bias,  margin[n,e] = scores[n,e] + bias[e] - bar[n]
        bias[e] falls by bias_rate times the (q+1)-th largest of margin[:,e]
    """
    o, bias, E = router.options, router.bias, router.num_experts
    if o.bias_update == "sign":
        # In whole numbers, so that rounding flips no sign.
        counts = torch.stack([routing.tokens_per_expert for routing in routings])
        wanted = gather_processes(counts).sum(0)
        bias += o.bias_rate * (wanted.sum() - E * wanted).sign().to(bias)
    else:
        scores = torch.cat([routing.scores.flatten(0, 1) for routing in routings])
        biased = gather_processes(scores).to(bias) + bias  # [N, E]
        if len(biased) and o.top_k < E:
            bar = biased.topk(o.top_k + 1).values[:, -1:]  # [N, 1]
            q = o.top_k * len(biased) // E
            margin = (biased - bar).topk(q + 1, dim=0).values[-1]  # [E]
            bias -= o.bias_rate * margin
    bias -= bias.mean()  # only differences choose


def run_filled(routing, x, experts):
    """combine(experts(dispatch(x))) of a dropless routing, whose slots are mostly empty.

    x [G, T, D] -> y [G, T, D]. HardRouting has counted the filled slots: here nothing waits.
    """
    tokens = x.flatten(0, 1)  # [G * T, D]
    seats = routing.seats.permute(2, 0, 1).flatten()  # expert after expert: [E * G * T]
    weights = routing.weights.permute(2, 0, 1).flatten()
    place = seats.nonzero_static(size=sum(routing.filled)).flatten()  # where seats are True
    row = place % len(tokens)  # place is e * G * T + row
    y = experts(tokens.index_select(0, row), routing.filled)  # [N, D]
    weighted = y * weights.index_select(0, place)[:, None].to(y.dtype)
    return y.new_zeros(tokens.shape).index_add_(0, row, weighted).view(x.shape)


def one_by_one(experts, slots, filled, weights):
    """Expert e on the next filled[e] rows of slots [N, D], one expert after the other."""
    device = slots.device.type
    if torch.is_autocast_enabled(device):  # cast once, not each expert's part
        half = torch.get_autocast_dtype(device)
        slots, weights = slots.to(half), [weight.to(half) for weight in weights]
    outputs = []
    of_experts = zip(*[weight.split(1) for weight in weights])
    for own, own_weights in zip(slots.split(filled), of_experts):
        y = experts.expert(own.reshape(1, -1, experts.dim), *own_weights)
        outputs.append(y.view_as(own))
    return torch.cat(outputs)


# ================================================================ Later: losses
def importance_loss(logits, gates=None):
    """Squared coefficient of variation of the experts' summed gates (V-MoE 2106.05974, app. A).

    logits without noise, gates (by default their softmax), both [G, T, E]. Mean over groups.
    """
    gates = logits.softmax(-1) if gates is None else gates
    importance = gates.sum(1)  # [G, E]
    return (importance.var(1, correction=0) / importance.mean(1) ** 2).mean()


def load_loss(logits, noisy_logits, top_k, noise_std):
    """Squared coefficient of variation of the experts' chances, averaged over tokens.

    A chance: to be among a token's K largest noisy logits under fresh noise (V-MoE, app. A).
    noisy_logits: logits [G, T, E] with normal noise of deviation noise_std. As published, unlike
    1701.06538, the threshold is the K-th noisy logit of all experts.
    """
    threshold = noisy_logits.topk(top_k).values[..., -1:]  # [G, T, 1]
    chance = torch.special.ndtr((logits - threshold) / noise_std).mean(1)  # [G, E]
    return (chance.var(1, correction=0) / chance.mean(1) ** 2).mean()


def balance_loss(gates, wants, top_k):
    """(E/K) sum_e f_e P_e: 1 when all is even, E/K at collapse (Switch, 2101.03961, eq. 4 to 6).

    f_e: the share of tokens that want e; P_e: the mean of gates [G, T, E]. Mean over groups.
    """
    f, P = wants.to(gates.dtype).mean(1), gates.mean(1)  # [G, E]
    return wants.shape[2] / top_k * (f * P).sum(1).mean()


def z_loss(logits):
    """Mean over tokens of logsumexp(logits)^2, to keep logits small (ST-MoE, 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


# ================================================================ Later: options, gates, processes
CHOICES = {
    "priority": ("token", "choice", "gate"),
    "combine_weights": ("softmax", "plan"),
    "gate": ("linear", "mlp"),
    "router_weights": ("learned", "frozen", "random"),
    "bias_update": ("sign", "quantile"),
    "hash_weights": ("equal", "learned"),
}


def check_options(router, overrides):
    """ValueError for an unknown option, or a value that its default's type does not allow."""
    kind, o, E = type(router).__name__, router.options, router.num_experts
    for name in overrides:
        if name not in router.defaults:
            known = ", ".join(router.defaults)
            raise ValueError(f"{kind} has no option {name}; it has {known}")
    sizes = dict(dim=router.dim, num_experts=E, tokens=router.tokens)
    for name, value in (sizes | vars(o)).items():
        default = router.defaults.get(name, 1)  # sizes are whole numbers
        if type(value) is type(default) and value == default:
            continue  # a default is always valid: a fork's may be below 0
        if value is None and name in ("tokens", "capacity_factor"):
            continue
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        rule, good = "", True
        if name in CHOICES:
            rule, good = f"one of {', '.join(CHOICES[name])}", value in CHOICES[name]
        elif isinstance(default, bool):
            rule, good = "True or False", isinstance(value, bool)
        elif isinstance(default, float):
            rule, good = "a number >= 0", number and 0 <= value < math.inf
            if name == "capacity_factor":
                rule, good = "a positive number", good and value > 0
        elif isinstance(default, int) or name in ("slots", "num_keys"):
            whole = number and isinstance(value, numbers.Integral)
            rule, good = "a whole number >= 1", whole and value >= 1
        if not good:
            raise ValueError(f"{name} must be {rule}, got {name}={value!r}")
    if o.top_k > E:
        raise ValueError(f"top_k must be at most num_experts={E}, got top_k={o.top_k}")
    if o.capacity_factor is None and router.chooses != "tokens":
        rule = "capacity_factor=None (dropless) is for routers in which tokens choose"
        raise ValueError(f"{rule}, got {kind}")


def new_gate(dim, num_experts, kind="linear"):
    """The layer that makes logits [..., E] of tokens [..., D]: linear, or mlp."""
    gate = nn.Linear(dim, num_experts, bias=False)
    if kind == "mlp":
        gate = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.GELU(), gate)
    redraw(gate)
    return gate


@torch.no_grad()
def redraw(gate, generator=None):
    """Fresh weights of deviation dim^-1/2: a linear gate's logits vary as tokens do."""
    for weight in gate.parameters():
        fresh = torch.empty(weight.shape, dtype=weight.dtype)  # on the CPU: all devices start alike
        weight.copy_(fresh.normal_(0, weight.shape[1] ** -0.5, generator=generator))


def draw_noise(logits):
    """Standard normal noise. Each process draws the whole batch's, and keeps that of its rows."""
    if not dist.is_initialized():
        return torch.randn_like(logits)
    whole = logits.new_empty(dist.get_world_size() * len(logits), *logits.shape[1:])
    return torch.randn_like(whole).chunk(dist.get_world_size())[dist.get_rank()]


def gather_processes(rows):
    """The rows [N, ...] of all processes, one process after the other."""
    if not dist.is_initialized():
        return rows
    whole = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(whole, rows.contiguous())
    return whole
