"""Direct, slow numpy versions of the peers' selections, one sample at a time, in float64."""

from __future__ import annotations

import numpy as np


def cosines(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def first_best(values, left):
    """The lowest index of ``left`` whose value is the largest, up to rounding."""
    top = max(values[i] for i in left)
    return next(i for i in left if values[i] >= top - 1e-10)


def slow_mmtok(text, visual, vision, count, alpha=0.5, temperatures=(0.02, 0.2)):
    """Picks in order; rows of ``text`` and ``visual`` are embeddings, of ``vision`` features."""
    picked: list[int] = []
    if not len(visual):
        return picked
    matrices = [(1.0, softmax(cosines(text, visual) / temperatures[0]))] if len(text) else []
    matrices += [(alpha, softmax(cosines(vision, vision) / temperatures[1]))]
    while len(picked) < min(count, len(visual)):
        left = [i for i in range(len(visual)) if i not in picked]
        values = {
            i: sum(weight * m[:, [*picked, i]].max(1).mean() for weight, m in matrices)
            for i in left
        }
        picked.append(first_best(values, left))
    return picked


def slow_qapruner(x, prior, alpha, group):
    """Scores of one sample's visual tokens ``x [n, D]``."""
    x = np.asarray(x, np.float64)
    error = np.zeros(len(x))
    for i, row in enumerate(x):
        back = np.zeros_like(row)
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = np.abs(part).max() / 7 or 1.0
            back[start : start + group] = np.round(part / scale) * scale
        error[i] = np.linalg.norm(row - back)

    def unit(values):
        span = np.ptp(values)
        return (values - values.min()) / span if span > 0 else np.zeros_like(values)

    spread = x.max(1) - x.min(1)
    return alpha * unit(prior) + (1 - alpha) * (unit(error) + unit(spread)) / 2


def slow_sqap(attention, places, count, preserved):
    """Picks in order; ``places`` is (picture, row, column) of each visual token."""
    picked: list[int] = []
    while len(picked) < min(count, len(places)):
        left = [i for i in range(len(places)) if i not in picked]
        if len(picked) < int(count * preserved + 0.5):
            values = dict(zip(left, attention[left], strict=True))
        else:
            values = {}
            for i in left:
                p, r, c = places[i]
                mine = [places[j] for j in picked if places[j][0] == p]
                values[i] = min([(r - a) ** 2 + (c - b) ** 2 for _, a, b in mine], default=10**9)
        picked.append(first_best(values, left))
    return picked


def slow_floor(scores, pictures, count, least):
    """Kept indices: the pictures' best tokens turn by turn, then the best of all."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    ranked = {p: [i for i in order if pictures[i] == p] for p in set(pictures)}
    queue = []
    for turn in range(least):
        queue += sorted(
            (tokens[turn] for tokens in ranked.values() if turn < len(tokens)), key=order.index
        )
    queue += [i for i in order if i not in queue]
    return sorted(queue[:count])


def slow_visionzip(states, attention, keys, budget, contextual):
    """New states and the places behind them; place 0 is the class token."""
    merged_count = max(0, min(budget - 1, int(budget * contextual + 0.5)))
    if budget == 0:
        return np.zeros((0, states.shape[1])), []
    patches = list(range(1, len(states)))
    best = sorted(patches, key=lambda i: (-attention[i], i))[: budget - merged_count - 1]
    dominant = [0, *sorted(best)]
    rest = [i for i in patches if i not in best]
    step = max(1, len(rest) // merged_count) if merged_count else 1
    targets = rest[::step][:merged_count]
    joined: dict[int, list[int]] = {t: [] for t in targets}
    similar = cosines(keys, keys)
    for i in rest:
        if targets and i not in targets:
            joined[first_best({t: similar[i, t] for t in targets}, targets)].append(i)
    new = [states[i] for i in dominant]
    new += [states[t] + (np.mean(states[js], axis=0) if js else 0) for t, js in joined.items()]
    return np.stack(new), [*dominant, *targets]
