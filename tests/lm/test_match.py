"""The loss that is small when a layer's output is close to dense attention over the same input."""

import pytest
import torch
from training_run import Echo, model, recipe

from proteus_playground.lm import losses
from proteus_playground.lm.training import train


def test_it_is_part_of_the_gradient_where_alpha_is_above_0():
    plain, matched = (list(train(model(), Echo(), recipe(match=match))) for match in (0.0, 0.5))
    assert [step.grad_norm for step in plain[:5]] == [step.grad_norm for step in matched[:5]]  # alpha 0
    assert plain[5].loss == matched[5].loss and plain[5].grad_norm != matched[5].grad_norm


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_it_is_a_distance_that_pulls_on_both(alpha):
    lm = model(route_heads=False).train()
    ids = Echo().batch(0, 2, 48).ids
    with lm.settings(flux_alpha=alpha), losses.attention_calls(lm) as calls:
        lm(ids)
    lm(ids)  # no longer listened to
    assert len(calls) == 2 and all(y.shape == h.shape == (2, 48, 16) for _, h, y in calls)
    seen = [attn.gates.pending_count.clone() for attn, _, _ in calls]
    loss = losses.dense_match(calls)
    assert (loss < 1e-10) == (alpha == 0) and loss < 4
    assert all(attn.training and attn.gates.pending_count.equal(n) for (attn, _, _), n in zip(calls, seen, strict=True))
    attn, h, y = calls[1]
    with torch.no_grad(), attn.settings(flux_alpha=0.0):
        dense = attn.eval()(h)
    squares = (y - dense).square().sum() / dense.square().sum()
    torch.testing.assert_close(losses.dense_match(calls[1:]), squares)
    pulls = [torch.autograd.grad(losses.dense_match([(attn, h, out)]), attn.o_proj.weight, retain_graph=True)[0]
             for out in (y.detach(), y)]  # fmt: skip
    assert alpha == 0 or (pulls[0].any() and not pulls[0].allclose(pulls[1]))  # dense alone, and both
    with pytest.raises(ValueError, match="calls=\\[\\]"):
        losses.dense_match([])


def test_a_pass_with_positions_or_padding_is_refused():
    lm, ids = model(), Echo().batch(0, 1, 24).ids
    for name, value in (("positions", torch.arange(24)), ("key_padding_mask", torch.zeros(1, 24, dtype=torch.bool))):
        with pytest.raises(ValueError, match=f"{name} is given"), losses.attention_calls(lm):
            lm(ids, **{name: value})
    lm(ids, positions=torch.arange(24))  # the hooks are gone
