"""Which attention is timed: models by their heads, batches by their lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"


@dataclass(frozen=True)
class AttentionShape:
    """A batch of sequences that all bring as many query tokens, or of decodes beside such."""

    name: str
    seq_lens: tuple[int, ...]  # cached tokens of each sequence, including its queries
    query_len: int = 1  # 1 is a decode
    num_decodes: int = 0  # sequences at the head that decode beside prefills

    @property
    def kernel(self) -> str:
        kind = "mixed" if self.num_decodes else "decode" if self.query_len == 1 else "prefill"
        return f"paged_attention {kind}"

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        rest = len(self.seq_lens) - self.num_decodes
        return (1,) * self.num_decodes + (self.query_len,) * rest

    @property
    def is_even(self) -> bool:
        return len(set(self.seq_lens)) == 1

    @property
    def query_tokens(self) -> int:
        return sum(self.query_lens)

    def kv_bytes(self, heads: Heads, itemsize: int) -> int:
        """Keys and values, each read once."""
        return 2 * sum(self.seq_lens) * heads.num_kv_heads * heads.head_dim * itemsize

    def decode_bytes(self, heads: Heads, itemsize: int) -> int:
        """Those of decodes, which are bound by them."""
        tokens = (
            sum(self.seq_lens) if self.query_len == 1 else sum(self.seq_lens[: self.num_decodes])
        )
        return 2 * tokens * heads.num_kv_heads * heads.head_dim * itemsize

    def flops(self, heads: Heads) -> int:
        """Both matrix products over what the causal mask leaves."""
        lengths = zip(self.query_lens, self.seq_lens, strict=True)
        seen = sum(queries * (2 * length - queries + 1) // 2 for queries, length in lengths)
        return 4 * heads.num_heads * heads.head_dim * seen

    def prefill_flops(self, heads: Heads) -> int:
        """Those of prefills, which are bound by them."""
        if self.query_len == 1:
            return 0
        return replace(self, seq_lens=self.seq_lens[self.num_decodes :], num_decodes=0).flops(heads)


def decode(batch: int, context: int) -> AttentionShape:
    return AttentionShape(f"{batch} x {context}", (context,) * batch)


def prefill(batch: int, length: int, prefix: int = 0) -> AttentionShape:
    name = f"{batch} x {length}" + (f" on {prefix}" if prefix else "")
    return AttentionShape(name, (prefix + length,) * batch, length)


def mixed(decodes: AttentionShape, prefills: AttentionShape) -> list[AttentionShape]:
    """Both in one batch, and each alone."""
    both = AttentionShape(
        f"{prefills.name} beside {decodes.name}",
        decodes.seq_lens + prefills.seq_lens,
        prefills.query_len,
        len(decodes.seq_lens),
    )
    return [both, prefills, decodes]


def skewed(long: int, batch: int, short: int) -> list[AttentionShape]:
    """One long context beside `batch` short ones, and as many sequences of one length that hold the
    same bytes.
    """
    lengths = (long, *(short,) * batch)
    even, rest = divmod(sum(lengths), len(lengths))
    assert rest == 0, "the tokens cannot be shared out evenly"
    return [AttentionShape(f"{long} + {batch} x {short}", lengths), decode(len(lengths), even)]


MODELS = {
    "llama-8b": Heads(32, 8, 128),
    "qwen3-0.6b": Heads(16, 8, 128),
    "64-heads": Heads(64, 8, 128),
    "smollm2": Heads(9, 3, 64),
}

DECODES = [
    decode(batch, context)
    for context in (1024, 8192, 32768)
    for batch in (1, 8, 64, 256)
    if (batch, context) != (256, 32768)  # 34 GB of KV cache, and as much again for dense peers
] + skewed(long=100 * 1024, batch=255, short=1024)
PREFILLS = [
    prefill(16, 1024),
    prefill(4, 4096),
    prefill(1, 8192),
    prefill(1, 32768),
    prefill(1, 2048, prefix=30 * 1024),
]
MIXES = [
    *mixed(decode(64, 1024), prefill(1, 512, prefix=1536)),
    *mixed(decode(128, 2048), prefill(1, 512, prefix=8192)),
    *mixed(decode(32, 4096), prefill(2, 1024)),
]
CPU_DECODES = [decode(1, 512), decode(16, 512), decode(1, 4096)]
CPU_PREFILLS = [prefill(1, 512), prefill(4, 256)]
CPU_MIXES = mixed(decode(8, 512), prefill(1, 128))
