"""The `InferenceService` resource, v1alpha1: its spec and status.

This is the one source of what a manifest may say. Field names are camelCase in manifests. Unknown
fields are refused; see `loader.load_manifest` for how refusals are worded.
"""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

from penstock_operator.labels import Role
from penstock_operator.quantity import parse_quantity

API_VERSION = "penstock.dev/v1alpha1"
KIND = "InferenceService"
MAX_NAME = 40
"""Longest service name: names and hashes that objects add must fit into a label of 63."""
SCHEMES = ("file", "hf", "pvc", "s3", "oci")


def _quantity(text: str) -> str:
    parse_quantity(text)
    return text


def _positive_quantity(text: str) -> str:
    if parse_quantity(text) <= 0:
        raise ValueError("must be more than 0")
    return text


DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(coerce_numbers_to_str=True), AfterValidator(_quantity)]
PositiveQuantity = Annotated[
    str, Field(coerce_numbers_to_str=True), AfterValidator(_positive_quantity)
]


class Strict(BaseModel):
    """Base of all parts: camelCase names, unknown fields refused, nothing changed afterwards."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Model(Strict):
    """What is served."""

    uri: str
    """Where the checkpoint is: hf://ORG/NAME, file:///PATH, pvc://CLAIM/PATH, s3:// or oci://.
    A directory in Hugging Face format (config.json, safetensors, tokenizer.json). No default: it is
    the one thing nobody can guess."""
    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^\S+$")] | None = None
    """The `model` that clients send. Default: the last part of the URI, which is what people call
    the checkpoint."""
    revision: Annotated[str, Field(min_length=1, pattern=r"^[^\s@]+$")] | None = None
    """Branch, tag or commit of an hf:// repository. Default: the repository's default branch; pin a
    commit in production so that a restart cannot change the weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of weights, activations and KV. Default auto: what the checkpoint was saved in,
    so that quality is what its makers measured."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt plus answer, in tokens. Default: what the checkpoint's config allows; lower it
    to admit more requests into the same KV memory."""
    token_secret: DnsName | None = None
    """Secret whose entry `token` gives access to the repository. Default: none, for public ones."""

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme not in SCHEMES:
            raise ValueError(
                f"{uri!r} does not begin with one of {', '.join(f'{s}://' for s in SCHEMES)}"
            )
        if not rest.strip("/"):
            raise ValueError(f"{uri!r} names no model behind {scheme}://")
        if scheme == "file" and not rest.startswith("/"):
            raise ValueError(f"{uri!r} is not absolute: write file:///PATH with three slashes")
        return uri

    @model_validator(mode="after")
    def _revision_needs_hub(self) -> Self:
        if self.revision is not None and self.scheme != "hf":
            raise ValueError(f"revision applies to hf:// repositories, and uri is {self.uri}")
        return self

    @property
    def scheme(self) -> str:
        """The part of the URI before ://."""
        return self.uri.partition("://")[0]

    @property
    def served_name(self) -> str:
        """What clients send as `model`."""
        return self.name or self.uri.partition("://")[2].rstrip("/").rpartition("/")[2]


class Rdma(Strict):
    """Network devices that write remote memory directly."""

    resource: Annotated[str, Field(min_length=1)]
    """Extended resource that the device plugin advertises, such as rdma/ib. No default: plugins
    name it as they like."""
    count: Annotated[int, Field(ge=1)] = 1
    """Devices a pod. Default 1; one a GPU gives each GPU its own rail."""


class Resources(Strict):
    """What one pod asks for; it is both the request and the limit, so that pods are Guaranteed."""

    cpu: PositiveQuantity | None = None
    """Cores, such as 8 or 500m. Default: none asked, the node decides; set it to have the worker
    use exactly so many threads."""
    memory: PositiveQuantity | None = None
    """Bytes, such as 64Gi. Default: none asked. It must hold the weights, the KV memory and about
    1 GiB for the process."""
    gpu: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs a pod (nvidia.com/gpu). Default 0: the default device is cpu."""
    rdma: Rdma | None = None
    """Default: none, KV travels over TCP."""


class ChunkedPrefill(Strict):
    """How a prompt is cut into the chunks that travel through the pipeline."""

    mode: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: chunks of equal predicted time, from a cost model that is learned while serving.
    fixed: every chunk has maxTokens. Default adaptive: it needs no tuning, and later chunks, which
    attend to more tokens, do not stall the pipeline."""
    max_tokens: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    """Tokens of the largest chunk; it bounds the memory for activations. Default 2048 in prefill,
    where linear layers are saturated well below it, and 512 in decode, where a chunk holds up the
    tokens of everybody else."""


class Autoscaling(Strict):
    """Lets something else (an HPA, KEDA) set the replicas of a role within bounds."""

    min_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Fewest replicas. Default 1: scaling from zero would leave requests waiting for weights."""
    max_replicas: Annotated[int, Field(ge=1, le=1000)]
    """Most replicas. No default: it is a budget."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"minReplicas {self.min_replicas} is more than maxReplicas {self.max_replicas}"
            )
        return self


class RoleSpec(Strict):
    """What every role can say."""

    replicas: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many run. Default 1. 0 would leave requests without a worker."""
    autoscaling: Autoscaling | None = None
    """Instead of replicas. Default: none, the number is fixed."""
    resources: Resources = Resources()
    """What one pod asks for. Default: nothing, which fits a laptop."""
    extra_args: tuple[str, ...] = ()
    """Put behind the arguments of the container's command, for flags that have no field here."""
    pod_template: dict[str, Any] = {}
    """A patch of the pod template (metadata, spec), for what was not foreseen: node selectors,
    tolerations, volumes. Maps are merged, lists of named things are merged by name, other values
    replace."""

    @model_validator(mode="after")
    def _replicas_or_autoscaling(self) -> Self:
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("replicas and autoscaling exclude each other: keep one")
        return self

    @property
    def wanted(self) -> int:
        """Replicas to run when nothing scales the role."""
        if self.autoscaling is not None:
            return self.autoscaling.min_replicas
        return 1 if self.replicas is None else self.replicas


