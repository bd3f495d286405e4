"""Keys of the cache: 128 bits of each example's inputs, hashed where they are, and fingerprints of weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = [
    "ASKS_FOR_MORE",
    "IGNORED",
    "PAST",
    "Batch",
    "Unkeyed",
    "by_length",
    "can_be_cut",
    "fingerprint",
    "is_cache",
    "pasts_of",
    "read_batch",
    "take",
]

# Arguments that do not change what the prefix computes.
IGNORED = frozenset({"labels", "num_items_in_batch", "return_dict", "return_loss", "use_cache"})
ASKS_FOR_MORE = ("output_hidden_states", "output_attentions")  # of the outermost module: such a forward runs in full
PAST = frozenset({"past_key_values", "cache"})  # keys and values of generation, up to transformers 5.23 and since
ALONG_TOKENS = frozenset(
    ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox", "hidden_states")
)
CHUNK = 1 << 20  # words of a weight hashed at a time
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FACTOR, SECOND = -7046029254386353131, -4417276706812531889  # odd, from splitmix64
MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685))


class Unkeyed(Exception):
    """A call that cannot have keys; the text says why, and is empty where that is usual (generation)."""


@dataclass
class Batch:
    """The inputs of one call, and for each example its key and the number of its tokens without padding.

    Args:
        inputs: Arguments by name.
        size: Number of examples.
        keys: 16 bytes of content for each example.
        lengths: Tokens that count for each example; all of them where nothing is known of padding.
        tokens: Length of the padded batch, or 0 where the call has no mask of that form.
        salt: What else the activations depend on, as text.
    """

    inputs: dict[str, Any]
    size: int
    keys: list[bytes]
    lengths: list[int]
    tokens: int
    salt: str

    @property
    def padded(self) -> bool:
        """Whether an example is shorter than the batch, and its padding is not part of its key."""
        return bool(self.tokens) and min(self.lengths) < self.tokens


def read_batch(inputs: dict[str, Any], ragged: bool) -> Batch:
    """Compute the keys of a call.

    Args:
        inputs: Arguments of the forward by name.
        ragged: Whether an example padded on the right has the same key in batches of every length.

    Raises:
        Unkeyed: An argument is of a kind that has no content to hash.
    """
    tensors, plain = _sorted_out(inputs)
    # the first with most rows: a mask may be one for all examples
    main = max((tensor for tensor in tensors.values() if tensor.dim() > 1), key=len, default=None)
    if main is None:
        raise Unkeyed("no input is a batch of examples")
    if not len(main):
        raise Unkeyed("")
    size, device = main.shape[0], main.device
    mask = tensors.get("attention_mask")
    tokens = mask.shape[1] if mask is not None and mask.dim() == 2 and mask.shape[0] == size else 0
    cut = mask if ragged and tokens else None
    lengths = torch.full((size,), tokens, device=device) if cut is None else _lengths(cut)
    described = [*plain]
    parts = []
    for name, tensor in tensors.items():
        along = bool(tokens) and name in ALONG_TOKENS and tensor.dim() > 1 and tensor.shape[1] == tokens
        parts.append(_Part(tensor if tensor.dim() and tensor.shape[0] in (1, size) else tensor.reshape(1, -1), along))
        described.append(f"{name}:{tensor.dtype}:{tuple(tensor.shape[2 if along else 1 :])}")
    # hashed where they are: a copy of every input to the host would stall a GPU
    keys, counts = (_host_keys if device.type == "cpu" else _device_keys)(parts, lengths, 0 if cut is None else tokens)
    return Batch(inputs, size, keys, counts, tokens, " ".join(described))


class _Part(NamedTuple):
    """One input: a row for each example, or one for all."""

    rows: torch.Tensor
    along: bool  # whether its second dimension is the tokens, of which only the kept ones count


Keys = tuple[list[bytes], list[int]]


def _host_keys(parts: Sequence[_Part], lengths: torch.Tensor, tokens: int) -> Keys:
    counts = lengths.tolist()
    digests = [hashlib.blake2b(count.to_bytes(8, "little"), digest_size=16) for count in counts]
    for rows, along in parts:
        table = rows.detach().reshape(len(rows), -1).contiguous().view(torch.uint8).numpy()
        width = table.shape[1] // tokens if along and tokens else 0  # bytes of a token
        for index, (digest, count) in enumerate(zip(digests, counts, strict=True)):
            row = table[index if len(table) > 1 else 0]
            digest.update(row[: count * width] if width else row)
    return [digest.digest() for digest in digests], counts


def _device_keys(parts: Sequence[_Part], lengths: torch.Tensor, tokens: int) -> Keys:
    """Two words of 64 bits for each example, and one copy to the host for the whole batch."""
    kept = torch.arange(tokens, device=lengths.device) < lengths[:, None] if tokens else None
    state = _mix(torch.stack((lengths, lengths + FACTOR), dim=1))
    for rows, along in parts:
        state = _mix(state * FACTOR + _hash_rows(_words(rows), kept if along else None))
    table = torch.cat((state, lengths[:, None]), dim=1).cpu().numpy()
    return [row[:2].tobytes() for row in table], table[:, 2].tolist()


def take(batch: Batch, rows: list[int], tokens: int = 0) -> dict[str, Any]:
    """Return the arguments for some examples of a batch, in this order, cut to ``tokens`` where that is not 0."""
    taken = batch.inputs
    if rows != list(range(batch.size)):
        taken = {
            name: value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == (batch.size,) else value
            for name, value in taken.items()
        }
    if tokens:
        taken = {name: value[:, :tokens] if name in ALONG_TOKENS and _is_table(value) else value
                 for name, value in taken.items()}  # fmt: skip
    return taken


def can_be_cut(batch: Batch) -> bool:
    """Whether there is padding, and every argument is along the tokens, so that less of it can be had."""
    tables = {name: value for name, value in batch.inputs.items() if _is_table(value) and name not in IGNORED}
    along = (name in ALONG_TOKENS and value.shape[1] == batch.tokens for name, value in tables.items())
    return batch.padded and all(along)


def by_length(batch: Batch, rows: Sequence[int], part_cost: int, most: int) -> list[tuple[list[int], int]]:
    """Divide examples into parts of like length, each with the tokens that it is to be padded to.

    Together they cost least, where a part costs ``part_cost`` tokens besides those of its examples and their padding;
    then those of more than ``most`` examples are cut. A batch that cannot be cut stays in one part: (rows, 0).
    """
    if not can_be_cut(batch):
        return [(list(rows), 0)]
    ordered = sorted(rows, key=lambda row: batch.lengths[row])
    lengths = [batch.lengths[row] for row in ordered]
    best = {0: (0, 0)}  # for the first so many examples: the least that they cost, and where their last part begins
    for end, (length, following) in enumerate(zip(lengths, [*lengths[1:], 0], strict=True), 1):
        if length != following:
            best[end] = min((cost + (end - first) * length + part_cost, first) for first, (cost, _) in best.items())
    parts = []
    end = len(ordered)
    while end:
        first = best[end][1]
        for last in range(end, first, -most):
            parts.append((ordered[max(first, last - most) : last], lengths[last - 1]))
        end = first
    return parts[::-1]


def _is_table(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """Return 16 bytes of the names, types, shapes and values of some tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        if tensor.numel():
            words = _words(tensor.detach().reshape(1, -1))
            sums = torch.cat([_hash_rows(chunk) for chunk in torch.split(words, CHUNK, dim=1)])
            digest.update(sums.cpu().numpy().tobytes())
    return digest.digest()


