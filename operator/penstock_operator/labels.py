"""Names that tie objects together: labels, ports, mounts. Shared by what renders and what reads."""

from __future__ import annotations

from typing import Literal, TypeAlias

Role: TypeAlias = Literal["prefill", "decode", "router"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "router")

SERVICE = "penstock.dev/service"
ROLE = "penstock.dev/role"
GROUP = "penstock.dev/group"
REVISION = "penstock.dev/revision"
LAYOUT = "penstock.dev/kv-layout"
"""Revisions with equal values of this label exchange KV and share a tokenizer."""
POD_INDEX = "apps.kubernetes.io/pod-index"
"""Set by the StatefulSet controller: the ordinal of the pod, which is its pipeline stage."""
APPLIED = "penstock.dev/applied"
"""Annotation of objects that the operator applied: the hash of what it asked for."""
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Annotation of pods: of a Deployment that shrinks, the cheapest go first."""

CONTROL_PORT = 7000
HTTP_PORT = 7001
KEYS_MOUNT = "/etc/penstock/keys"
API_KEY_MOUNT = "/etc/penstock/api-key"
MODEL_TOKEN_MOUNT = "/etc/penstock/model-token"  # noqa: S105 - a path
API_KEY_ENTRY = "api-key"
"""The entry of `router.apiKeySecret` that holds the bearer key."""
TOKEN_ENTRY = "token"  # noqa: S105 - the entry's name in `model.tokenSecret`
CACHE_MOUNT = "/var/cache/penstock"