class Prefill(RoleSpec):
    """Groups of workers that compute the KV of prompts. One group is one pipeline of stages."""

    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Stages of a group; each holds a part of the layers on its own pod. Default 1. More stages
    shorten the time to first token of long prompts and let a larger model fit."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Devices a stage. Default 1, the only value available yet."""
    chunked_prefill: ChunkedPrefill = ChunkedPrefill()
    """How prompts are cut."""


class Decode(RoleSpec):
    """Workers that own requests, hold all layers and give the tokens."""

    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Devices a worker. Default 1, the only value available yet."""
    chunked_prefill: ChunkedPrefill = ChunkedPrefill()
    """How a decode worker cuts the prompts that it prefills itself."""


class Router(RoleSpec):
    """The OpenAI API in front."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port of the API. Default 8000, what clients of this field try first."""
    api_key_secret: DnsName | None = None
    """Secret whose entry `api-key` clients must send as bearer key. Default: none, the API is
    open to whoever reaches it."""


class KvCache(Strict):
    """Memory for keys and values."""

    memory: PositiveQuantity = "1Gi"
    """Bytes of KV a worker; a prefill stage holds only its layers' part of a page, so the same
    memory holds more pages there. Default 1Gi, which fits a laptop; give it what the weights leave
    of the device."""
    page_size: Literal[8, 16, 32, 64, 128] = 32
    """Tokens a page: the unit of sharing between prompts and of transfer. Default 32: attention
    over pages and the part of a page that a prompt wastes are both near their best. Larger pages
    move faster over RDMA and share less."""


class Images(Strict):
    """Container images. Unused on one machine."""

    runtime: Annotated[str, Field(min_length=1)] = "penstock/runtime:0.1.0"
    """Of prefill and decode workers. Default: the release of the operator."""
    router: Annotated[str, Field(min_length=1)] = "penstock/router:0.1.0"
    """Of the router; it has no torch in it. Default: the release of the operator."""
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """Default IfNotPresent: tags of releases do not move."""
    pull_secrets: tuple[DnsName, ...] = ()
    """Secrets for a private image registry. Default: none."""


class Spec(Strict):
    """What should run. A model is enough."""

    model: Model
    """What is served."""
    prefill: Prefill | None = None
    """Default: none, decode workers prefill for themselves (aggregated serving)."""
    decode: Decode = Decode()
    """Default: one worker."""
    router: Router = Router()
    """Default: one replica."""
    kv_cache: KvCache = KvCache()
    """Default: 1Gi in pages of 32 tokens."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where workers compute. Default cpu: it is there on every machine."""
    image: Images = Images()
    """Container images. Default: those of this release."""

    def role(self, role: Role) -> RoleSpec | None:
        """Return the part of `role`, None where the manifest has none."""
        parts: dict[Role, RoleSpec | None] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "router": self.router,
        }
        return parts[role]


class Metadata(BaseModel):
    """The parts of Kubernetes' object metadata that matter here; others are kept as they are."""

    model_config = ConfigDict(alias_generator=to_camel, extra="allow", frozen=True)

    name: Annotated[
        str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=MAX_NAME, min_length=1)
    ]
    namespace: DnsName = "default"
    generation: int = 1


# --- status -----------------------------------------------------------------------------------

ConditionStatus = Literal["True", "False", "Unknown"]


class Condition(Strict):
    """A condition as metav1 has it. `last_transition_time` moves only when `status` flips."""

    type: str
    status: ConditionStatus
    reason: str
    message: str
    observed_generation: int
    last_transition_time: datetime


class RoleStatus(Strict):
    """Counts of one role: groups for prefill, pods for the others."""

    replicas: int
    """Wanted."""
    ready: int
    """Of any revision: they answer requests."""
    updated: int
    """Ready and of the newest revision."""
    revision: str
    """The newest one."""

    @property
    def column(self) -> str:
        """Ready/wanted."""
        return f"{self.ready}/{self.replicas}"


class Status(Strict):
    """What was observed."""

    observed_generation: int
    conditions: tuple[Condition, ...]
    prefill: RoleStatus | None = None
    decode: RoleStatus
    router: RoleStatus
    url: str
    """Where the API answers."""
    transport: str = ""
    """What KV pages travel over, as the workers report it."""

    def condition(self, kind: str) -> Condition:
        """Return the condition of this type. Raises KeyError."""
        for condition in self.conditions:
            if condition.type == kind:
                return condition
        raise KeyError(kind)


class InferenceService(Strict):
    """One model, served."""

    api_version: Literal["penstock.dev/v1alpha1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: Spec
    status: Status | None = None

    @property
    def name(self) -> str:
        """The service's name."""
        return self.metadata.name

    def scaled(self, role: Role, replicas: int) -> Self:
        """Return the service with other replicas of `role`. Raises ValueError if it cannot be."""
        part = self.spec.role(role)
        if part is None:
            raise ValueError(f"the manifest has no {role}")
        bounds = part.autoscaling
        if bounds and not bounds.min_replicas <= replicas <= bounds.max_replicas:
            raise ValueError(
                f"{replicas} is outside {role}.autoscaling: "
                f"{bounds.min_replicas} to {bounds.max_replicas}"
            )
        changed = part.model_copy(update={"replicas": replicas, "autoscaling": None})
        return self.model_copy(update={"spec": self.spec.model_copy(update={role: changed})})
