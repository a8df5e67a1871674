"""Every message between Penstock's processes, as msgspec structs tagged by name.

A message is decoded into one of the types of this file or refused: a type name from the network
never becomes a class. Token ids travel as little-endian int32 bytes (`pack_tokens`), because a
prompt of a million tokens as a list would cost seconds to decode.

Who says what to whom (a *server* binds, a *client* connects; every worker is a server):

    router  → decode         Generate, Cancel, Groups, Subscribe
    decode  → router         Tokens, Failed, Snapshot, KvEvents, Load
    router  → prefill 0      Subscribe
    prefill 0 → router       Snapshot, KvEvents, Load
    decode  → prefill 0      Prefill
    decode  → every stage    OpenLink, LinkEcho, Revoke
    stage   → decode         LinkUp, LinkFailed, RevokeAck, PrefillFailed
    stage 0 → other stages   Prepare, Form, StepPlan
    stage   → stage 0        Prepared, Formed, StepDone, Released, StageFault
    both ways, everywhere    Hello, Heartbeat, Unknown

Inside transfer notifications (ordered after the bytes that they announce):

    stage → decode           LinkProbe, ChunkDelivered
    stage → next stage       RingProbe, Activations        next stage → stage   RingEcho, Credit
"""

from __future__ import annotations

from array import array
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

PROTOCOL_VERSION = 2
MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""Largest control message. A million tokens are 4 MiB, a snapshot of a million blocks 16 MiB."""

Role: TypeAlias = Literal["router", "decode", "prefill"]
Name: TypeAlias = Annotated[str, Meta(max_length=256)]
Text: TypeAlias = Annotated[str, Meta(max_length=4096)]
Tokens32: TypeAlias = bytes
"""Token ids as little-endian int32, see `pack_tokens`."""
BlockHashes: TypeAlias = bytes
"""Block hashes of `blocks.HASH_BYTES` bytes each, joined."""


class WireError(Exception):
    """A message that cannot be decoded, or is larger than the limit."""


class Message(Struct, frozen=True, tag_field="type"):
    """The base of everything that is sent."""


# --- sampling ---------------------------------------------------------------------------------


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. The defaults sample from the plain softmax.

    The random number of output position p is a pure function of (seed, p), so a request that is
    moved or replayed continues with the same tokens.
    """

    seed: int
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    """0: no limit."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    max_tokens: Annotated[int, Meta(ge=1)] = 16
    """Output tokens in all, those of earlier attempts (`Generate.output`) included."""
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    """Stop tokens are not chosen before this many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """End the output; the model's own end-of-sequence ids are among them unless told otherwise."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """None: none. k: that of the chosen token, and of the k most likely ones."""


class TokenOut(Struct, frozen=True, array_like=True):
    """One output token. `top` holds (token id, logprob), most likely first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


# --- every link -------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Who I am. The first message of a client, and the server's answer.

    Peers address (name, boot_id), never the name alone: a restarted peer is a new peer.
    """

    protocol: int = PROTOCOL_VERSION
    role: Role
    name: Name
    boot_id: Name
    revision: Name = ""
    group: Name = ""
    """Prefill group, for prefill stages."""
    stage: int = 0
    stages: int = 1
    model_digest: Name = ""
    """Of the configuration and weights; workers with different ones never exchange KV."""
    kv_layout: Name = ""
    """Digest of architecture, page size, dtype, heads and layout."""
    layers: tuple[float, float] = (0, 0)
    """Half-open range of layers held; .5: the border is behind that layer's attention."""
    pages: int = 0
    page_size: int = 0
    max_model_len: int = 0


class Heartbeat(Message, frozen=True, kw_only=True, tag="beat"):
    """I live. Sent both ways on every link; carries the sender's state."""

    boot_id: Name
    state: Literal["starting", "ready", "draining"] = "ready"


class Unknown(Message, frozen=True, kw_only=True, tag="unknown"):
    """A server's answer to a client that it does not know: say Hello first."""

    boot_id: Name


# --- router ↔ decode --------------------------------------------------------------------------


class GroupAddress(Struct, frozen=True, kw_only=True):
    """A prefill group: the control addresses (host:port) of its stages, in order."""

    name: Name
    stages: tuple[Name, ...]