def pasts_of(output: Any) -> list[Any]:
    """Return the keys and values among what a module returns."""
    return [output[name] for name in PAST & {*output}] if isinstance(output, Mapping) else []


def is_cache(past: Any) -> bool:
    """Whether something is a cache of keys and values of transformers, which goes from call to call by itself."""
    return hasattr(past, "get_seq_length")


def _sorted_out(inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    plain = []
    for name, value in sorted(inputs.items()):
        if value is None or name in IGNORED or (isinstance(value, (list, tuple)) and not any(map(_given, value))):
            continue
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                raise Unkeyed(f"a gradient flows into {name} (prompt tuning?), and so through the frozen blocks")
            if value.layout is not torch.strided or value.is_nested:
                raise Unkeyed(f"the argument {name} is a sparse or nested tensor")
            tensors[name] = value
        elif isinstance(value, (bool, int, float, str)):
            plain.append(f"{name}={value!r}")
        else:
            usual = name in PAST
            raise Unkeyed("" if usual else f"the argument {name} is a {type(value).__name__}")
    return tensors, plain


def _given(value: Any) -> bool:
    return value is not None


def _lengths(mask: torch.Tensor) -> torch.Tensor:
    """Tokens up to the padding on the right; a row padded otherwise is kept whole."""
    seen = mask != 0
    right = (seen[:, 1:] <= seen[:, :-1]).all(dim=1) & seen[:, 0]
    return torch.where(right, seen.sum(dim=1), mask.shape[1])


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each row as int64, two or more values to a word where that comes out even."""
    rows = tensor.reshape(tensor.shape[0], -1)
    if rows.dtype in (torch.int64, torch.bool, torch.uint8, torch.int32, torch.int16, torch.int8):
        return rows.to(torch.int64)
    rows = rows.contiguous()
    packed = 8 // rows.element_size()
    if rows.shape[1] % packed == 0 and rows.storage_offset() % packed == 0:
        return rows.view(torch.int64)
    return rows.view(WORDS[rows.element_size()]).to(torch.int64)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64; int64 products wrap around, on every device alike."""
    for shift, factor in MIXERS:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@functools.lru_cache(maxsize=32)
def _pads(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed random word and a fixed odd factor for each position."""
    places = torch.arange(count, device=device)
    return _mix(places * FACTOR + SECOND), _mix(places * SECOND + FACTOR) | 1


def _hash_rows(words: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Two sums of mixed words for each row; integer sums do not depend on the order of addition."""
    secret, factors = _pads(words.shape[1], words.device)
    mixed = _mix(words ^ secret)
    if kept is not None:
        repeats = words.shape[1] // kept.shape[1]
        mixed = mixed * (kept if repeats == 1 else kept.repeat_interleave(repeats, dim=1))
    return torch.stack((mixed.sum(dim=1), (mixed * factors).sum(dim=1)), dim=1)
