"""What can be asked about a scene: the topics, and the builder of each."""

from __future__ import annotations

from collections.abc import Callable

from quota_jax.testbed.world import hint_topics as hints
from quota_jax.testbed.world import object_topics as objects
from quota_jax.testbed.world import sign_topics as signs
from quota_jax.testbed.world.asker import Asker, Topic

TOPICS: tuple[str, ...] = (
    "presence", "color", "position", "count", "relation", "neighbor", "shape", "size", "binding",
    "neighbor_color", "two_hop", "more", "reading", "sign_color", "sign_neighbor", "sum",
    "inventory", "owner_of_color", "owner_of_kind", "person_at", "named_owner",
)  # fmt: skip
"""Topics in the order of `Questions.topic`. Inventory exists as a choice only; the last four need a
hint, and the very last needs nothing else: it teaches to read hints."""
YES_NO_TOPICS = ("presence", "relation", "more")
HINT_TOPICS = ("owner_of_color", "owner_of_kind", "person_at", "named_owner")
CHOICE_TOPICS = ("inventory",)
NO_CHOICE_TOPICS = (*YES_NO_TOPICS, "size")
"""Topics that never take the form of a choice among options."""

BUILDERS: tuple[Callable[[Asker], Topic], ...] = (
    objects.presence,
    objects.color,
    objects.position,
    objects.count,
    objects.relation,
    objects.neighbor,
    objects.shape,
    objects.size,
    objects.binding,
    objects.neighbor_color,
    objects.two_hop,
    objects.more,
    signs.reading,
    signs.sign_color,
    signs.sign_neighbor,
    signs.total,
    objects.inventory,
    hints.owner_of_color,
    hints.owner_of_kind,
    hints.person_at,
    hints.named_owner,
)
"""One per entry of TOPICS."""