class Groups(Message, frozen=True, kw_only=True, tag="groups"):
    """The prefill groups there are: the decode worker opens links to them ahead of requests."""

    groups: tuple[GroupAddress, ...]


class Generate(Message, frozen=True, kw_only=True, tag="generate"):
    """Answer this prompt. The decode worker owns the request from here."""

    request_id: Name
    tokens: Tokens32
    """The prompt."""
    output: Tokens32 = b""
    """What earlier attempts on other workers already gave: generation goes on behind it."""
    sampling: Sampling
    group: Name = ""
    """The prefill group that the router chose; empty: prefill here."""
    salt: bytes = b""
    """Separates prefix caches (tenant)."""
    force_group: bool = False
    """Use the group even for a short prompt, and fail rather than prefill here (canaries)."""


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Nobody waits for this request any more."""

    request_id: Name


class Tokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """New output tokens. `position` is the index of the first one in the whole output."""

    request_id: Name
    position: int
    tokens: tuple[TokenOut, ...]
    finish: Literal["", "stop", "length"] = ""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in a cache (decode's or the prefill group's)."""


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """The request ended without an answer.

    retriable: another worker, or the same one later, may answer it. `code` is one of
    overloaded, draining, too_long, prefill_lost, invalid, internal.
    """

    request_id: Name
    code: Literal["overloaded", "draining", "too_long", "prefill_lost", "invalid", "internal"]
    message: Text
    retriable: bool


class Subscribe(Message, frozen=True, kw_only=True, tag="subscribe"):
    """Send a Snapshot now, then KvEvents and Load as they come. Repeat it after a gap."""


class Snapshot(Message, frozen=True, kw_only=True, tag="snapshot"):
    """All blocks whose KV this worker or group holds, as of event `seq`."""

    seq: int
    hashes: BlockHashes


class KvEvents(Message, frozen=True, kw_only=True, tag="kv_events"):
    """Blocks stored and evicted since event seq - 1. A gap in seq asks for a new Snapshot."""

    seq: int
    stored: BlockHashes = b""
    evicted: BlockHashes = b""


class CostCoefficients(Struct, frozen=True, kw_only=True):
    """t(L, x) = c + gamma L + b x + a (2 L x + x²) seconds for x tokens after L cached ones."""

    c: float
    gamma: float
    b: float
    a: float
    error: float = 0.0
    """Relative error, a moving mean of |predicted - measured| / measured."""


class Load(Message, frozen=True, kw_only=True, tag="load"):
    """How busy the sender is; at most a few a second, and on every change of state."""

    state: Literal["starting", "ready", "draining"]
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    """Prompt tokens that wait for prefill here."""
    queued_seconds: float = 0.0
    """Predicted time until a new prompt's first chunk would start."""
    pages_free: int = 0
    """Pages free or cached: what a new request can get."""
    pages_total: int = 0
    cost: CostCoefficients | None = None
    """Prefill group: of its slowest stage. Decode: of prefilling here."""
    stages: int = 1
    step_seconds: float = 0.0
    """Decode: recent time of a step without prompts' chunks; 0 before the first."""
    step_seconds_per_request: float = 0.0
    """Decode: predicted growth of the step's time with one more request."""
    groups_ready: tuple[Name, ...] = ()
    """Decode: prefill groups whose every stage has a verified KV link to this worker."""


# --- decode ↔ prefill -------------------------------------------------------------------------


class KvArenaAddress(Struct, frozen=True, kw_only=True):
    """The KV pages of one rank of a decode worker."""

    base: int
    heads: tuple[int, int]
    """The KV heads in it, [first, last)."""


class KvTarget(Struct, frozen=True, kw_only=True):
    """A decode worker's KV memory as one prefill group sees it, valid for one incarnation.

    How a page lies in an arena follows from the KV layout that both sides have, see
    `transfer.page_ranges`.
    """

    receiver: Name
    """name/boot_id of the decode worker."""
    incarnation: int
    """Raised by every fence; links of older incarnations are dead."""
    agent: bytes
    """Transfer metadata of the receiving agent."""
    arenas: Annotated[tuple[KvArenaAddress, ...], Meta(min_length=1, max_length=64)]
    """One a rank."""
    pages: int
    layers: tuple[int, int]


class OpenLink(Message, frozen=True, kw_only=True, tag="open_link"):
    """Connect to this arena (an older incarnation of the same receiver is dropped)."""

    target: KvTarget


