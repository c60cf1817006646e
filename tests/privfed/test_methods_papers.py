"""Each method's rule on a quadratic, with numbers worked by hand: ∇L(θ) = h (θ − t), so H = h."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from privfed.methods import (
    MRMTL,
    Anil,
    Ditto,
    FedBABU,
    FedPer,
    FedProx,
    FedRep,
    LocalNorm,
    Maml,
    MetaSGD,
    PerFedAvg,
    PFedMe,
    Scaffold,
)
from privfed.models import Layout
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge
from privfed.privacy.oracle.door import ALL, Batch, Meter

HEAD = torch.tensor([True, False])
LAYOUT: Layout = {"head": HEAD, "body": ~HEAD, "norm": torch.zeros(2, dtype=torch.bool)}
NORM: Layout = {"head": torch.zeros(2, dtype=torch.bool), "body": ~HEAD, "norm": HEAD}


class Quadratic:
    """Every part of the records has its own target; all have curvature ``h``."""

    def __init__(self, h: float = 1.0, **targets: float) -> None:
        self.h, self.targets, self.asked = h, targets, list[tuple[str, list[float]]]()
        self._meter = Meter(0.5, 2.0, "hash-0")

    def draw(self, part: str = ALL) -> Batch:
        return self._meter.drawn(Batch(part, torch.arange(1)))

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        self._meter.query(batch)
        self.asked.append((batch._part, theta[0].tolist()))
        return self.h * (theta - self.targets[batch._part])

    def curvature(self, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        assert batch._part == "support"
        return self.h * vector

    @property
    def charges(self) -> tuple[Charge, ...]:
        return self._meter.charges


class Noised(Quadratic):
    """A private door has no second order."""

    curvature = None  # type: ignore[assignment]


def at(*values: float, **more: float) -> dict[str, Tensor]:
    return {"theta": torch.tensor(values), **{name: torch.tensor([value]) for name, value in more.items()}}


def contributed(method: Any, state: Any, shared: Any, door: Quadratic) -> tuple[list[float], Any]:
    update, after = method.contribute(state, shared, door)
    assert update.shape == (1, method.blocks * len(state["theta"]))
    return update[0].tolist(), after


def test_fedprox_is_pulled_back_to_the_start_after_each_answer() -> None:
    # 2 → 2 − ½(2 − 10) = 6 → 6 − ½((6 − 10) + ¼(6 − 2)) = 6 + 2 − ½ = 7.5
    method = FedProx(local_steps=2, lr=0.5, regularization=0.25)
    assert contributed(method, at(2.0), {}, Quadratic(all=10.0)) == ([5.5], {})
    assert contributed(FedProx(local_steps=2, lr=0.5, regularization=0.0), at(2.0), {}, Quadratic(all=10.0))[0] == [6.0]


def test_scaffold_steps_along_the_corrected_gradient_and_sends_two_differences() -> None:
    method = Scaffold(local_steps=2, lr=0.5)
    # c_k = 0, c = −4: 2 − ½(−8 − 0 − 4) = 8; 8 − ½(−2 − 4) = 11
    # c_k⁺ = 0 + 4 + (2 − 11)/(2·½) = −5, the mean of −8 and −2
    update, after = contributed(method, at(2.0, control=-4.0), {}, Quadratic(all=10.0))
    assert update == [9.0, -5.0] and after["control"].tolist() == [[-5.0]]
    # the next round goes on from c_k = −5: 2 − ½(−8 + 5 − 4) = 5.5; 5.5 − ½(−4.5 + 5 − 4) = 7.25; c_k⁺ = (−8 − 4.5)/2
    update, after = contributed(method, at(2.0, control=-4.0), after, Quadratic(all=10.0))
    assert update == [5.25, -1.25] and after["control"].tolist() == [[-6.25]]
    state = Scaffold(outer_lr=0.5).serve(at(2.0, control=-4.0), torch.tensor([9.0, -5.0]), 0.0)
    assert state["theta"].tolist() == [6.5] and state["control"].tolist() == [-9.0]
    assert method.init_server(torch.tensor([2.0]))["control"].tolist() == [0.0]


def test_scaffold_with_equal_controls_is_fedavg() -> None:
    update, _ = contributed(
        Scaffold(local_steps=2, lr=0.5), at(2.0, control=3.0), {"control": torch.tensor([[3.0]])}, Quadratic(all=10.0)
    )
    assert update[0] == 6.0


def test_mr_mtl_goes_on_from_its_own_model_and_sends_it_against_the_mean() -> None:
    method = MRMTL(local_steps=1, lr=0.5, regularization=0.5, personal_steps=1, personal_lr=0.5)
    # no model yet: from v̄ = 2, 2 − ½(−8 + 0) = 6; sent 6 − 2
    update, after = contributed(method, at(2.0), {}, Quadratic(all=10.0))
    assert update == [4.0] and after["theta"].tolist() == [[6.0]]
    # v̄ = 4 now: 6 − ½(−4 + ½(6 − 4)) = 7.5; sent 7.5 − 4
    update, after = contributed(method, at(4.0), after, Quadratic(all=10.0))
    assert update == [3.5] and after["theta"].tolist() == [[7.5]]
    # the mean of v_k is what the server has next: 4 + mean(v_k − 4)
    assert method.serve(at(4.0), torch.tensor([3.5]), 0.0)["theta"].tolist() == [7.5]
    # personal: 7.5 − ½(−2.5 + ½(7.5 − 4)) = 7.875; nothing flows back
    assert method.personalize(at(4.0), after, {}, Quadratic(all=10.0))["theta"].tolist() == [7.875]
    assert after["theta"].tolist() == [[7.5]]


def test_ditto_keeps_a_personal_model_that_is_pulled_to_the_federated_one() -> None:
    method = Ditto(local_steps=2, lr=0.5, regularization=0.5, personal_steps=1, personal_lr=0.5)
    assert contributed(method, at(2.0), {}, Quadratic(all=10.0)) == ([6.0], {})
    # first from w = 2: 2 − ½(−8) = 6; then at w = 8: 6 − ½(−4 + ½(6 − 8)) = 8.5
    private = method.personalize(at(2.0), {}, {}, Quadratic(all=10.0))
    assert private["theta"].tolist() == [6.0]
    assert method.personalize(at(8.0), {}, private, Quadratic(all=10.0))["theta"].tolist() == [8.5]


def test_pfedme_moves_towards_the_proximal_point() -> None:
    method = PFedMe(local_steps=2, inner_steps=1, inner_lr=0.5, lr=0.25, regularization=2.0, outer_lr=0.5)
    # θ = 2 − ½(−8) = 6; w_k = 2 − ½(2 − 6) = 4.  θ = 4 − ½(−6) = 7; w_k = 4 + ½·3 = 5.5
    assert contributed(method, at(2.0), {}, Quadratic(all=10.0)) == ([3.5], {})
    # two inner steps: θ = 6 − ½(−4 + 2(6 − 2)) = 4; w_k = 2 + ½·2 = 3
    two = PFedMe(local_steps=1, inner_steps=2, inner_lr=0.5, lr=0.25, regularization=2.0)
    assert contributed(two, at(2.0), {}, Quadratic(all=10.0))[0] == [1.0]
    # (1 − β) w + β mean w_k = ½ · 2 + ½ · 5.5
    assert method.serve(at(2.0), torch.tensor([3.5]), 0.0)["theta"].tolist() == [3.75]
    personal = PFedMe(personal_steps=2, personal_lr=0.5, regularization=2.0)
    assert personal.personalize(at(2.0), {}, {}, Quadratic(all=10.0))["theta"].tolist() == [4.0]


def test_maml_sends_the_gradient_through_its_adaptation() -> None:
    method = Maml(inner_steps=2, inner_lr=0.25, outer_lr=3.0)
    door = Quadratic(h=2.0, support=10.0, query=4.0)
    # θ: 2 → 2 − ¼·2(2 − 10) = 6 → 6 − ½(6 − 10) = 8; ∇L_Q = 2(8 − 4) = 8; (1 − ¼·2)² · 8 = 2; −3 · 2
    assert contributed(method, at(2.0), {}, door) == ([-6.0], {})
    assert door.asked == [("support", [2.0]), ("support", [6.0]), ("query", [8.0])]
    with pytest.raises(NoGuarantee, match="second-order terms exist only without a claim or at client level"):
        method.contribute(at(2.0), {}, Noised(support=10.0, query=4.0))


def test_anil_adapts_the_head_alone_and_sends_a_gradient_for_all() -> None:
    door = Quadratic(h=2.0, support=10.0, query=4.0)
    shared, _ = Anil().init_site(torch.zeros(2), LAYOUT)
    # head 2 → 2 − ¼·2·(−8) = 6, body stays 2; ∇L_Q = (2·2, 2·(−2)); head times 1 − ½, body times 1; by −3
    for first_order, head in ((False, -6.0), (True, -12.0)):
        method = Anil(inner_steps=1, inner_lr=0.25, outer_lr=3.0, first_order=first_order)
        assert contributed(method, at(2.0, 2.0), shared, door)[0] == [head, 12.0]
    first = Anil(inner_steps=1, inner_lr=0.25, outer_lr=3.0, first_order=True)
    assert contributed(first, at(2.0, 2.0), shared, Noised(h=2.0, support=10.0, query=4.0))[0] == [-12.0, 12.0]
    personal = Anil(personal_steps=1, personal_lr=0.5).personalize(at(2.0, 2.0), shared, {}, Quadratic(all=10.0))
    assert personal["theta"].tolist() == [6.0, 2.0]


def test_meta_sgd_learns_its_rates() -> None:
    door = Quadratic(h=2.0, support=10.0, query=4.0)
    # g_S = 2·(−8) = −16; θ = 2 + ¼·16 = 6; g_Q = 2·2 = 4; w: (1 − 2·¼)·4 = 2; α: −(−16)·4 = 64; both by −½
    second = MetaSGD(outer_lr=0.5)
    state = at(2.0, rates=0.25)
    assert contributed(second, state, {}, door) == ([-1.0, -32.0], {})
    first = MetaSGD(outer_lr=0.5, first_order=True)
    assert contributed(first, state, {}, Noised(h=2.0, support=10.0, query=4.0))[0] == [-2.0, -32.0]
    served = second.serve(state, torch.tensor([-1.0, -32.0]), 0.0)
    assert served["theta"].tolist() == [1.0] and served["rates"].tolist() == [-31.75]
    assert MetaSGD(inner_lr=0.25).init_server(torch.tensor([2.0]))["rates"].tolist() == [0.25]
    # two steps at the learned rate ¼: 2 → 4 → 5.5
    assert MetaSGD(personal_steps=2).personalize(state, {}, {}, Quadratic(all=10.0))["theta"].tolist() == [5.5]


def test_per_fedavg_takes_the_hessian_from_two_gradients_on_one_draw() -> None:
    method = PerFedAvg(local_steps=1, inner_lr=0.25, outer_lr=3.0, difference=0.5)
    door = Quadratic(h=2.0, support=10.0, query=4.0)
    # θ = 6; u = 4; ± : 2(4 − 10) and 2(0 − 10), (−12 + 20)/1 = 8 = H u; 4 − ¼·8 = 2; −3 · 2
    assert contributed(method, at(2.0), {}, door) == ([-6.0], {})
    assert door.asked == [("support", [2.0]), ("query", [6.0]), ("support", [4.0]), ("support", [0.0])]
    assert sorted((c.group, c.event.noise_multiplier, c.count) for c in door.charges) == [  # type: ignore[union-attr]
        ("hash-0/query", 2.0, 1),
        ("hash-0/support", 2.0 / math.sqrt(2), 1),
        ("hash-0/support", 2.0, 1),
    ]
    # τ = 2: the second step starts at 2 − 6 = −4: θ = −4 + ½·14 = 3, u = −2, Hu = −4, −2 + 1 = −1; −4 + 3
    assert contributed(PerFedAvg(local_steps=2, inner_lr=0.25, outer_lr=3.0, difference=0.5), at(2.0), {}, door)[0] == [
        -3.0
    ]


def test_fedper_trains_both_and_keeps_the_head() -> None:
    method = FedPer(local_steps=1, lr=0.5, personal_steps=1, personal_lr=0.5)
    shared, _ = method.init_site(torch.zeros(2), LAYOUT)
    update, after = contributed(method, at(2.0, 2.0), shared, Quadratic(all=10.0))
    assert update[1] == 4.0 and after["theta"].tolist() == [[6.0, 0.0]]  # of the body nothing is kept
    # next round: own head 6, the server's body 4; what the server has in the head is of no account
    door = Quadratic(all=10.0)
    update, after = contributed(method, at(99.0, 4.0), after, door)
    assert door.asked == [("all", [6.0, 4.0])] and update[1] == 3.0 and after["theta"].tolist() == [[8.0, 0.0]]
    personal = method.personalize(at(99.0, 4.0), after, {}, Quadratic(all=10.0))
    assert personal["theta"].tolist() == [9.0, 4.0] and after["theta"].tolist() == [[8.0, 0.0]]


def test_fedrep_fits_the_head_first_and_moves_the_body_under_it() -> None:
    method = FedRep(head_steps=2, head_lr=0.5, body_steps=1, body_lr=0.25, personal_steps=1, personal_lr=0.5)
    shared, _ = method.init_site(torch.zeros(2), LAYOUT)
    door = Quadratic(all=10.0)
    update, after = contributed(method, at(2.0, 2.0), shared, door)
    # head 2 → 6 → 8 at body 2; then body 2 + ¼·8 = 4 at head 8
    assert door.asked == [("all", [2.0, 2.0]), ("all", [6.0, 2.0]), ("all", [8.0, 2.0])]
    assert update == [0.0, 2.0] and after["theta"].tolist() == [[8.0, 0.0]]
    assert method.personalize(at(99.0, 4.0), after, {}, Quadratic(all=10.0))["theta"].tolist() == [9.0, 4.0]
    # a site that never contributed fits a head to the server's
    assert method.personalize(at(2.0, 4.0), shared, {}, Quadratic(all=10.0))["theta"].tolist() == [6.0, 4.0]


def test_fedbabu_never_trains_the_head() -> None:
    method = FedBABU(local_steps=2, lr=0.5, personal_steps=1, personal_lr=0.5)
    shared, _ = method.init_site(torch.zeros(2), LAYOUT)
    door = Quadratic(all=10.0)
    assert contributed(method, at(2.0, 2.0), shared, door)[0] == [0.0, 6.0]
    assert door.asked == [("all", [2.0, 2.0]), ("all", [2.0, 6.0])]
    assert method.personalize(at(2.0, 2.0), shared, {}, Quadratic(all=10.0))["theta"].tolist() == [6.0, 6.0]


def test_local_norm_keeps_scales_and_shifts() -> None:
    method = LocalNorm(local_steps=1, lr=0.5, personal_steps=1, personal_lr=0.5)
    shared, _ = method.init_site(torch.zeros(2), NORM)
    update, after = contributed(method, at(2.0, 2.0), shared, Quadratic(all=10.0))
    assert update[1] == 4.0 and after["theta"].tolist() == [[6.0, 0.0]]
    assert method.personalize(at(99.0, 4.0), after, {}, Quadratic(all=10.0))["theta"].tolist() == [8.0, 4.0]
