"""Keeps track, on the host, of which pages of the cache belong to which sequence.

    manager = BlockManager(num_blocks=1000, page_block_size=64)
    reused = manager.allocate("a", prompt)  # `reused` tokens are in the cache already
    ...  # the device writes the others into manager.pages("a")
    manager.publish("a", prompt, len(prompt))  # its full pages may be shared from now on
    manager.grow("a", len(prompt) + 1)  # one more page, if the next token starts one
    manager.free("a")

Sequences that begin with the same tokens share pages. A page is found by a hash of all tokens from
the start of the sequence to the end of the page, because its cache entries depend on all of them.
Only full, written pages are shared. They are never written again, so nothing has to be copied. A
page that no sequence holds can still be found until it is handed out again. The least recently used
page is handed out first, so a sequence that lost its pages and comes back may find some of them.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Hashable, Sequence

import numpy as np


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than a call needs. The call has changed nothing."""


@dataclasses.dataclass
class _Held:
    """The pages of one sequence."""

    pages: list[int]
    digests: list[bytes]  # of the pages that are published, from the first on


class BlockManager:
    """Hands out the pages 0 .. num_blocks - 1, each of page_block_size tokens.

    Args:
      num_blocks: pages of the pool. If one buffer holds the pages of all layers: of one layer.
      page_block_size: tokens of a page.
    """

    def __init__(self, num_blocks: int, page_block_size: int):
        for name, value in (("num_blocks", num_blocks), ("page_block_size", page_block_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_blocks = num_blocks
        self.page_block_size = page_block_size
        self._held: dict[Hashable, _Held] = {}
        self._references = [0] * num_blocks  # how many sequences hold a page
        # In the order in which they are handed out: first pages without content, then the others,
        # the least recently used first.
        self._free = collections.OrderedDict.fromkeys(range(num_blocks))
        self._page_of: dict[bytes, int] = {}  # published content -> page, and back
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def pages(self, sequence: Hashable) -> list[int]:
        """The pages of a sequence, in order: its row of the block table."""
        return list(self._find(sequence).pages)

    def pages_for(self, length: int) -> int:
        """How many pages `length` tokens need."""
        return -(-length // self.page_block_size)

    def allocate(self, sequence: Hashable, tokens: Sequence[int], reserve: int = 0) -> int:
        """Gives a new sequence the pages for its tokens.

        Args:
          sequence: the name of the sequence. It must hold no pages.
          tokens: all of its tokens so far, at least one.
          reserve: number of pages that must stay free.

        Returns:
          How many of the first tokens are in the cache already, in pages that other sequences
          wrote. At least one token is left to compute, because its logits are needed.

        Raises:
          OutOfPages: fewer pages than needed are free.
          ValueError: the sequence holds pages, or has no token.
        """
        if sequence in self._held:
            raise ValueError(f"sequence {sequence!r} holds pages already: grow it, or free it")
        if not len(tokens):
            raise ValueError(f"tokens of sequence {sequence!r} must not be empty")
        digests = self._published_prefix(tokens)
        shared = [self._page_of[digest] for digest in digests]
        fresh = self.pages_for(len(tokens)) - len(shared)
        revived = sum(self._references[page] == 0 for page in shared)
        self._require(fresh + revived, reserve)
        for page in shared:  # before _hand_out, which must not take them
            self._references[page] += 1
            self._free.pop(page, None)
        self._held[sequence] = _Held(shared + [self._hand_out() for _ in range(fresh)], digests)
        return len(shared) * self.page_block_size

    def grow(self, sequence: Hashable, length: int) -> list[int]:
        """Gives a sequence the pages that it lacks for `length` tokens. Returns these pages.

        Raises:
          OutOfPages: fewer pages than needed are free.
          ValueError: the sequence holds no pages.
        """
        held = self._find(sequence)
        missing = max(self.pages_for(length) - len(held.pages), 0)
        self._require(missing)
        new = [self._hand_out() for _ in range(missing)]
        held.pages += new
        return new

    def publish(self, sequence: Hashable, tokens: Sequence[int], length: int) -> None:
        """Lets other sequences share the full pages of the first `length` tokens.

        Call it after these tokens are written, or after the program that writes them was enqueued
        and before any program that reads them is. They must not be written again.

        Args:
          sequence: its name.
          tokens: its tokens from the first on, at least `length`. Tokens of pages that are
            published already are not read.
          length: number of tokens that are written.

        Raises:
          ValueError: the sequence holds no pages, or `length` is larger than its pages hold or than
            the number of tokens.
        """
        held, page = self._find(sequence), self.page_block_size
        if length > min(len(tokens), len(held.pages) * page):
            raise ValueError(
                f"length must be at most the {len(tokens)} tokens given and the "
                f"{len(held.pages) * page} that the pages of sequence {sequence!r} hold, "
                f"got {length}"
            )
        for index in range(len(held.digests), length // page):
            digest = self._digest(held.digests, tokens, index)
            held.digests.append(digest)
            # If two sequences computed the same page, the one that was published first is found.
            if digest not in self._page_of:
                self._page_of[digest] = held.pages[index]
                self._digest_of[held.pages[index]] = digest

    def free(self, sequence: Hashable) -> None:
        """Takes a sequence's pages back, except those that other sequences hold too.

        Raises:
          ValueError: the sequence holds no pages.
        """
        held = self._find(sequence)
        del self._held[sequence]
        for page in reversed(held.pages):  # the first page last: it is shared most often
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._digest_of)

    def check(self) -> None:
        """Checks that the records are consistent.

        Raises:
          RuntimeError: they are not; the message says where.
        """
        counted = collections.Counter(page for held in self._held.values() for page in held.pages)
        for page, references in enumerate(self._references):
            if references != counted[page]:
                raise RuntimeError(f"page {page}: {references} references, {counted[page]} holders")
            if (page in self._free) != (references == 0):
                raise RuntimeError(f"page {page}: free and held, or neither")
            if references > 1 and page not in self._digest_of:
                raise RuntimeError(f"page {page}: shared without being published")
        if len(self._free) + len(counted) != self.num_blocks:
            raise RuntimeError(
                f"{len(self._free)} free + {len(counted)} held: not {self.num_blocks}"
            )
        if self._digest_of != {page: digest for digest, page in self._page_of.items()}:
            raise RuntimeError("published pages and their contents do not match")
        for name, held in self._held.items():
            if len(set(held.pages)) < len(held.pages):
                raise RuntimeError(f"sequence {name!r} holds a page twice: {held.pages}")

    def _find(self, sequence: Hashable) -> _Held:
        if sequence not in self._held:
            raise ValueError(f"sequence {sequence!r} holds no pages: allocate it first")
        return self._held[sequence]

    def _require(self, pages: int, reserve: int = 0) -> None:
        if pages and pages + reserve > self.num_free:
            kept = f", with {reserve} to stay free" if reserve else ""
            raise OutOfPages(f"{pages} pages are needed{kept}, {self.num_free} are free")

    def _hand_out(self) -> int:
        page, _ = self._free.popitem(last=False)
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
        self._references[page] = 1
        return page

    def _published_prefix(self, tokens: Sequence[int]) -> list[bytes]:
        """The digests of the published pages that tokens[:-1] begins with."""
        digests: list[bytes] = []
        for index in range((len(tokens) - 1) // self.page_block_size):
            digest = self._digest(digests, tokens, index)
            if digest not in self._page_of:
                break
            digests.append(digest)
        return digests

    def _digest(self, before: list[bytes], tokens: Sequence[int], index: int) -> bytes:
        """The digest of page `index`: a hash of the previous page's digest and its own tokens."""
        page = tokens[index * self.page_block_size : (index + 1) * self.page_block_size]
        parent = before[index - 1] if index else b""
        return hashlib.sha256(parent + np.asarray(page, np.int64).tobytes()).digest()