class LinkEcho(Message, frozen=True, kw_only=True, tag="link_echo"):
    """The nonce of a LinkProbe came in over the data path: the link leads to me."""

    incarnation: int
    nonce: bytes


class LinkUp(Message, frozen=True, kw_only=True, tag="link_up"):
    """The stage has verified its link and may write."""

    incarnation: int
    stage: int


class LinkFailed(Message, frozen=True, kw_only=True, tag="link_failed"):
    """The stage cannot reach, or has lost, this incarnation's agent."""

    incarnation: int
    stage: int
    message: Text


class Prefill(Message, frozen=True, kw_only=True, tag="prefill"):
    """Compute the KV of tokens [cached, len(tokens)) into the granted pages.

    `pages` are the decode worker's pages of the whole sequence. Those of [0, cached) hold KV and
    may be read (a stage whose own cache has less loads it from there); the rest is granted for
    writing. `grant` names this attempt: it is unique and rising for one receiver's boot.
    """

    grant: int
    request_id: Name
    incarnation: int
    tokens: Tokens32
    cached: int
    pages: tuple[int, ...]
    salt: bytes = b""


class PrefillFailed(Message, frozen=True, kw_only=True, tag="prefill_failed"):
    """The group gave this grant up. Its pages are not free before the stages' RevokeAcks."""

    grant: int
    message: Text


class Revoke(Message, frozen=True, kw_only=True, tag="revoke"):
    """Post no more writes for this grant, and acknowledge when those posted are done.

    Every grant below `floor` has ended for good: the stage may forget it.
    """

    grant: int
    floor: int


class RevokeAck(Message, frozen=True, kw_only=True, tag="revoke_ack"):
    """This stage writes nothing for the grant any more, and will not."""

    grant: int
    stage: int


# --- inside a prefill group -------------------------------------------------------------------


class RingAddress(Struct, frozen=True, kw_only=True):
    """Where the stage before me writes activations: `slots` slots of `slot_bytes` at `base`."""

    agent: bytes
    base: int
    slot_bytes: int
    slots: int


class Prepare(Message, frozen=True, kw_only=True, tag="prepare"):
    """Epoch `epoch` begins: drop everything older and open fresh activation agents."""

    epoch: int


class Prepared(Message, frozen=True, kw_only=True, tag="prepared"):
    """The old epoch's agents are gone; here is where the stage before me may write."""

    epoch: int
    stage: int
    ring: RingAddress


class Form(Message, frozen=True, kw_only=True, tag="form"):
    """Your neighbours in this epoch. `pages` is the smallest pool of the group."""

    epoch: int
    previous: RingAddress | None
    next: RingAddress | None
    pages: int


class Formed(Message, frozen=True, kw_only=True, tag="formed"):
    """Both neighbours answered over the data path."""

    epoch: int
    stage: int


class Admit(Struct, frozen=True, kw_only=True):
    """A request enters the pipeline. All stages number pages alike, so `pages` holds for all."""

    key: int
    """Names the request in this epoch's plans."""
    grant: int
    receiver: Name
    incarnation: int
    pages: tuple[int, ...]
    """The group's own pages for the whole sequence."""
    target_pages: tuple[int, ...]
    """The receiver's pages, one for each of `pages`."""
    load: tuple[int, int] = (0, 0)
    """Half-open range of page positions to read from the receiver before the first chunk."""
    send_from: int = 0
    """First page position that the receiver lacks; cached ones at or after it are sent at once."""
    start: int = 0
    """First token that is computed; positions before it are cached here or loaded."""
    length: int


class ChunkItem(Struct, frozen=True, array_like=True):
    """Tokens [start, start + length) of request `key`. `last`: the prompt ends here."""

    key: int
    start: int
    length: int
    last: bool


class StepPlan(Message, frozen=True, kw_only=True, tag="plan"):
    """One step, decided by stage 0 alone. Stages carry plans out in order of `step`.

    Token ids are not in it: only stage 0 embeds them. A key in `release` ends: its pages are
    reused once every stage said Released.
    """

    step: int
    epoch: int
    items: tuple[ChunkItem, ...] = ()
    admit: tuple[Admit, ...] = ()
    release: tuple[int, ...] = ()


