"""The `InferenceService` resource, v1alpha1: its spec and status.

This is the one source of what a manifest may say: types and ranges here, what must hold between
values in `rules`, and `crds` makes the schema of both. Field names are camelCase in manifests.
Unknown fields are refused; see `loader.load_manifest` for how refusals are worded.
"""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

from penstock_operator.labels import Role

API_VERSION = "penstock.dev/v1alpha1"
KIND = "InferenceService"
RUNTIME_IMAGE = "penstock/runtime:0.1.0"
ROUTER_IMAGE = "penstock/router:0.1.0"


def _quantity(value: object) -> object:
    """Accept a whole number for a quantity, as Kubernetes does."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        raise ValueError(f'{value} is neither a whole number nor a text: write "{value}"')  # noqa: TRY004
    return value


DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[
    str,
    BeforeValidator(_quantity),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]}),
]
MAX_REPLICAS = 1000
Replicas = Annotated[int, Field(ge=1, le=MAX_REPLICAS, strict=True)]


class Strict(BaseModel):
    """Base of all parts: camelCase names, unknown fields refused, nothing changed afterwards."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class S3(Strict):
    """Where a bucket is, and how it is asked."""

    endpoint: Annotated[str, Field(max_length=1024)] | None = None
    """URL of the object store, such as https://minio.storage.svc:9000. Default: Amazon's, of the
    region."""
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=64)] = "us-east-1"
    """Region that requests are signed for. Default us-east-1: what stores without regions expect,
    and what Amazon redirects from."""


class Model(Strict):
    """What is served."""

    uri: Annotated[str, Field(max_length=1024)]
    """Where the checkpoint is: a directory in Hugging Face format (config.json, safetensors,
    tokenizer.json). hf://ORG/NAME is a repository of the hub. file:///PATH is a directory of the
    node, mounted read-only. pvc://CLAIM/PATH is a directory of a volume claim. s3://BUCKET/PREFIX
    is downloaded from an object store. oci://IMAGE is mounted as an image volume, which needs
    Kubernetes 1.31 and its feature ImageVolume. No default: it is the one thing nobody can
    guess."""
    name: Annotated[str, Field(max_length=253, pattern=r"^\S+$")] | None = None
    """The `model` that clients send. Default: the last part of the URI, which is what people call
    the checkpoint (of an image without its tag)."""
    revision: Annotated[str, Field(max_length=255, pattern=r"^[^\s@]+$")] | None = None
    """Branch, tag or commit of an hf:// repository. Default: the repository's default branch; pin a
    commit in production so that a restart cannot change the weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of weights, activations and KV. Default auto: what the checkpoint was saved in,
    so that quality is what its makers measured."""
    max_model_len: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Longest prompt plus answer, in tokens. Default: what the checkpoint's config allows; lower it
    to admit more requests into the same KV memory."""
    token_secret: DnsName | None = None
    """Secret that gives access to the model. For hf:// its entry `token`; for s3:// its entries
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, of temporary keys, AWS_SESSION_TOKEN. Default:
    none; hf:// is then asked as anybody, s3:// with the pod's own identity if it has one."""
    s3: S3 | None = None
    """Where the bucket of an s3:// model is. Default: Amazon S3."""

    @property
    def scheme(self) -> str:
        """The part of the URI before ://."""
        return self.uri.partition("://")[0]

    @property
    def served_name(self) -> str:
        """What clients send as `model`."""
        last = self.uri.partition("://")[2].rstrip("/").rpartition("/")[2]
        if self.scheme == "oci":
            last = last.partition("@")[0].partition(":")[0]
        return self.name or last


class Rdma(Strict):
    """Network devices that write remote memory directly."""

    resource: Annotated[str, Field(max_length=253)]
    """Extended resource that the device plugin advertises, such as rdma/ib. No default: plugins
    name it as they like."""
    count: Annotated[int, Field(ge=1, le=64, strict=True)] = 1
    """Devices a pod. Default 1; one a GPU gives each GPU its own rail."""


class Resources(Strict):
    """What one pod asks for; it is both the request and the limit, so that pods are Guaranteed."""

    cpu: Quantity | None = None
    """Cores, such as 8 or 500m. Default: none asked, the node decides; set it to have the worker
    use exactly so many threads."""
    memory: Quantity | None = None
    """Bytes, such as 64Gi. Default: none asked. It must hold the weights, the KV memory and about
    1 GiB for the process."""
    gpu: Annotated[int, Field(ge=0, le=64, strict=True)] = 0
    """GPUs a pod (nvidia.com/gpu). Default 0: it runs on every machine."""
    rdma: Rdma | None = None
    """Network devices for remote direct memory access. Default: none, KV travels over TCP."""


