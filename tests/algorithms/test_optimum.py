"""Learning with a known answer: a KL-regularised policy must reach pi* ∝ pi_reference exp((1 - beta) r / beta).

The policy writes at most three tokens of a vocabulary of three; token 0 ends the response. It is a table: one row of
logits and one value for each of the seven states (prefixes without an end token). All fifteen responses can be listed,
so expectations, gradients and the optimum are exact.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pe_rlhf_jax.algorithms import group, ppo, reinforce
from pe_rlhf_jax.algorithms.advantages import gae, returns_to_go
from pe_rlhf_jax.algorithms.kl import kl_per_token, token_rewards
from pe_rlhf_jax.algorithms.masked import masked_sum

BETA = 0.4


def responses():
    """Tokens, states and mask [15, 3]. The prefix after token a (1 or 2) in state s is state 2 s + a."""
    tokens, states, mask = [], [], []
    for candidate in itertools.product(range(3), repeat=3):
        length = candidate.index(0) + 1 if 0 in candidate else 3
        if any(candidate[length:]):
            continue  # counted once, with zeros after its end
        state, visited = 0, []
        for token in candidate:
            visited.append(state)
            state = 2 * state + token if len(visited) < length else 0
        tokens.append(candidate)
        states.append(visited)
        mask.append([t < length for t in range(3)])
    return jnp.array(tokens), jnp.array(states), jnp.array(mask)


TOKENS, STATES, MASK = responses()
REFERENCE = 0.7 * jax.random.normal(jax.random.key(1), (7, 3))
SCORES = jnp.array([0.7, -1.6, 0.4, -0.3, 1.3] * 3)  # fractions: rounded to integers they would be 0, -1, 0, 0, 1


@jax.jit
def logprobs(logits):
    """[15, 3]; NaN where masked, so that every test here also shows that it does not matter."""
    return jnp.where(MASK, jax.nn.log_softmax(logits)[STATES, TOKENS], jnp.nan)


def values(table):
    return jnp.where(MASK, table[STATES], jnp.nan)


@jax.jit
def log_probability(logits):
    return masked_sum(logprobs(logits), MASK, axis=1)


def objective(logits):
    """E[(1 - beta) r - beta KL], exact."""
    log_pi = log_probability(logits)
    return jnp.sum(jnp.exp(log_pi) * ((1 - BETA) * SCORES - BETA * (log_pi - log_probability(REFERENCE))))


def optimum(scores):
    return jax.nn.softmax(log_probability(REFERENCE) + (1 - BETA) / BETA * scores)


@functools.partial(jax.jit, static_argnums=1)
def rewards(logits, estimator="k1"):
    kl = kl_per_token(logprobs(logits), logprobs(REFERENCE), estimator)
    return token_rewards(SCORES, kl, MASK, kl_coef=BETA, score_coef=1 - BETA)


def expectation(loss_of_row, logits):
    """E_pi of a loss per episode: `total` 1 makes it a sum over the row's tokens, as in the paper."""
    probability = jax.lax.stop_gradient(jnp.exp(log_probability(logits)))
    rows = jax.vmap(lambda row: loss_of_row(row[None]))(jnp.arange(len(TOKENS)))
    return jnp.sum(probability * rows)


