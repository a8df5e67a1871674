"""The `RoleScaler` resource, v1alpha1: the number of replicas of one role, for autoscalers.

It has the scale subresource, so `kubectl scale`, an HPA or KEDA can drive a role without writing to
the InferenceService. The operator creates one for each role whose manifest gives no `replicas`,
and never owns the number in it.
"""

from typing import Annotated, Literal

from pydantic import Field

from penstock_operator.api import MAX_REPLICAS, Metadata, Observed, Strict
from penstock_operator.labels import Role

KIND = "RoleScaler"


class ScalerSpec(Strict):
    """What is asked for."""

    service: Annotated[str, Field(max_length=63)]
    """InferenceService in the same namespace."""
    role: Role
    """Role of it that is scaled."""
    replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS, strict=True)] = 1
    """Groups of prefill, or pods of decode and router. What the role gets is kept within its
    autoscaling.minReplicas and maxReplicas. Default 1, the least that serves."""


class ScalerStatus(Observed):
    """What was observed."""

    replicas: int = 0
    """That run."""
    selector: str = ""
    """Label selector of the role's pods, in the form that autoscalers read."""


class RoleScaler(Strict):
    """The number of replicas of one role of an InferenceService, with a scale subresource."""

    api_version: Literal["penstock.dev/v1alpha1"]
    kind: Literal["RoleScaler"]
    metadata: Metadata
    spec: ScalerSpec
    """What is asked for."""
    status: ScalerStatus | None = None
    """What was observed."""
