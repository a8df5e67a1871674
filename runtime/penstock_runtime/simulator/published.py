"""Another system's published results, as far as they concern a pipeline of chunks.

S. Cai, "Pipeline Parallelism in SGLang: Scaling to Million-Token Contexts and Beyond", LMSYS,
15 January 2026 (lmsys.org/blog/2026-01-15-chunked-pipeline): one prompt of 128K tokens at a time in
the TTFT test, 16 consecutive ones in the throughput test, on nodes of eight H20. The text gives
some of the numbers, the others are bars of its charts and can be read to about 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PROMPT = 131_072
PROMPTS = 16


class Row(NamedTuple):
    """One measured layout."""

    stages: int
    chunk: int
    """Tokens; of the first chunk if they are dynamic."""
    dynamic: bool
    throughput: float | None
    """Tokens a second over PROMPTS prompts; None: not given."""
    ttft: float
    """Seconds, of one prompt."""
    prompt: int = PROMPT


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The table of one model."""

    name: str
    layout: str
    smoothing: float
    """Of its dynamic rule."""
    saturation: float
    """Tokens at which reading weights and arithmetic take equally long. Not fitted: see `why`."""
    why: str
    rows: tuple[Row, ...]
    calibrated: tuple[tuple[int, int], ...]
    """(stages, chunk) of the rows with fixed chunks whose TTFT the hardware is fitted to."""

    def row(self, stages: int, chunk: int, *, dynamic: bool, prompt: int = PROMPT) -> Row:
        """Return one row. Raises KeyError."""
        for row in self.rows:
            if (row.stages, row.chunk, row.dynamic, row.prompt) == (stages, chunk, dynamic, prompt):
                return row
        raise KeyError((stages, chunk, dynamic, prompt))


QWEN = Published(
    name="Qwen3-235B-A22B-FP8",
    layout="TP4 a stage",
    smoothing=0.8,
    saturation=1000.0,
    why=(
        "an H20 does 296 TFLOP/s in FP8 and reads 4 TB/s, so a weight byte must serve 37 tokens; "
        "with 8 of 128 experts a token that is 590 tokens for the experts, and more where the "
        "router is uneven: taken as 1,000"
    ),
    rows=(
        Row(1, 6144, False, 2350, 56.0),
        Row(1, 8192, False, 2280, 57.8),
        Row(1, 12288, False, 2370, 55.6),
        Row(1, 18432, False, 2370, 55.5),
        Row(2, 6144, False, 4300, 31.1),
        Row(2, 8192, False, 4100, 32.4),
        Row(2, 12288, False, 4100, 32.7),
        Row(2, 18432, False, 3950, 35.0),
        Row(2, 18432, True, 4330, 31.4),
        Row(4, 6144, False, 7800, 17.8),
        Row(4, 8192, False, 7300, 19.4),
        Row(4, 12288, False, 6800, 20.5),
        Row(4, 18432, False, 6500, 24.0),
        Row(4, 18432, True, 8100, 17.7),
        Row(8, 6144, False, 13250, 11.0),
        Row(8, 8192, False, 11800, 12.8),
        Row(8, 12288, False, 11400, 14.4),
        Row(8, 18432, False, 11100, 18.5),
        Row(8, 18432, True, 14600, 10.54),
        Row(8, 18432, True, None, 32.68, 2 * PROMPT),
        Row(8, 18432, True, None, 114.33, 4 * PROMPT),
        Row(8, 18432, True, None, 420.91, 8 * PROMPT),
    ),
    calibrated=((1, 6144), (1, 18432), (8, 6144), (8, 12288), (8, 18432)),
)

DEEPSEEK = Published(
    name="DeepSeek-V3.1",
    layout="TP8 a stage",
    smoothing=0.65,
    saturation=1200.0,
    why=(
        "37 tokens a weight byte as above; with 8 of 256 experts a token that is 1,180 tokens: "
        "taken as 1,200"
    ),
    rows=(
        Row(1, 4096, False, 2450, 53.0),
        Row(1, 8192, False, 2600, 50.2),
        Row(1, 12288, False, 2650, 48.5),
        Row(2, 4096, False, 4650, 28.6),
        Row(2, 8192, False, 4650, 28.7),
        Row(2, 12288, False, 4700, 28.3),
        Row(2, 12288, True, 4750, 27.8),
        Row(4, 4096, False, 8550, 15.8),
        Row(4, 8192, False, 8050, 17.0),
        Row(4, 12288, False, 8000, 17.8),
        Row(4, 12288, True, 8800, 15.5),
    ),
    calibrated=((1, 4096), (1, 12288), (4, 4096), (4, 8192), (4, 12288)),
)
