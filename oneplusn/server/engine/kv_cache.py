"""Hand out the blocks of the KV cache, and find again what they already hold. Knows no torch."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from hashlib import blake2b
from itertools import chain

from oneplusn.server.engine.sequence import Sequence

# Two different prefixes must never meet: at 128 bits they do not, in any lifetime of a server.
DIGEST_BYTES = 16


class BlockManager:
    """Owner of the KV blocks: who uses them, and what is in them.

    A full block whose keys and values are computed is *published* under a hash of everything
    that they depend on: salt, task, and all tokens up to the block's end, chained block by
    block. A new sequence starts on the published blocks that begin it; blocks of generated
    tokens are published like those of prompts. A block that no sequence uses keeps its content
    until it is needed for another, least recently used first.

    Lives on the engine's thread.

    Invariants (`check_integrity`):
        * Each block is in exactly one of: blank (free, no content), idle (free, published), used.
        * A block's reference count is the number of tables that name it.
        * Every published hash leads to one block, and that block knows the hash.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        """Start with all blocks blank.

        Args:
            num_blocks: Blocks of the cache.
            block_size: Tokens of a block.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(reversed(range(num_blocks)))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_refs = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}
        self._tables: dict[str, array[int]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence uses, with or without content."""
        return len(self._blank) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences use, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    def next_needed(self, seq: Sequence) -> bytes | None:
        """Return the hash of the first block that `seq` could start on if it were published."""
        found = len(self._find(seq))
        return seq.block_hashes[found] if found < self._num_reusable(seq) else None

    def expected(self, seq: Sequence) -> list[bytes]:
        """Return the hashes that `seq` will publish when its known tokens are computed."""
        full = seq.num_tokens // self.block_size
        self._hash(seq, full)
        return seq.block_hashes[seq.num_computed // self.block_size : full]

    def allocate(self, seq: Sequence, *, spare: int = 0) -> bool:
        """Take blocks for all tokens of `seq`, reusing those that hold its first ones.

        Sets `seq.block_table`, and `seq.num_computed` to the tokens found. At least one token is
        left to compute, as something must yield the logits.

        Args:
            seq: A sequence without blocks.
            spare: Blocks that must remain free.

        Returns:
            Whether there were enough; if not, nothing has changed.
        """
        assert not seq.block_table, f"{seq.id} has blocks already"
        found = self._find(seq)
        num_new = -(-seq.num_tokens // self.block_size) - len(found)
        num_revived = sum(self._num_refs[block] == 0 for block in found)
        if self.num_free - num_revived - num_new < spare:
            return False
        for block in found:
            self._idle.pop(block, None)
            self._num_refs[block] += 1
        seq.block_table.extend(found)
        for _ in range(num_new):
            seq.block_table.append(self._take())
        seq.num_computed = len(found) * self.block_size
        self._tables[seq.id] = seq.block_table
        return True

    def extend(self, seq: Sequence) -> bool:
        """Make room for all tokens of `seq`, which has blocks for all but the newest.

        Returns:
            Whether there is; if not, nothing has changed.
        """
        if seq.num_tokens <= len(seq.block_table) * self.block_size:
            return True
        if self.num_free == 0:
            return False
        seq.block_table.append(self._take())
        return True

    def advance(self, seq: Sequence, count: int) -> None:
        """Count `count` more tokens of `seq` as computed, and publish the blocks now full.

        Of two blocks with equal content the first stays the published one.
        """
        first = seq.num_computed // self.block_size
        seq.num_computed += count
        full = seq.num_computed // self.block_size
        if full == first:
            return
        self._hash(seq, full)
        for index in range(first, full):
            digest, block = seq.block_hashes[index], seq.block_table[index]
            if digest not in self._published:
                self._published[digest] = block
                self._hash_of[block] = digest

    def free(self, seq: Sequence) -> None:
        """Give the blocks of `seq` back; published ones keep their content for now."""
        # The end of a sequence is reused less than its beginning, so it is to go first.
        for block in reversed(seq.block_table):
            self._num_refs[block] -= 1
            if self._num_refs[block] > 0:
                continue
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._blank.append(block)
        seq.block_table = array("i")
        seq.num_computed = 0
        del self._tables[seq.id]

    def check_integrity(self) -> None:
        """Assert the invariants of this class."""
        num_refs = Counter(chain.from_iterable(self._tables.values()))
        assert self._num_refs == [num_refs[block] for block in range(self.num_blocks)]
        everywhere = [*self._blank, *self._idle, *num_refs]
        assert sorted(everywhere) == list(range(self.num_blocks))
        assert {digest: block for block, digest in self._hash_of.items()} == self._published
        assert len(self._hash_of) == len(self._published)
        assert self._idle.keys() <= self._hash_of.keys()
        assert self._hash_of.keys().isdisjoint(self._blank)

    def _find(self, seq: Sequence) -> list[int]:
        """Look up the published blocks that begin `seq`, but never all of its tokens."""
        most = self._num_reusable(seq)
        self._hash(seq, most)
        found = []
        for digest in seq.block_hashes[:most]:
            block = self._published.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _num_reusable(self, seq: Sequence) -> int:
        return (seq.num_tokens - 1) // self.block_size

    def _hash(self, seq: Sequence, num_blocks: int) -> None:
        """Make `seq.block_hashes` reach over its first `num_blocks` blocks of tokens."""
        hashes, size = seq.block_hashes, self.block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else _root(seq.salt, seq.task_key)
            tokens = array("q", seq.token_ids(index * size, (index + 1) * size))
            hashes.append(blake2b(parent + tokens.tobytes(), digest_size=DIGEST_BYTES).digest())

    def _take(self) -> int:
        """Take a free block, a blank one if there is, else the least recently used."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._published[self._hash_of.pop(block)]
        self._num_refs[block] = 1
        return block


def _root(salt: str, task_key: str) -> bytes:
    """Hash what all blocks of a sequence depend on besides its tokens."""
    # The length keeps a salt from running into the task key.
    return blake2b(f"{len(salt)}:{salt}{task_key}".encode(), digest_size=DIGEST_BYTES).digest()