def test_all_responses_are_listed():
    assert TOKENS.shape == (15, 3)
    for logits in (REFERENCE, 3 * REFERENCE[::-1]):
        assert float(jnp.sum(jnp.exp(log_probability(logits)))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("returns_of", ["to go", "whole episode"])
def test_reinforce_follows_the_gradient_of_the_objective(returns_of):
    """Both readings of Z_t have the same expected gradient, whatever the baseline. 45 float32 terms: 1e-5 is ample."""
    logits, table = jax.random.normal(jax.random.key(2), (7, 3)), jax.random.normal(jax.random.key(3), (7,))
    shaped = rewards(logits)
    whole = jnp.where(MASK, shaped.sum(axis=1, keepdims=True), jnp.nan)
    returns = returns_to_go(shaped, MASK, 1.0) if returns_of == "to go" else whole

    def loss(logits):
        lp, v = logprobs(logits), values(table)
        return expectation(lambda i: reinforce.policy_loss(lp[i], returns[i], v[i], MASK[i], total=1.0), logits)

    np.testing.assert_allclose(-jax.jit(jax.grad(loss))(logits), jax.jit(jax.grad(objective))(logits), atol=1e-5)


def test_ppo_starts_along_the_gradient_of_the_objective():
    """At the policy that sampled, with lam = gamma = 1."""
    logits, table = jax.random.normal(jax.random.key(2), (7, 3)), jax.random.normal(jax.random.key(3), (7,))
    advantages, _ = gae(rewards(logits), values(table), MASK, 1.0, 1.0)

    def loss(new):
        lp, old = logprobs(new), logprobs(logits)
        return expectation(lambda i: ppo.policy_loss(lp[i], old[i], advantages[i], MASK[i], 0.2, 1.0)[0], new)

    np.testing.assert_allclose(-jax.jit(jax.grad(loss))(logits), jax.jit(jax.grad(objective))(logits), atol=1e-5)


def test_at_the_optimum_the_objective_is_flat_and_every_return_is_the_value():
    """r - beta log(pi* / reference) is the same for all responses: a sampled gradient there has no noise either."""
    target = optimum(SCORES)
    paths = jax.nn.one_hot(TOKENS, 3) * MASK[..., None]
    visits = jnp.zeros((7, 3)).at[STATES].add(target[:, None, None] * paths)
    logits = jnp.log(visits)
    np.testing.assert_allclose(jnp.exp(log_probability(logits)), target, rtol=1e-5)
    returns = returns_to_go(rewards(logits), MASK, 1.0)
    np.testing.assert_allclose(returns[:, 0], returns[0, 0], rtol=1e-5)
    for state in range(7):
        at = np.asarray(MASK & (state == STATES))
        np.testing.assert_allclose(returns[at], returns[at][0], rtol=1e-4, atol=1e-5)


def reinforce_update(parameters, old, rows, shaped):
    returns, mask = returns_to_go(shaped, MASK, 1.0)[rows], MASK[rows]

    def loss(p):
        lp, v = logprobs(p["logits"])[rows], values(p["values"])[rows]
        return reinforce.policy_loss(lp, returns, v, mask) + reinforce.value_loss(v, returns, mask)

    return jax.grad(loss)(parameters)


def ppo_update(parameters, old, rows, shaped):
    old_values, mask = values(old["values"])[rows], MASK[rows]
    advantages, returns = gae(shaped[rows], old_values, mask, 1.0, 0.95)

    def loss(p):
        lp, v = logprobs(p["logits"])[rows], values(p["values"])[rows]
        policy, _ = ppo.policy_loss(lp, logprobs(old["logits"])[rows], advantages, mask, 0.2)
        value, _ = ppo.value_loss(v, old_values, returns, mask, 0.2)
        return policy + value

    return jax.grad(loss)(parameters)


def rloo_update(parameters, old, rows, shaped):
    """Groups of four; without a prompt, any rows make a group."""
    mask = MASK[rows]
    advantages = group.to_tokens(group.leave_one_out(masked_sum(shaped, MASK, axis=1)[rows], 4), mask)

    def loss(p):
        return ppo.policy_loss(logprobs(p["logits"])[rows], logprobs(old["logits"])[rows], advantages, mask, 0.2)[0]

    return jax.grad(loss)(parameters)


def train(update, epochs, estimator, seed, steps=400, episodes=64):
    """Trains on sampled responses, from the reference; the policy's distribution over responses at the end."""
    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, steps * epochs))
    parameters = {"logits": REFERENCE, "values": jnp.zeros(7)}

    def step(carry, key):
        parameters, opt_state = old, _ = carry
        rows = jax.random.categorical(key, log_probability(old["logits"]), shape=(episodes,))
        shaped = rewards(old["logits"], estimator)
        for _ in range(epochs):
            updates, opt_state = optimizer.update(update(parameters, old, rows, shaped), opt_state)
            parameters = optax.apply_updates(parameters, updates)
        return (parameters, opt_state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    (parameters, _), _ = jax.lax.scan(step, (parameters, optimizer.init(parameters)), keys)
    return jnp.exp(log_probability(parameters["logits"]))


def distances(update, epochs, estimator="k1"):
    """Total variation distance from the optimum, for three seeds."""
    run = jax.jit(jax.vmap(functools.partial(train, update, epochs, estimator)))
    return 0.5 * jnp.sum(jnp.abs(run(jnp.arange(3)) - optimum(SCORES)), axis=1)


def total_variation(p, q):
    return float(0.5 * jnp.sum(jnp.abs(p - q)))


TOLERANCE = 0.02


@pytest.mark.parametrize(("update", "epochs"), [(reinforce_update, 1), (ppo_update, 2), (rloo_update, 2)], ids=["reinforce", "ppo", "rloo"])
def test_learning_reaches_the_optimum(update, epochs):
    """From 64 sampled responses a step. TOLERANCE is a small share of how far the reference, and the optimum of
    rewards that were rounded to integers, are from the target."""
    assert total_variation(jnp.exp(log_probability(REFERENCE)), optimum(SCORES)) > 10 * TOLERANCE
    assert total_variation(optimum(jnp.trunc(SCORES)), optimum(SCORES)) > 5 * TOLERANCE
    found = distances(update, epochs)
    assert np.all(found < TOLERANCE), found


def test_k3_as_a_reward_misses_the_optimum():
    """Why k1 is the default: the gradient of k3 as a reward is not the KL's."""
    found = distances(reinforce_update, 1, "k3")
    assert np.all(found > 5 * TOLERANCE), found