class ChunkedPrefill(Strict):
    """How a prompt is cut into the chunks that travel through the pipeline."""

    mode: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: chunks of equal predicted time, from a cost model that is learned while serving.
    fixed: every chunk has maxTokens. Default adaptive: it needs no tuning, and later chunks, which
    attend to more tokens, do not stall the pipeline."""
    max_tokens: Annotated[int, Field(ge=16, le=1_048_576, strict=True)] | None = None
    """Tokens of the largest chunk; it bounds the memory for activations. Default 2048 in prefill,
    where linear layers are saturated well below it, and 512 in decode, where a chunk holds up the
    tokens of everybody else."""


class Autoscaling(Strict):
    """Lets something else (an HPA, KEDA, kubectl scale) set the replicas of a role within bounds.

    It drives the RoleScaler SERVICE-ROLE, which has a scale subresource.
    """

    min_replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS, strict=True)] = 1
    """Fewest replicas. 0, for prefill and decode: after idleSeconds without a request the role is
    scaled to zero, and the next request waits until it is back. Default 1: no request waits for
    weights."""
    max_replicas: Replicas
    """Most replicas. No default: it is a budget."""
    idle_seconds: Annotated[int, Field(ge=10, le=604_800, strict=True)] = 300
    """With minReplicas 0, how long every router must have been idle before the role is scaled to
    zero, in seconds. Default 300: shorter than a coffee break it would mostly load weights."""


class RoleSpec(Strict):
    """What every role can say."""

    replicas: Replicas | None = None
    """How many run: groups for prefill, pods for the others. Given, the manifest owns the number.
    Default: 1, or what the role's RoleScaler was scaled to. 0 would leave requests without a
    worker; see autoscaling.minReplicas."""
    autoscaling: Autoscaling | None = None
    """Bounds for whatever scales the role, instead of replicas. Default: none."""
    resources: Resources = Resources()
    """What one pod asks for. Default: nothing, which fits a laptop."""
    extra_args: tuple[str, ...] = ()
    """Put behind the arguments of the container's command, for flags that have no field here.
    Default: none."""
    pod_template: dict[str, Any] = {}
    """A patch of the pod template (metadata, spec), for what was not foreseen: node selectors,
    tolerations, volumes. Maps are merged, lists of named things are merged by name (a volume of
    the same name is replaced), other values replace. Default: nothing."""

    @property
    def wanted(self) -> int:
        """Replicas to run as long as nothing has scaled the role."""
        if self.autoscaling is not None:
            return max(1, self.autoscaling.min_replicas)
        return 1 if self.replicas is None else self.replicas

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most replicas that the role may be scaled to."""
        if self.autoscaling is not None:
            return self.autoscaling.min_replicas, self.autoscaling.max_replicas
        return 1, MAX_REPLICAS


class Prefill(RoleSpec):
    """Groups of workers that compute the KV of prompts. One group is one pipeline of stages."""

    pipeline_parallel: Annotated[int, Field(ge=1, le=64, strict=True)] = 1
    """Stages of a group; each holds a part of the layers on its own pod. Default 1. More stages
    shorten the time to first token of long prompts and let a larger model fit."""
    layers_per_stage: (
        Annotated[
            list[Annotated[float, Field(ge=1, le=1024, strict=True)]],
            Field(min_length=1, max_length=64),
        ]
        | None
    ) = None
    """Layers of each stage, such as [9, 9, 8]: fewer for a stage on slower hardware. [8.5, 7.5]
    cuts a layer behind its attention. Default: the same arithmetic for all, for a prompt of 16384
    tokens; `penstock explain-chunks --group` says from a running group what would be faster."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64, strict=True)] = 1
    """Ranks a stage: they share every layer, each on a GPU of its own or with its part of the
    cores. Must divide the model's attention heads. Default 1."""
    chunked_prefill: ChunkedPrefill = ChunkedPrefill()
    """How prompts are cut into chunks. Default: adaptive, of at most 2048 tokens."""


class Decode(RoleSpec):
    """Workers that own requests, hold all layers and give the tokens."""

    tensor_parallel: Annotated[int, Field(ge=1, le=64, strict=True)] = 1
    """Ranks a worker: they share every layer, each on a GPU of its own or with its part of the
    cores. Must divide the model's attention heads. Prefill may have another number. Default 1."""
    chunked_prefill: ChunkedPrefill = ChunkedPrefill()
    """How a decode worker cuts the prompts that it prefills itself. Default: adaptive, of at most
    512 tokens."""


class Router(RoleSpec):
    """The OpenAI API in front."""

    port: Annotated[int, Field(ge=1, le=65535, strict=True)] = 8000
    """TCP port of the API. Default 8000, what clients of this field try first."""
    api_key_secret: DnsName | None = None
    """Secret whose entry `api-key` clients must send as bearer key. Default: none, the API is
    open to whoever reaches it."""


class KvCache(Strict):
    """Memory for keys and values."""

    memory: Quantity | None = None
    """Bytes of KV a worker; a prefill stage holds only its layers' part of a page, so the same
    memory holds more pages there. Default: 1Gi on the CPU, which fits a laptop; on CUDA nine tenths
    of the device memory that the weights leave, the rest is for activations."""
    page_size: Literal[8, 16, 32, 64, 128] = 32
    """Tokens a page: the unit of sharing between prompts and of transfer. Default 32: attention
    over pages and the part of a page that a prompt wastes are both near their best. Larger pages
    move faster over RDMA and share less."""


