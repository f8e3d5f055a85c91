"""Which blocks hold which prefix. Holds no tensors, and no tokens but to verify hits: only digests.

The digest of a block covers its tokens, all tokens before it, the request's salt, whether long rotary factors made it, and
this engine's secret key: nobody can find (or forge) another tenant's prefix by choosing tokens. SHA-256 chain.
With `verify_hits`, all that it covers but the key follows it, so that a digest that is found is found by that too: prefixes
of one digest that differ are then a plain miss to each other.
"""

from collections.abc import Sequence
from hashlib import sha256
from struct import Struct

DIGEST_BYTES = 32


class PrefixIndex:
    """Digest of a full block <-> the block that stores it, at most one each way."""

    def __init__(self, block_tokens: int, key: bytes, *, verify_hits: bool = False) -> None:
        self._block_tokens = block_tokens
        self._key = key
        self._pack = Struct(f"<{block_tokens}i").pack
        self._verify_hits = verify_hits
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    def extend(
        self, digests: list[bytes], tokens: Sequence[int], salt: bytes, *, is_long: bool = False
    ) -> None:
        """Append the digests of the full blocks of `tokens` that `digests` does not cover yet."""
        size = self._block_tokens
        for end in range((len(digests) + 1) * size, len(tokens) + 1, size):
            parent = digests[-1] if digests else self._root(salt, is_long)
            block = self._pack(*tokens[end - size : end])
            covered = parent[DIGEST_BYTES:] + block if self._verify_hits else b""
            digests.append(sha256(self._key + parent + block).digest() + covered)

    def _root(self, salt: bytes, is_long: bool) -> bytes:
        # One byte, always, and before the salt: no salt of a tenant's reads as another's with the flag.
        covered = bytes([is_long]) + salt
        digest = sha256(self._key + covered).digest()
        return digest + len(salt).to_bytes(8) + covered if self._verify_hits else digest

    def find(self, digest: bytes) -> int | None:
        """The block that stores this prefix, or None."""
        return self._block_of.get(digest)

    def insert(self, digest: bytes, block: int) -> None:
        """A block is computed. Where another stores the same already, that one stays and this one is private."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, block: int) -> None:
        """The block is about to hold something else."""
        del self._block_of[self._digest_of.pop(block)]