class StepDone(Message, frozen=True, kw_only=True, tag="step_done"):
    """What a step cost this stage, for the cost model and the bubble metric."""

    epoch: int
    step: int
    stage: int
    compute_seconds: float
    wait_seconds: float


class Released(Message, frozen=True, kw_only=True, tag="released"):
    """This stage has no read or write in flight on the pages of these keys any more."""

    epoch: int
    stage: int
    keys: tuple[int, ...]


class StageFault(Message, frozen=True, kw_only=True, tag="stage_fault"):
    """A request cannot go on at this stage (its load failed, its link is down).

    A key of -1 means all of them: the data path to the next stage is broken.
    """

    epoch: int
    stage: int
    key: int
    message: Text


Control: TypeAlias = (
    Hello
    | Heartbeat
    | Unknown
    | Groups
    | Generate
    | Cancel
    | Tokens
    | Failed
    | Subscribe
    | Snapshot
    | KvEvents
    | Load
    | OpenLink
    | LinkEcho
    | LinkUp
    | LinkFailed
    | Prefill
    | PrefillFailed
    | Revoke
    | RevokeAck
    | Prepare
    | Prepared
    | Form
    | Formed
    | StepPlan
    | StepDone
    | Released
    | StageFault
)

# --- transfer notifications -------------------------------------------------------------------


class LinkProbe(Message, frozen=True, kw_only=True, tag="link_probe"):
    """Answered by LinkEcho over the control link, so that a link never leads to a stranger."""

    incarnation: int
    group: Name
    stage: int
    boot_id: Name
    nonce: bytes


class ChunkDelivered(Message, frozen=True, kw_only=True, tag="delivered"):
    """The KV of tokens [start, end) of this stage's layers lies in the granted pages.

    `reused`: tokens at the prompt's start that the group did not compute, because it or the
    receiver had them.
    """

    incarnation: int
    grant: int
    stage: int
    start: int
    end: int
    reused: int = 0


class RingProbe(Message, frozen=True, kw_only=True, tag="ring_probe"):
    """A nonce to the next stage, which answers with RingEcho over the same data path."""

    epoch: int
    nonce: bytes


class RingEcho(Message, frozen=True, kw_only=True, tag="ring_echo"):
    """The answer to RingProbe."""

    epoch: int
    nonce: bytes


class Activations(Message, frozen=True, kw_only=True, tag="activations"):
    """The hidden states of the epoch's hand-over `number` lie in slot number mod slots."""

    epoch: int
    number: int


class Credit(Message, frozen=True, kw_only=True, tag="credit"):
    """The slot of this hand-over was read and may be written again."""

    epoch: int
    number: int


Notification: TypeAlias = LinkProbe | ChunkDelivered | RingProbe | RingEcho | Activations | Credit

_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()
_control: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)
_notification: msgspec.msgpack.Decoder[Notification] = msgspec.msgpack.Decoder(Notification)


def encode(message: Message) -> bytes:
    """Return the bytes to send. Raises WireError if they are more than MAX_MESSAGE_BYTES."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(
            f"a {type(message).__name__} message of {len(data)} bytes is over the limit of "
            f"{MAX_MESSAGE_BYTES}"
        )
    return data


def decode_control(data: bytes) -> Control:
    """Return the control message in `data`. Raises WireError on anything else."""
    return _decode(_control, data)


def decode_notification(data: bytes) -> Notification:
    """Return the transfer notification in `data`. Raises WireError on anything else."""
    return _decode(_notification, data)


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a message cannot be decoded: {error}") from error


def pack_tokens(tokens: list[int] | tuple[int, ...] | array[int]) -> Tokens32:
    """Return token ids as little-endian int32 bytes. Raises OverflowError beyond 31 bits."""
    packed = tokens if isinstance(tokens, array) else array("i", tokens)
    if _SWAP:
        packed = packed[:]
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: Tokens32) -> array[int]:
    """Return the token ids in `data`. Raises WireError unless it is a whole number of int32."""
    if len(data) % 4:
        raise WireError(f"{len(data)} bytes are not a whole number of int32 token ids")
    tokens = array("i")
    tokens.frombytes(data)
    if _SWAP:
        tokens.byteswap()
    return tokens


_SWAP = array("h", [1]).tobytes() != b"\x01\x00"