class Images(Strict):
    """Container images. Unused on one machine."""

    # None, not a name: a default would be stored, and an upgrade of the operator not seen.
    runtime: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Of prefill and decode workers. Default: penstock/runtime of the operator's release."""
    router: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Of the router; it has no torch in it. Default: penstock/router of the operator's release."""
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When images are pulled. Default IfNotPresent: tags of releases do not move."""
    pull_secrets: tuple[DnsName, ...] = ()
    """Secrets for a private image registry. Default: none."""


class Spec(Strict):
    """What should run. A model is enough."""

    model: Model
    """The model that is served."""
    prefill: Prefill | None = None
    """Groups of workers that compute the KV of prompts; one group is one pipeline of stages, a pod
    each. Default: none, decode workers prefill for themselves (aggregated serving)."""
    decode: Decode = Decode()
    """Workers that own requests, hold all layers and give the tokens. Default: one."""
    router: Router = Router()
    """The OpenAI API in front of the workers. Default: one replica at port 8000."""
    kv_cache: KvCache = KvCache()
    """Memory for keys and values. Default: 1Gi a worker, on CUDA nine tenths of what the weights
    leave, in pages of 32 tokens."""
    device: Literal["cpu", "cuda"] | None = None
    """Where workers compute. Default: cuda where resources.gpu is asked for, else cpu."""
    image: Images = Images()
    """Container images. Default: those of the operator's release."""

    @property
    def computes_on(self) -> Literal["cpu", "cuda"]:
        """The device, chosen if the manifest does not say."""
        workers = [self.decode] if self.prefill is None else [self.decode, self.prefill]
        return self.device or ("cuda" if any(w.resources.gpu for w in workers) else "cpu")

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

    name: str
    namespace: DnsName = "default"
    generation: int = 1


# --- status -----------------------------------------------------------------------------------

ConditionStatus = Literal["True", "False", "Unknown"]


class Observed(Strict):
    """Base of what was observed: fields that another release wrote are passed over."""

    model_config = ConfigDict(extra="ignore")


class Condition(Observed):
    """A condition as metav1 has it."""

    type: Annotated[str, Field(max_length=316)]
    """Ready is the conjunction of ConfigValid, ModelReady, PrefillReady, DecodeReady, RouterReady
    and KVTransferReady; Progressing and Degraded stand beside it."""
    status: ConditionStatus
    """True, False or Unknown; Unknown is not True."""
    reason: Annotated[str, Field(max_length=1024)]
    """Why, in one word."""
    message: Annotated[str, Field(max_length=32768)]
    """Why, in a sentence."""
    observed_generation: int = 0
    """Generation of the spec that this is about."""
    last_transition_time: datetime
    """When the status flipped last."""


class RoleStatus(Observed):
    """Counts of one role: groups for prefill, pods for the others."""

    replicas: int = 0
    """Wanted."""
    ready: int = 0
    """Of any revision: they answer requests."""
    updated: int = 0
    """Ready and of the newest revision."""
    revision: str = ""
    """The newest revision: a hash of what its pods are made of."""
    summary: str = Field(default_factory=lambda told: f"{told['ready']}/{told['replicas']}")
    """Ready/wanted, for columns."""


class Status(Observed):
    """What was observed. Every field may be missing: older releases had fewer."""

    observed_generation: int = 0
    """Generation of the spec that was acted upon."""
    conditions: tuple[Condition, ...] = ()
    """What holds and what does not, with reasons."""
    model: str = ""
    """The name that clients send as `model`."""
    prefill: RoleStatus | None = None
    """Groups; missing without prefill."""
    decode: RoleStatus = RoleStatus()
    """Decode workers."""
    router: RoleStatus = RoleStatus()
    """Routers."""
    url: str = ""
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
    """One large language model, served by prefill groups, decode workers and routers."""

    api_version: Literal["penstock.dev/v1alpha1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: Spec
    """What should run. A model is enough."""
    status: Status | None = None
    """What was observed."""

    @property
    def name(self) -> str:
        """The service's name."""
        return self.metadata.name

    def scaled(self, role: Role, replicas: int) -> Self:
        """Return the service with other replicas of `role`. Raises ValueError if it cannot be."""
        part = self.spec.role(role)
        if part is None:
            raise ValueError(f"the manifest has no {role}")
        fewest, most = part.bounds
        if part.autoscaling is not None and not fewest <= replicas <= most:
            raise ValueError(f"{replicas} is outside {role}.autoscaling: {fewest} to {most}")
        changed = part.model_copy(update={"replicas": replicas, "autoscaling": None})
        return self.model_copy(update={"spec": self.spec.model_copy(update={role: changed})})
